"""Where the claims are measured: the networks of a weights folder, prompts and music in, videos out, and their reading.

Concept   everything in batches: many clips at once through the sampler, a few at once through the decoder; what is read
          of pixels is spread over processes. The noise of a clip is a function of its seed, whatever the batch.
Paper     arXiv 2503.14505v2, Sec. 5.1 (sampling).
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import audio
import mochi_vae
import t5
import tensors
import toy
import toy_read
import toy_reader
from check import DECODER, ENCODER, MUSIC, find_files, made_for
from config import UserError, flag, words
from data_names import CAMERAS, GENRES
from model import load_musicinfuser, read_settings
from sample import null_of, sample
from schedule import linear_quadratic
from stages import pick_device

FRAMES = 73
FORMS = {"published": "published ZICA", "aligned": "time-aligned ZICA", "add": "feature addition"}


@dataclass(frozen=True)
class ClaimsConfig:
    """Measure the paper's claims on the toy world, each against its level of chance and its ceiling.

    Each claim is written to --out as soon as it is measured; the same command goes on where it was stopped."""

    names: tuple[str, ...] = words(help="claims to measure (default: all that the other flags allow)")
    weights: Path = flag(Path("weights/baby"), help="folder of the weights")
    adapters: str = flag(
        "musicinfuser.safetensors", help="adapter files to compare, in --weights or paths, with commas"
    )
    clips: int = flag(64, help="videos a measurement")
    batch: int = flag(32, help="videos sampled at once")
    steps: int | None = flag(None, help="sampling steps (default: what the weights were made for)")
    cfg: float | None = flag(None, help="classifier-free guidance scale (default: what the weights were made for)")
    seed: int = flag(0, help="of the tracks, prompts and noise")
    examples: int = flag(3000, help="true clips that the reader of view, figure and number of dancers is fitted to")
    music: Path | None = flag(None, help="folder of recorded music, for `unheard`")
    data: Path | None = flag(None, help="folder of toy.py's AIST clips, for `layers`, `table1` and `table4`")
    wild: Path | None = flag(None, help="folder of toy.py --wild, for the same")
    layers: Path | None = flag(None, help="JSON with the most adaptable layers, for the same (needed for `layers`)")
    seeds: int = flag(3, help="trainings a row of these tables")
    train_steps: int = flag(500, help="steps of such a training")
    train_batch: int = flag(16, help="clips in a batch of such a training")
    jobs: int | None = flag(None, help="processes that read pixels, and that train (default: one a core)")
    device: str | None = flag(None, help="cpu, cuda, cuda:N or mps (default: cuda if there is one)")
    dtype: str | None = flag(None, help="float32 or bfloat16 (default: bfloat16 on cuda, float32 on cpu)")
    out: Path = flag(Path("runs/claims"), help="folder for the results: NAME.json each, claims.md for all")

    def __post_init__(self):
        for name in ("clips", "batch", "seeds", "train_steps", "train_batch", "examples"):
            least = {"clips": 4, "examples": 20}.get(name, 1)
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least {least}")
        if self.jobs is not None and self.jobs < 1:
            raise UserError(f"--jobs {self.jobs}: expected at least 1")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype}: expected float32 or bfloat16")


class Dancer(NamedTuple):
    """What is measured: the prior with an adapter, or without."""

    label: str
    adapter: Path | None


PRIOR = Dancer("prior without adapter", None)


def find_dancers(cfg: ClaimsConfig) -> list[Dancer]:
    """The adapters of --adapters, by the form that their header names; the file's folder tells two of a form apart."""
    paths = [Path(name.strip()) for name in cfg.adapters.split(",")]
    paths = [cfg.weights / path if (cfg.weights / path).exists() else path for path in paths]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such adapter, neither here nor in {cfg.weights}")
    labels = [FORMS.get(read_settings(tensors.open_weights(path), None)["form"]) for path in paths]
    return [
        Dancer(label if labels.count(label) == 1 else f"{label} ({path.parent.name}/{path.stem})", path)
        for path, label in zip(paths, labels)
    ]


# ------------------------------------------------------------------------------------------------------ the prompts


def prompt_of(clip: toy.Clip) -> str:
    """All that is seen of a clip, in the words of most captions of the world; never the tempo."""
    professional = "professional " if clip.setting == toy.WHITE_STUDIO else ""
    names = [f"a {professional}{figure}" for figure in clip.figures]
    who = " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    view = CAMERAS[clip.camera]
    return f"{who} wearing {toy.clothes(clip)} dancing {GENRES[clip.genre]} {clip.setting}, captured from a {view}"


def solo_clips(cfg: ClaimsConfig, count: int | None = None, bpm: tuple[float, float] = (80, 135)) -> list[toy.Clip]:
    """Solo dances in the white studio from the front, each to a track and tempo of its own that no network heard."""
    clips = []
    for index in range(count or cfg.clips):
        rng = np.random.default_rng([cfg.seed, 1_000_000, index])
        clip = toy.sample_clip(rng)
        while toy.held_back(clip):
            clip = toy.sample_clip(rng)
        figure, situation = toy.FIGURES[index % 2], ("BM", "FM")[index // 2 % 2]
        clips.append(
            replace(clip, camera=1, figures=(figure,), situation=situation, bpm=float(rng.uniform(*bpm)))
        )  # fmt: skip
    return clips


# ------------------------------------------------------------------------------------------------------- the studio


class Studio:
    """The networks of cfg.weights on one device; made when first needed."""

    def __init__(self, cfg: ClaimsConfig):
        self.cfg, self.device = cfg, pick_device(cfg.device)
        self.dtype = getattr(torch, cfg.dtype or ("bfloat16" if self.device.type == "cuda" else "float32"))
        self.files = find_files(cfg.weights, None)
        made = made_for(self.files.dit)
        self.steps, self.scale = cfg.steps or made["steps"], made["cfg"] if cfg.cfg is None else cfg.cfg
        self.size = made["height"]
        if made["width"] != self.size:
            raise UserError(f"{cfg.weights}: made for {made['width']}x{self.size}; the toy world is square")
        self.jobs = cfg.jobs or os.cpu_count() or 1
        self.decoded_at_once = 512 if self.device.type == "cuda" else 1  # frames

    @cached_property
    def tokenizer(self) -> t5.Tokenizer:
        return t5.Tokenizer(self.files.vocabulary)

    @cached_property
    def text_encoder(self) -> t5.T5:
        return t5.load_t5(self.files.text, self.device)

    @cached_property
    def ears(self) -> audio.Wav2Vec2:
        return audio.load_wav2vec2(MUSIC.find(self.cfg.weights), device=self.device)

    @cached_property
    def encoder(self):
        return mochi_vae.load_encoder(ENCODER.find(self.cfg.weights), self.device, self.dtype)

    @cached_property
    def decoder(self):
        return mochi_vae.load_decoder(DECODER.find(self.cfg.weights), self.device, self.dtype)

    @cached_property
    def pool(self) -> ProcessPoolExecutor:
        os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the children
        return ProcessPoolExecutor(self.jobs, get_context("spawn"))  # a fork of a process with CUDA is of no use

    def close(self) -> None:
        if "pool" in self.__dict__:
            self.pool.shutdown()

    def map(self, what: Callable, items: Sequence) -> list:
        """[what(item) for each], spread over the processes."""
        if self.jobs == 1 or len(items) < 2:
            return [what(item) for item in items]
        try:
            return list(self.pool.map(what, items, chunksize=max(1, len(items) // (4 * self.jobs))))
        except BrokenProcessPool:  # one was killed, such as for memory: slowly here, rather than not at all
            del self.pool
            return [what(item) for item in items]

    # ---- videos

    def true(self, clips: Sequence[toy.Clip], num_frames: int = FRAMES) -> list[np.ndarray]:
        """The true videos, each (F, H, W, 3) uint8."""
        return self.map(Render(num_frames, self.size), clips)

    @torch.no_grad()
    def rebuild(self, videos: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Videos through the encoder and the decoder: what the best sampler could reach."""
        made, some = [], max(1, self.decoded_at_once // len(videos[0]))
        for i in range(0, len(videos), some):
            pixels = torch.from_numpy(np.stack(videos[i : i + some])).permute(0, 4, 1, 2, 3).to(self.device)
            made += self.develop(self.encoder(pixels / 127.5 - 1)[0])  # float32 in: half precision blurs pixels
        return made

    @torch.no_grad()
    def dance(
        self,
        dancer: Dancer,
        prompts: Sequence[str],
        waves: Sequence[np.ndarray] | None,
        num_frames: int = FRAMES,
        seeds: Sequence[int] | None = None,
    ) -> list[np.ndarray]:
        """One video a prompt, each (F, H, W, 3) uint8. waves: 16 kHz; None: without music. seeds: of the noise."""
        m = load_musicinfuser(self.files.dit, dancer.adapter, device=self.device, dtype=self.dtype)
        m.merge()
        videos, seeds = [], range(len(prompts)) if seeds is None else seeds
        shape = (12, (num_frames - 1) // 6 + 1, self.size // 8, self.size // 8)
        for i in tqdm(range(0, len(prompts), self.cfg.batch), dancer.label, unit="batch", dynamic_ncols=True):
            part = slice(i, i + self.cfg.batch)
            text, mask = t5.encode(self.text_encoder, self.tokenizer, list(prompts[part]), self.device)
            prompt = text.to(self.dtype), mask.cpu()
            music = None if waves is None or dancer.adapter is None else self.hear(waves[part], num_frames)
            noise = torch.stack([self.noise(shape, seed) for seed in seeds[part]]).to(self.device)
            z = sample(m, noise, linear_quadratic(self.steps), prompt, null_of(prompt), music, cfg=self.scale)
            if not z.isfinite().all():
                raise UserError(f"{dancer.label}: the sampler left the range of numbers")
            videos += self.develop(mochi_vae.to_vae_space(z))
        return videos

    def noise(self, shape: tuple[int, ...], seed: int) -> Tensor:
        """Drawn on the CPU: the same on any device and in any batch."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.cfg.seed * 1_000_003 + seed))

    @torch.no_grad()
    def hear(self, waves: Sequence[np.ndarray], num_frames: int) -> Tensor:
        """Music tokens (B, A, audio_dim)."""
        heard = [audio.prepare(torch.as_tensor(wave, dtype=torch.float32), num_frames) for wave in waves]
        return self.ears(torch.cat(heard).to(self.device))

    def develop(self, z_vae: Tensor) -> list[np.ndarray]:
        """Latents (B, C, T, H, W) -> videos, each (F, H, W, 3) uint8."""
        some = max(1, self.decoded_at_once // (6 * z_vae.shape[2]))
        videos = []
        for part in z_vae.split(some):
            pixels = self.decoder(part.to(self.dtype)).float().clamp(-1, 1)  # (b, 3, F, H, W)
            videos += list((pixels * 127.5 + 127.5).round().byte().permute(0, 2, 3, 4, 1).cpu().numpy())
        return videos

    # ---- reading

    def read(self, videos: Sequence[np.ndarray]) -> list[dict]:
        """What toy_read.read tells of each video."""
        return self.map(toy_read.read, videos)

    def curves(self, videos: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self.map(toy_read.body_curve, videos)

    @cached_property
    def reader(self) -> toy_reader.Reader:
        """The reader of view, figure and number of dancers, fitted to true clips."""
        with torch.enable_grad():
            return toy_reader.fit(self.map(toy_reader.draw, range(self.cfg.examples)), self.device)

    def look(self, videos: Sequence[np.ndarray]) -> list[dict]:
        """All answers for each video: those of toy_read.read and those of the reader."""
        told = self.read(videos)
        return [a | b for a, b in zip(told, self.reader.read([a["glance"] for a in told]))]


@dataclass(frozen=True)
class Render:
    """Renders clips; an object so that processes can be given it."""

    num_frames: int
    size: int

    def __call__(self, clip: toy.Clip) -> np.ndarray:
        return toy.render(clip, self.num_frames, self.size)


def music_of(clips: Sequence[toy.Clip], num_frames: int = FRAMES, speed: float = 1.0) -> list[np.ndarray]:
    """What each clip's dancer hears: its track at 16 kHz, played `speed` times as fast by changing the waveform."""
    dur_s = audio.clip_samples(num_frames) / audio.SR_HZ
    margin_s = 0.05 * speed  # the resampler looks ahead
    waves = [torch.from_numpy(toy.music(clip, 0.0, dur_s * speed + margin_s)) for clip in clips]
    return [audio.change_speed(wave, speed)[: audio.clip_samples(num_frames)].numpy() for wave in waves]
