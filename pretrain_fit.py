"""How each baby network is trained: the flags of pretrain.py, and one loop for all of its stages.

Concept   AdamW with an average of the weights; state is (weights, average, optimiser, step) in one file, all else is a
          function of (seed, step), so that a killed stage goes on exactly where it would have been.
Paper     none: the paper starts from networks that others trained.
"""

import math
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import tensors
from config import UserError, flag

FRAMES, SIZE, FPS = 73, 96, 30
HELD_OUT = 64  # clips at the end of the world that no stage trains on
READ_EVERY = 20  # steps between looks at the loss: each waits for the device
STAGES = ("world", "vae", "decoder", "audio", "prior", "export")


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-train the baby VAE, audio encoder, text encoder and video prior on the toy world.

    The defaults made the shipped weights, in minutes on a GPU: --device cuda --dtype bfloat16."""

    stage: str = flag(
        "all", help="world, vae, decoder, audio, prior, export, or all of them; a stage first makes what it needs"
    )
    out: Path = flag(Path("runs/baby"), help="folder for the world, checkpoints and pictures")
    weights: Path = flag(Path("runs/baby/weights"), help="folder that receives the finished weights")
    vae: Path | None = flag(
        None, help="folder with a finished VAE: its encoder stays, its decoder is trained further (default: make one)"
    )
    clips: int = flag(4000, help="clips of the world, of which the last 64 are held out")
    vae_steps: int = flag(2000, help="steps of encoder and decoder together")
    vae_batch: int = flag(96, help="single frames in a batch of the VAE; of 7 or 13 frames a quarter or an eighth")
    decoder_steps: int = flag(1200, help="steps of the decoder alone")
    audio_steps: int = flag(1500, help="steps of the audio encoder")
    prior_steps: int = flag(1800, help="steps of text encoder and DiT")
    prior_batch: int = flag(128, help="clips in a batch of the prior")
    seed: int = flag(0, help="seed of the world, of the initial weights and of every step's draw")
    device: str = flag("cpu", help="cpu or cuda")
    dtype: str = flag("float32", help="float32, or bfloat16 autocast where the chip multiplies it fast")
    compile: bool = flag(False, help="let torch.compile fuse the blocks of the prior: worth it from 1,000 steps on")
    save_every: int = flag(250, help="steps between checkpoints")
    look_every: int = flag(1000, help="steps between pictures of held-out clips")
    jobs: int = flag(0, help="processes that render the world and play its music (default 0: one a core)")

    def __post_init__(self):
        if self.stage not in (*STAGES, "all"):
            raise UserError(f"--stage {self.stage}: expected one of {', '.join(STAGES)} or all")
        if self.vae and self.stage == "vae":
            raise UserError("--stage vae makes a VAE and --vae brings one: leave one of them out")
        if self.clips <= 2 * HELD_OUT:
            raise UserError(f"--clips {self.clips}: need more than {2 * HELD_OUT}")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype}: expected float32 or bfloat16")
        if self.vae_batch < 8 or self.prior_batch < 1 or self.jobs < 0:
            raise UserError(
                f"--vae-batch {self.vae_batch} --prior-batch {self.prior_batch} --jobs {self.jobs}: expected at least "
                "8, 1 and 0"
            )


def pool(cfg: PretrainConfig):
    """A pool of cfg.jobs processes."""
    return multiprocessing.get_context("spawn").Pool(cfg.jobs or None)


def on_device(generator: torch.Generator, device: str) -> torch.Generator:
    """A generator on `device`, seeded by the next draw of the given one: large noise is drawn where it is needed."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)


def fit(
    name: str,
    cfg: PretrainConfig,
    networks: nn.ModuleDict,
    steps: int,
    lr: float,
    ema: float,
    loss_of: Callable[[int, torch.Generator], Tensor],
    look: Callable[[], str],
) -> nn.ModuleDict:
    """Minimise loss_of(step, generator) with AdamW; returns the networks with their averaged weights.

    The learning rate warms up for 100 steps, stays at `lr` and falls linearly to 0 over the last 35 %.
    State is (weights, their average, optimiser, step) in out/<name>.safetensors; all else is a function of
    (seed, step), so an interrupted run goes on exactly where it would have been.

    ema    decay of the exponential moving average of the weights, which is what is looked at and returned
    look   called with the averaged weights in place; draws held-out pictures, returns a line to print
    """
    path = cfg.out / f"{name}.safetensors"
    weights = {key: p for key, p in networks.named_parameters() if p.requires_grad}
    average = {key: p.detach().clone() for key, p in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    first = 0
    if path.exists():
        first = _restore(path, weights, average, optimizer)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=name, unit="step", dynamic_ncols=True)
    smooth, losses = None, []
    for step in bar:
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            loss = loss_of(step, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100, (steps - step) / (0.35 * steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(ema, (step + 1) / (step + 10))  # follow closely at first, when the start is worth nothing
            torch._foreach_lerp_(list(average.values()), list(weights.values()), 1 - decay)
        losses.append(loss.detach())
        done = step + 1
        looking, saving = (done % every == 0 or done == steps for every in (cfg.look_every, cfg.save_every))
        if looking or saving or len(losses) == READ_EVERY:
            for i, value in enumerate(torch.stack(losses).tolist(), done - len(losses)):
                if not math.isfinite(value):
                    raise UserError(f"{name}: the loss is {value} at step {i}; {path} holds the last good state")
                smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
            losses.clear()
            bar.set_postfix(loss=f"{smooth:.4f}")
        if saving:
            _store(path, weights, average, optimizer, done)
        if looking:
            swapped = {key: p.detach().clone() for key, p in weights.items()}
            _copy(average, weights)
            tqdm.write(f"{name} step {done}: loss {smooth:.4f}, {look()}")
            _copy(swapped, weights)
    _copy(average, weights)
    return networks.eval()


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for key, tensor in source.items():
        target[key].copy_(tensor)


def _store(path: Path, weights, average, optimizer, step: int) -> None:
    state = {f"weights/{key}": p for key, p in weights.items()} | {f"average/{key}": p for key, p in average.items()}
    for key, p in weights.items():
        state[f"exp_avg/{key}"] = optimizer.state[p]["exp_avg"]
        state[f"exp_avg_sq/{key}"] = optimizer.state[p]["exp_avg_sq"]
    tensors.save(path, state, {"step": str(step)})


def _restore(path: Path, weights, average, optimizer) -> int:
    saved = tensors.open_weights(path)
    step = int(saved.metadata["step"])
    _copy({key: saved.read(f"weights/{key}") for key in weights}, weights)
    _copy({key: saved.read(f"average/{key}") for key in average}, average)
    for key, p in weights.items():
        optimizer.state[p] = {
            "step": torch.tensor(float(step), device=p.device),
            "exp_avg": saved.read(f"exp_avg/{key}", p.device),
            "exp_avg_sq": saved.read(f"exp_avg_sq/{key}", p.device),
        }
    return step
