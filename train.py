"""Train the music adapters: Eq. (1) from top to bottom.

Concept   the prior is frozen; its adapters learn to denoise dance clips given their music. In flow coordinates the
          objective of Eq. (1), E || D(y + n | c, a; sigma) - y ||^2, is (up to a weight per noise level) the squared
          error of the velocity: || v(z_sigma | c, a; sigma) - (z - eps) ||^2, z_sigma = (1 - sigma) z + sigma eps.
Paper     arXiv 2503.14505v2, Sec. 4 (Eq. 1), Sec. 4.2 (Beta-Uniform scheduling, Eq. 5), Sec. 5.1 (recipe).
Differs   the official trainer noises the latent in the VAE's raw space while its target and its sampler live in the
          normalised one; ours normalises first. Its runs cannot be resumed; ours go on bit for bit. On N devices
          (torchrun) a batch is the same draw, shared out.

Dimension key   B batch   C latent channels   T H W latent frames, height, width
"""

import dataclasses
import json
import math
import os
import signal
import sys
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import budget
import stages
from audio import load_wav2vec2
from check import DECODER
from config import UserError, flag, from_cli, make_folder, run
from data import Batch, DanceClips
from data_encode import DataConfig, Encoded, encode, fingerprint_weights, frame_size, hash_of, weights_part
from layer_select import STRATEGIES, select_layers
from mochi_dit import compile_blocks, load_dit
from model import OFFICIAL_LAYERS, Adapters, MusicInfuser, save_adapter
from schedule import beta_at, lr_at, sample_sigma
from train_log import Log, draw_curves
from train_show import show
from train_state import StopSignal, restore, save, sweep

BIG = 10**9  # parameters of a prior from which on activations are recomputed: slower by a third, many times smaller
SCHEDULES = ("beta-uniform", "uniform")


@dataclass(frozen=True)
class TrainConfig(DataConfig):
    """Train the music adapters on a folder of dance videos (encoded first, where they are not yet)."""

    data: Path | None = flag(None, help="folder with AIST videos, or any dance videos; needed unless --dry-run")
    out: Path = flag(Path("runs/train"), help="folder for checkpoints, log.jsonl, curves.png, musicinfuser.safetensors")
    steps: int = flag(4000, help="optimiser steps in total")
    batch: int = flag(1, help="clips in a batch, over all devices together")
    lr: float = flag(1e-4, help="peak learning rate")
    warmup: int = flag(200, help="steps of linear warm-up, then cosine to 0")
    lora_rank: int = flag(64, help="rank and alpha of the LoRA; 0 for none")
    layers: str | None = flag(
        None,
        help="blocks that hear the music: adaptability, all, a third of them by even, first, middle or last, their "
        "numbers such as 6,7,8, or a JSON file with them (default: adaptability for 48 blocks, else all)",
    )
    form: str = flag("published", help="published, aligned (time on q and k) or add (feature addition)")
    null_audio: str = flag("keep", help="should CFG's null branch hear the music: keep (published) or drop")
    zero_init: bool = flag(True, help="start the path of the music at zero")
    schedule: str = flag("beta-uniform", help="of the noise level: Beta(1, beta) with beta to 1, or uniform all along")
    beta0: float = flag(3.0, help="beta at the first step of beta-uniform")
    half_life: float = flag(200.0, help="steps in which beta - 1 halves")
    wild_ratio: float = flag(0.5, help="chance of a clip to be in-the-wild where there are both kinds; 0 for none")
    base_prompt: float = flag(0.2, help="chance of the base prompt instead of the detailed one")
    caption_dropout: float = flag(0.1, help="chance of no prompt")
    music_dropout: float = flag(0.0, help="chance of a batch without music")
    seed: int = flag(0, help="seed of the fresh adapters and of every step's draw")
    save_every: int = flag(200, help="steps between checkpoints; the last two are kept")
    eval_every: int = flag(200, help="steps between held-out losses")
    eval_clips: int = flag(32, help="held-out clips to measure on")
    sample_every: int = flag(0, help="steps between sample videos of a held-out clip, in OUT/samples; 0 for none")
    recompute: int | None = flag(
        None, help="blocks computed again in backward, to save memory (default: all of a prior above 1 B, else 0)"
    )
    compile: bool = flag(False, help="compile the prior's blocks first: a minute or two, then faster on a GPU")
    resume: bool = flag(False, help="go on from the last checkpoint in --out")
    dry_run: bool = flag(False, help="print parameters and the memory of a step, by part, and stop")

    def __post_init__(self):
        super().__post_init__()
        if self.data is None and not self.dry_run:
            raise UserError("--data: which folder of dance videos? Give one, or --dry-run to see what a step needs")
        if self.schedule not in SCHEDULES:
            raise UserError(f"--schedule {self.schedule}: expected {' or '.join(SCHEDULES)}")
        if self.sample_every < 0:
            raise UserError(f"--sample-every {self.sample_every}: expected a number of steps, 0 for no samples")
        if self.recompute is not None and self.recompute < 0:
            raise UserError(f"--recompute {self.recompute}: expected a number of blocks, 0 for none")
        for name in ("steps", "batch", "save_every", "eval_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        for name in ("wild_ratio", "base_prompt", "caption_dropout", "music_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: a chance lies between 0 and 1")
        if self.beta0 < 1 or self.half_life <= 0:
            raise UserError(f"--beta0 {self.beta0} --half-life {self.half_life}: expected at least 1 and above 0")
        if self.lr <= 0 or self.lora_rank < 0 or self.warmup < 0:
            raise UserError(f"--lr {self.lr} --lora-rank {self.lora_rank} --warmup {self.warmup}: too small")


IRRELEVANT = {  # flags that do not change the result
    "data", "wild", "weights", "cache", "out", "save_every", "eval_every", "eval_clips", "sample_every",
    "recompute", "compile", "resume", "dry_run", "device",
}  # fmt: skip


def train(cfg: TrainConfig, encoded: Encoded | None = None) -> MusicInfuser:
    """Run the whole training; the adapters end up in OUT/musicinfuser.safetensors.

    encoded   the clips, where the caller has them already: many trainings on one folder look at it once
    """
    rank, world, device = join_others(cfg)
    cfg = replace(cfg, device=device)
    if cfg.sample_every:
        DECODER.find(cfg.weights)  # a mistake is better told now than at the first sample
    make_folder(cfg.out, "--out")
    encoded = encoded or encode(cfg)
    clips = DanceClips(encoded.clips, encoded.prompts, cfg.base_prompt, cfg.caption_dropout, cfg.music_dropout)
    mix(clips, cfg.wild_ratio)
    model = build(cfg, clips.audio_dim)
    if cfg.compile:
        compile_blocks(model.dit)
    optimizer = torch.optim.AdamW(model.adapter_parameters(), lr=cfg.lr, weight_decay=0.0)
    identity = identity_of(cfg, model.layers, encoded.clips)
    start = restore(cfg.out, cfg.resume, identity, model, optimizer)
    if rank == 0:
        sweep(cfg.out)
    held_out = clips.held_out_batch(cfg.eval_clips)
    mine = slice(rank, None, world)  # this device's part of every batch
    with Log(cfg.out / "log.jsonl", start, rank) as log, StopSignal() as stop:
        bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc="train", unit="step", disable=rank > 0)
        for step in bar:
            rng = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)  # the same draw, resumed or not
            batch = clips.batch(cfg.batch, rng, mine)
            beta = beta_at(step, cfg.beta0, cfg.half_life) if cfg.schedule == "beta-uniform" else 1.0
            sigma = sample_sigma(cfg.batch, beta, rng)  # (B,)                                             Eq. (5)
            eps = torch.randn(cfg.batch, *batch.z.shape[1:], generator=rng)  # on the CPU: same on any device
            loss = velocity_error(model, batch, batch.audio, sigma[mine], eps[mine], cfg.dtype).sum() / cfg.batch
            mean_loss = sum_over_devices(loss.detach().clone()).item()
            if loss.requires_grad:  # a batch without music teaches nothing where there is no LoRA
                loss.backward()
            gradients = [p.grad for p in model.adapter_parameters() if p.grad is not None]
            for gradient in gradients:
                sum_over_devices(gradient)
            grad_norm = torch.nn.utils.get_total_norm(gradients).item()
            if not (math.isfinite(mean_loss) and math.isfinite(grad_norm)):
                raise UserError(
                    f"the loss is {mean_loss} and its gradient {grad_norm} at step {step} with "
                    f"{', '.join(batch.names)}; stopped before this step"
                )
            lr = lr_at(step, cfg.steps, cfg.lr, cfg.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.write(step=step, loss=mean_loss, grad_norm=grad_norm, lr=lr, beta=beta)
            bar.set_postfix(loss=f"{mean_loss:.4f}")
            done = step + 1
            stopped = sum_over_devices(torch.tensor(float(stop.signal), device=device)).item() > 0
            if rank == 0 and held_out and (done % cfg.eval_every == 0 or done == cfg.steps):
                told = held_out_losses(model, held_out, cfg)
                log.write(step=done, held_out=told)
                tqdm.write(f"step {done}: held-out loss " + ", ".join(f"{k} music {v:.4f}" for k, v in told.items()))
                draw_curves(cfg.out)
            if rank == 0 and (done % cfg.save_every == 0 or done == cfg.steps or stopped):
                save(cfg.out, identity, model, optimizer, done)
            if rank == 0 and held_out and cfg.sample_every and done % cfg.sample_every == 0:
                path = cfg.out / "samples" / f"step-{done:07d}.mp4"
                show(model, clips, cfg.weights, torch.device(device), cfg.dtype, path)
            if stopped and done < cfg.steps:
                print(f"stopped at step {done} of {cfg.steps}; the same command with --resume goes on")
                sys.exit(128 + (stop.signal or signal.SIGTERM))
    if rank == 0:
        save_adapter(model, cfg.out / "musicinfuser.safetensors")
        draw_curves(cfg.out)
        print(cfg.out / "musicinfuser.safetensors")
    return model


def velocity_error(model, batch: Batch, audio: Tensor | None, sigma: Tensor, eps: Tensor, dtype: str) -> Tensor:
    """Mean over the latent of (v(z_sigma | c, a; sigma) - (z - eps))^2, for each item: (B,).            Eq. (1)

    sigma (B,) in [0, 1), eps (B, C, T, H, W) ~ N(0, 1)
    """
    device = model.adapters.audio_projection.projection[0].weight.device
    z, sigma, eps, text = (t.to(device) for t in (batch.z, sigma, eps, batch.text))
    s = sigma.view(-1, 1, 1, 1, 1)
    z_s = (1 - s) * z + s * eps  # (B, C, T, H, W)
    target = z - eps  # velocity towards the data
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        velocity = model(z_s, sigma, text, batch.text_mask, None if audio is None else audio.to(device))
    return (velocity.float() - target).square().mean((1, 2, 3, 4))


@torch.no_grad()
def held_out_losses(model, batch: Batch, cfg: TrainConfig) -> dict[str, float]:
    """Loss on held-out clips with their own music, with each other's and with none; noise and levels always the same.

    An adapter that hears has right < none and right < shuffled; one that is deaf has three equal numbers.
    """
    n = len(batch.z)
    rng = torch.Generator().manual_seed(0)
    eps = torch.randn(batch.z.shape, generator=rng)
    sigma = (torch.randperm(n, generator=rng) + 0.5) / n  # one from each n-th of [0, 1]
    losses = {}
    for name, audio in (("right", batch.audio), ("shuffled", batch.audio.roll(max(1, n // 2), 0)), ("no", None)):
        total = 0.0
        for i in range(0, n, cfg.batch):
            part = slice(i, i + cfg.batch)
            few = Batch(batch.z[part], batch.text[part], batch.text_mask[part], None, batch.names[part])
            music = None if audio is None else audio[part]
            total += velocity_error(model, few, music, sigma[part], eps[part], cfg.dtype).sum().item()
        losses[name] = total / n
    return losses


# ------------------------------------------------------------------------------------------------- setting up


def join_others(cfg: TrainConfig) -> tuple[int, int, str]:
    """(rank, number of processes, device of this one). Alone unless torchrun started us."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > cfg.batch:
        raise UserError(f"--batch {cfg.batch}: fewer clips than the {world} processes; give at least {world}")
    rank, world, device = stages.join_others(cfg.device)
    return rank, world, str(device)


def sum_over_devices(tensor: Tensor) -> Tensor:
    """Sum in place over the processes, if there are several."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def mix(clips: DanceClips, wild_ratio: float) -> None:
    """Make in-the-wild clips that share of the draws, to 1 %; `clips` draws evenly from its `kinds`."""
    if len(clips.kinds) == 2:
        (aist, wild), share = clips.kinds, Fraction(wild_ratio).limit_denominator(100)
        clips.kinds = [aist] * (share.denominator - share.numerator) + [wild] * share.numerator


def build(cfg: TrainConfig, audio_dim: int, device: str | None = None) -> MusicInfuser:
    """The prior with fresh adapters, on cfg.device unless another is given ("meta": no memory)."""
    device = device or cfg.device
    dit = load_dit(weights_part(cfg.weights, "dit.safetensors", "transformer"), device, stored_dtype(cfg))
    layers = choose_layers(cfg.layers, len(dit.blocks))
    rank = alpha = cfg.lora_rank
    with torch.device("meta" if device == "meta" else "cpu"):  # drawn on the CPU: the same on any device
        adapters = Adapters(dit, layers, audio_dim, rank, alpha, cfg.form, cfg.null_audio, cfg.zero_init, cfg.seed)
    model = MusicInfuser(dit, adapters.to(device))
    everything = len(dit.blocks) if sum(p.numel() for p in dit.parameters()) > BIG else 0
    model.recompute = everything if cfg.recompute is None else min(cfg.recompute, len(dit.blocks))
    return model


def stored_dtype(cfg: TrainConfig) -> torch.dtype:
    """Type of the frozen weights: the one to compute in; on a CPU float32, which autocast converts as it multiplies."""
    return torch.float32 if torch.device(cfg.device).type == "cpu" else getattr(torch, cfg.dtype)


def choose_layers(text: str | None, depth: int) -> list[int]:
    """The blocks that --layers stands for; None is `adaptability` for a prior of the paper's depth, else `all`.

    A third of the blocks is taken by `even`, `first`, `middle` and `last`: 16 of 48, as in the paper.
    """
    if text is None:
        text = "adaptability" if depth == 48 else "all"
    if text in STRATEGIES:
        return select_layers(text, depth, max(1, depth // 3))
    if text == "adaptability":
        if depth != 48:
            raise UserError(
                f"--layers adaptability: the paper measured Mochi's 48 blocks, and this prior has {depth}; give "
                "--layers FILE.json with the blocks that were measured for it, or all"
            )
        return list(OFFICIAL_LAYERS)
    try:
        if not text.endswith(".json"):
            return [int(i) for i in text.split(",")]
        told = json.loads(Path(text).read_text())
        return list(told["layers"] if isinstance(told, dict) else told)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"--layers {text}: expected adaptability, {', '.join(STRATEGIES)}, block numbers with commas between such "
            'as 1,3,5, or a JSON file that holds [1, 3, 5] or {"layers": [1, 3, 5]}'
        ) from error


def dry_run(cfg: TrainConfig) -> None:
    """Print trainable and frozen parameters and the memory of one step by part; reads headers only."""
    try:
        encoder = load_wav2vec2(weights_part(cfg.weights, "wav2vec2", "wav2vec2.safetensors"), device="meta")
        audio_dim = encoder.feature_projection.projection.out_features
    except UserError:
        audio_dim = 768  # Wav2Vec 2.0 base
    model = build(cfg, audio_dim, "meta")
    height, width = frame_size(cfg)
    latent = (cfg.frames - 1) // 6 + 1, height // 8, width // 8
    trained = sum(p.numel() for p in model.adapter_parameters())
    frozen = sum(p.numel() for p in model.parameters()) - trained
    print(f"trainable parameters {trained:>17,}   in {len(model.layers)} of {len(model.dit.blocks)} blocks")
    print(f"frozen parameters    {frozen:>17,}")
    parts = budget.predict(model, cfg.batch, latent, model.recompute, stored_dtype(cfg), getattr(torch, cfg.dtype))
    unit, bytes_in_unit = ("GiB", 2**30) if sum(parts.values()) > 2**30 else ("MiB", 2**20)
    for name, size in (parts | {"in all": sum(parts.values())}).items():
        print(f"{name:<20} {size / bytes_in_unit:>13.2f} {unit}")
    print(
        f"for a batch of {cfg.batch} on one device, {cfg.frames} frames of {width}x{height}, {model.recompute} of "
        f"{len(model.dit.blocks)} blocks recomputed"
    )


def identity_of(cfg: TrainConfig, layers: tuple[int, ...], clips) -> dict:
    """All that the result depends on: the flags that matter, the clips, the prior."""
    fields = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in IRRELEVANT}
    prior = fingerprint_weights(weights_part(cfg.weights, "dit.safetensors", "transformer"))
    return fields | {
        "layers": list(layers),
        "clips": hash_of([clip.file.name for clip in clips]),
        "prior": prior[:32],
    }


def main() -> None:
    cfg = from_cli(TrainConfig)
    if cfg.dry_run:
        return dry_run(cfg)
    train(cfg)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
