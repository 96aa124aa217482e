"""Rows of a benchmark: each measured on its own, in a box of time, and written down before the next begins.

Concept   a row that fails (no memory, no such kernel, too slow) is a result too: it says why, and the rest goes on. A
          killed run keeps what it has.
Paper     none.
"""

import gc
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

GB = 1e9


def hardware(device: str) -> dict:
    """The machine and the versions."""
    cpu = next((x.split(":")[1].strip() for x in cpu_lines() if x.startswith("model name")), platform.processor())
    told = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": None}
    told |= {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("av", "diffusers", "transformers"):
        try:
            told[package] = version(package)
        except PackageNotFoundError:
            told[package] = None
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        told |= {"gpu": card.name, "gpu_memory_gb": card.total_memory / GB, "cuda": torch.version.cuda}
        told |= {"cudnn": torch.backends.cudnn.version()}
    return told


def cpu_lines() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


class OutOfTime(Exception):
    """The row's box of time is over."""


class Rows:
    """Measure rows one by one; the file `out` is whole after each."""

    def __init__(self, out: Path, head: dict, budget_s: float):
        self.out, self.head, self.rows = out, head, []
        self.began, self.budget_s = time.monotonic(), budget_s

    def row(self, name: str, measure: Callable[[], dict], box_s: float) -> dict:
        """Add `measure()` under that name; box_s is the most it may take. -> the row, {"failed": why} if it did."""
        left = self.budget_s - (time.monotonic() - self.began)
        began = time.monotonic()
        if left < 5:
            told = {"failed": f"not begun: the budget of {self.budget_s:.0f} s is spent"}
        else:
            told = boxed(measure, min(box_s, left))
        told = {"name": name, **told, "took_s": round(time.monotonic() - began, 2)}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.add(told)
        return told

    def add(self, told: dict) -> None:
        self.rows.append(told)
        self.write()
        print(json.dumps(told), flush=True)

    def write(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.head | {"rows": self.rows}, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.out)


def boxed(measure: Callable[[], dict], box_s: float) -> dict:
    """measure(), or why it failed. Whatever it raises ends here: that row is without a figure, not the run."""

    def ring(*_):
        raise OutOfTime(f"not done after {box_s:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, box_s)
    try:
        return measure()
    except Exception as error:  # a failure is a result here
        where = error.__traceback__
        while where.tb_next is not None:
            where = where.tb_next
        place = f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}"
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({place})"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(fn: Callable[[], object], device: torch.device, repeats: int = 3) -> dict:
    """Seconds of fn() after one warm-up: median, least and most of `repeats`; peak memory of the device, all told."""
    began = time.perf_counter()
    fn()
    wait(device)
    first_s = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        fn()
        wait(device)
        seconds.append(time.perf_counter() - began)
    told = {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds), "first_s": first_s}
    if device.type == "cuda":
        told["peak_gb"] = torch.cuda.max_memory_allocated(device) / GB
    return told


def peak_host_gb(reset: bool = False) -> float:
    """Peak resident memory of this process in GB, since the last reset where the system allows one (Linux)."""
    if reset and sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass  # then the peak is that of the whole run so far: too high, never too low
    lines = Path("/proc/self/status").read_text().splitlines() if sys.platform == "linux" else []
    return next((int(x.split()[1]) * 1024 / GB for x in lines if x.startswith("VmHWM")), float("nan"))


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> dict:
    """How far two outputs are apart: the largest difference over the largest value, and the same of the squares."""
    ours, theirs = ours.float(), theirs.float()
    difference = ours - theirs
    return {
        "max_error": (difference.abs().max() / theirs.abs().max()).item(),
        "rms_error": (difference.norm() / theirs.norm()).item(),
    }
