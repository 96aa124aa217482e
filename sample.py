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

import math
import resource
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

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
from config import UserError, flag, from_cli, run
from model import MusicInfuser, load_musicinfuser
from schedule import linear_quadratic

BASE_PROMPT = "a professional dancer dancing in a studio with a white backdrop"
OFFICIAL = {"height": 480, "width": 848, "steps": 64, "cfg": 6.0, "prompt": BASE_PROMPT}
SOUND_HZ = 48_000  # of the mp4's sound; the model hears 16 kHz
TEMPO_S = 10  # seconds of music that the filmstrip's beats are found in, more than a clip has
WATCHABLE = 512  # pixels: smaller videos are written enlarged
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
    adapter: Path | None = flag(Path("musicinfuser.safetensors"), help="file, sought in --weights first; none: deaf")
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
    device: str | None = flag(None, help="cpu, cuda or cuda:N (default: cuda if there is one)")
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


class Files(NamedTuple):
    """Where each network is: our layout of a weights folder, or the snapshots of the hub as they come."""

    text: Path
    vocabulary: Path
    music: Path | None
    dit: Path
    adapter: Path | None
    decoder: Path


def find_files(folder: Path, adapter: Path | None = Path("musicinfuser.safetensors")) -> Files:
    """UserError that names the first network without a file."""

    def find(what: str, *names: str) -> Path:
        for name in names:
            if (folder / name).exists():
                return folder / name
        raise UserError(f"{folder}: {what} missing; expected {' or '.join(str(folder / name) for name in names)}")

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of weights")
    if adapter is not None and not (folder / adapter).exists() and not adapter.exists():
        raise UserError(f"{folder / adapter}: no such adapter; give --adapter a file, or none for the bare prior")
    return Files(
        text=find("text encoder", "t5", "text_encoder"),
        vocabulary=find("vocabulary of the text encoder", "t5/spiece.model", "tokenizer/spiece.model"),
        music=adapter and find("music encoder", "wav2vec2", "wav2vec2.safetensors"),
        dit=find("video transformer", "dit.safetensors", "transformer"),
        adapter=adapter and (folder / adapter if (folder / adapter).exists() else adapter),
        decoder=find("video decoder", "decoder.safetensors", "vae"),
    )


def check_networks(files: Files) -> MusicInfuser:
    """Read every header: UserError if a file is broken, or one network does not fit the next. Allocates nothing."""
    m = load_musicinfuser(files.dit, files.adapter, device="meta")
    mochi_vae.load_decoder(files.decoder, "meta")
    made, read = t5.load_t5(files.text, "meta").embed.embedding_dim, m.dit.t5_yproj.in_features
    if made != read:
        raise UserError(f"{files.text}: makes features of width {made}, but {files.dit} reads {read}")
    if m.adapters:
        made = audio.load_wav2vec2(files.music, device="meta").encoder.layer_norm.weight.shape[0]
        read = m.adapters.audio_projection.projection[0].in_features
        if made != read:
            raise UserError(f"{files.music}: makes features of width {made}, but {files.adapter} reads {read}")
    return m


def made_for(dit: Path) -> dict:
    """What the weights were made for: `default_*` in the header of the transformer, else the official values."""
    header = tensors.open_weights(dit).metadata
    try:
        return {key: type(value)(header.get(f"default_{key}", value)) for key, value in OFFICIAL.items()}
    except ValueError as error:
        raise UserError(f"{dit}: a default_... entry of its header is not a number ({error})") from error


def pick_device(name: str | None) -> torch.device:
    """The device of that name, tried out; UserError if there is none."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here; expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:N")
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


def decode(files: Files, z_dit: Tensor, dtype=torch.float32) -> Iterator[np.ndarray]:
    """Latent (1, C, T, H, W) -> frames (H, W, 3) uint8, one by one, as soon as they are ready."""
    decoder = mochi_vae.load_decoder(files.decoder, z_dit.device, dtype)
    for part in decoder.stream(mochi_vae.to_vae_space(z_dit)):  # (1, 3, t, H, W) in about [-1, 1]
        pixels = (part[0].float().clamp(-1, 1) * 127.5 + 127.5).round().byte()
        yield from pixels.permute(1, 2, 3, 0).cpu().numpy()


@contextmanager
def stage(name: str, device: torch.device) -> Iterator[None]:
    """Print the seconds a stage took, and the peak memory: of the device in this stage, of the host so far."""
    start = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield
    memory = ""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        memory = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}, "
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    print(f"{name:<10} {time.perf_counter() - start:7.1f} s   peak memory {memory}{host:.2f} GiB on the host")


def main() -> None:
    args = from_cli(SampleConfig)
    # everything that can be wrong is found out first
    out = args.out or Path("out") / f"{args.audio.stem}_{args.seed}.mp4"
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    files = find_files(args.weights, args.adapter)
    checked = check_networks(files)
    if args.skip_layer is not None and not 0 <= args.skip_layer < len(checked.dit.blocks):
        raise UserError(f"--skip-layer {args.skip_layer}: expected 0 to {len(checked.dit.blocks) - 1}")
    args = replace(args, **{k: value for k, value in made_for(files.dit).items() if getattr(args, k) is None})
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
    print(f"weights    {files.dit} with {files.adapter or 'no adapter: it does not hear the music'}")
    print(f"video      {args.frames} frames of {args.width}x{args.height}, 30 a second")
    print(f"sampler    {args.steps} steps, cfg {args.cfg:g}, seed {args.seed}")

    with stage("text", device):
        text = encode_text(files, args.prompt, device, dtype)
    with stage("music", device):
        music = encode_music(files, heard, args.frames, device) if files.adapter else None
    with stage("sample", device):
        m = load_musicinfuser(files.dit, files.adapter, device=device, dtype=dtype)
        m.merge()
        shape = (1, 12, (args.frames - 1) // 6 + 1, args.height // 8, args.width // 8)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed)).to(device)  # same on any device
        skip = ((), 0.0) if args.skip_layer is None else ((args.skip_layer,), args.skip_scale)
        sigmas = linear_quadratic(args.steps)
        z = sample(m, noise, sigmas, text, null_of(text), music, None, args.cfg, *skip, progress=True)
        del m  # its memory is the decoder's now
    if not z.isfinite().all():
        raise UserError("the sampler left the range of numbers; use a smaller --cfg, or --dtype float32")
    scale = max(1, WATCHABLE // max(args.height, args.width))
    with stage("decode", device):
        frames = list(decode(files, z, dtype))
        media.write_mp4(out, frames, audio.FPS, sound, SOUND_HZ, scale)
    sound = np.pad(sound, (0, max(0, round(shown_s * SOUND_HZ) - len(sound))))
    bpm, beats_s = beats.music_beats(sound, SOUND_HZ)
    strip, title = out.with_suffix(".png"), f"{args.prompt} ({bpm:.0f} beats a minute found)"
    media.filmstrip(strip, frames, sound, SOUND_HZ, audio.FPS, beats_s[beats_s < shown_s], title=title)
    print(f"wrote      {out}" + f" (enlarged {scale} times for watching)" * (scale > 1))
    print(f"wrote      {strip}")


if __name__ == "__main__":
    run(main)
