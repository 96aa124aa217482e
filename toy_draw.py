"""Toy pictures: draws the dancers of a clip and the place they dance in.

Concept   every limb is a capsule (a thick line, its radius changing from end to end) in an orthographic view, painted
          from back to front; a pixel's coverage follows from its distance to the limb, so edges are anti-aliased.
Paper     stands in for AIST's studio footage and the in-the-wild clips (arXiv 2503.14505v2, Sec. 5.1).
Differs   skin and hair are chosen so that they stand out against the clothes and the backdrop.

Units     pixels, y down, measured at the pixels' centres; colours are RGB in [0, 255].
Dimension key   F frames   M dancers   J joints   H W picture
"""

from functools import lru_cache

import numpy as np

from toy_dance import JOINTS, Clip, azimuth, joints

COLOURS = {
    "red": (214, 34, 40), "orange": (250, 135, 20), "yellow": (250, 218, 40), "green": (30, 150, 62),
    "blue": (30, 80, 215), "purple": (125, 45, 160), "pink": (252, 120, 180), "black": (28, 28, 32),
    "white": (246, 246, 246),
}  # fmt: skip
SKINS = ((248, 212, 182), (226, 172, 130), (176, 118, 78), (112, 70, 46))
HAIRS = ((40, 28, 24), (108, 60, 28), (222, 178, 92), (150, 44, 24))
FURS = ((238, 232, 226), (165, 150, 140), (120, 88, 62))
STUDIOS = {  # wall, floor
    "white": ((236, 236, 238), (208, 208, 212)), "black": ((30, 30, 34), (52, 52, 58)),
    "grey": ((138, 138, 142), (112, 112, 116)), "navy": ((28, 36, 84), (48, 56, 100)),
    "teal": ((40, 128, 128), (32, 98, 100)), "brown": ((122, 84, 58), (92, 64, 46)),
}  # fmt: skip
WHITE_STUDIO = "in a studio with a white backdrop"
SCENES = (
    "on a rooftop at sunset", "on a beach", "in a subway station", "in an art gallery with some paintings",
    "in a forest", "on a snowy mountain", "in a city street at night",
)  # fmt: skip
SETTINGS = tuple(f"in a studio with a {name} backdrop" for name in STUDIOS) + SCENES
HORIZON = 0.74  # the floor begins here, as a share of the height
FLOOR = 0.925  # the dancers' feet


def render(clip: Clip, num_frames: int = 73, size: int = 64, fps: float = 30) -> np.ndarray:
    """Film a clip -> uint8 (F, size, size, 3). The same clip gives the same bytes."""
    times_s = np.arange(num_frames) / fps
    zoom, shift = camera_path(clip, times_s)
    frames = _film_backdrop(clip.setting, size, zoom, shift)  # (F, H, W, 3)
    points, pixels = project(clip, joints(clip, times_s), times_s, size)  # (F, M, J, 3)
    skin, hair = _tones(clip)
    pad = size // 2
    canvas = np.zeros((num_frames, size + 2 * pad, size + 2 * pad, 3), np.float32)
    canvas[:, pad : pad + size, pad : pad + size] = frames
    for m in range(len(clip.figures)):
        under = points[:, m, JOINTS.index("pelvis"), 0]
        _shadow(canvas[:, pad : pad + size, pad : pad + size], under, _floor(clip, size, zoom), 0.24 * pixels)
    for m, figure in enumerate(clip.figures):
        limbs = _limbs(points[:, m], pixels, figure, clip, skin, hair)
        _paint(canvas, limbs, pad)
    return (canvas[:, pad : pad + size, pad : pad + size] + 0.5).clip(0, 255).astype(np.uint8)


def camera_path(clip: Clip, times_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Camera 10 zooms and pans slowly -> zoom (F,) about the picture's centre, shift (F,) to the right in heights."""
    if clip.camera != 10:
        return np.ones(len(times_s)), np.zeros(len(times_s))
    angle = 2 * np.pi * (times_s / 6 + (clip.dance_seed % 97) / 97)
    return 1 + 0.05 * np.sin(angle), 0.06 * np.cos(angle)


def project(clip: Clip, pose: np.ndarray, times_s: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Poses (F, M, J, 3) -> (x, y, nearness) in pixels (F, M, J, 3), and pixels per body height (F,)."""
    zoom, shift = camera_path(clip, times_s)
    angle, tilt = azimuth(clip), -0.2 if clip.camera == 9 else 0.1  # radians; camera 9 looks up
    pixels = size * zoom * (1.25 if clip.camera == 9 else {1: 0.86, 2: 0.72, 3: 0.64}[len(clip.figures)])  # (F,)
    floor = _floor(clip, size, zoom)
    x, y, z = np.moveaxis(pose, -1, 0)  # each (F, M, J)
    across, near = x * np.cos(angle) - z * np.sin(angle), x * np.sin(angle) + z * np.cos(angle)
    high, near = y * np.cos(tilt) - near * np.sin(tilt), near * np.cos(tilt) + y * np.sin(tilt)
    scale = pixels[:, None, None]
    screen_x = size * (0.5 + shift[:, None, None]) + scale * across - 0.5
    screen_y = floor[:, None, None] - scale * high - 0.5
    return np.stack([screen_x, screen_y, scale * near], -1), pixels


def _floor(clip: Clip, size: int, zoom: np.ndarray) -> np.ndarray:
    """Where the dancers' floor is, in pixels from the top (F,): below the picture for the close-up."""
    return size * (1.3 * zoom if clip.camera == 9 else 0.5 + (FLOOR - 0.5) * zoom)


def visible_colours(setting: str) -> list[str]:
    """Names of the clothes' colours that stand out from a place."""
    behind = _backdrop(setting, 64)[12:56, 32:64].reshape(-1, 3)
    return [name for name, colour in COLOURS.items() if _far(behind.mean(0), colour) > 80]


def _far(a, b) -> float:
    return float(np.linalg.norm(np.subtract(a, b)))


def _tones(clip: Clip) -> tuple[tuple, tuple]:
    """Skin and hair: of those that stand out from the clothes and the backdrop, the dance seed picks one."""
    backdrop = _backdrop(clip.setting, 64)[8:44, 12:52].reshape(-1, 3).mean(0)

    def pick(tones, avoid):
        contrast = [min(_far(tone, other) for other in avoid) for tone in tones]
        good = [tone for tone, c in zip(tones, contrast) if c > 90] or [tones[int(np.argmax(contrast))]]
        return good[clip.dance_seed % len(good)]

    skin = pick(SKINS, (backdrop, COLOURS[clip.shirt], COLOURS[clip.trousers]))
    return skin, pick(HAIRS, (backdrop, skin))


def _limbs(points, pixels, figure, clip, skin, hair) -> list[tuple]:
    """One dancer's limbs, each (start (F, 3), end (F, 3), radii (F, 2), colour (3,), roundness, nearness bias (F,))."""
    at = {name: points[:, j] for j, name in enumerate(JOINTS)}
    scale = pixels[:, None]
    shirt, trousers = COLOURS[clip.shirt], COLOURS[clip.trousers]
    shoe = (60, 48, 52) if clip.trousers != "black" else (150, 150, 158)
    rabbit, female = figure == "rabbit", figure == "female dancer"
    if rabbit:
        skin = max(FURS, key=lambda fur: min(_far(fur, shirt), _far(fur, _backdrop(clip.setting, 64)[20, 32])))
    slim = 0.88 if female else 1.0
    # the face looks where the shoulders and the spine say
    side = _unit(at["left shoulder"] - at["right shoulder"])
    up = _unit(at["head"] - at["neck"])
    front = _unit(np.cross(side * FLIP, up * FLIP)) * FLIP
    limbs = []

    def limb(start, end, radii, colour, roundness=0.35, bias=0.0):
        limbs.append((start, end, np.multiply(radii, scale), np.array(colour, np.float32), roundness, bias * pixels))

    for name in ("left", "right"):
        hip, knee, ankle = at[name + " hip"], at[name + " knee"], at[name + " ankle"]
        shoulder, elbow, wrist = at[name + " shoulder"], at[name + " elbow"], at[name + " wrist"]
        flank = 0.80 * hip + 0.20 * shoulder
        inset = 0.25 * (at["neck"] - shoulder)
        limb(hip, knee, (0.064 if female else 0.066, 0.052), trousers)
        limb(knee, ankle, (0.052, 0.042), trousers)
        sole = ankle + np.array([0, 0.012, 0]) * scale
        limb(sole, sole + 0.055 * scale * front, (0.042, 0.036), shoe, bias=-0.01)
        limb(shoulder + inset, flank, (0.058 * slim, 0.056 * slim), shirt, 0.0, -0.03)
        limb(shoulder, elbow, (0.050 * slim, 0.047 * slim), shirt, 0.4, 0.03)
        limb(elbow, wrist, (0.043, 0.040), skin, 0.3, 0.035)
        limb(wrist, wrist, (0.048, 0.048), skin, 0.2, 0.04)
    limb(at["left hip"], at["right hip"], (0.068, 0.068), trousers, 0.1, -0.02)
    waist = 0.75 * at["pelvis"] + 0.25 * at["neck"]
    limb(at["neck"] - 0.03 * scale * up, waist, (0.085 * slim, 0.075 * slim), shirt, 0.1, -0.025)
    limb(at["neck"], at["head"], (0.040, 0.040), skin, 0.2, -0.02)
    head, r = at["head"], 0.088 if not rabbit else 0.092
    limb(head, head, (r, r), skin, 0.25, 0.02)
    if rabbit:
        for sign in (1, -1):
            root = head + (0.04 * sign * side + 0.06 * up) * scale
            limb(root, root + (0.035 * sign * side + 0.12 * up) * scale, (0.032, 0.026), skin, 0.5, -0.01)
        tail = at["pelvis"] - 0.11 * scale * front
        limb(tail, tail, (0.045, 0.045), skin, 0.3)
    else:
        crown = head + (0.030 * up - 0.034 * front) * scale
        limb(crown, crown, (r, r), hair, 0.15, 0.02)
    if female:
        back = head - 0.05 * scale * front
        limb(back, back - (0.19 * up + 0.02 * front) * scale, (0.096, 0.112), hair, 0.2)
    for sign in (1, -1):
        eye = head + (0.075 * front + 0.036 * sign * side + 0.005 * up) * scale
        limb(eye, eye, (0.013, 0.013), (30, 22, 24), 0.0, 0.02)
    return limbs


FLIP = np.array([1.0, -1.0, 1.0])  # pictures count y downwards


def _unit(v):
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-6)


def _paint(canvas: np.ndarray, limbs: list[tuple], pad: int) -> None:
    """Paint one figure's limbs onto the canvas (F, H + 2 pad, W + 2 pad, 3) in place, each frame from back to front."""
    frames, high, wide, _ = canvas.shape
    flat, f = canvas.reshape(-1, 3), np.arange(frames)
    starts, ends, radii, colours, roundness, bias = (
        np.array([limb[k] for limb in limbs], np.float32) for k in range(6)
    )
    middle = (starts[..., 2] + ends[..., 2]) / 2  # (limbs, F)
    light = np.clip(1 + 0.2 * middle / radii.max(), 0.86, 1.08)  # far limbs are darker
    for k in np.argsort(middle + bias, axis=0):  # k (F,): in each frame, the limb to paint now
        a, b, (r0, r1) = starts[k, f, :2], ends[k, f, :2], radii[k, f].T
        widest = np.maximum(r0, r1)[:, None]
        corner = np.floor(np.minimum(a, b) - widest - 1).astype(int)
        width, height = np.ceil((np.abs(b - a) + 2 * widest).max(0)).astype(int) + 3  # one patch size for all frames
        width, height = min(width, wide), min(height, high)
        xs = np.clip(corner[:, :1] + pad, 0, wide - width) + np.arange(width)  # (F, width)
        ys = np.clip(corner[:, 1:] + pad, 0, high - height) + np.arange(height)  # (F, height)
        dx = (xs - pad - a[:, :1]).astype(np.float32)[:, None, :]
        dy = (ys - pad - a[:, 1:]).astype(np.float32)[:, :, None]
        ex, ey = (b - a).T[:, :, None, None]
        share = 1 / np.maximum(ex * ex + ey * ey, 1e-6)
        along = np.clip(dx * (ex * share) + dy * (ey * share), 0, 1)  # (F, height, width) from start to end of the limb
        square = (dx - along * ex) ** 2 + (dy - along * ey) ** 2
        radius = along * (r1 - r0)[:, None, None] + r0[:, None, None]
        inside = np.flatnonzero(square < (radius + 0.5) ** 2)  # about a third of the patch; the rest is left alone
        n = inside // (height * width)
        square, radius = square.ravel()[inside], radius.ravel()[inside]
        cover = np.minimum(radius - np.sqrt(square) + 0.5, 1)
        shade = light[k, f][n] * (1 - roundness[k][n] * np.minimum(square / radius**2, 1.2))
        pixel = ((f[:, None, None] * high + ys[:, :, None]) * wide + xs[:, None, :]).ravel()[inside]
        under = flat[pixel]
        flat[pixel] = under + cover[:, None] * (colours[k][n] * shade[:, None] - under)


def _shadow(frames: np.ndarray, x: np.ndarray, floor: np.ndarray, radius: np.ndarray) -> None:
    """A soft dark ellipse on the floor beneath a dancer, painted in place on (F, H, W, 3)."""
    size = frames.shape[1]
    grid = np.arange(size, dtype=np.float32)
    rows = slice(int(0.8 * size), size)
    dx = (grid - x[:, None].astype(np.float32)) / radius[:, None].astype(np.float32)  # (F, W)
    dy = (grid[rows] - floor[:, None].astype(np.float32) + 0.01 * size) / (0.22 * radius[:, None].astype(np.float32))
    dark = 0.4 * np.clip(1.2 - dx[:, None, :] ** 2 - dy[:, :, None] ** 2, 0, 1)
    frames[:, rows] *= 1 - dark[..., None]


def _film_backdrop(setting: str, size: int, zoom: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """The place as the moving camera sees it, interpolated along rows and columns -> (F, H, W, 3) float32."""
    picture = _backdrop(setting, size)  # (H, 1.5 W, 3): wider than the view
    high, wide = picture.shape[:2]
    if np.all(zoom == 1) and not shift.any():
        left = (wide - size) // 2
        return np.broadcast_to(picture[:, left : left + size], (len(zoom), size, size, 3))
    offset = np.arange(size) - (size - 1) / 2
    rows = _tent((high - 1) / 2 + offset / zoom[:, None], high)  # (F, H, high)
    columns = _tent((wide - 1) / 2 + (offset - (shift * size)[:, None]) / zoom[:, None], wide)  # (F, W, wide)
    return np.stack([rows @ picture[..., c] @ columns.transpose(0, 2, 1) for c in range(3)], -1)


def _tent(at: np.ndarray, length: int) -> np.ndarray:
    """Weights (F, P, length) of linear interpolation at positions (F, P)."""
    at = np.clip(at, 0, length - 1)[..., None]
    return np.maximum(0, 1 - np.abs(at - np.arange(length))).astype(np.float32)


@lru_cache(maxsize=64)
def _backdrop(setting: str, size: int) -> np.ndarray:
    """The place itself, (size, 1.5 size, 3) float32: large soft shapes, the same every time."""
    high, wide = size, size + 2 * (size // 4)
    y = ((np.arange(high) + 0.5) / size)[:, None, None]  # 0 top ... 1 bottom
    x = ((np.arange(wide) + 0.5) / size - 0.25)[None, :, None]  # 0 left ... 1 right of the still view
    soft = 1.2 / size

    def mix(*stops):  # a vertical gradient through (height, colour) stops
        heights, colours = zip(*stops)
        return np.stack([np.interp(y[:, 0, 0], heights, channel) for channel in zip(*colours)], -1)[:, None] + 0 * x

    def box(x0, y0, x1, y1, colour):
        inside = np.minimum(np.minimum(x - x0, x1 - x), np.minimum(y - y0, y1 - y))
        put(inside, colour)

    def disc(cx, cy, radius, colour, stretch=1.0):
        put(radius - np.hypot(x - cx, (y - cy) / stretch), colour)

    def put(inside, colour):
        nonlocal picture
        picture = picture + np.clip(inside / soft + 0.5, 0, 1) * (np.array(colour, float) - picture)

    floor = HORIZON
    if setting.startswith("in a studio"):
        wall, ground = STUDIOS[setting.split()[5]]
        light = np.array(wall) * 0.96
        picture = mix((0, light), (0.4, wall), (floor, wall), (floor + 0.06, ground), (1, ground))
    elif setting == "on a rooftop at sunset":
        picture = mix((0, (88, 70, 140)), (0.3, (226, 110, 110)), (0.6, (255, 190, 96)), (1, (255, 210, 120)))
        disc(0.16, 0.5, 0.09, (255, 236, 160))
        for k, top in enumerate((0.55, 0.42, 0.6, 0.5, 0.64, 0.48, 0.4, 0.57)):
            box(-0.25 + 0.19 * k, top, -0.25 + 0.19 * k + 0.15, 1, (74, 54, 92))
        box(-1, floor, 2, 2, (134, 108, 108))
    elif setting == "on a beach":
        picture = mix(
            (0, (96, 178, 240)),
            (0.45, (190, 226, 248)),
            (0.46, (30, 130, 180)),
            (0.7, (60, 170, 196)),
            (1, (60, 170, 196)),
        )
        disc(0.85, 0.14, 0.08, (255, 244, 190))
        put(y - floor + 0.03 * np.sin(5 * x), (238, 214, 160))
    elif setting == "in a subway station":
        picture = mix((0, (196, 200, 190)), (floor, (172, 178, 170)), (1, (172, 178, 170)))
        box(-1, 0.1, 2, 0.2, (200, 60, 50))
        for k in range(4):
            box(-0.2 + 0.42 * k, 0, -0.12 + 0.42 * k, floor, (110, 122, 124))
        box(-1, floor - 0.1, 2, floor, (40, 42, 46))
        box(-1, floor, 2, 2, (140, 136, 128))
        box(-1, floor, 2, floor + 0.03, (236, 204, 60))
    elif setting == "in an art gallery with some paintings":
        picture = mix((0, (222, 214, 200)), (floor, (230, 222, 208)), (1, (230, 222, 208)))
        for k, colour in enumerate(((60, 110, 160), (190, 70, 60), (70, 140, 90), (210, 160, 50), (120, 70, 140))):
            left = -0.22 + 0.31 * k
            box(left, 0.16, left + 0.21, 0.46, (96, 70, 44))
            box(left + 0.025, 0.185, left + 0.185, 0.435, colour)
            disc(left + 0.105, 0.31, 0.05, np.clip(np.array(colour) + 70, 0, 255))
        box(-1, floor, 2, 2, (158, 116, 80))
    elif setting == "in a forest":
        picture = mix((0, (90, 140, 80)), (0.4, (150, 190, 120)), (floor, (110, 150, 80)), (1, (110, 150, 80)))
        for k in range(7):
            box(-0.22 + 0.23 * k, 0.1, -0.16 + 0.23 * k, floor + 0.03 * (k % 2), (84, 62, 44))
            disc(-0.19 + 0.23 * k, 0.06 + 0.05 * (k % 3), 0.16, (44 + 14 * (k % 2), 96 + 12 * (k % 3), 50))
        put(y - floor, (96, 110, 58))
    elif setting == "on a snowy mountain":
        picture = mix((0, (70, 120, 200)), (0.6, (180, 208, 236)), (1, (180, 208, 236)))
        for centre, top in ((0.2, 0.22), (0.9, 0.3), (-0.2, 0.4), (1.3, 0.36)):
            put(y - top - 0.9 * np.abs(x - centre), (104, 116, 150))
            put(np.minimum(y - top - 0.9 * np.abs(x - centre), top + 0.12 - y), (240, 244, 250))
        put(y - floor, (232, 238, 246))
    elif setting == "in a city street at night":
        picture = mix((0, (20, 22, 56)), (floor, (70, 50, 110)), (1, (70, 50, 110)))
        for k, top in enumerate((0.2, 0.34, 0.12, 0.4, 0.26, 0.16, 0.3)):
            left = -0.25 + 0.22 * k
            box(left, top, left + 0.18, 1, (34, 36, 66))
            for row in range(3):
                box(left + 0.04, top + 0.06 + 0.13 * row, left + 0.14, top + 0.12 + 0.13 * row, (236, 196, 96))
        box(-1, floor, 2, 2, (58, 58, 74))
    else:
        raise ValueError(f"unknown setting {setting!r}: expected one of {', '.join(SETTINGS)}")
    return picture.astype(np.float32)
