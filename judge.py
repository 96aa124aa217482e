"""A video LLM as judge, and the proof that it can hear.

Concept   every video is asked about, picture and sound sent as two files. Served models often ignore the sound without
          a word, so a part of the videos is judged again with other music, with silence, with the music shifted by
          half a beat, and with the picture frozen. A judge who does not rate the right sound higher is called deaf.
Paper     arXiv 2503.14505v2, Sec. 5.1 "Quantitative Metrics", App. F, App. J.
Differs   the paper shows its judge to be right by ranking ground truth first; whether it hears was not tested.
"""

import io
import itertools
import json
import os
import tempfile
import wave
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

import beats
import media
from config import UserError, flag, from_cli
from judge_server import Answers, Server, endpoint
from questions import DANCE, QUESTIONS, VIDEO, Clip, bpm_of, find_clips

SR_HZ = 16_000  # of the wav that is sent
AUDIBLE = ("style_alignment", "beat_alignment")  # asked again with another sound
VISIBLE = ("movement_realism", "choreography_complexity")  # asked again with a still picture
SOUNDS, STILL = ("swapped", "silent", "shifted"), "still"
FEWEST = 6  # pairs: with fewer, no pattern of signs can reach 5 % after Holm's correction for three tests


@dataclass(frozen=True)
class JudgeConfig:
    """Ask a video LLM the paper's eleven questions about every video of a folder, and find out whether it hears."""

    videos: Path = flag(help="folder of mp4 files with sound; grid.json there names the prompts and what is missing")
    url: str | None = flag(None, help="OpenAI-compatible server, e.g. http://localhost:8000/v1 (key: JUDGE_API_KEY)")
    model: str = flag("Qwen/Qwen3-Omni-30B-A3B-Instruct", help="name of the model on that server")
    metrics: str = flag("llm", help="llm, or vbench: imaging and aesthetic quality by two networks, without a server")
    weights: Path = flag(Path("weights/vbench"), help="for vbench: folder of its networks (README, VBench's scores)")
    controls: int = flag(24, help="videos that are judged again with wrong sound and with a still picture")
    jobs: int = flag(8, help="questions in flight at once")
    retries: int = flag(4, help="further tries after a failure or an answer that is not a number")
    backoff: float = flag(1.0, help="seconds before the second try, doubled for every further one")
    timeout: float = flag(180.0, help="seconds a single try may take")
    out: Path | None = flag(None, help="result (default: judge.json in --videos; answers.jsonl beside it is the cache)")

    def __post_init__(self):
        if self.metrics not in ("llm", "vbench"):
            raise UserError(f"--metrics {self.metrics}: expected llm or vbench")
        if self.metrics == "llm":
            endpoint(self.url)
        if self.controls < 0 or self.jobs < 1 or self.retries < 0 or not self.timeout > 0 or not self.backoff >= 0:
            raise UserError("expected controls, retries, backoff >= 0, jobs >= 1, timeout > 0")


# ------------------------------------------------------------------------------------------------- what is sent


def soundless(path: Path) -> bytes:
    """The pictures of a video as an mp4 without any sound track: copied, not encoded anew."""
    out = io.BytesIO()
    with media.open_media(path) as source, av.open(out, "w", format="mp4") as target:
        stream = media.video_stream(source, path)
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    return out.getvalue()


def frozen(path: Path) -> bytes:
    """The middle picture of a video, for as long as the video lasts."""
    info = media.video_info(path)
    middle = next(media.video_frames(path, start_s=info.dur_s / 2))
    with tempfile.TemporaryDirectory() as folder:
        still = Path(folder) / "still.mp4"
        media.write_mp4(still, itertools.repeat(middle, max(1, round(info.dur_s * 30))), 30)
        return still.read_bytes()


def wav(waveform: np.ndarray) -> bytes:
    """Float (S,) in [-1, 1] -> a 16-bit wav file."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SR_HZ)
        file.writeframes((np.clip(waveform, -1, 1) * 32767).round().astype("<i2").tobytes())
    return out.getvalue()


def half_a_beat_later(waveform: np.ndarray, bpm: float | None) -> np.ndarray:
    """Shift (S,) around its own end by half a beat of its tempo (0.3 s where no tempo is found)."""
    tempo, _ = beats.music_beats(waveform, SR_HZ, bpm)
    return np.roll(waveform, round((30 / tempo if tempo else 0.3) * SR_HZ))


# ------------------------------------------------------------------------------------------------ does it hear?


def sign_flip_p(differences, two_sided: bool = False, draws: int = 20_000, seed: int = 0) -> float:
    """P value of paired differences (n,) under the null that each could as well have the other sign.

    The share of sign patterns whose mean is at least the one seen: all 2^n up to n = 14, `draws` random ones beyond.
    """
    d = np.asarray(differences, np.float64)
    if len(d) == 0:
        return 1.0
    if len(d) <= 14:
        signs = 1 - 2 * (np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1)  # (2^n, n)
    else:
        signs = np.random.default_rng(seed).choice([-1, 1], size=(draws, len(d)))
        signs[0] = 1  # the pattern seen is one of them
    means, seen = signs @ d / len(d), d.mean()
    if two_sided:
        means, seen = np.abs(means), abs(seen)
    return float((means >= seen - 1e-9).mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for asking several times (Holm 1979), in the order given."""
    order, worst, out = np.argsort(p_values), 0.0, [1.0] * len(p_values)
    for rank, i in enumerate(order):
        worst = max(worst, (len(p_values) - rank) * p_values[i])
        out[i] = min(1.0, worst)
    return out


def compare(pairs: Sequence[tuple[float, float]]) -> dict:
    """Right against control, one pair a video: means, difference with its interval, one-sided paired P value."""
    right, control = np.array(pairs, np.float64).reshape(-1, 2).T
    d = right - control
    return {
        "pairs": len(d),
        "right": float(right.mean()) if len(d) else None,
        "control": float(control.mean()) if len(d) else None,
        "difference": float(d.mean()) if len(d) else None,
        "interval": beats.bootstrap_interval(d) if len(d) else None,
        "p": sign_flip_p(d),
    }


def verdict(pairs: dict[str, list[tuple[float, float]]]) -> dict:
    """Does the judge hear? `pairs`: for each control, (score with the right sound, score with the control) a video.

    Paired sign-flip tests, one-sided, corrected by Holm over the three controls of the sound, at 5 %. It hears if it
    rates the right music above other music or above shifted music; a judge who only misses the music in silence hears
    something, but not whether it fits.
    """
    tests = {name: compare(pairs.get(name, [])) for name in (*SOUNDS, STILL)}
    for name, p in zip(SOUNDS, holm([tests[name]["p"] for name in SOUNDS])):
        tests[name]["p_corrected"] = p
    fewest = min(tests[name]["pairs"] for name in SOUNDS)
    above = [name for name in SOUNDS if tests[name]["p_corrected"] < 0.05]
    if fewest < FEWEST:
        hears, text = None, f"cannot tell: {fewest} pairs, at least {FEWEST} are needed"
    elif "swapped" in above or "shifted" in above:
        hears, text = True, f"this judge hears: it rates the right sound above {' and '.join(above)} sound"
    elif above:
        hears, text = False, "this judge hears that there is sound, but not whether it fits the dance"
    else:
        hears, text = False, "this judge is DEAF: it rates wrong and missing sound like the right one"
    if tests[STILL]["pairs"] >= FEWEST and tests[STILL]["p"] >= 0.05:
        text += "; it does not see movement either: a still picture is rated like the dance"
    return {"hears": hears, "verdict": text, "tests": tests}


# -------------------------------------------------------------------------------------------------- the command


def control_media(clip: Clip, others: list[Clip], waves: Callable) -> dict[str, tuple[bytes, bytes]]:
    """Control -> (video, sound). The swapped sound is another track's: of the nearest later clip that has one."""
    sound, own = waves(clip), bpm_of(clip.name)
    at = others.index(clip)
    track = clip.name.split("_p")[0]
    rest = [c for c in others[at + 1 :] + others[:at] if c.name.split("_p")[0] != track]
    picture, out = soundless(clip.path), {}
    if rest:
        out["swapped"] = picture, wav(np.resize(waves(rest[len(rest) // 2]), len(sound)))
    out["silent"] = picture, wav(np.zeros_like(sound))
    out["shifted"] = picture, wav(half_a_beat_later(sound, own))
    out[STILL] = frozen(clip.path), wav(sound)
    return out


def main() -> None:
    cfg = from_cli(JudgeConfig)
    out = cfg.out or cfg.videos / ("judge.json" if cfg.metrics == "llm" else "vbench.json")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; expected a file name")
    clips = find_clips(cfg.videos)
    there = [clip for clip in clips if clip.path.exists()]
    gaps = {clip.name: "no such file" for clip in clips if not clip.path.exists()}
    if cfg.metrics == "llm":
        result = judge_folder(cfg, there, gaps, out.with_name("answers.jsonl"))
    else:
        import vbench  # brings torch

        result = vbench.judge_folder(cfg.weights, there, gaps)
    result = {"expected": len(clips), "gaps": gaps} | result
    with media.new_file(out) as temporary:
        temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if gaps:
        print(f"gaps       {len(gaps)} of {len(clips)} videos are missing or broken: counted, not scored")
    print(f"wrote      {out}")


def judge_folder(cfg: JudgeConfig, clips: list[Clip], gaps: dict, cache: Path) -> dict:
    """Judge every clip, then some again under control; prints the verdict, returns what judge.json holds.

    A video that cannot be read, or has no sound, becomes one of the `gaps`.
    """
    key = os.environ.get("JUDGE_API_KEY", "").strip()
    server = Server(endpoint(cfg.url), cfg.model, cfg.retries, cfg.backoff, cfg.timeout, key)
    answers, scores, reasons = Answers(server, cache), {}, Counter()

    def waves(clip: Clip) -> np.ndarray:
        return media.read_audio(clip.path, SR_HZ)

    def all_of(names: Sequence[str], prompt: str | None, video: bytes, sound: bytes) -> dict:
        texts = [QUESTIONS[name].replace("{prompt}", prompt or "") for name in names]
        replies = dict(zip(names, pool.map(lambda text: answers.get(video, sound, text), texts)))
        answers.check()
        reasons.update(why for _, why in replies.values() if why)
        return {name: score for name, (score, _) in replies.items()}

    def both(first: dict, second: dict) -> list[tuple[float, float]]:
        shared = [q for q in second if first[q] is not None and second[q] is not None]
        return [tuple(float(np.mean([s[q] for q in shared])) for s in (first, second))] if shared else []

    pairs = {name: [] for name in (*SOUNDS, STILL)}
    with ThreadPoolExecutor(cfg.jobs) as pool:
        for clip in tqdm(clips, "judging", unit="video"):
            try:
                given = soundless(clip.path), wav(waves(clip))
            except UserError as error:
                gaps[clip.name] = str(error)
                continue
            names = list(QUESTIONS) if clip.prompt else [*DANCE, *VIDEO]
            scores[clip.name] = all_of(names, clip.prompt, *given)
        clips = [clip for clip in clips if clip.name in scores]
        if not clips:
            raise UserError(f"{cfg.videos}: none of its videos can be read; the first: {next(iter(gaps.values()))}")
        chosen = [clips[i] for i in sorted({round(i) for i in np.linspace(0, len(clips) - 1, cfg.controls)})]
        asked = sum(map(len, scores.values()))
        missing = sum(score is None for answered in scores.values() for score in answered.values())
        for clip in tqdm(chosen, "controls", unit="video"):
            for control, given in control_media(clip, clips, waves).items():
                replies = all_of(VISIBLE if control == STILL else AUDIBLE, clip.prompt, *given)
                pairs[control] += both(scores[clip.name], replies)
    hearing = verdict(pairs)
    print(f"answers    {asked - missing} of {asked}; {missing / asked:.1%} missing {dict(reasons) or ''}")
    for name, test in hearing["tests"].items():
        if test["pairs"]:
            low, high = test["interval"]
            print(f"{name:<10} right {test['right']:.2f}, control {test['control']:.2f}, difference", end=" ")
            print(f"{test['difference']:+.2f} [{low:+.2f}, {high:+.2f}], p = {test['p']:.4f}, {test['pairs']} pairs")
    print(f"verdict    {hearing['verdict']}")
    return {"judge": cfg.model, "asked": asked, "missing": missing, "missing_rate": missing / asked,
            "reasons": dict(reasons), "scores": scores, **hearing}  # fmt: skip
