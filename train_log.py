"""What a person wants to see of a training run: log.jsonl and curves.png.

Concept   one line of JSON a step, {"step", "loss", "grad_norm", "lr", "beta"}, and one for each held-out measurement,
          {"step", "held_out": {"right", "shuffled", "no"}}. The picture is drawn from the log alone.
Paper     none: plumbing.
"""

import json
import os
from pathlib import Path

from config import UserError


class Log:
    """A line of JSON a step; lines of steps that a resumed run does again are dropped. Only rank 0 writes."""

    def __init__(self, path: Path, start: int, rank: int):
        self.path, self.start, self.rank = path, start, rank

    def __enter__(self):
        if self.rank == 0:
            old = read_log(self.path) if self.path.exists() else []
            keep = [line for line in old if line["step"] < self.start + ("held_out" in line)]
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                new = self.path.with_suffix(".tmp")
                new.write_text("".join(json.dumps(line) + "\n" for line in keep))
                os.replace(new, self.path)
                self.file = open(self.path, "a")
            except OSError as error:
                raise self.unwritable(error) from error
        return self

    def write(self, **line) -> None:
        if self.rank == 0:
            try:
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()
            except OSError as error:
                raise self.unwritable(error) from error

    def unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: cannot write there: {error.strerror}; make room, then go on with --resume")

    def __exit__(self, *error):
        if self.rank == 0:
            try:
                self.file.close()
            except OSError:  # a line that a full disk refused, and of which `write` has told
                pass


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
    told = [line for line in lines if "held_out" in line]
    figure, axes = plt.subplots(1, 2 if told else 1, figsize=(11 if told else 6, 4), squeeze=False)
    left, *right = axes[0]
    left.plot(steps, losses, lw=0.4, alpha=0.5, label="each step")
    left.plot(steps, smooth(losses), lw=2, label="running mean")
    left.set(title="training loss", xlabel="step")
    left.legend()
    for ax in right:
        for kind, colour in (("right", "tab:green"), ("shuffled", "tab:red"), ("no", "tab:gray")):
            values = [line["held_out"][kind] for line in told]
            ax.plot([line["step"] for line in told], values, marker=".", color=colour, label=f"{kind} music")
        ax.set(title="held-out loss at fixed noise", xlabel="step")
        ax.legend()
    figure.tight_layout()
    new = out / "curves.tmp.png"
    try:
        figure.savefig(new, dpi=120)
        os.replace(new, out / "curves.png")
    except OSError as error:
        raise UserError(f"{out / 'curves.png'}: cannot write there: {error.strerror}") from error
    finally:
        plt.close(figure)


def smooth(values: list[float]) -> list[float]:
    """Mean of the values so far, the recent ones weighing more: a window of about 50, shorter at the beginning."""
    means = []
    for i, value in enumerate(values):
        share = max(0.02, 1 / (i + 1))
        means.append(value if not means else means[-1] + share * (value - means[-1]))
    return means
