"""The laptop-scale world: draws clips, describes them in words, and writes them as AIST files.

Concept   a `Clip` fixes everything; picture (toy_draw.py), pose (toy_dance.py), sound (toy_music.py), captions and true
          beats follow from it.
Paper     arXiv 2503.14505v2: stands in for AIST and the in-the-wild clips of Sec. 5.1, with the prompts of Table 8.
Differs   small pictures of capsule figures; beats, poses, clothes and places are known exactly: claims are measured.
          Some subjects are held back from the data sets, so that what was never adapted to can be asked for.

Dimension key   F frames   H W picture   S audio samples
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

import config
import media
from data_names import AIST_BASE, CAMERAS, FEMALE, GENRES, WILD_BASE, AistName
from toy_dance import FIGURES, JOINTS, Clip, joints
from toy_draw import SCENES, SETTINGS, WHITE_STUDIO, project, render, visible_colours
from toy_music import TRACKS, beats_in, play, track

VIEW_CHANCES = (0.0, 0.52, 0.04, 0.03, 0.03, 0.03, 0.03, 0.03, 0.04, 0.05, 0.20)  # of cameras 0 (none), 1, ... 10
HELD_BACK = {  # shirt -> trousers: each colour once above and once below, so that only the pair is new
    "red": "green", "green": "purple", "purple": "orange", "orange": "blue", "blue": "yellow", "yellow": "pink",
    "pink": "black", "black": "red",
}  # fmt: skip


def sample_clip(rng: np.random.Generator, wild: bool = False, track_name: str | None = None) -> Clip:
    """Draw a clip: AIST-like (white studio, all views) or in the wild (other studios and places, at times a rabbit).

    Tempo is uniform in 80 ... 135 whatever the genre, unless `track_name` (such as mBR0) sets genre, tempo and music.
    Clothes stand out from the backdrop; shirt and trousers differ.
    """
    if track_name:
        genre, bpm, music_seed = track(track_name)
    else:
        bpm, music_seed, genre = rng.uniform(80, 135), rng.integers(1000, 10**6), str(rng.choice(list(GENRES)))
    situation = str(rng.choice(["BM", "FM", "GR"], p=[0.48, 0.46, 0.06] if wild else [0.45, 0.45, 0.1]))
    count = int(rng.integers(2, 4)) if situation == "GR" else 1
    chances = [0.45, 0.45, 0.1] if wild else [0.5, 0.5, 0.0]
    figures = tuple(str(f) for f in rng.choice(FIGURES, size=count, p=chances))
    camera = rng.choice([1, 10, 2, 8], p=[0.6, 0.24, 0.08, 0.08]) if wild else rng.choice(11, p=VIEW_CHANCES)
    places = SCENES if rng.random() < 0.65 else SETTINGS[: -len(SCENES)]
    setting = str(rng.choice(places)) if wild else WHITE_STUDIO
    shirt, trousers = rng.choice(visible_colours(setting), 2, replace=False)
    return Clip(
        genre, float(bpm), situation, figures, int(camera), str(shirt), str(trousers), setting,
        int(music_seed), int(rng.integers(10**6)), float(rng.uniform(0, 40)), wild,
    )  # fmt: skip


def held_back(clip: Clip) -> bool:
    """Is this a subject that the adapter must never see? It is in no data set that `dataset` draws, yet in the world of
    the prior: a rabbit, or a shirt and trousers of a pair in HELD_BACK. What the adapter does with it can be measured.
    """
    return "rabbit" in clip.figures or HELD_BACK.get(clip.shirt) == clip.trousers


def music(clip: Clip, start_s: float = 0.0, dur_s: float = 2.6, sr_hz: int = 16000) -> np.ndarray:
    """The clip's sound from `start_s` seconds into the clip on -> float32 (S,) in [-1, 1], S = round(dur_s * sr_hz)."""
    return play(clip.genre, clip.bpm, clip.music_seed, clip.start_s + start_s, dur_s, sr_hz)


def beat_times(clip: Clip, dur_s: float) -> np.ndarray:
    """Seconds into the clip of its beats within [0, dur_s): k * 60 / bpm - start. Dancers are lowest exactly then."""
    return beats_in(clip.bpm, clip.start_s, dur_s)


def true_heights(clip: Clip, num_frames: int = 73, size: int = 64, fps: float = 30) -> dict[str, np.ndarray]:
    """True heights of head and pelvis, mean over dancers, in pixels upwards from the picture's bottom: name -> (F,)."""
    times_s = np.arange(num_frames) / fps
    points, _ = project(clip, joints(clip, times_s), times_s, size)  # (F, M, J, 3)
    return {name: size - 0.5 - points[:, :, JOINTS.index(name), 1].mean(1) for name in ("head", "pelvis")}


# ---------------------------------------------------------------------------------------------------------- captions


def aist_prompt(clip: Clip, rng: np.random.Generator) -> str:
    """One of the paper's four templates for AIST (Table 8)."""
    dancers = tuple(min(FEMALE) if figure == "female dancer" else 4 for figure in clip.figures)
    prompts = AistName(clip.situation, clip.camera, clip.genre, dancers).prompts()
    return prompts[rng.integers(len(prompts))]


def wild_caption(clip: Clip, rng: np.random.Generator) -> str:
    """A detailed caption, in one of several wordings: who, clothes, genre, place and view. Never the tempo."""
    professional = "professional " if clip.setting == WHITE_STUDIO else ""
    who = _listed([f"a {professional}{figure}" for figure in clip.figures])
    view, genre = CAMERAS[clip.camera], GENRES[clip.genre]
    dressed = f"{who} wearing {clothes(clip)}"
    return (
        f"{dressed} dancing {genre} {clip.setting}, captured from a {view}",
        f"{dressed} dancing {clip.setting}, captured from a {view}",
        f"a {view} video of {dressed} performing {genre} {clip.setting}",
        f"{who} dancing {clip.setting}, captured from a {view}",
    )[rng.choice(4, p=[0.45, 0.3, 0.15, 0.1])]


def prior_caption(clip: Clip, rng: np.random.Generator) -> str:
    """A caption for pre-training: mostly detailed, at times a template of Table 8 (white studio) or a base prompt."""
    draw = rng.random()
    if draw < 0.06:
        return base_prompt(clip)
    if draw < 0.35 and clip.setting == WHITE_STUDIO and "rabbit" not in clip.figures:
        return aist_prompt(clip, rng)
    return wild_caption(clip, rng)


def base_prompt(clip: Clip) -> str:
    """The paper's short prompts: one for AIST, one for the wild."""
    return WILD_BASE if clip.wild else AIST_BASE


def clothes(clip: Clip) -> str:
    """Such as "an orange shirt and blue trousers"; for several dancers "orange shirts and blue trousers"."""
    article = "an" if clip.shirt[0] in "aeiou" else "a"
    shirts = f"{article} {clip.shirt} shirt" if len(clip.figures) == 1 else f"{clip.shirt} shirts"
    return f"{shirts} and {clip.trousers} trousers"


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


# ----------------------------------------------------------------------------------------------------------- command


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Write a synthetic dance data set: AIST-named mp4 files with sound, or with --wild captioned clips in the wild.

    Beside them truth.json holds what is true of each: clip, beats, heights of head and pelvis."""

    out: Path = config.flag(help="new folder to write, such as aist/")
    clips: int = config.flag(120, help="how many clips")
    seed: int = config.flag(0, help="the same seed gives the same clips")
    seconds: float = config.flag(4.0, help="length of a clip")
    wild: bool = config.flag(
        False, help="the in-the-wild half: other places and music, a .txt caption beside each clip"
    )
    size: int = config.flag(96, help="height and width in pixels, even")

    def __post_init__(self):
        if self.clips < 1 or self.seconds < 1 or self.size < 32 or self.size % 2 or self.seed < 0:
            raise config.UserError("expected clips >= 1, seconds >= 1, seed >= 0 and an even size >= 32")


def dataset(cfg: ToyConfig) -> Iterator[tuple[str, Clip, np.random.Generator]]:
    """(file name, clip, its random numbers) for each clip; AIST clips go through the 60 tracks evenly.

    A clip of a held-back subject is drawn again, to the same track.
    """
    taken: dict[str, int] = {}
    for index in range(cfg.clips):
        rng = np.random.default_rng([cfg.seed, int(cfg.wild), index])
        if cfg.wild:
            yield f"wild_{index:06d}.mp4", _drawn(rng, wild=True), rng
            continue
        music_name = TRACKS[index * 7 % len(TRACKS)]  # 7 and 60 share no factor: all tracks, genres mixed
        clip = _drawn(rng, track_name=music_name)
        numbers = {"female dancer": FEMALE, "male dancer": [d for d in range(1, 36) if d not in FEMALE]}
        dancers = "_".join(f"d{rng.choice(sorted(numbers[figure])):02d}" for figure in clip.figures)
        stem = f"g{clip.genre}_s{clip.situation}_c{clip.camera:02d}_{dancers}_{music_name}"
        taken[stem] = taken.get(stem, 0) + 1
        yield f"{stem}_ch{taken[stem]:02d}.mp4", clip, rng


def _drawn(rng: np.random.Generator, wild: bool = False, track_name: str | None = None) -> Clip:
    while held_back(clip := sample_clip(rng, wild, track_name)):
        pass
    return clip


def main():
    cfg = config.from_cli(ToyConfig)
    if cfg.out.exists() and (not cfg.out.is_dir() or any(cfg.out.iterdir())):
        raise config.UserError(f"{cfg.out} exists and is not an empty folder: give --out a new name, or remove it")
    partial = cfg.out.absolute().with_name(f".{cfg.out.absolute().name}.partial")  # renamed when all is there
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        truth = {}
        with multiprocessing.get_context("spawn").Pool() as processes:
            written = processes.imap(functools.partial(write, partial, cfg), enumerate(dataset(cfg)), chunksize=4)
            for name, true in tqdm(written, total=cfg.clips, unit="clip", dynamic_ncols=True):
                truth[name] = true
        (partial / "truth.json").write_text(json.dumps(truth), encoding="utf-8")
        os.replace(partial, cfg.out)
    except OSError as error:
        raise config.UserError(f"{cfg.out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{cfg.clips} clips and truth.json -> {cfg.out}")


def write(folder: Path, cfg: ToyConfig, item: tuple[int, tuple[str, Clip, np.random.Generator]]) -> tuple[str, dict]:
    """Write one clip with its music (44.1 kHz mono or 48 kHz stereo) -> its name and what is true of it."""
    index, (name, clip, rng) = item
    stereo = index % 2 == 1
    num_frames, sr_hz = round(30 * cfg.seconds), 48000 if stereo else 44100
    sound = music(clip, 0.0, num_frames / 30, sr_hz)
    if stereo:
        sound = np.stack([sound, 0.8 * sound], axis=1)  # (S, 2)
    media.write_mp4(folder / name, render(clip, num_frames, cfg.size), 30, sound, sr_hz)
    if clip.wild:
        (folder / name).with_suffix(".txt").write_text(wild_caption(clip, rng) + "\n", encoding="utf-8")
    heights = true_heights(clip, num_frames, cfg.size)
    return name, {
        "clip": dataclasses.asdict(clip),
        "fps": 30,
        "beats_s": beat_times(clip, num_frames / 30).round(6).tolist(),
        **{f"{name}_px": height.round(4).tolist() for name, height in heights.items()},
    }


if __name__ == "__main__":
    config.run(main)
