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
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import tensors
from config import UserError, flag, from_cli, run
from data import Batch, DanceClips
from data_encode import DataConfig, encode, fingerprint_weights, hash_of, weights_part
from mochi_dit import load_dit
from model import OFFICIAL_LAYERS, Adapters, MusicInfuser, save_adapter
from sample import pick_device
from schedule import beta_at, lr_at, sample_sigma

BIG = 10**9  # parameters of a prior from which on activations are recomputed: slower by a third, many times smaller
KEPT = 2  # checkpoints


@dataclass(frozen=True)
class TrainConfig(DataConfig):
    """Train the music adapters on a folder of dance videos (encoded first, where they are not yet)."""

    out: Path = flag(Path("runs/train"), help="folder for checkpoints, log.jsonl, curves.png, musicinfuser.safetensors")
    steps: int = flag(4000, help="optimiser steps in total")
    batch: int = flag(1, help="clips in a batch, over all devices together")
    lr: float = flag(1e-4, help="peak learning rate")
    warmup: int = flag(200, help="steps of linear warm-up, then cosine to 0")
    lora_rank: int = flag(64, help="rank and alpha of the LoRA; 0 for none")
    layers: str | None = flag(None, help="blocks that hear the music: all, or 1,3,5 (default: 16 of 48, else all)")
    form: str = flag("published", help="published, aligned (time on q and k) or add (feature addition)")
    null_audio: str = flag("keep", help="should CFG's null branch hear the music: keep (published) or drop")
    zero_init: bool = flag(True, help="start the path of the music at zero")
    beta0: float = flag(3.0, help="sigma is drawn from Beta(1, beta), beta falls from beta0 to 1; 1 is uniform")
    half_life: float = flag(200.0, help="steps in which beta - 1 halves")
    base_prompt: float = flag(0.2, help="chance of the base prompt instead of the detailed one")
    caption_dropout: float = flag(0.1, help="chance of no prompt")
    music_dropout: float = flag(0.0, help="chance of a batch without music")
    seed: int = flag(0, help="seed of the fresh adapters and of every step's draw")
    save_every: int = flag(200, help="steps between checkpoints; the last two are kept")
    eval_every: int = flag(200, help="steps between held-out losses")
    eval_clips: int = flag(32, help="held-out clips to measure on")
    resume: bool = flag(False, help="go on from the last checkpoint in --out")

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "batch", "save_every", "eval_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        for name in ("base_prompt", "caption_dropout", "music_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: a chance lies between 0 and 1")
        if self.beta0 < 1 or self.half_life <= 0:
            raise UserError(f"--beta0 {self.beta0} --half-life {self.half_life}: expected at least 1 and above 0")
        if self.lr <= 0 or self.lora_rank < 0 or self.warmup < 0:
            raise UserError(f"--lr {self.lr} --lora-rank {self.lora_rank} --warmup {self.warmup}: too small")


IRRELEVANT = {"data", "wild", "weights", "cache", "out", "save_every", "eval_every", "eval_clips", "resume", "device"}


def train(cfg: TrainConfig) -> MusicInfuser:
    """Run the whole training; the adapters end up in OUT/musicinfuser.safetensors."""
    rank, world, device = join_others(cfg)
    cfg = replace(cfg, device=device)
    encoded = encode(cfg)
    clips = DanceClips(encoded.clips, encoded.prompts, cfg.base_prompt, cfg.caption_dropout, cfg.music_dropout)
    model = build(cfg, clips.audio_dim)
    optimizer = torch.optim.AdamW(model.adapter_parameters(), lr=cfg.lr, weight_decay=0.0)
    identity = identity_of(cfg, encoded.clips)
    start = restore(cfg, identity, model, optimizer)
    held_out = clips.held_out_batch(cfg.eval_clips)
    mine = slice(rank, None, world)  # this device's part of every batch
    with Log(cfg.out / "log.jsonl", start, rank) as log, StopSignal() as stop:
        bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc="train", unit="step", disable=rank > 0)
        for step in bar:
            rng = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)  # the same draw, resumed or not
            batch = clips.batch(cfg.batch, rng, mine)
            beta = beta_at(step, cfg.beta0, cfg.half_life)
            sigma = sample_sigma(cfg.batch, beta, rng)  # (B,)                                             Eq. (5)
            eps = torch.randn(cfg.batch, *batch.z.shape[1:], generator=rng)  # on the CPU: same on any device
            loss = velocity_error(model, batch, batch.audio, sigma[mine], eps[mine], cfg.dtype).sum() / cfg.batch
            mean_loss = sum_over_devices(loss.detach().clone()).item()
            if not math.isfinite(mean_loss):
                raise UserError(
                    f"the loss is {mean_loss} at step {step} with {', '.join(batch.names)}; stopped before it"
                )
            loss.backward()
            for p in model.adapter_parameters():
                if p.grad is not None:
                    sum_over_devices(p.grad)
            lr = lr_at(step, cfg.steps, cfg.lr, cfg.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.write(step=step, loss=mean_loss, lr=lr, beta=beta)
            bar.set_postfix(loss=f"{mean_loss:.4f}")
            done = step + 1
            stopped = sum_over_devices(torch.tensor(float(stop.signal), device=device)).item() > 0
            if rank == 0 and held_out and (done % cfg.eval_every == 0 or done == cfg.steps):
                told = held_out_losses(model, held_out, cfg)
                log.write(step=done, held_out=told)
                tqdm.write(f"step {done}: held-out loss " + ", ".join(f"{k} music {v:.4f}" for k, v in told.items()))
            if rank == 0 and (done % cfg.save_every == 0 or done == cfg.steps or stopped):
                save(cfg.out, identity, model, optimizer, done)
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
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > cfg.batch:
        raise UserError(f"--batch {cfg.batch}: fewer clips than the {world} processes; give at least {world}")
    device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if world > 1 and cfg.device == "cuda" else cfg.device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, str(device)


def sum_over_devices(tensor: Tensor) -> Tensor:
    """Sum in place over the processes, if there are several."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def build(cfg: TrainConfig, audio_dim: int) -> MusicInfuser:
    """The prior with fresh adapters. On a GPU the frozen weights are kept in the type to compute in."""
    on_cpu = torch.device(cfg.device).type == "cpu"  # where autocast converts as it multiplies
    dtype = torch.float32 if on_cpu else getattr(torch, cfg.dtype)
    dit = load_dit(weights_part(cfg.weights, "dit.safetensors", "transformer"), cfg.device, dtype)
    layers = choose_layers(cfg.layers, len(dit.blocks))
    rank = alpha = cfg.lora_rank
    adapters = Adapters(dit, layers, audio_dim, rank, alpha, cfg.form, cfg.null_audio, cfg.zero_init, cfg.seed)
    model = MusicInfuser(dit, adapters.to(cfg.device))
    model.recompute = sum(p.numel() for p in dit.parameters()) > BIG
    return model


def choose_layers(text: str | None, depth: int) -> list[int]:
    """`all`, `1,3,5`, or None: the paper's for a prior of its depth, else all."""
    if text is None:
        text = ",".join(map(str, OFFICIAL_LAYERS)) if depth == 48 else "all"
    if text == "all":
        return list(range(depth))
    try:
        return [int(i) for i in text.split(",")]
    except ValueError as error:
        raise UserError(
            f"--layers {text}: expected all, or block numbers with commas between, such as 1,3,5"
        ) from error


# ------------------------------------------------------------------------------------------------- checkpoints


def identity_of(cfg: TrainConfig, clips) -> dict:
    """All that the result depends on: the flags that matter, the clips, the prior."""
    fields = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in IRRELEVANT}
    prior = fingerprint_weights(weights_part(cfg.weights, "dit.safetensors", "transformer"))
    return fields | {"clips": hash_of([clip.file.name for clip in clips]), "prior": prior[:32]}


def checkpoints(out: Path) -> list[Path]:
    """Oldest first."""
    return sorted(out.glob("step-*.safetensors"))


def save(out: Path, identity: dict, model: MusicInfuser, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Adapters, optimiser state and step in one file, whole or not at all; all but the last two are deleted."""
    state = {}
    for name, p in model.adapters.named_parameters():
        state[f"adapters/{name}"] = p
        state |= {f"{key}/{name}": value for key, value in optimizer.state[p].items()}  # empty if never updated
    tensors.save(out / f"step-{step:07d}.safetensors", state, {"step": str(step), "config": json.dumps(identity)})
    for old in checkpoints(out)[:-KEPT]:
        old.unlink(missing_ok=True)


@torch.no_grad()
def restore(cfg: TrainConfig, identity: dict, model: MusicInfuser, optimizer: torch.optim.Optimizer) -> int:
    """Put the last checkpoint into model and optimiser; returns the steps done, 0 for a fresh run.

    raises   UserError if there are checkpoints but no --resume, none that is readable, or one of another training
    """
    files = checkpoints(cfg.out)
    if not cfg.resume:
        if files:
            raise UserError(f"{cfg.out}: holds {files[-1].name} of another run; add --resume, or give another --out")
        return 0
    for file in reversed(files):
        try:
            saved = tensors.open_weights(file)
            break
        except UserError as error:
            print(f"{error}; trying the one before")
    else:
        raise UserError(f"{cfg.out}: no readable checkpoint to resume from; leave out --resume")
    then = json.loads(saved.metadata["config"])
    differ = [f"{k} {then.get(k)} -> {v}" for k, v in identity.items() if then.get(k) != v]
    if differ:
        raise UserError(f"{file}: was trained otherwise ({'; '.join(differ)}); use its settings, or another --out")
    state = {}
    for i, (name, p) in enumerate(model.adapters.named_parameters()):
        p.copy_(saved.read(f"adapters/{name}"))
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in saved.shapes]
        if keys:
            state[i] = {key: saved.read(f"{key}/{name}") for key in keys}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(saved.metadata["step"])


class StopSignal:
    """While active, SIGINT and SIGTERM are only noted (`signal`, 0 for none), so that the step at hand is finished."""

    signal = 0

    def __enter__(self):
        self.before = {kind: signal.signal(kind, self.note) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, kind, frame):
        self.signal = kind

    def __exit__(self, *error):
        for kind, handler in self.before.items():
            signal.signal(kind, handler)


# ------------------------------------------------------------------------------------------------- log


class Log:
    """A line of JSON a step; lines of steps that a resumed run does again are dropped. Only rank 0 writes."""

    def __init__(self, path: Path, start: int, rank: int):
        self.path, self.start, self.rank = path, start, rank

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            old = read_log(self.path) if self.path.exists() else []
            keep = [line for line in old if line["step"] < self.start + ("held_out" in line)]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in keep))
        self.file = open(self.path, "a")
        return self

    def write(self, **line) -> None:
        if self.rank == 0:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def __exit__(self, *error):
        self.file.close()


def read_log(path: Path) -> list[dict]:
    """The lines of a log; a last line that was cut off by a kill is left out."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def draw_curves(out: Path) -> None:
    """Training loss (thin: each step, thick: running mean) and held-out losses over the steps, to OUT/curves.png."""
    import matplotlib  # only here: training needs no plots

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_log(out / "log.jsonl")
    train_lines = [line for line in lines if "loss" in line]
    steps, losses = [line["step"] + 1 for line in train_lines], [line["loss"] for line in train_lines]
    smooth = []
    for loss in losses:
        smooth.append(loss if not smooth else 0.98 * smooth[-1] + 0.02 * loss)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    left.plot(steps, losses, lw=0.4, alpha=0.5)
    left.plot(steps, smooth, lw=2)
    left.set(title="training loss", xlabel="step")
    told = [line for line in lines if "held_out" in line]
    for kind in told[0]["held_out"] if told else ():
        right.plot([line["step"] for line in told], [line["held_out"][kind] for line in told], label=f"{kind} music")
    right.set(title="held-out loss", xlabel="step")
    if told:
        right.legend()
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=120)
    plt.close(figure)


def main() -> None:
    train(from_cli(TrainConfig))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
