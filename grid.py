"""The paper's test videos: ten held-out tracks times ten prompts from one set of weights, one folder a configuration.

Concept   text, music, every latent, then every video, so that no network is loaded twice and none waits in memory for
          another. Latents and videos that are there are not made again. Several devices share the grid: torchrun
          starts a process on each, or --part i/n gives one process its part.
Paper     arXiv 2503.14505v2, Sec. 5.1, App. I, Table 7 (tracks), App. J, Table 9 (prompts): 100 videos a configuration.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import audio
import media
import mochi_vae
import tensors
from check import Files, check_networks, find_files, made_for
from config import UserError, check_frames, flag
from data_encode import fingerprint_weights, hash_of
from data_names import TEST_TRACKS
from model import load_musicinfuser
from sample import null_of, sample
from schedule import linear_quadratic
from stages import SOUND_HZ, WATCHABLE, encode_music, encode_text, join_others, read_section, stage, to_pixels

FRONT = ", captured from a front view"
PROMPTS = tuple(prompt + FRONT for prompt in (  # Table 9
    "a male dancer dancing on a rooftop at sunset",
    "a female dancer dancing in a subway station",
    "a male dancer dancing in an art gallery with some paintings",
    "a female dancer wearing a leather jacket dancing in a studio with a white backdrop",
    "a male dancer wearing a hoodie dancing in a studio with a white backdrop",
    "a female dancer wearing a denim vest dancing in a studio with a white backdrop",
    "a female dancer wearing a Hawaiian dress dancing on Waikiki Beach at sunset with Diamond Head in the background",
    "a male dancer wearing a suit dancing in the middle of a New York City",
    "a male dancer wearing a chef's uniform dancing in a busy restaurant kitchen with flames from the grill behind him",
    "a female dancer wearing a Renaissance gown dancing in a Venetian masquerade ball with ornate chandeliers overhead",
))  # fmt: skip


@dataclass(frozen=True)
class GenerateConfig:
    """Make the paper's test videos: 10 held-out tracks x 10 prompts. What is there already is not made again.

    With torchrun --nproc_per_node=N they are divided among N devices."""

    music: Path = flag(help="folder with the test tracks: mBR0.mp3, ..., or AIST videos of them")
    out: Path = flag(help="folder for the videos; its name is the configuration's (ours, all_layers, mochi, ...)")
    weights: Path = flag(Path("weights/baby"), help="folder of checkpoints")
    adapter: Path | None = flag(Path("musicinfuser.safetensors"), help="file, sought in --weights first; none: deaf")
    frames: int = flag(73, help="video frames, 1 + 6k, at 30 a second")
    steps: int | None = flag(None, help="sampling steps (default: what the weights were made for, else 64)")
    cfg: float | None = flag(None, help="guidance scale (default: of the weights, else 6)")
    seed: int = flag(0, help="of the noise; the same for every configuration, so that videos are comparable")
    batch: int = flag(1, help="videos to sample at once")
    part: str = flag("1/1", help="i/n: make every n-th video only, from the i-th on; for several machines")
    device: str | None = flag(None, help="cpu, cuda or cuda:N (default: cuda if there is one)")
    dtype: str | None = flag(None, help="float32 or bfloat16 (default: bfloat16 on cuda, float32 on cpu)")

    def __post_init__(self):
        check_frames(self.frames)
        if self.dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype}: expected float32 or bfloat16")
        for name in ("steps", "batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: expected at least 1")
        self.division()

    def division(self) -> tuple[int, int]:
        """--part as (first item, stride)."""
        i, slash, n = self.part.partition("/")
        if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
            raise UserError(f"--part {self.part}: expected i/n with 1 <= i <= n, such as 1/8")
        return int(i) - 1, int(n)


def find_track(folder: Path, track: str) -> Path:
    """The file called mBR0.*, else the first AIST video to that track; UserError if there is neither."""
    if not folder.is_dir():
        raise UserError(f"--music {folder}: no such folder")
    files = sorted(path for path in folder.glob(f"*{track}*") if path.is_file() and path.suffix != ".json")
    for path in [p for p in files if p.stem == track] + [p for p in files if f"_{track}_ch" in p.stem]:
        return path
    raise UserError(f"{folder}: no {track}.mp3 (wav, flac, ...) and no AIST video with {track} in its name")


def grid() -> list[dict]:
    """The 100 videos in order: name, track, prompt."""
    tracks = sorted(TEST_TRACKS)
    return [{"name": f"{t}_p{k:02d}", "track": t, "prompt": p} for t in tracks for k, p in enumerate(PROMPTS)]


def claim(out: Path, settings: dict) -> None:
    """Write grid.json, or check that the one there was written with the same settings."""
    path, text = out / "grid.json", json.dumps({"settings": settings, "videos": grid()}, indent=1)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"{out}: holds videos made with other settings (grid.json); give --out another folder")
    with media.new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def generate(cfg: GenerateConfig) -> None:
    """Sample every latent that is not there, then decode every video that is not there: each network is loaded once.

    raises   UserError at the end, naming the videos that failed, if any did
    """
    files, (first, stride) = find_files(cfg.weights, cfg.adapter), cfg.division()
    rank, world, device = join_others(cfg.device)
    dtype = getattr(torch, cfg.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    check_networks(files)
    made = made_for(files.dit)
    made["steps"] = made["steps"] if cfg.steps is None else cfg.steps
    made["cfg"] = made["cfg"] if cfg.cfg is None else cfg.cfg
    music = {track: find_track(cfg.music, track) for track in sorted(TEST_TRACKS)}
    networks = hash_of([fingerprint_weights(path) for path in files if path])
    settings = {key: str(getattr(cfg, key)) for key in ("weights", "adapter", "frames", "seed", "music")}
    claim(
        cfg.out, settings | {key: made[key] for key in ("steps", "cfg")} | {"dtype": str(dtype), "networks": networks}
    )

    def latent(item: dict) -> Path:
        return cfg.out / "latents" / f"{item['name']}.safetensors"

    mine = grid()[first::stride][rank::world]
    items = [item for item in mine if not (cfg.out / f"{item['name']}.mp4").exists()]
    waiting, failed = [item for item in items if not latent(item).exists()], {}
    for item, z in latents(cfg, files, made, music, waiting, device, dtype) if waiting else ():
        if z.isfinite().all():
            tensors.save(latent(item), {"z_dit": z})
        else:
            failed[item["name"]] = "the sampler left the range of numbers"
    ready = [item for item in items if latent(item).exists()]
    decoder = mochi_vae.load_decoder(files.decoder, device, dtype) if ready else None
    enlarge = max(1, WATCHABLE // max(made["height"], made["width"]))
    for item in tqdm(ready, "decoding", unit="video", disable=rank > 0):
        z = tensors.open_weights(latent(item)).read("z_dit", device)
        sound = read_section(music[item["track"]], SOUND_HZ, 0.0, cfg.frames / audio.FPS, 1.0).numpy()
        media.write_mp4(cfg.out / f"{item['name']}.mp4", frames_of(decoder, z), audio.FPS, sound, SOUND_HZ, enlarge)
        latent(item).unlink()
    print(f"wrote      {cfg.out}: {len(ready)} videos now, {len(list(cfg.out.glob('*.mp4')))} of 100 in all")
    if dist.is_initialized():
        dist.destroy_process_group()
    if failed:
        raise UserError(f"{len(failed)} videos failed: " + "; ".join(f"{name}: {why}" for name, why in failed.items()))


@torch.no_grad()
def latents(cfg: GenerateConfig, files: Files, made: dict, music: dict, items: list, device, dtype) -> Iterator:
    """Yield (item, z_dit (1, C, T, H, W)) one by one. Text, music and transformer are read once, one after the other.

    The noise is a function of (seed, place in the grid): the same for every configuration, part, batch and device.
    """
    prompts, tracks = ([*dict.fromkeys(item[key] for item in items)] for key in ("prompt", "track"))
    with stage("text", device, "try --device cpu"):
        features, mask = encode_text(files, prompts, device, dtype)  # (P, L, F), (P, L)
    heard, dur_s = None, audio.clip_samples(cfg.frames) / audio.SR_HZ
    with stage("music", device, "take fewer --frames, or --device cpu"):
        if files.adapter:
            sections = [read_section(music[track], audio.SR_HZ, 0.0, dur_s, 1.0) for track in tracks]
            heard = torch.cat([encode_music(files, section, cfg.frames, device) for section in sections])  # (N, A, D)
    shape = (mochi_vae.LATENT, (cfg.frames - 1) // 6 + 1, made["height"] // 8, made["width"] // 8)
    sigmas, order = linear_quadratic(made["steps"]), [item["name"] for item in grid()]
    bar = tqdm(total=len(items), desc="sampling", unit="video", disable=device.index not in (None, 0))
    with stage("sample", device, "take fewer --frames, a smaller --batch, or --dtype bfloat16"):
        m = load_musicinfuser(files.dit, files.adapter, device=device, dtype=dtype)
        m.merge()
        for some in (items[k : k + cfg.batch] for k in range(0, len(items), cfg.batch)):
            seeds = [cfg.seed * 1_000_003 + order.index(item["name"]) for item in some]
            draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            which = [prompts.index(item["prompt"]) for item in some]
            text = features[which], mask[which]
            sound = None if heard is None else heard[[tracks.index(item["track"]) for item in some]]
            z = sample(m, torch.stack(draws).to(device), sigmas, text, null_of(text), sound, cfg=made["cfg"])
            for item, one in zip(some, z.split(1)):
                yield item, one.cpu()
                bar.update()
    bar.close()


@torch.no_grad()
def frames_of(decoder, z_dit: torch.Tensor) -> Iterator[np.ndarray]:
    """Latent (1, C, T, H, W) -> frames (H, W, 3) uint8 as they are ready."""
    for part in decoder.stream(mochi_vae.to_vae_space(z_dit)):
        yield from to_pixels(part)
