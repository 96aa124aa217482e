"""Which clips a folder of dance videos holds, and how the model sees each: exact frames, the music under them.

Concept   a clip is `frames` frames at exactly 30 a second, cropped to the wanted aspect and resized, and the sound of
          the same seconds. Each video gives short random crops; one that cannot serve is left out, with a reason.
Paper     arXiv 2503.14505v2, Sec. 5.1 (clips of about 2.5 s).
Differs   frames are taken by time stamp at exactly 30 a second; only the wanted cameras are used (the official filter
          has no effect); a video of which too little would be left, or too coarse, is not used.

Dimension key   F frames   H W pixels
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import audio
import media
from check import made_for
from config import UserError, check_frames, flag
from data_names import CAMERAS, VIDEO_SUFFIXES, Skipped, Source, find_videos, read_source

FPS = 30


@dataclass(frozen=True)
class DataConfig:
    """Encode a folder of dance videos once, so that training only reads latents. Resumable; several may run at once."""

    data: Path = flag(help="folder with AIST videos, or any dance videos")
    wild: Path | None = flag(None, help="folder with in-the-wild videos, captions in .txt files beside them")
    weights: Path = flag(Path("weights/baby"), help="folder with dit.safetensors, encoder.safetensors, t5/, wav2vec2/")
    cache: Path | None = flag(None, help="folder for the encodings (default: DATA/.encoded)")
    frames: int = flag(73, help="frames of a clip, 1 + 6k, at 30 a second")
    height: int | None = flag(None, help="pixels, a multiple of 16 (default: of the weights, else 480)")
    width: int | None = flag(None, help="pixels, a multiple of 16 (default: of the weights, else 848)")
    cameras: str = flag("c01,c10", help="AIST cameras to use")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    dtype: str = flag("bfloat16" if torch.cuda.is_available() else "float32", help="to compute in: float32 or bfloat16")

    def __post_init__(self):
        check_frames(self.frames)
        for name in ("height", "width"):
            pixels = getattr(self, name)
            if pixels is not None and (pixels < 16 or pixels % 16):
                raise UserError(f"--{name} {pixels}: expected a multiple of 16; use {max(16, pixels // 16 * 16)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype}: expected float32 or bfloat16 (float16 overflows in T5)")


def weights_part(weights: Path, *names: str) -> Path:
    """The first of the names that exists in the weights folder: our layout or a Hugging Face snapshot's."""
    for name in names:
        if (weights / name).exists():
            return weights / name
    raise UserError(f"{weights}: holds no {' or '.join(names)}; give a folder with these weights by --weights")


def camera_numbers(cameras: str) -> list[int]:
    """`c01,c10` -> [1, 10]."""
    try:
        numbers = [int(c.strip().removeprefix("c")) for c in cameras.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not set(numbers) <= set(CAMERAS):
        raise UserError(f"--cameras {cameras}: expected some of c01 to c10 with commas between, such as c01,c10")
    return numbers


def frame_size(cfg: DataConfig) -> tuple[int, int]:
    """(height, width) asked for, else what the prior was made for, else Mochi's 480 x 848."""
    if cfg.height and cfg.width:
        return cfg.height, cfg.width
    default = made_for(weights_part(cfg.weights, "dit.safetensors", "transformer"))
    return cfg.height or default["height"], cfg.width or default["width"]


# ---------------------------------------------------------------------------------------------------------- crops

CROPS_A_MINUTE = 5
MARGIN = 0.05  # of the duration, left out at each end
CROP_SEED = 0


def crop_starts(name: str, dur_s: float, frames: int, seed: int = CROP_SEED) -> list[int]:
    """First frames of the random crops of a file, ascending: 5 a minute, at least one; [] if it is too short.

    5 % of the duration is left out at both ends where that leaves room for a crop with its frames/30 + 0.09 s of sound.
    """
    if round(dur_s * FPS) < frames:
        return []
    clip_s = audio.clip_samples(frames) / audio.SR_HZ
    first, last = MARGIN * dur_s, (1 - MARGIN) * dur_s - clip_s
    if last < first:
        first, last = 0.0, max(0.0, dur_s - clip_s)
    draw = random.Random(hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest())
    count = max(1, round(dur_s / 60 * CROPS_A_MINUTE))
    return sorted({round(draw.uniform(first, last) * FPS) for _ in range(count)})


# ------------------------------------------------------------------------------------------------------- pictures

MOST_ENLARGED = 2.0  # times: what is smaller shows the model blur
LEAST_KEPT = 0.5  # of the picture: upright phone videos cut to 16:9 lose head and feet


def crop_box(H: int, W: int, height: int, width: int, aist: bool) -> tuple[float, float, float, float]:
    """(top, left, height, width) in pixels of the part that is used of a picture of H x W.

    A video of the wanted size is taken as it is. From AIST's 1920x1080 the official crop is taken, 1272x720 around a
    point 90 px below the centre; from anything else the largest centred part of the wanted aspect.
    """
    if (H, W) == (height, width):
        return 0, 0, H, W
    large = aist and H >= 1080
    h = min(H * 2 / 3 if large else H, W * height / width)
    w = h * width / height
    return (H - h) / 2 + (H / 12 if large else 0), (W - w) / 2, h, w


def misfit(H: int, W: int, height: int, width: int, aist: bool) -> str:
    """Why a picture of H x W cannot serve at height x width; empty if it can."""
    _, _, h, w = crop_box(H, W, height, width, aist)
    if height > MOST_ENLARGED * h:
        return f"too small: {W}x{H} pixels would be enlarged {height / h:.1f} times to {width}x{height}"
    if not aist and h * w < LEAST_KEPT * H * W:
        return f"wrong shape: of {W}x{H} pixels {width}x{height} would keep only {100 * h * w / H / W:.0f} %"
    return ""


def fit_frames(frames: Tensor, height: int, width: int, aist: bool) -> Tensor:
    """Crop, then resize with anti-aliasing: uint8 (F, H, W, 3) -> float (3, F, height, width) in [-1, 1]."""
    top, left, h, w = crop_box(*frames.shape[1:3], height, width, aist)
    frames = frames[:, round(top) : round(top + h), round(left) : round(left + w)]
    pieces = []
    for piece in frames.split(8):  # a few frames at a time: float needs four times the memory
        piece = piece.permute(0, 3, 1, 2).float()  # (f, 3, H, W)
        if piece.shape[2:] != (height, width):
            piece = F.interpolate(piece, (height, width), mode="bicubic", antialias=True, align_corners=False)
        pieces.append(piece.clamp(0, 255) / 127.5 - 1)
    return torch.cat(pieces).transpose(0, 1)


def read_clip(source: Source, start: int, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """What the networks are given of a clip: pictures (3, F, height, width) in [-1, 1] and the sound (S,) at 16 kHz.

    start    first frame, at 30 a second; the sound begins with it and lasts frames/30 + 0.09 s where there is as much
    raises   UserError if pictures or sound are broken or too short
    """
    path, start_s = source.path, start / FPS
    pictures = torch.from_numpy(media.read_video(path, FPS, start_s, frames))  # (F, H, W, 3)
    if len(pictures) < frames:
        raise UserError(f"{path}: {len(pictures)} frames from {start_s:.2f} s on instead of {frames}")
    sound = torch.from_numpy(media.read_audio(path, audio.SR_HZ, start_s, audio.clip_samples(frames) / audio.SR_HZ))
    if len(sound) < (frames / FPS - 0.25) * audio.SR_HZ:
        raise UserError(f"{path}: its sound ends {len(sound) / audio.SR_HZ:.2f} s into the clip at {start_s:.2f} s")
    return fit_frames(pictures, height, width, source.aist is not None), sound


# ---------------------------------------------------------------------------------------------------------- clips


class Cut(NamedTuple):
    """The F frames of a source from `start` on, in frames at 30 a second; `source_print` changes when the file does."""

    source: Source
    start: int
    source_print: tuple[str, int]


def cut_videos(cfg: DataConfig, size: Sequence[int]) -> tuple[list[Path], list[Cut], Skipped]:
    """(all video files, the clips to use, what was left out and why); size is (frames, height, width).

    raises   UserError if there is no video file at all
    """
    cameras = camera_numbers(cfg.cameras)
    paths, skipped = find_videos([cfg.data, cfg.wild] if cfg.wild else [cfg.data])
    if not paths:
        raise UserError(f"{cfg.data}: holds no video files ({' '.join(sorted(VIDEO_SUFFIXES))}); give another --data")
    cuts = []
    for path in tqdm(paths, desc="look", unit="file", dynamic_ncols=True):
        try:
            source = read_source(path, cameras)
            if isinstance(source, str):
                raise UserError(source)
            info = media.video_info(path)
            if not info.has_audio:
                raise UserError("no sound")
            if why := misfit(info.height, info.width, *size[1:], source.aist is not None):
                raise UserError(why)
            starts = crop_starts(path.name, info.dur_s, cfg.frames)
            if not starts:
                raise UserError(f"too short: {info.dur_s:.2f} s; {cfg.frames} frames take {cfg.frames / FPS:.2f} s")
            source_print = fingerprint(path, 3), path.stat().st_mtime_ns
        except (UserError, OSError, ValueError) as error:
            skipped.append((path, str(error).removeprefix(f"{path}: ")))
            continue
        cuts += [Cut(source, start, source_print) for start in starts]
    return paths, cuts, skipped


def fingerprint(path: Path, samples: int, size: int = 65_536) -> str:
    """Hash of a file's length and of `samples` pieces of `size` bytes spread over it (of all of it, if it is small)."""
    total = path.stat().st_size
    digest = hashlib.sha256(str(total).encode())
    with open(path, "rb") as handle:
        if total <= samples * size:
            digest.update(handle.read())
        else:
            for i in range(samples):
                handle.seek((total - size) * i // (samples - 1))
                digest.update(handle.read(size))
    return digest.hexdigest()
