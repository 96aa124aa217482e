"""What each guidance does, in pictures: the same noise, prompt and music, sampled with one scale turned.

Concept   one picture for each term of sample.py's update; its rows differ in the flags that stand above them and in
          nothing else, so any row is `sample.py` with these flags. Below the frames runs the height of the body, read
          from the pixels, with the beats found in the music as lines.
Paper     arXiv 2503.14505v2, Eq. (3) and (4); guidance by music alone and rescaling are not in the paper.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import audio
import beats
from check import ADAPTER, find_files, made_for
from config import UserError, flag, from_cli, run
from figures import Strip, strips
from model import load_musicinfuser
from sample import SampleConfig, null_of, sample
from schedule import linear_quadratic
from stages import TEMPO_S, decode, encode_music, encode_text, pick_device, read_section

SOUND_HZ = 16_000
PICTURES = {  # file: title, flags of each row
    "guidance-prompt": (
        "Guidance by the prompt (CFG, Eq. 3)",
        ({"cfg": 1.0}, {"cfg": 3.0}, {"cfg": 8.0}),
    ),
    "guidance-layer": (
        "Guidance by a block left out (layer skip, Eq. 4)",
        ({"skip_scale": 0.0}, {"skip_scale": 0.5}, {"skip_scale": 3.0}),
    ),
    "guidance-music": (
        "Guidance by the music",
        (
            {"null_audio": "keep", "music_scale": 0.0},
            {"null_audio": "keep", "music_scale": 1.0},
            {"null_audio": "keep", "music_scale": 4.0},
        ),
    ),
    "guidance-rescale": (
        "Strong guidance, and its contrast taken back",
        ({"cfg": 8.0, "rescale": 0.0}, {"cfg": 8.0, "rescale": 0.7}),
    ),
}


@dataclass(frozen=True)
class GuidanceConfig:
    """Draw what each guidance does: one picture each, rows that differ in one flag."""

    audio: Path = flag(Path("demo/demo.ogg"), help="music")
    prompt: str | None = flag(None, help="what to show (default: what the weights were made for)")
    weights: Path = flag(Path("weights/baby"), help="folder of checkpoints")
    adapter: Path = flag(ADAPTER, help="file, sought in --weights first")
    out: Path = flag(Path("docs"), help="folder for the pictures")
    skip_layer: str = flag("0", help="block, or blocks, left out for layer-skip guidance")
    frames: int = flag(73, help="video frames, 1 + 6k")
    steps: int | None = flag(None, help="sampling steps (default: what the weights were made for)")
    seed: int = flag(0, help="of the noise")
    device: str | None = flag(None, help="cpu, cuda, cuda:N or mps (default: cuda if there is one)")
    dtype: str | None = flag(None, help="float32 or bfloat16 (default: bfloat16 on cuda, float32 on cpu)")

    def as_sample(self) -> SampleConfig:
        """The same for sample.py, with what the weights were made for filled in."""
        args = SampleConfig(**{key: value for key, value in asdict(self).items() if key != "out"})
        made = made_for(find_files(self.weights, self.adapter).dit)
        return replace(args, **{key: value for key, value in made.items() if getattr(args, key) is None})


def label(args: SampleConfig, flags: dict) -> str:
    """The flags of a row as they are typed."""
    flags = ({"skip_layer": args.skip_layer} if "skip_scale" in flags else {}) | flags
    numbers = {key: f"{value:g}" if isinstance(value, float) else value for key, value in flags.items()}
    return "  ".join(f"--{key.replace('_', '-')} {value}" for key, value in numbers.items())


@torch.no_grad()
def dance(args: SampleConfig, rows: list[dict]) -> list[np.ndarray]:
    """A video (F, H, W, 3) uint8 for each set of flags, from the same noise."""
    files, device = find_files(args.weights, args.adapter), pick_device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    text = encode_text(files, [args.prompt], device, dtype)
    heard = read_section(args.audio, audio.SR_HZ, args.start, audio.clip_samples(args.frames) / audio.SR_HZ, args.speed)
    music = encode_music(files, heard, args.frames, device)
    m = load_musicinfuser(files.dit, files.adapter, device=device, dtype=dtype)
    m.merge()
    shape = (1, 12, (args.frames - 1) // 6 + 1, args.height // 8, args.width // 8)
    noise = torch.randn(shape[1:], generator=torch.Generator().manual_seed(args.seed))[None].to(device)
    videos, sigmas = [], linear_quadratic(args.steps)
    for flags in tqdm(rows, "videos", unit="video"):
        row = replace(args, **flags)
        guidance = row.null_audio, row.cfg, row.skip_layers(), row.skip_scale, row.music_scale, row.rescale
        z = sample(m, noise, sigmas, text, null_of(text), music, *guidance)
        videos.append(np.stack(list(decode(files.decoder, z, dtype))))
    return videos


def main() -> None:
    cfg = from_cli(GuidanceConfig)
    args = replace(cfg.as_sample(), skip_scale=0.0)
    depth = len(load_musicinfuser(find_files(args.weights, args.adapter).dit, device="meta").dit.blocks)
    if any(not 0 <= layer < depth for layer in args.skip_layers()):
        raise UserError(f"--skip-layer {args.skip_layer}: expected 0 to {depth - 1}")
    sound = read_section(args.audio, SOUND_HZ, args.start, max(args.frames / audio.FPS, TEMPO_S), args.speed).numpy()
    _, beats_s = beats.music_beats(sound, SOUND_HZ)
    rows = [flags for _, every in PICTURES.values() for flags in every]
    videos = iter(dance(args, rows))
    for name, (title, every) in PICTURES.items():
        drawn = [Strip(label(args, flags), next(videos), beats_s) for flags in every]
        strips(cfg.out / f"{name}.webp", drawn, title)


if __name__ == "__main__":
    run(main)
