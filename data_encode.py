"""Encode once: a folder of dance videos becomes files of latents and tokens.

Concept   short random crops of each video are encoded into one file each, video as mean and log-variance of the latent,
          sound as Wav2Vec 2.0 tokens; all prompts go into one file of T5 tokens. A file is named by a hash of what it
          was made from, so a stale one is never used; it is written whole or not at all, so a killed run goes on; and
          a process claims it while writing, so that several may share the work.
Paper     arXiv 2503.14505v2, Sec. 5.1 (clips of about 2.5 s), Sec. 4.4 (in-the-wild clips have captions of their own).
Differs   frames are taken by time stamp at exactly 30 a second; only the wanted cameras are used (the official filter
          has no effect); the posterior is stored instead of a draw from it.

Dimension key   C latent channels   T H W latent frames, height, width (F H W of a video: frames and pixels)
                L text tokens   E text width   A music tokens   D width of a music token
"""

import fcntl
import hashlib
import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import audio
import media
import mochi_vae
import t5
import tensors
from config import UserError, flag
from data_names import CAMERAS, TEST_TRACKS, VIDEO_SUFFIXES, Skipped, Source, find_videos, read_source
from sample import made_for

VERSION = 1  # of what is stored: a change makes all old encodings stale


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
        if self.frames < 1 or (self.frames - 1) % 6:
            below = max(1, self.frames - (self.frames - 1) % 6)
            raise UserError(f"--frames {self.frames}: the video VAE packs 1 + 6k frames; use {below} or {below + 6}")
        for name in ("height", "width"):
            pixels = getattr(self, name)
            if pixels is not None and (pixels < 16 or pixels % 16):
                raise UserError(f"--{name} {pixels}: expected a multiple of 16; use {max(16, pixels // 16 * 16)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype}: expected float32 or bfloat16 (float16 overflows in T5)")


# ------------------------------------------------------------------------------------------------- crops

SPIECE = ("t5/spiece.model", "tokenizer/spiece.model")
FPS = 30
CROPS_A_MINUTE = 5
MARGIN = 0.05  # of the duration, left out at each end
CROP_SEED = 0


@dataclass(frozen=True)
class Clip:
    """F frames of a source from `start`, in frames at 30 a second; `file` is its encoding in the cache."""

    source: Source
    start: int
    file: Path


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


# ------------------------------------------------------------------------------------------------------- encoding


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


def fingerprint_weights(path: Path) -> str:
    """Hash of the headers and sampled bytes of the files of a network."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in (".safetensors", ".model"))
    return hashlib.sha256("".join(fingerprint(file, 64, 2**20) for file in files).encode()).hexdigest()


def weights_part(weights: Path, *names: str) -> Path:
    """The first of the names that exists in the weights folder: our layout or a Hugging Face snapshot's."""
    for name in names:
        if (weights / name).exists():
            return weights / name
    raise UserError(f"{weights}: holds no {' or '.join(names)}; give a folder with these weights by --weights")


def hash_of(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def is_whole(file: Path) -> bool:
    """Is this a finished encoding? A damaged one counts as none."""
    try:
        tensors.open_weights(file)
    except UserError:
        return False
    return True


@contextmanager
def claim(file: Path, wait: bool) -> Iterator[bool]:
    """Hold the right to write `file`; yields False if another process has it. A killed process loses its claim."""
    lock = file.with_suffix(".lock")
    with open(lock, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            lock.unlink(missing_ok=True)


def fit_frames(frames: Tensor, height: int, width: int, aist: bool) -> Tensor:
    """Crop to the aspect, then resize with anti-aliasing: uint8 (F, H, W, 3) -> float (3, F, height, width) in [-1, 1].

    A video of the wanted size is taken as it is. From AIST's 1920x1080 the official crop is taken, 1272x720 around a
    point 90 px below the centre; from anything else the largest centred part of the wanted aspect.
    """
    _, H, W, _ = frames.shape
    if (H, W) != (height, width):
        large = aist and H >= 1080
        h = min(H * 2 / 3 if large else H, W * height / width)
        w = h * width / height
        top, left = (H - h) / 2 + (H / 12 if large else 0), (W - w) / 2
        frames = frames[:, round(top) : round(top + h), round(left) : round(left + w)]
    pieces = []
    for piece in frames.split(8):  # a few frames at a time: float needs four times the memory
        piece = piece.permute(0, 3, 1, 2).float()  # (f, 3, H, W)
        if piece.shape[2:] != (height, width):
            piece = F.interpolate(piece, (height, width), mode="bicubic", antialias=True, align_corners=False)
        pieces.append(piece.clamp(0, 255) / 127.5 - 1)
    return torch.cat(pieces).transpose(0, 1)


@torch.no_grad()
def encode_clip(clip: Clip, frames: int, height: int, width: int, encoder, wav2vec2, device) -> dict[str, Tensor]:
    """`mean` and `logvar` (C, T, H, W) of z_vae and the music tokens `audio` (A, D) of one clip.

    raises   UserError if its pictures or sound are broken or too short
    """
    path, start_s = clip.source.path, clip.start / FPS
    pictures = torch.from_numpy(media.read_video(path, FPS, start_s, frames))  # (F, H, W, 3)
    if len(pictures) < frames:
        raise UserError(f"{path}: {len(pictures)} frames from {start_s:.2f} s on instead of {frames}")
    sound = torch.from_numpy(media.read_audio(path, audio.SR_HZ, start_s, audio.clip_samples(frames) / audio.SR_HZ))
    if len(sound) < (frames / FPS - 0.25) * audio.SR_HZ:
        raise UserError(f"{path}: its sound ends {len(sound) / audio.SR_HZ:.2f} s into the clip at {start_s:.2f} s")
    video = fit_frames(pictures, height, width, clip.source.aist is not None)  # (3, F, H, W)
    mean, logvar = encoder(video[None].to(device))  # (1, C, T, H, W) each
    music = wav2vec2(audio.prepare(sound, frames).to(device))  # (1, A, D)
    # float16 keeps 11 bits: far finer than the posterior's own spread, and half the disk
    encoding = {"mean": mean[0].half(), "logvar": logvar[0].clamp(-30, 20).half(), "audio": music[0].float()}
    if not all(tensor.isfinite().all() for tensor in encoding.values()):
        raise UserError(f"{path}: its encoding from {start_s:.2f} s on is not finite")
    return encoding


def encode_clips(clips: list[Clip], encoder_file: Path, wav2vec2_file: Path, size, device, dtype) -> Skipped:
    """Encode the clips that are not in the cache. Several processes may do this on one cache at a time.

    The networks live in here only: they are gone before T5 is loaded, and that before the transformer.
    """
    missing = [clip for clip in clips if not is_whole(clip.file)]
    if not missing:
        return []
    encoder = mochi_vae.load_encoder(encoder_file, device=device, dtype=dtype)
    wav2vec2 = audio.load_wav2vec2(wav2vec2_file, device=device)
    encoder.check(*size)
    skipped, others = [], []
    with tqdm(total=len(missing), desc="encode", unit="clip", dynamic_ncols=True) as bar:
        for wait, todo in ((False, missing), (True, others)):
            for clip in todo:
                with claim(clip.file, wait) as mine:
                    if not mine:
                        others.append(clip)  # by another process: looked after at the end
                        continue
                    if not is_whole(clip.file):
                        try:
                            encoding = encode_clip(clip, *size, encoder, wav2vec2, device)
                        except (UserError, OSError, ValueError) as error:
                            skipped.append((clip.source.path, str(error).removeprefix(f"{clip.source.path}: ")))
                        else:
                            made_from = f"frames from {clip.start} of {printable(clip.source.path.name)}"
                            tensors.save(clip.file, encoding, {"source": made_from})
                bar.update()
    return skipped


@torch.no_grad()
def encode_prompts(prompts: set[str], weights: Path, cache: Path, device, dtype) -> Path:
    """One file with the T5 features (L, E) of each prompt ever asked for, under the prompt's hash; returns its path."""
    network, pieces = weights_part(weights, "t5", "text_encoder"), weights_part(weights, *SPIECE)
    key = hash_of(fingerprint_weights(network), fingerprint_weights(pieces), str(dtype))
    file = cache / f"text-{key}.safetensors"
    with claim(file, wait=True):
        known = tensors.open_weights(file) if is_whole(file) else None
        missing = sorted(p for p in prompts if known is None or hash_of(p) not in known.shapes)
        if missing:
            features = {name: known.read(name) for name in known.shapes} if known else {}
            model, tokenizer = t5.load_t5(network, device, dtype), t5.Tokenizer(pieces)
            for prompt in tqdm(missing, desc="prompts", unit="prompt", dynamic_ncols=True):
                text, mask = t5.encode(model, tokenizer, [prompt], device)  # (1, L, E), (1, L)
                features[hash_of(prompt)] = text[0, mask[0]]  # only what is not padding
            tensors.save(file, features)
    return file


@dataclass(frozen=True)
class Encoded:
    """What `encode` leaves: the clips that are in the cache, the file with the prompts, and what was left out."""

    clips: list[Clip]
    prompts: Path
    skipped: Skipped


def encode(cfg: DataConfig) -> Encoded:
    """Find the videos, encode what is not yet encoded, print what was left out and why.

    raises   UserError if nothing is left to train on
    """
    cache = cfg.cache or cfg.data / ".encoded"
    size = cfg.frames, *frame_size(cfg)
    encoder_file = weights_part(cfg.weights, "encoder.safetensors", "vae")
    wav2vec2_file = weights_part(cfg.weights, "wav2vec2", "wav2vec2.safetensors")
    networks = fingerprint_weights(encoder_file), fingerprint_weights(wav2vec2_file), cfg.dtype
    cameras = camera_numbers(cfg.cameras)
    paths, skipped = find_videos([cfg.data, cfg.wild] if cfg.wild else [cfg.data])
    if not paths:
        raise UserError(f"{cfg.data}: holds no video files ({' '.join(sorted(VIDEO_SUFFIXES))}); give another --data")
    clips = []
    for path in tqdm(paths, desc="look", unit="file", dynamic_ncols=True):
        try:
            source = read_source(path, cameras)
            if isinstance(source, str):
                raise UserError(source)
            info = media.video_info(path)
            if not info.has_audio:
                raise UserError("no sound")
            starts = crop_starts(path.name, info.dur_s, cfg.frames)
            if not starts:
                raise UserError(f"too short: {info.dur_s:.2f} s; {cfg.frames} frames take {cfg.frames / FPS:.2f} s")
            source_print = fingerprint(path, 3), path.stat().st_mtime_ns
        except (UserError, OSError, ValueError) as error:
            skipped.append((path, str(error).removeprefix(f"{path}: ")))
            continue
        for start in starts:
            key = hash_of(VERSION, source_print, start, size, networks)
            clips.append(Clip(source, start, cache / f"{key}.safetensors"))
    make_folder(cache)
    skipped += encode_clips(clips, encoder_file, wav2vec2_file, size, cfg.device, getattr(torch, cfg.dtype))
    clips = [clip for clip in clips if clip.file.exists()]
    if clips:
        wanted = {p for clip in clips for p in (*clip.source.prompts(), clip.source.base_prompt())}
        prompts = encode_prompts(wanted, cfg.weights, cache, cfg.device, getattr(torch, cfg.dtype))
    print_report(paths, clips, skipped, cache)
    if not clips:
        raise UserError(f"{cfg.data}: no usable video; {cache / 'skipped.txt'} says why for each file")
    return Encoded(clips, prompts, skipped)


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


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}; give another folder by --cache") from error


def printable(text: object) -> str:
    """On one line, what is no text (bytes of a file name that are not UTF-8) replaced."""
    return " ".join(str(text).encode(errors="replace").decode().split())


def print_report(paths: list[Path], clips: list[Clip], skipped: Skipped, cache: Path) -> None:
    """Say what there is and what was left out; each left-out file with its reason goes into skipped.txt."""
    sources = {clip.source for clip in clips}
    wild = [s for s in sources if s.aist is None]
    test = sum(s.aist is not None and s.aist.music in TEST_TRACKS for s in sources)
    bare = sum(not s.caption for s in wild)
    print(
        f"{len(paths)} videos: {len(sources) - len(wild)} AIST ({test} of them test music, held out), {len(wild)} in "
        f"the wild ({bare} without a caption), {len(paths) - len(sources)} left out; {len(clips)} clips in {cache}"
    )
    lines = [(printable(path), printable(why)) for path, why in skipped]
    (cache / "skipped.txt").write_text("".join(f"{path}\t{why}\n" for path, why in lines))
    reasons = {}  # one line for each kind of reason: numbers aside
    for path, why in lines:
        reasons.setdefault(re.sub(r"\d+(\.\d+)?", "#", why), []).append((path, why))
    for alike in sorted(reasons.values(), key=len, reverse=True):
        print(f"  {len(alike)} x {alike[0][1]} (such as {alike[0][0]})")
