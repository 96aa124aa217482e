"""Toy dancers: what a clip is, and the true pose of its dancers at any time.

Concept   key poses on the beats, joined by curves that stand still at every key. Each genre has a vocabulary of moves;
          over all of them the body bounces once a beat and is lowest exactly on it. Two-bone inverse kinematics bends
          knees and elbows.
Paper     stands in for AIST (arXiv 2503.14505v2, Sec. 5.1): ten genres, basic and advanced dances, groups, ten cameras.
Differs   everything about a clip, down to the true pose at any time, follows from its fields alone.

Units     body heights; x to the dancer's left, y up, z to the front; the floor is y = 0.
Dimension key   F frames   M dancers   J joints
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Clip:
    """Everything about a clip except its length. Its music is (genre, bpm, music_seed) from start_s on."""

    genre: str  # AIST code, a key of toy_music.STYLES
    bpm: float
    situation: (
        str  # "BM" basic: one move. "FM" advanced: larger, a new move every four beats. "GR" group: several dancers
    )
    figures: tuple[str, ...]  # one to three of FIGURES, from left to right on the screen
    camera: int  # 1 ... 10, AIST's views
    shirt: str  # a colour's name, a key of toy_draw.COLOURS
    trousers: str
    setting: str  # a key of toy_draw.SETTINGS
    music_seed: int
    dance_seed: int
    start_s: float  # seconds into the music
    wild: bool = False

    @property
    def gender(self) -> str:
        return self.figures[0].split()[0]


FIGURES = ("female dancer", "male dancer", "rabbit")
JOINTS = (
    "head", "neck", "left shoulder", "right shoulder", "left elbow", "right elbow", "left wrist", "right wrist",
    "pelvis", "left hip", "right hip", "left knee", "right knee", "left ankle", "right ankle",
)  # fmt: skip

# A move is five strings, one letter a key: left hand, right hand, left foot, right foot, body. One key a beat, or two a
# beat with a final '/'. All are cyclic over 1, 2 or 4 beats.
MOVES = {
    "BR": ("sc cs cn nc yt", "udld duld knnn nnkn lrlr", "sbsb bsbs ckck kckc ytyt", "lulu ulul wnwn nwnw LRLR"),
    "PO": ("rlrl lrlr nnww nnww .t.y", "sfsr rsfs wwnn wwnn ty..", "sh hs wn nw lr", "fcsl fcsl nfnb nbnf .f.b"),
    "LO": ("uh hu wn nw LR", "phph hphp kwnw wnkw lrlr", "ccss ccss wwnn wwnn .fb.", "rdrd drdr knkn nknk LrLr"),
    "MH": ("lc cl wn nw lr", "fdfd dfdf unun nunu f.f.", "sl ls ww ww lr", "cclu ccul wnnw wnnw LfRf"),
    "LH": ("lx xl ww ww ty", "rurl lrur wwuu wwnn tfyf", "xsxs sxsx fbfb bfbf tyty", "pd dp un nu fb"),
    "HO": ("ldld dldl fnbn bnfn lrlr/", "lxlx xlxl cncn ncnc tyty/", "ssdd ssdd knkn nknk lrlr", "fb bf cn nc lr"),
    "WA": ("su hs wn wn lr", "usxs hhhh nnwn wnnw lrLR", "xuxu usus fnfn nfnf tyty", "suls luse wwnn nnww l.r."),
    "KR": ("rp pr un nu fb", "ss cc ww ww bf", "plpl rprp unwn wnun fbfb", "xxss xxss uwuw wuwu fbfb/"),
    "JS": ("hs sh wc cw lr", "uhcd hucd Knnn nnKn LRlr", "sfsx xsfs cwcw wcwc ytyt", "lh ul nf fn lr"),
    "JB": ("sule sule Knfn nnbn L.R.", "usus susu wKwn nwKw lRrL", "fsul fsul fnKn bnnn .bLb", "es se cb bc LR"),
}
BOUNCE = {  # depth of the dip on the beat
    "BR": 1.0, "PO": 0.85, "LO": 1.0, "MH": 1.15, "LH": 1.1, "HO": 1.0, "WA": 0.85, "KR": 1.2, "JS": 0.9, "JB": 0.85,
}  # fmt: skip
SNAP = {  # how late and how fast a key is left for the next
    "BR": 1.2, "PO": 2.2, "LO": 2.0, "MH": 1.1, "LH": 1.3, "HO": 1.0, "WA": 1.3, "KR": 2.0, "JS": 1.5, "JB": 1.0,
}  # fmt: skip

HANDS = {  # from the shoulder, in arm lengths: outward, up, to the front; none far above the head
    "d": (0.30, -0.90, 0.12), "s": (0.97, -0.05, 0.10), "u": (0.80, 0.50, 0.12), "f": (0.20, -0.05, 0.93),
    "h": (0.30, -0.55, 0.10), "c": (-0.15, -0.30, 0.60), "x": (-0.50, -0.15, 0.70), "l": (0.75, -0.62, 0.10),
    "b": (0.50, -0.70, -0.40), "r": (0.68, 0.40, 0.25), "p": (0.45, -0.30, 0.80), "e": (0.90, 0.25, -0.15),
}  # fmt: skip
FEET = {  # outward from the middle, up, to the front
    "n": (0.09, 0.00, 0.00), "w": (0.18, 0.00, 0.00), "f": (0.09, 0.00, 0.13), "b": (0.09, 0.00, -0.13),
    "c": (-0.05, 0.00, 0.09), "k": (0.14, 0.13, 0.20), "K": (0.30, 0.15, 0.05), "u": (0.11, 0.19, 0.10),
}  # fmt: skip
BODY = {  # hips to the left, lean to the left, lean to the front, twist of the shoulders to the left (radians)
    ".": (0.0, 0.0, 0.03, 0.0), "f": (0.0, 0.0, 0.22, 0.0), "b": (0.0, 0.0, -0.10, 0.0),
    "l": (0.05, -0.08, 0.03, 0.0), "L": (0.03, 0.20, 0.0, 0.2), "t": (0.02, 0.0, 0.04, 0.6),
    "r": (-0.05, 0.08, 0.03, 0.0), "R": (-0.03, -0.20, 0.0, -0.2), "y": (-0.02, 0.0, 0.04, -0.6),
}  # fmt: skip
ARM, LEG = 0.18, 0.238  # length of each of the two bones
SHOULDER = {"female dancer": 0.098, "male dancer": 0.130, "rabbit": 0.105}  # half widths
HIP = {"female dancer": 0.074, "male dancer": 0.066, "rabbit": 0.075}


def joints(clip: Clip, times_s: np.ndarray) -> np.ndarray:
    """The true pose at `times_s` (F,) seconds into the clip -> (F, M, J, 3) in body heights; M dancers in step.

    The dancers of a group stand side by side as seen by the camera, each around its own x-z origin (see `places`).
    """
    beat = (np.asarray(times_s) + clip.start_s) * clip.bpm / 60  # (F,)
    rng = np.random.default_rng([11, clip.dance_seed])
    vocabulary = MOVES[clip.genre]
    order, mirror = rng.permutation(len(vocabulary)), rng.random() < 0.5
    span = {"BM": 0.75, "FM": 1.05, "GR": 0.85}[clip.situation] * rng.uniform(0.92, 1.08)
    if clip.situation == "BM":
        keys = _play(vocabulary[order[0]], beat, SNAP[clip.genre])
    else:  # a new move every four beats, blended in during the half beat before
        part = beat // 4
        blend = _ease(np.clip((beat - 4 * part - 3.5) / 0.5, 0, 1))[:, None]
        now, then = (order[((part + k) % len(order)).astype(int)] for k in (0, 1))
        moves = np.stack([_play(move, beat, SNAP[clip.genre]) for move in vocabulary])  # (moves, F, 16)
        at = np.arange(len(beat))
        keys = (1 - blend) * moves[now, at] + blend * moves[then, at]
    keys = REST + span * (keys - REST)
    if mirror:
        keys = keys[:, [3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8, 12, 13, 14, 15]] * MIRROR
    depth = {"BM": 0.062, "FM": 0.078, "GR": 0.074}[clip.situation] * BOUNCE[clip.genre]
    dip = depth * ((1 + np.cos(2 * np.pi * beat)) / 2) ** 1.6  # 1 on the beat, 0 between: lowest on the beat
    return np.stack([_skeleton(keys, dip, figure) for figure in clip.figures], 1) + places(clip)[:, None]


def places(clip: Clip) -> np.ndarray:
    """Where each dancer stands (M, 3): in a row across the camera's view."""
    across = 0.46 * (np.arange(len(clip.figures)) - (len(clip.figures) - 1) / 2)
    angle = azimuth(clip)
    return across[:, None] * np.array([np.cos(angle), 0, -np.sin(angle)])


def azimuth(clip: Clip) -> float:
    """The camera's direction around the dancer in radians: 0 front, then to the dancer's left, 45 degrees a camera."""
    return 0.0 if clip.camera >= 9 else (clip.camera - 1) * np.pi / 4


def _ease(u, snap=1.0):
    """0 to 1 with no speed at either end; a larger `snap` waits longer and moves faster."""
    u = np.clip((u - 0.5) * snap + 0.5, 0, 1)
    return u * u * (3 - 2 * u)


def _play(move: str, beat: np.ndarray, snap: float) -> np.ndarray:
    """Follow a move -> (F, 16): left hand, right hand, left foot, right foot, body. Feet lift as they step."""
    keys = _keys(move)
    at = beat * (2 if move.endswith("/") else 1)
    now = np.floor(at).astype(int)
    a, b = keys[now % len(keys)], keys[(now + 1) % len(keys)]
    u = (at - now)[:, None]
    out = a + (b - a) * _ease(u, snap)
    for foot in (6, 9):
        stride = np.linalg.norm((b - a)[:, foot : foot + 3], axis=1)
        out[:, foot + 1] += np.minimum(0.05, 0.4 * stride) * np.sin(np.pi * u[:, 0]) ** 2
    return out


def _keys(move: str) -> np.ndarray:
    left, right, left_foot, right_foot, body = move.rstrip("/").split()
    rows = zip(left, right, left_foot, right_foot, body)
    return np.array([HANDS[a] + HANDS[b] + FEET[c] + FEET[d] + BODY[e] for a, b, c, d, e in rows])


REST = _keys("l l n n .")[0]
MIRROR = np.array([1.0] * 12 + [-1, -1, 1, -1])


def _skeleton(keys: np.ndarray, dip: np.ndarray, figure: str) -> np.ndarray:
    """Key parameters (F, 16) and the bounce (F,) -> joints (F, J, 3) of a dancer at the origin."""
    left_hand, right_hand, left_foot, right_foot, body = np.split(keys, [3, 6, 9, 12], axis=1)
    hips_x, lean_left, lean_front, twist = body.T
    zero = np.zeros_like(dip)
    pelvis = np.stack([hips_x, 0.505 - dip, -0.35 * dip], 1)  # knees bend: the hips go back a little
    lean_front = lean_front + 1.2 * dip
    up = np.stack([np.sin(lean_left), np.cos(lean_left) * np.cos(lean_front), np.sin(lean_front)], 1)
    up /= np.linalg.norm(up, axis=1, keepdims=True)
    side = np.stack([np.cos(twist), zero, -np.sin(twist)], 1)
    side -= up * (side * up).sum(1, keepdims=True)
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    front = np.cross(side, up)
    neck = pelvis + 0.295 * up
    head = neck + 0.11 * up + 0.15 * dip[:, None] * front
    found = {"head": head, "neck": neck, "pelvis": pelvis}
    for name, sign, hand, foot in (("left", 1, left_hand, left_foot), ("right", -1, right_hand, right_foot)):
        shoulder = neck - 0.03 * up + sign * SHOULDER[figure] * side
        outward, above, ahead = (2 * ARM * hand).T[:, :, None]
        wrist = shoulder + sign * outward * side + above * up + ahead * front
        found[name + " shoulder"] = shoulder
        found[name + " elbow"], found[name + " wrist"] = _bend(
            shoulder, wrist, ARM, 0.8 * sign * side - 0.5 * up - 0.5 * front
        )
        hip = pelvis + sign * HIP[figure] * np.array([1.0, 0, 0])
        ankle = foot * np.array([sign, 1, 1]) + np.array([0, 0.045, 0])
        knee_to = np.broadcast_to(np.array([0.35 * sign, 0.0, 1.0]), hip.shape)
        found[name + " hip"] = hip
        found[name + " knee"], found[name + " ankle"] = _bend(hip, ankle, LEG, knee_to)
    return np.stack([found[name] for name in JOINTS], 1)


def _bend(root, target, bone, pole):
    """Two equal bones from `root` to `target`, bent towards `pole` -> middle and end joint; the reach is limited."""
    reach = target - root
    length = np.linalg.norm(reach, axis=1, keepdims=True)
    along = reach / np.maximum(length, 1e-6)
    length = np.clip(length, 0.1 * bone, 1.98 * bone)
    pole = pole - along * (pole * along).sum(1, keepdims=True)
    pole = pole / np.maximum(np.linalg.norm(pole, axis=1, keepdims=True), 1e-6)
    return root + along * length / 2 + pole * np.sqrt(bone**2 - (length / 2) ** 2), root + along * length
