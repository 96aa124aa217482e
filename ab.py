"""The human study: which of two videos looks better, fits the music better, moves more naturally, dances more.

Concept   one HTML file holds everything: pairs of videos with their sound, the same track and prompt, in random order
          and on random sides; no server, no network. Answers stay in the browser until they are saved as a file; the
          files of all participants are tallied with the key, which stays with whoever ran the study.
Paper     arXiv 2503.14505v2, Sec. 5.2 "Human Evaluation", App. C (anonymised A/B test, four questions, 33 people).
Differs   every video is encoded anew in the same way, so that neither name, metadata nor codec tells the two apart.

Interval  95 %, the wider of two: Wilson's, which takes votes as independent, and a bootstrap that draws people and
          pairs anew at once (Owen 2007), as one person's votes, or those on one pair, are not.
"""

import base64
import json
import random
import re
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import media
from config import UserError, flag, from_cli, words
from questions import find_clips
from tables import PUBLISHED

ASKED = {  # App. C, word for word
    "visual_quality": "Which video has higher visual quality?",
    "music_alignment": "Which video's dance aligns better with the music?",
    "realism": "Which video's motion is more realistic?",
    "complexity": "Which video's dance is more complex?",
}
PAGE = Path(__file__).with_name("ab.html")
SOUND_HZ = 48_000


@dataclass(frozen=True)
class AbConfig:
    """Make the page of a human A/B study from two folders of videos. ab --tally FILE... counts the answers."""

    a: Path = flag(help="folder of the first configuration")
    b: Path = flag(help="folder of the second; pairs are videos of the same name")
    out: Path = flag(Path("out/ab/study.html"), help="page to write; its key goes beside it, to be kept back")
    pairs: int = flag(10, help="pairs shown to each participant, spread evenly over the tracks")
    seed: int = flag(0, help="of the choice of pairs")

    def __post_init__(self):
        if self.pairs < 1:
            raise UserError(f"--pairs {self.pairs}: expected at least 1")
        if self.out.suffix != ".html":
            raise UserError(f"--out {self.out}: expected a name that ends in .html")


@dataclass(frozen=True)
class TallyConfig:
    """The answers that participants saved -> preference rates with intervals, and how far people agree."""

    files: tuple[str, ...] = words(help="the files that participants saved")
    key: Path = flag(Path("out/ab/study.key.json"), help="key written beside the page")
    json: Path | None = flag(None, help="also write the figures there")


def choose(names: list[str], count: int, seed: int) -> list[str]:
    """`count` of the names in random order, taken from every track in turn (the part before _p is the track)."""
    rng, tracks = random.Random(seed), {}
    for name in sorted(names):
        tracks.setdefault(name.split("_p")[0], []).append(name)
    queues = list(tracks.values())
    rng.shuffle(queues)
    for queue in queues:
        rng.shuffle(queue)
    deepest = max(map(len, queues), default=0)
    chosen = [queue[i] for i in range(deepest) for queue in queues if i < len(queue)][:count]
    rng.shuffle(chosen)
    return chosen


def anonymous(path: Path) -> str:
    """A video, encoded anew at 30 frames a second with mono sound at 48 kHz -> data URI of an mp4."""
    sound = media.read_audio(path, SOUND_HZ)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "video.mp4"
        media.write_mp4(copy, media.video_frames(path), 30, sound, SOUND_HZ)
        return "data:video/mp4;base64," + base64.b64encode(copy.read_bytes()).decode()


def build(cfg: AbConfig) -> tuple[str, dict]:
    """The page, and its key: study, names of the folders, and for each pair which configuration each video is of.

    Names of pairs, sides and order come from the system's random numbers: `seed` or the page tell nothing of them.
    """
    videos = [{clip.name: clip.path for clip in find_clips(folder) if clip.path.exists()} for folder in (cfg.a, cfg.b)]
    shared = [name for name in videos[0] if name in videos[1]]
    if not shared:
        raise UserError(f"{cfg.a} and {cfg.b} have no video of the same name; make both by evaluate.py generate")
    study, shown, key = secrets.token_hex(8), [], {}
    for name in choose(shared, cfg.pairs, cfg.seed):
        pair, sides = secrets.token_hex(6), secrets.SystemRandom().sample("ab", 2)
        shown.append({"id": pair, "videos": [anonymous(videos["ab".index(side)][name]) for side in sides]})
        key[pair] = {"name": name, "videos": sides}
    secrets.SystemRandom().shuffle(shown)
    data = json.dumps({"study": study, "questions": ASKED, "pairs": shown})
    page = PAGE.read_text(encoding="utf-8").replace("__STUDY__", data.replace("<", "\\u003c"))
    return page, {"study": study, "a": cfg.a.absolute().name, "b": cfg.b.absolute().name, "pairs": key}


def main() -> None:
    cfg = from_cli(AbConfig)
    page, key = build(cfg)
    for path, text in ((cfg.out, page), (cfg.out.with_suffix(".key.json"), json.dumps(key, indent=1))):
        with media.new_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"wrote      {cfg.out} ({len(page) / 2**20:.1f} MiB, {len(key['pairs'])} pairs): open it in any browser")
    print(f"wrote      {cfg.out.with_suffix('.key.json')}: keep it back, it tells which video is which")


# ------------------------------------------------------------------------------------------------------ the tally


def read_votes(path: Path, key: dict) -> tuple[str, dict]:
    """A participant's file -> (participant, {(pair, question): 1 if b was preferred, else 0}). UserError if unfit."""
    try:
        saved, votes = json.loads(path.read_text(encoding="utf-8")), {}
        study, person = str(saved["study"]), str(saved["participant"])
        if study != key["study"]:
            raise UserError(f"{path}: belongs to study {study[:40]}, the key to {key['study']}")
        for answer in saved["answers"]:
            pair, question, choice = answer["pair"], answer["question"], answer["choice"]
            if question not in ASKED or choice not in (0, 1):
                raise ValueError(f"question {question!r}, choice {choice!r}")
            votes[pair, question] = int(key["pairs"][pair]["videos"][choice] == "b")
    except OSError as error:
        raise UserError(f"{path}: cannot be read; expected a file saved by the page") from error
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not the answers of this study ({error})") from error
    if not re.fullmatch(r"[0-9a-f]{1,64}", person):
        raise UserError(f"{path}: {person[:40]!r} is no participant's number")
    return person, votes


def read_key(path: Path) -> dict:
    """The key that `main` wrote beside the page, checked."""
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        if {key["study"], key["a"], key["b"]} and all(sorted(p["videos"]) == ["a", "b"] for p in key["pairs"].values()):
            return key
        raise ValueError("pairs without an a and a b")
    except OSError as error:
        raise UserError(f"{path}: no such key; give --key the file written beside the page") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the key of a study ({error})") from error


def wilson(wins: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n independent votes."""
    middle, half = wins + z * z / 2, z * np.sqrt(wins * (n - wins) / n + z * z / 4)
    return float((middle - half) / (n + z * z)), float((middle + half) / (n + z * z))


def preference(votes: np.ndarray, draws: int = 2000, seed: int = 0) -> dict:
    """Votes (people, pairs) of 0, 1 or nan -> share of 1, its interval, number of votes."""
    voted = ~np.isnan(votes)
    n, wins = int(voted.sum()), float(np.nansum(votes))
    if n == 0:
        return {"votes": 0}
    rng, (people, pairs) = np.random.default_rng(seed), votes.shape
    w_people = rng.multinomial(people, np.full(people, 1 / people), draws)  # (draws, people): how often each is drawn
    w_pairs = rng.multinomial(pairs, np.full(pairs, 1 / pairs), draws)
    counted = np.einsum("di,ij,dj->d", w_people, voted.astype(float), w_pairs)
    won = np.einsum("di,ij,dj->d", w_people, np.nan_to_num(votes), w_pairs)
    drawn = np.quantile(won[counted > 0] / counted[counted > 0], [0.025, 0.975])
    low, high = wilson(int(wins), n)
    return {"votes": n, "rate": wins / n, "interval": [min(low, float(drawn[0])), max(high, float(drawn[1]))]}


def fleiss_kappa(counts: np.ndarray) -> float:
    """Agreement of many raters beyond chance (Fleiss 1971): counts (items, categories) of votes -> kappa.

    1 is full agreement, 0 chance. Items may have different numbers of votes; those with one vote say nothing of
    agreement and count for the categories' shares only. nan without two votes on any item, or if all votes are alike.
    """
    counts = np.asarray(counts, np.float64)
    n = counts.sum(axis=1)  # (items,)
    chance = float(((counts.sum(axis=0) / max(n.sum(), 1)) ** 2).sum())
    several = n > 1
    if not several.any() or chance >= 1:
        return float("nan")
    agreed = ((counts[several] ** 2).sum(axis=1) - n[several]) / (n[several] * (n[several] - 1))
    return float((agreed.mean() - chance) / (1 - chance))


def tally() -> None:
    """Read the key and every participant's file; print and write the preference rates."""
    cfg = from_cli(TallyConfig)
    if not cfg.files:
        raise UserError("ab --tally: expected the files that participants saved")
    key, people = read_key(cfg.key), {}
    for path in map(Path, cfg.files):
        person, votes = read_votes(path, key)
        if person in people and people[person] != votes:
            raise UserError(f"{path}: a second, different file of participant {person}; keep the later one only")
        people[person] = votes
    print(f"{len(people)} people, {len(key['pairs'])} pairs: how many prefer {key['b']} to {key['a']}")
    result = {}
    for question, text in ASKED.items():
        rows = [[votes.get((pair, question), np.nan) for pair in key["pairs"]] for votes in people.values()]
        votes = np.array(rows, np.float64)  # (people, pairs)
        ones, voted = np.nansum(votes, axis=0), (~np.isnan(votes)).sum(axis=0)
        kappa = fleiss_kappa(np.stack([voted - ones, ones], axis=1))
        found = preference(votes) | {"fleiss_kappa": None if np.isnan(kappa) else kappa}
        result[question] = found
        if found["votes"]:
            low, high = found["interval"]
            agreement = "not defined" if np.isnan(kappa) else f"{kappa:.2f}"
            print(f"{text:<50} {found['rate']:6.1%} [{low:.1%}, {high:.1%}], {found['votes']} votes,", end=" ")
            print(f"Fleiss' kappa {agreement} (paper, against MM-Diffusion: {PUBLISHED['people'][question]} %)")
        else:
            print(f"{text:<50} no votes")
    if cfg.json:
        data = {"a": key["a"], "b": key["b"], "people": len(people), "prefer_b": result}
        with media.new_file(cfg.json) as temporary:
            temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
        print(f"wrote      {cfg.json}")
