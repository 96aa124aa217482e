"""The laptop-scale world: draws clips, describes them in words, writes them as AIST files, and measures videos of them.

Concept   a `Clip` fixes everything; picture (toy_draw.py), pose (toy_dance.py), sound (toy_music.py), captions and true
          beats follow from it. The measuring half sees pixels only, so it serves generated videos just as well.
Paper     arXiv 2503.14505v2: stands in for AIST and the in-the-wild clips of Sec. 5.1, with the prompts of Table 8.
Differs   64x64 pixels and capsule figures; beats, poses, clothes and places are known exactly, so claims are measured.

Dimension key   F frames   H W picture   S audio samples
"""

import dataclasses
import json
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
from toy_draw import COLOURS, FURS, HAIRS, SCENES, SETTINGS, SKINS, WHITE_STUDIO, project, render, visible_colours
from toy_music import TRACKS, beats_in, play, track

VIEW_CHANCES = (0.0, 0.40, 0.05, 0.05, 0.04, 0.05, 0.04, 0.05, 0.05, 0.07, 0.20)  # of cameras 0 (none), 1, ... 10


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


VIEW_CHANCES = [0.0, 0.52, 0.04, 0.03, 0.03, 0.03, 0.03, 0.03, 0.04, 0.05, 0.20]  # of cameras 0 (none), 1, ... 10


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


# --------------------------------------------------------------------------------------------------------- measuring


def body_curve(frames: np.ndarray) -> np.ndarray:
    """How high the dancers' upper body is, from pixels alone: (F, H, W, 3) uint8 -> (F,) pixels up from the bottom.

    Columns count by the square of how much figure they show on average (so arms count little); the height is where the
    figure below the top of each frame first reaches a fixed area, a fifth of the usual: about the shoulders. Its local
    minima are the motion's beats.
    """
    figure = _figure(frames)  # (F, H, W)
    columns = figure.mean((0, 1)) ** 2
    area = np.cumsum(figure @ (columns / max(columns.sum(), 1e-6)), axis=1)  # (F, H) from the top down to each row
    target = 0.2 * max(np.median(area[:, -1]), 1e-6)
    rows = np.arange(1, area.shape[1] + 1)
    return np.array([len(rows) - np.interp(target, a, rows) for a in area])


def read_colours(frames: np.ndarray) -> tuple[str, str]:
    """Shirt and trousers, from pixels alone: of the clothes' colours the two most frequent, the upper one first."""
    figure, frames = _figure(frames)[::6], frames[::6].astype(np.float32)
    tones = [(name, rgb, shade) for name, rgb in COLOURS.items() for shade in (1.0, 0.85, 0.7)]
    tones += [("", rgb, shade) for rgb in SKINS + HAIRS + FURS for shade in (1.0, 0.85)]  # no clothes
    nearest = np.argmin([((frames - np.multiply(rgb, shade)) ** 2).sum(-1) for _, rgb, shade in tones], axis=0)
    weight = figure * (figure > 0.6) * figure.mean((0, 1)) ** 2  # (F, H, W)
    share = np.cumsum(weight.sum((0, 2))) / max(weight.sum(), 1e-6)
    weight *= (share > 0.12)[:, None]  # not the head
    rows = {}  # colour -> how much of the figure has it, in each row
    for k, (name, _, _) in enumerate(tones):
        rows[name] = rows.get(name, 0) + (weight * (nearest == k)).sum((0, 2))
    two = sorted(COLOURS, key=lambda name: -rows[name].sum())[:2]
    upper, lower = sorted(two, key=lambda name: rows[name] @ np.arange(len(share)) / max(rows[name].sum(), 1e-6))
    return upper, lower


def _figure(frames: np.ndarray) -> np.ndarray:
    """Share of each pixel that is not backdrop, (F, H, W) in [0, 1]; each row's backdrop is that of its two ends."""
    pixels = frames.astype(np.float32)
    high, wide = pixels.shape[1:3]
    edge, x = max(wide // 10, 1), ((np.arange(wide) + 0.5) / wide)[:, None]
    left, right = (
        np.median(side.transpose(1, 0, 2, 3).reshape(high, 1, -1, 3), axis=2)
        for side in (pixels[:, :, :edge], pixels[:, :, -edge:])
    )  # (H, 1, 3)
    return np.clip((np.linalg.norm(pixels - (left * (1 - x) + right * x), axis=-1) - 25) / 50, 0, 1)


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
    size: int = config.flag(64, help="height and width in pixels, even")

    def __post_init__(self):
        if self.clips < 1 or self.seconds < 1 or self.size < 32 or self.size % 2 or self.seed < 0:
            raise config.UserError("expected clips >= 1, seconds >= 1, seed >= 0 and an even size >= 32")


def dataset(cfg: ToyConfig) -> Iterator[tuple[str, Clip, np.random.Generator]]:
    """(file name, clip, its random numbers) for each clip; AIST clips go through the 60 tracks evenly."""
    taken: dict[str, int] = {}
    for index in range(cfg.clips):
        rng = np.random.default_rng([cfg.seed, int(cfg.wild), index])
        if cfg.wild:
            yield f"wild_{index:06d}.mp4", sample_clip(rng, wild=True), rng
            continue
        music_name = TRACKS[index * 7 % len(TRACKS)]  # 7 and 60 share no factor: all tracks, genres mixed
        clip = sample_clip(rng, track_name=music_name)
        numbers = {"female dancer": FEMALE, "male dancer": [d for d in range(1, 36) if d not in FEMALE]}
        dancers = "_".join(f"d{rng.choice(sorted(numbers[figure])):02d}" for figure in clip.figures)
        stem = f"g{clip.genre}_s{clip.situation}_c{clip.camera:02d}_{dancers}_{music_name}"
        taken[stem] = taken.get(stem, 0) + 1
        yield f"{stem}_ch{taken[stem]:02d}.mp4", clip, rng


def main():
    cfg = config.from_cli(ToyConfig)
    if cfg.out.exists() and (not cfg.out.is_dir() or any(cfg.out.iterdir())):
        raise config.UserError(f"{cfg.out} exists and is not an empty folder: give --out a new name, or remove it")
    partial = cfg.out.absolute().with_name(f".{cfg.out.absolute().name}.partial")  # renamed when all is there
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        truth = {}
        for index, (name, clip, rng) in enumerate(tqdm(dataset(cfg), total=cfg.clips, unit="clip")):
            truth[name] = write(partial / name, clip, cfg, stereo=index % 2 == 1)
            if clip.wild:
                (partial / name).with_suffix(".txt").write_text(wild_caption(clip, rng) + "\n", encoding="utf-8")
        (partial / "truth.json").write_text(json.dumps(truth), encoding="utf-8")
        os.replace(partial, cfg.out)
    except OSError as error:
        raise config.UserError(f"{cfg.out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{cfg.clips} clips and truth.json -> {cfg.out}")


def write(path: Path, clip: Clip, cfg: ToyConfig, stereo: bool) -> dict:
    """Write one clip with its music (44.1 kHz mono or 48 kHz stereo) -> what is true of it, as JSON takes it."""
    num_frames, sr_hz = round(30 * cfg.seconds), 48000 if stereo else 44100
    sound = music(clip, 0.0, num_frames / 30, sr_hz)
    if stereo:
        sound = np.stack([sound, 0.8 * sound], axis=1)  # (S, 2)
    media.write_mp4(path, render(clip, num_frames, cfg.size), 30, sound, sr_hz)
    heights = true_heights(clip, num_frames, cfg.size)
    return {
        "clip": dataclasses.asdict(clip),
        "fps": 30,
        "beats_s": beat_times(clip, num_frames / 30).round(6).tolist(),
        **{f"{name}_px": height.round(4).tolist() for name, height in heights.items()},
    }


if __name__ == "__main__":
    config.run(main)
