"""What a video of the toy world shows, read from its pixels alone: so it serves generated videos just as well.

Concept   each pixel is more or less figure, by how far it is from the backdrop at the ends of its row. Where the figure
          is, how high it reaches in each frame, and what colours it wears is then arithmetic.
Paper     stands in for the video LLM that judges what a video shows (arXiv 2503.14505v2, Sec. 5.1).

Dimension key   F frames   H W picture
"""

import numpy as np

from toy_draw import COLOURS, FURS, HAIRS, SETTINGS, SKINS
from toy_draw import _backdrop as backdrop

GLANCES_S = (0.0, 0.6, 1.2, 1.8)  # seconds of the frames that are looked at for what does not move
GLANCE = 48  # pixels of such a frame


def body_curve(frames: np.ndarray) -> np.ndarray:
    """How high the dancers' upper body is, from pixels alone: (F, H, W, 3) uint8 -> (F,) pixels up from the bottom.

    Columns count by the square of how much figure they show on average (so arms count little); the height is where the
    figure below the top of each frame first reaches a fixed area, a fifth of the usual: about the shoulders. Its local
    minima are the motion's beats.
    """
    figure = figure_share(frames)  # (F, H, W)
    columns = figure.mean((0, 1)) ** 2
    area = np.cumsum(figure @ (columns / max(columns.sum(), 1e-6)), axis=1)  # (F, H) from the top down to each row
    target = 0.2 * max(np.median(area[:, -1]), 1e-6)
    rows = np.arange(1, area.shape[1] + 1)
    return np.array([len(rows) - np.interp(target, a, rows) for a in area])


def read_colours(frames: np.ndarray) -> tuple[str, str]:
    """Shirt and trousers, from pixels alone: of the clothes' colours the two most frequent, the upper one first."""
    figure, frames = figure_share(frames)[::6], frames[::6].astype(np.float32)
    tones = [(name, rgb, shade) for name, rgb in COLOURS.items() for shade in (1.0, 0.85, 0.7)]
    tones += [("", rgb, shade) for rgb in SKINS + HAIRS + FURS for shade in (1.0, 0.85)]  # no clothes
    nearest = np.argmin([((frames - np.multiply(rgb, shade)) ** 2).sum(-1) for _, rgb, shade in tones], axis=0)
    weight = figure * (figure > 0.6) * figure.mean((0, 1)) ** 2  # (F, H, W)
    share = np.cumsum(weight.sum((0, 2))) / max(weight.sum(), 1e-6)
    weight *= (share > 0.12)[:, None]  # not the head
    rows = {}  # colour -> how much of the figure has it, in each row
    for k, (name, _, _) in enumerate(tones):
        rows[name] = rows.get(name, 0) + (weight * (nearest == k)).sum((0, 2))
    two = sorted(COLOURS, key=lambda name: -rows[name].sum())[:2]
    upper, lower = sorted(two, key=lambda name: rows[name] @ np.arange(len(share)) / max(rows[name].sum(), 1e-6))
    return upper, lower


def read_setting(frames: np.ndarray) -> str:
    """The place, from pixels alone: the one whose empty picture is nearest in the border of the usual frame."""
    usual = np.median(frames[::6], axis=0).astype(np.float32)  # (H, W, 3)
    size = len(usual)
    edge = max(size // 8, 1)
    outer = np.zeros(usual.shape[:2], bool)
    outer[:, :edge] = outer[:, -edge:] = True
    outer[:edge] = True
    left = size // 4
    empty = {name: backdrop(name, size)[:, left : left + size] for name in SETTINGS}
    return min(empty, key=lambda name: np.abs(usual - empty[name])[outer].mean())


def movement(frames: np.ndarray) -> float:
    """How much the figures move: mean change of the share of figure from frame to frame, per figure pixel."""
    figure = figure_share(frames)
    return float(np.abs(np.diff(figure, axis=0)).sum(0).sum() / (len(frames) - 1) / max(figure.mean(0).sum(), 1e-6))


def sharpness(frames: np.ndarray) -> float:
    """Mean step between neighbouring pixels, in grey levels, of every sixth frame."""
    grey = frames[::6].astype(np.float32).mean(-1)
    return float(np.abs(np.diff(grey, axis=1)).mean() + np.abs(np.diff(grey, axis=2)).mean())


def silhouette(frames: np.ndarray) -> np.ndarray:
    """Where the figures are in every third frame, coarse: (F, H, W, 3) uint8 -> (F', 16, 16) shares of figure."""
    figure = figure_share(frames[::3])
    rows, columns = (np.array_split(np.arange(n), 16) for n in figure.shape[1:])
    figure = np.stack([figure[:, part].mean(1) if len(part) else 0 * figure[:, 0] for part in rows], 1)
    return np.stack([figure[..., part].mean(-1) if len(part) else 0 * figure[..., 0] for part in columns], -1)


def glance(frames: np.ndarray, fps: float = 30) -> np.ndarray:
    """The few small frames that tell what does not move: (F, H, W, 3) uint8 -> (4, GLANCE, GLANCE, 3) uint8."""
    few = frames[[min(round(t * fps), len(frames) - 1) for t in GLANCES_S]].astype(np.float32)
    for axis in (1, 2):  # averages over equal parts: exact for a whole ratio, near enough for others
        edges = np.linspace(0, few.shape[axis], GLANCE + 1)
        total = np.concatenate([np.zeros_like(few.take([0], axis)), few.cumsum(axis)], axis)
        low = np.floor(edges).astype(int)
        part = (edges - low).reshape([-1 if a == axis else 1 for a in range(4)])
        at = total.take(low, axis) * (1 - part) + total.take(np.minimum(low + 1, few.shape[axis]), axis) * part
        few = np.diff(at, axis=axis) * GLANCE / few.shape[axis]
    return (few + 0.5).clip(0, 255).astype(np.uint8)


def read(frames: np.ndarray) -> dict:
    """All that is read of a video by arithmetic: curve (F,), shirt, trousers, setting, movement, sharpness, glance."""
    shirt, trousers = read_colours(frames)
    return {
        "curve": body_curve(frames),
        "shirt": shirt,
        "trousers": trousers,
        "setting": read_setting(frames),
        "movement": movement(frames),
        "sharpness": sharpness(frames),
        "glance": glance(frames),
    }


def figure_share(frames: np.ndarray) -> np.ndarray:
    """Share of each pixel that is not backdrop, (F, H, W) in [0, 1]; each row's backdrop is that of its two ends."""
    pixels = frames.astype(np.float32)
    high, wide = pixels.shape[1:3]
    edge, x = max(wide // 10, 1), ((np.arange(wide) + 0.5) / wide)[:, None]
    left, right = (
        np.median(side.transpose(1, 0, 2, 3).reshape(high, 1, -1, 3), axis=2)
        for side in (pixels[:, :, :edge], pixels[:, :, -edge:])
    )  # (H, 1, 3)
    return np.clip((np.linalg.norm(pixels - (left * (1 - x) + right * x), axis=-1) - 25) / 50, 0, 1)
