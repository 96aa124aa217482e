"""Dance to music: the ODE of Eq. (2) by Euler steps, with guidance; and the command that makes an mp4 of it.

Concept   start from noise, follow the velocity of the model from sigma = 1 to 0, decode the latent into frames.
          Guidance adds differences of velocities: with and without the prompt (CFG), or a block (layer skip).
Paper     arXiv 2503.14505v2, Eq. (2) ODE, Eq. (3) CFG, Eq. (4) layer-skip guidance, Sec. 5.1 (CFG scale 6), Fig. 7
          (speed of the music). In flow coordinates (see schedule.py) D - x is proportional to the velocity, so that
          each equation keeps its form with velocities in place of (D - x) / s.
Differs   the published code crops the music at a random place: ours starts at 0 or at --start.
          In the published code the unconditional pass hears the music too, so CFG amplifies the prompt only; an adapter
          whose header says null_audio = drop leaves the music out there, so that CFG amplifies both.
"""

import json
import math
import re
import resource
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import audio
import beats
import media
import mochi_vae
import t5
import tensors
from check import ADAPTER, DECODER, Files, check_networks, find_files, made_for
from config import UserError, flag, from_cli, run
from model import MusicInfuser, load_musicinfuser
from schedule import linear_quadratic

SOUND_HZ = 48_000  # of the mp4's sound; the model hears 16 kHz
TEMPO_S = 10  # seconds of music that the filmstrip's beats are found in, more than a clip has
WATCHABLE = 512  # pixels: smaller videos are written enlarged
STRIP = 12  # frames of a filmstrip
LATENTS = ".latents.safetensors"  # beside the mp4
Text = tuple[Tensor, Tensor]  # features (B, L, F), mask (B, L)


@torch.no_grad()
def sample(
    m: MusicInfuser,
    noise: Tensor,
    sigmas: Sequence[float],
    text: Text,
    null_text: Text,
    audio: Tensor | None = None,
    null_audio: str | None = None,
    cfg: float = 6.0,
    skip_layers: Collection[int] = (),
    skip_scale: float = 0.0,
    progress: bool = False,
) -> Tensor:
    """Noise (B, C, T, H, W) -> z_dit (B, C, T, H, W) float32, by Euler steps along `sigmas`, from 1 to 0.

        dz/dsigma = -v                                                   Eq. (2)
        v = cfg v(z | c, a) + (1 - cfg) v(z)                             Eq. (3)
        v = v + skip_scale (v(z | c, a) - v_skip(z | c, a))              Eq. (4)

    text, null_text          features (B, L, F) and mask (B, L) of the prompt and of the empty prompt
    audio                    (B, A, audio_dim) or None
    null_audio               does v(z) hear the music: "keep" yes, "drop" no, None as the adapter was made for
    cfg                      1 runs the conditional pass only
    skip_layers, skip_scale  v_skip passes these blocks by; 0 runs no such pass
    """
    if null_audio is None:
        null_audio = m.adapters.null_audio if m.adapters else "keep"
    background = audio if null_audio == "keep" else None
    z = noise.float()
    for sigma, following in zip(tqdm(sigmas[:-1], "sampling", disable=not progress), sigmas[1:]):
        level = torch.full((len(z),), sigma, device=z.device)
        v = conditional = m(z, level, *text, audio).float()
        if cfg != 1:
            unconditional = m(z, level, *null_text, background).float()
            v = cfg * conditional + (1 - cfg) * unconditional
        if skip_scale:
            v = v + skip_scale * (conditional - m(z, level, *text, audio, skip_layers).float())
        z = z + (sigma - following) * v
    return z


def null_of(text: Text) -> Text:
    """The empty prompt in the shape of `text`: features zero, mask all False."""
    features, mask = text
    return torch.zeros_like(features), torch.zeros_like(mask)


# ------------------------------------------------------------------------------------------------------ the command


@dataclass(frozen=True)
class SampleConfig:
    """Make a video that dances to a piece of music: an mp4 with the music on it, and a filmstrip of it as a PNG."""

    audio: Path = flag(help="music: any audio file, or a video with sound")
    prompt: str | None = flag(None, help="what to show (default: what the weights were made for)")
    weights: Path = flag(Path("weights/baby"), help="folder of checkpoints: dit.safetensors, t5, ...")
    adapter: Path | None = flag(ADAPTER, help="file, sought in --weights first; none: deaf")
    out: Path | None = flag(None, help="mp4 to write (default: out/AUDIO_SEED.mp4)")
    frames: int = flag(73, help="video frames, 1 + 6k, at 30 a second")
    steps: int | None = flag(None, help="sampling steps (default: what the weights were made for, else 64)")
    cfg: float | None = flag(None, help="classifier-free guidance scale (default: of the weights, else 6)")
    seed: int = flag(0, help="of the noise: another seed, another dance")
    start: float = flag(0.0, help="second of the music to start at")
    speed: float = flag(1.0, help="play the music this many times as fast, 0.25 to 4")
    skip_layer: int | None = flag(None, help="block left out for layer-skip guidance")
    skip_scale: float = flag(1.0, help="scale of layer-skip guidance, with --skip-layer")
    height: int | None = flag(None, help="pixels, a multiple of 16 (default: of the weights, else 480)")
    width: int | None = flag(None, help="pixels, a multiple of 16 (default: of the weights, else 848)")
    latents: Path | None = flag(
        None, help="decode these again: what an earlier run left beside its mp4, with its music"
    )
    device: str | None = flag(None, help="cpu, cuda, cuda:N or mps (default: cuda if there is one)")
    dtype: str | None = flag(None, help="float32 or bfloat16 (default: bfloat16 on cuda, float32 on cpu)")

    def __post_init__(self):
        below = self.frames - (self.frames - 1) % 6
        if self.frames < 1:
            raise UserError(f"--frames {self.frames}: the video VAE packs 1 + 6k frames; use 73")
        if below != self.frames:
            raise UserError(f"--frames {self.frames}: the video VAE packs 1 + 6k frames; use {below} or {below + 6}")
        for name in ("height", "width"):
            pixels = getattr(self, name)
            if pixels is not None and (pixels < 16 or pixels % 16):
                raise UserError(f"--{name} {pixels}: expected a multiple of 16; use {max(16, pixels // 16 * 16)}")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"--steps {self.steps}: expected at least 1")
        if not 0.25 <= self.speed <= 4:
            raise UserError(f"--speed {self.speed}: expected 0.25 to 4 times as fast; 1 leaves the music alone")
        if not 0 <= self.start < math.inf:
            raise UserError(f"--start {self.start}: expected seconds from the beginning of the music, 0 or more")
        if not all(math.isfinite(x) for x in (self.cfg or 0.0, self.skip_scale)):
            raise UserError(f"--cfg {self.cfg}, --skip-scale {self.skip_scale}: expected finite numbers")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: expected 0 to 2^63 - 1")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype}: expected float32 or bfloat16 (float16 overflows in T5)")
        if self.out is not None and self.out.suffix != ".mp4":
            raise UserError(f"--out {self.out}: expected a name that ends in .mp4")


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
def encode_text(files: Files, prompt: str, device="cpu", dtype=torch.float32) -> Text:
    """A prompt -> features (1, L, F), mask (1, L). T5 goes through memory block by block."""

    def stream(ids: Tensor, mask: Tensor) -> Tensor:
        return t5.stream_t5(files.text, ids, mask, device, dtype)

    features, mask = t5.encode(stream, t5.Tokenizer(files.vocabulary), [prompt], device)
    return features, mask.cpu()  # the transformer looks at the mask on the host


@torch.no_grad()
def encode_music(files: Files, waveform: Tensor, num_frames: int, device="cpu") -> Tensor:
    """A waveform (S,) at 16 kHz -> music tokens (1, A, audio_dim), in float32."""
    encoder = audio.load_wav2vec2(files.music, device=device)
    return encoder(audio.prepare(waveform, num_frames).to(device))


def decode(path: Path, z_dit: Tensor, dtype=torch.float32) -> Iterator[np.ndarray]:
    """Latent (1, C, T, H, W) -> frames (H, W, 3) uint8, one by one, as soon as the decoder in `path` has them."""
    decoder = mochi_vae.load_decoder(path, z_dit.device, dtype)
    for part in decoder.stream(mochi_vae.to_vae_space(z_dit)):  # (1, 3, t, H, W) in about [-1, 1]
        pixels = (part[0].float().clamp(-1, 1) * 127.5 + 127.5).round().byte()
        yield from pixels.permute(1, 2, 3, 0).cpu().numpy()


def keep(frames: Iterator[np.ndarray], numbers: Collection[int], kept: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Pass the frames on; copies of those with these numbers stay in the list `kept`."""
    for i, frame in enumerate(frames):
        if i in numbers:
            kept.append(frame.copy())
        yield frame


def save_latents(path: Path, z_dit: Tensor, args: SampleConfig) -> None:
    """Write z_dit (1, C, T, H, W) with all the settings that made it."""
    tensors.save(path, {"z_dit": z_dit}, {"settings": json.dumps(asdict(args), default=str)})


def load_latents(args: SampleConfig, device: torch.device) -> tuple[Tensor, SampleConfig]:
    """The z_dit that `save_latents` wrote, and `args` with those of its settings that decoding looks at."""
    w = tensors.open_weights(args.latents)
    shape = w.shapes.get("z_dit", ())
    try:
        told = json.loads(w.metadata["settings"])
        told = {"prompt": str(told["prompt"]), "start": float(told["start"]), "speed": float(told["speed"])}
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{args.latents}: not latents that this command saved") from error
    if len(shape) != 5 or shape[:2] != (1, mochi_vae.LATENT) or 0 in shape:
        raise UserError(f"{args.latents}: not latents that this command saved: z_dit is {shape}")
    T, H, W = shape[2:]
    args = replace(args, **told, frames=6 * T - 5, height=8 * H, width=8 * W)
    return w.read("z_dit", device, torch.float32), args


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


def dance(args: SampleConfig, files: Files, heard: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Text, music, sampling, one network in memory after the other: -> z_dit (1, C, T, H, W)."""
    print(f"weights    {files.dit} with {files.adapter or 'no adapter: it does not hear the music'}")
    print(f"sampler    {args.steps} steps, cfg {args.cfg:g}, seed {args.seed}")
    small = "take fewer --frames, a smaller --height and --width, or --dtype bfloat16"
    with stage("text", device, "try --device cpu"):
        text = encode_text(files, args.prompt, device, dtype)
    with stage("music", device, "take fewer --frames, or --device cpu"):
        music = encode_music(files, heard, args.frames, device) if files.adapter else None
    with stage("sample", device, small):
        m = load_musicinfuser(files.dit, files.adapter, device=device, dtype=dtype)
        m.merge()
        shape = (1, 12, (args.frames - 1) // 6 + 1, args.height // 8, args.width // 8)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed)).to(device)  # same on any device
        skip = ((), 0.0) if args.skip_layer is None else ((args.skip_layer,), args.skip_scale)
        sigmas = linear_quadratic(args.steps)
        z = sample(m, noise, sigmas, text, null_of(text), music, None, args.cfg, *skip, progress=True)
    if not z.isfinite().all():
        raise UserError("the sampler left the range of numbers; use a smaller --cfg, or --dtype float32")
    return z


def main() -> None:
    args = from_cli(SampleConfig)
    # everything that can be wrong is found out first
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if args.latents:
        (z, args), decoder = load_latents(args, device), DECODER.find(args.weights)
        mochi_vae.load_decoder(decoder, "meta")
        name = args.latents.name.removesuffix(".safetensors").removesuffix(".latents")
        out = args.out or args.latents.with_name(f"{name}.mp4")
    else:
        files = find_files(args.weights, args.adapter)
        checked, decoder = check_networks(files), files.decoder
        if args.skip_layer is not None and not 0 <= args.skip_layer < len(checked.dit.blocks):
            raise UserError(f"--skip-layer {args.skip_layer}: expected 0 to {len(checked.dit.blocks) - 1}")
        args = replace(args, **{k: value for k, value in made_for(files.dit).items() if getattr(args, k) is None})
        out = args.out or Path("out") / f"{args.audio.stem}_{args.seed}.mp4"
    dur_s = audio.clip_samples(args.frames) / audio.SR_HZ  # of the music that the model hears: a little more than shown
    heard = read_section(args.audio, audio.SR_HZ, args.start, dur_s, args.speed)
    audio.prepare(heard, args.frames)
    shown_s = args.frames / audio.FPS
    sound = read_section(args.audio, SOUND_HZ, args.start, max(shown_s, TEMPO_S), args.speed).numpy()
    check_output(out)

    end_s = args.start + len(heard) / audio.SR_HZ * args.speed
    silence_s = dur_s - len(heard) / audio.SR_HZ
    print(f"music      {args.audio}, {args.start:.2f} to {end_s:.2f} s" + f", at {args.speed:g}x" * (args.speed != 1))
    if silence_s > 0.5 / audio.SR_HZ:
        print(f"           it ends {silence_s:.2f} s before the clip does: silence from there on")
    print(f"prompt     {args.prompt}")
    print(f"video      {args.frames} frames of {args.width}x{args.height}, 30 a second")
    latents = args.latents or out.with_suffix(LATENTS)
    if not args.latents:
        z = dance(args, files, heard, device, dtype)
        save_latents(latents, z, args)  # before decoding: a decode that fails loses nothing
        print(f"wrote      {latents}")
    again = f"the latents are safe: --latents {latents} decodes them again, with --dtype bfloat16 or --device cpu"
    scale = max(1, WATCHABLE // max(args.height, args.width))
    count, kept = min(STRIP, args.frames), []
    numbers = {int((i + 0.5) * args.frames / count) for i in range(count)}
    with stage("decode", device, again):
        frames = keep(decode(decoder, z, dtype), numbers, kept)
        media.write_mp4(out, frames, audio.FPS, sound, SOUND_HZ, scale)
    sound = np.pad(sound, (0, max(0, round(shown_s * SOUND_HZ) - len(sound))))
    bpm, beats_s = beats.music_beats(sound, SOUND_HZ)
    strip, title = out.with_suffix(".png"), f"{args.prompt} ({bpm:.0f} beats a minute found)"
    media.filmstrip(strip, kept, sound, SOUND_HZ, len(kept) / shown_s, beats_s[beats_s < shown_s], title=title)
    print(f"wrote      {out}" + f" (enlarged {scale} times for watching)" * (scale > 1))
    print(f"wrote      {strip}")


if __name__ == "__main__":
    run(main)
