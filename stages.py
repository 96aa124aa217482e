"""The stages around the sampler: device, section of the music, text, music, decoding, latents kept, memory told.

Concept   one network is in memory at a time; what a stage leaves behind is small. A stage that lacks memory says what
          to change; latents are on disk before they are decoded.
Paper     arXiv 2503.14505v2, Sec. 5.1 (text and music encoders), Fig. 7 (speed of the music). The rest is plumbing.
"""

import json
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import audio
import beats
import drawing
import media
import mochi_vae
import t5
import tensors
from check import Files
from config import UserError

SOUND_HZ = 48_000  # of the mp4's sound; the model hears 16 kHz
TEMPO_S = 10  # seconds of music that the filmstrip's beats are found in, more than a clip has
STRIP = 12  # frames of a filmstrip
WATCHABLE = 512  # pixels: smaller videos are written enlarged
Text = tuple[Tensor, Tensor]  # features (B, L, F), mask (B, L)


def pick_device(name: str | None) -> torch.device:
    """The device of that name, tried out; UserError if there is none."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here; expected cpu, cuda, cuda:N or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: expected cpu, cuda, cuda:N or mps")
    return device


def join_others(name: str | None) -> tuple[int, int, torch.device]:
    """(rank, number of processes, device of this one): alone unless torchrun started us, else one device a process."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and (name == "cuda" or (name is None and torch.cuda.is_available())):
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(name)
    if world > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def check_output(path: Path) -> None:
    """UserError if a file cannot be written there; leaves nothing behind."""
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "is a folder; expected a file name")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def read_section(path: Path, sr_hz: int, start_s: float, dur_s: float, speed: float) -> Tensor:
    """The music that is heard for `dur_s` seconds from `start_s` on, played at `speed`: (S,), shorter if it ends."""
    margin_s = 0.05 * speed  # the resampler of change_speed looks ahead
    wave = torch.from_numpy(media.read_audio(path, sr_hz, start_s, dur_s * speed + margin_s))
    return audio.change_speed(wave, speed)[: round(dur_s * sr_hz)]


@torch.no_grad()
def encode_text(files: Files, prompts: Sequence[str], device="cpu", dtype=torch.float32) -> Text:
    """B prompts -> features (B, L, F), mask (B, L). T5 goes through memory block by block, once."""

    def stream(ids: Tensor, mask: Tensor) -> Tensor:
        return t5.stream_t5(files.text, ids, mask, device, dtype)

    features, mask = t5.encode(stream, t5.Tokenizer(files.vocabulary), prompts, device)
    return features, mask.cpu()  # the transformer looks at the mask on the host


@torch.no_grad()
def encode_music(files: Files, waveform: Tensor, num_frames: int, device="cpu") -> Tensor:
    """A waveform (S,) at 16 kHz -> music tokens (1, A, audio_dim), in float32."""
    encoder = audio.load_wav2vec2(files.music, device=device)
    return encoder(audio.prepare(waveform, num_frames).to(device))


def decode(path: Path, z_dit: Tensor, dtype=torch.float32) -> Iterator[np.ndarray]:
    """Latent (1, C, T, H, W) -> frames (H, W, 3) uint8, one by one, as soon as the decoder in `path` has them."""
    decoder = mochi_vae.load_decoder(path, z_dit.device, dtype)
    for part in decoder.stream(mochi_vae.to_vae_space(z_dit)):
        yield from to_pixels(part)


def to_pixels(part: Tensor) -> np.ndarray:
    """A piece of film (1, 3, t, H, W) in about [-1, 1] -> (t, H, W, 3) uint8."""
    return (part[0].float().clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def keep(frames: Iterator[np.ndarray], numbers: Collection[int], kept: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Pass the frames on; copies of those with these numbers stay in the list `kept`."""
    for i, frame in enumerate(frames):
        if i in numbers:
            kept.append(frame.copy())
        yield frame


def save_latents(path: Path, z_dit: Tensor, settings: dict) -> None:
    """Write z_dit (1, C, T, H, W) with all the settings that made it."""
    tensors.save(path, {"z_dit": z_dit}, {"settings": json.dumps(settings, default=str)})


def load_latents(path: Path, device="cpu") -> tuple[Tensor, dict]:
    """The z_dit that `save_latents` wrote, and those of its settings that decoding looks at."""
    w = tensors.open_weights(path)
    shape = w.shapes.get("z_dit", ())
    try:
        told = json.loads(w.metadata["settings"])
        told = {"prompt": str(told["prompt"]), "start": float(told["start"]), "speed": float(told["speed"])}
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not latents that this command saved") from error
    if len(shape) != 5 or shape[:2] != (1, mochi_vae.LATENT) or 0 in shape:
        raise UserError(f"{path}: not latents that this command saved: z_dit is {shape}")
    T, H, W = shape[2:]
    return w.read("z_dit", device, torch.float32), told | {"frames": 6 * T - 5, "height": 8 * H, "width": 8 * W}


def write_video(latents: Path, music: Path, out: Path, decoder: Path, device, dtype=torch.float32) -> None:
    """Decode latents that `save_latents` wrote into an mp4 with its music on it, then draw its filmstrip, OUT.png."""
    z, told = load_latents(latents, device)
    shown_s = told["frames"] / audio.FPS
    sound = read_section(music, SOUND_HZ, told["start"], max(shown_s, TEMPO_S), told["speed"]).numpy()
    again = f"the latents are safe: --latents {latents} decodes them again, with --dtype bfloat16 or --device cpu"
    scale = max(1, WATCHABLE // max(told["height"], told["width"]))
    count, kept = min(STRIP, told["frames"]), []
    numbers = {int((i + 0.5) * told["frames"] / count) for i in range(count)}
    with stage("decode", device, again):
        frames = keep(decode(decoder, z, dtype), numbers, kept)
        media.write_mp4(out, frames, audio.FPS, sound, SOUND_HZ, scale)
    print(f"wrote      {out}" + f" (enlarged {scale} times for watching)" * (scale > 1), flush=True)
    sound = np.pad(sound, (0, max(0, round(shown_s * SOUND_HZ) - len(sound))))
    bpm, beats_s = beats.music_beats(sound, SOUND_HZ)
    strip, title = out.with_suffix(".png"), f"{told['prompt']} ({bpm:.0f} beats a minute found)"
    drawing.filmstrip(strip, kept, sound, SOUND_HZ, len(kept) / shown_s, beats_s[beats_s < shown_s], title=title)
    print(f"wrote      {strip}", flush=True)


@contextmanager
def stage(name: str, device: torch.device, advice: str) -> Iterator[None]:
    """Print the seconds a stage took, and the peak memory: of the device in this stage, of the host so far.

    raises   UserError with the advice if the memory of the device or the host does not suffice
    """
    start = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # CUDA and MPS say "out of memory", the CPU "can't allocate memory"
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        raise UserError(f"{device} has too little memory for the stage '{name}': {advice}") from error
    memory = ""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}, "
    if device.type == "mps":  # which counts no peaks
        memory = f"{torch.mps.driver_allocated_memory() / 2**30:.2f} GiB on mps at its end, "
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    print(f"{name:<10} {time.perf_counter() - start:7.1f} s   peak memory {memory}{host:.2f} GiB on the host")
