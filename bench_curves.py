"""Cost against frames and pixels, ours and the peer's, as a picture.

Paper     none.
"""

from dataclasses import replace
from pathlib import Path

from bench_cpu import PAIRS, CpuBench, peak_memory, sizes, take_turns
from media import new_file

FRAMES = (7, 19, 37, 73, 109, 145)
PIXELS = (48, 64, 96, 128, 160)
OURS, THEIRS, INK = "#e4572e", "#4d6a8f", "#222222"
ROUNDS = 5


def draw_curves(cfg: CpuBench) -> dict:
    """Measure one pass and decoding at the baby's networks, over frames and over pixels; draw CFG.curves (PNG)."""
    swept = {"frames": [replace(cfg, frames=n) for n in FRAMES], "pixels": [replace(cfg, pixels=n) for n in PIXELS]}
    seconds = {
        f"{name} against {axis}": [turns(name, at) | {axis: getattr(at, axis)} for at in points]
        for name in ("pass", "decode")
        for axis, points in swept.items()
    }
    memory = [
        {"frames": at.frames} | {side: peak_memory("decode", "baby", at, side) for side in ("ours", "theirs")}
        for at in swept["frames"]
    ]
    draw(cfg.curves, cfg, seconds | {"decode, peak MB against frames": memory})
    return {"picture": str(cfg.curves), "seconds": seconds, "decode_peak_mb": memory}


def turns(name: str, at: CpuBench) -> dict:
    told = take_turns(PAIRS[name](sizes(at)["baby"]), ROUNDS, at.box_s)
    return {"ours": told["ours_s"]["median"], "theirs": told["theirs_s"]["median"], "ratio": told["ratio"]["median"]}


def draw(path: Path, cfg: CpuBench, curves: dict[str, list[dict]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), dpi=110, layout="constrained", facecolor="white")
    axes = figure.subplots(2, 3).flat
    for axis, (title, points) in zip(axes, curves.items()):
        over = "pixels" if title.endswith("pixels") else "frames"
        for side, label, colour in (("ours", "this code", OURS), ("theirs", "diffusers", THEIRS)):
            x, y = [p[over] for p in points], [p[side] for p in points]
            axis.plot(x, y, "o-", color=colour, markersize=4, linewidth=1.8, label=label)
        fixed = f"{cfg.frames} frames" if over == "pixels" else f"{cfg.pixels} x {cfg.pixels} pixels"
        what = "a pass of the transformer" if title.startswith("pass") else "decoding"
        axis.set_title(f"{what}, {fixed}", fontsize=11, color=INK)
        axis.set(xlabel="video frames" if over == "frames" else "height = width, pixels", ylim=(0, None))
        axis.set_ylabel("peak memory, MB" if "MB" in title else "seconds")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.axes[len(curves)].set_axis_off()  # five curves in six places
    figure.axes[0].legend(frameon=False)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png")
