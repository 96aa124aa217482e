"""Encode once: the clips of a folder of dance videos become files of latents and tokens.

Concept   each clip is encoded into one file, video as mean and log-variance of the latent, sound as Wav2Vec 2.0
          tokens; all prompts go into one file of T5 tokens. A file is named by a hash of what it was made from, so a
          stale one is never used; it is written whole or not at all, so a killed run goes on; and a process claims it
          while writing, so that several may share the work.
Paper     arXiv 2503.14505v2, Sec. 5.1; Sec. 4.4 (in-the-wild clips have captions of their own).
Differs   the posterior is stored instead of a draw from it.

Dimension key   C latent channels   T H W latent frames, height, width   L text tokens   E text width
                A music tokens   D width of a music token
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import audio
import media
import mochi_vae
import t5
import tensors
from config import UserError, make_folder
from data_clips import DataConfig, cut_videos, fingerprint, frame_size, read_clip, weights_part
from data_names import TEST_TRACKS, Skipped, Source

VERSION = 1  # of what is stored: a change makes all old encodings stale
SPIECE = ("t5/spiece.model", "tokenizer/spiece.model")


@dataclass(frozen=True)
class Clip:
    """F frames of a source from `start`, in frames at 30 a second; `file` is its encoding in the cache."""

    source: Source
    start: int
    file: Path


def fingerprint_weights(path: Path) -> str:
    """Hash of the headers and sampled bytes of the files of a network."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in (".safetensors", ".model"))
    return hashlib.sha256("".join(fingerprint(file, 64, 2**20) for file in files).encode()).hexdigest()


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
    handle = take_lock(lock, wait)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            lock.unlink(missing_ok=True)  # first: whoever waits finds that this lock file is no more
            handle.close()


def take_lock(lock: Path, wait: bool):
    """The locked file, open; None if another process holds it."""
    while True:
        handle = open(lock, "w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(lock)):
                return handle
        except BlockingIOError:
            handle.close()
            return None
        except FileNotFoundError:
            pass
        handle.close()  # its holder has removed it meanwhile: a lock that nobody else would see


def remove_torn(cache: Path) -> None:
    """Remove what killed processes were writing; what a living one writes is claimed by it, and stays."""
    for torn in cache.glob("*.safetensors.tmp*"):
        with claim(cache / torn.name.split(".tmp")[0], wait=False) as mine:
            if mine:
                torn.unlink(missing_ok=True)


@torch.no_grad()
def encode_clip(clip: Clip, frames: int, height: int, width: int, encoder, wav2vec2, device) -> dict[str, Tensor]:
    """`mean` and `logvar` (C, T, H, W) of z_vae and the music tokens `audio` (A, D) of one clip.

    raises   UserError if its pictures or sound are broken or too short
    """
    video, sound = read_clip(clip.source, clip.start, frames, height, width)  # (3, F, H, W), (S,)
    mean, logvar = encoder(video[None].to(device))  # (1, C, T, H, W) each
    music = wav2vec2(audio.prepare(sound, frames).to(device))  # (1, A, D)
    # float16 keeps 11 bits: far finer than the posterior's own spread, and half the disk
    encoding = {"mean": mean[0].half(), "logvar": logvar[0].clamp(-30, 20).half(), "audio": music[0].float()}
    if not all(tensor.isfinite().all() for tensor in encoding.values()):
        raise UserError(f"{clip.source.path}: its encoding from frame {clip.start} on is not finite")
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
    paths, cuts, skipped = cut_videos(cfg, size)
    clips = []
    for source, start, source_print in cuts:
        key = hash_of(VERSION, source_print, start, size, networks)
        clips.append(Clip(source, start, cache / f"{key}.safetensors"))
    make_folder(cache, "--cache")
    remove_torn(cache)
    skipped += encode_clips(clips, encoder_file, wav2vec2_file, size, cfg.device, getattr(torch, cfg.dtype))
    clips = [clip for clip in clips if clip.file.exists()]
    if clips:
        wanted = {p for clip in clips for p in (*clip.source.prompts(), clip.source.base_prompt())}
        prompts = encode_prompts(wanted, cfg.weights, cache, cfg.device, getattr(torch, cfg.dtype))
    print_report(paths, clips, skipped, cache)
    if not clips:
        raise UserError(f"{cfg.data}: no usable video; {cache / 'skipped.txt'} says why for each file")
    return Encoded(clips, prompts, skipped)


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
    with media.new_file(cache / "skipped.txt") as temporary:
        temporary.write_text("".join(f"{path}\t{why}\n" for path, why in lines), encoding="utf-8")
    reasons = {}  # one line for each kind of reason: numbers aside
    for path, why in lines:
        reasons.setdefault(re.sub(r"\d+(\.\d+)?", "#", why), []).append((path, why))
    for alike in sorted(reasons.values(), key=len, reverse=True):
        print(f"  {len(alike)} x {alike[0][1]} (such as {alike[0][0]})")
