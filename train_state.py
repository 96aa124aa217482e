"""What a training run leaves on disk so that it can go on: checkpoints.

Concept   the state of a run is (adapters, optimiser, step): all else is a function of the flags and the step. One
          safetensors file holds it, written whole or not at all; the last two are kept, so that one that the disk
          damaged costs only the steps since the one before.
Paper     none: plumbing. The official trainer cannot resume.
"""

import json
import signal
from pathlib import Path

import torch

import tensors
from config import UserError
from model import MusicInfuser

KEPT = 2  # checkpoints


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
def restore(out: Path, resume: bool, identity: dict, model: MusicInfuser, optimizer: torch.optim.Optimizer) -> int:
    """Put the last checkpoint into model and optimiser; returns the steps done, 0 for a fresh run.

    raises   UserError if there are checkpoints but no --resume, none that is readable, or one of another training
    """
    files = checkpoints(out)
    if not resume:
        if files:
            raise UserError(f"{out}: holds {files[-1].name} of another run; add --resume, or give another --out")
        return 0
    for file in reversed(files):
        try:
            saved = tensors.open_weights(file)
            break
        except UserError as error:
            print(f"{error}; trying the one before")
    else:
        raise UserError(f"{out}: no readable checkpoint to resume from; leave out --resume")
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


def sweep(out: Path) -> None:
    """Delete what a run that was killed while writing left half-written."""
    for file in out.glob("*.safetensors.tmp*"):
        file.unlink(missing_ok=True)


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
