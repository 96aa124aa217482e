"""How good do pictures look? The scorers of layer adaptability, and the prompts that go with them.

Concept   `toy`: in the toy world it is known what a dancer can look like, so how much of that a video shows can be
          computed. Two things go wrong with generated figures: colours smear into each other, and limbs take shapes
          that no pose has. Both are measured where the backdrop is not; whether the prompt was followed is not.
          `musiq`: VBench's imaging quality, a network that was trained on people's ratings of photographs (vbench.py).
Paper     arXiv 2503.14505v2, Sec. 4.1, App. G: "imaging quality ... highly related to the structure and noisiness".

Dimension key   F frames   H W picture   P pixels of a frame
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

import toy
from data_names import GENRES
from toy_draw import COLOURS, HAIRS, SKINS, WHITE_STUDIO, render
from toy_read import figure_share, read_colours

SCORERS = ("toy", "musiq")
EVERY = 3  # one of so many frames is looked at
SHADES = np.linspace(0.6, 1.08, 9)  # limbs are shaded: darker at the edge and far away
DARK = ((60, 48, 52), (150, 150, 158), (30, 22, 24))  # shoes and eyes
TOLERANCE = 20.0  # distance in RGB, of 255, at which a colour counts exp(-1/2)
POSES = 480  # true figures that a generated one is compared with


def scenes(count: int, seed: int = 0) -> list[toy.Clip]:
    """Solo dances in a studio, seen from the front: every genre, both figures, all backdrops and clothes."""
    genres, chosen = list(GENRES), []
    for i in range(count):
        rng = np.random.default_rng([seed, 15, i])
        clip = toy.sample_clip(rng)
        setting = str(rng.choice([s for s in toy.SETTINGS if "studio" in s]))
        shirt, trousers = (str(c) for c in rng.choice(toy.visible_colours(setting), 2, replace=False))
        chosen.append(replace(
            clip, genre=genres[i % len(genres)], figures=(toy.FIGURES[i // len(genres) % 2],), camera=1,
            situation=("BM", "FM")[i % 2], setting=setting, shirt=shirt, trousers=trousers,
        ))  # fmt: skip
    return chosen


def prompt_of(clip: toy.Clip) -> str:
    """The scene in words."""
    who = ("professional " if clip.setting == WHITE_STUDIO else "") + clip.figures[0]
    dancing = f"dancing {GENRES[clip.genre]} {clip.setting}, captured from a front view"
    return f"a {who} wearing {toy.clothes(clip)} {dancing}"


def make_scorer(name: str, folder: Path, device: torch.device) -> Callable[[np.ndarray, toy.Clip], float]:
    """The scorer of that name: (frames (F, H, W, 3) uint8, scene) -> 0 to 100, higher is better."""
    return musiq(folder, device) if name == "musiq" else toy_fidelity


def toy_fidelity(frames: np.ndarray, scene: toy.Clip) -> float:
    """100 x colour fidelity x limb fidelity of a video's figure. True clips reach about 87, for edges are mixtures."""
    frames = frames[::EVERY]
    figure = figure_share(frames) > 0.5  # (F, H, W)
    if not figure.any():
        return 0.0
    return 100 * colour_fidelity(frames, figure) * limb_fidelity(figure, scene)


def colour_fidelity(frames: np.ndarray, figure: np.ndarray) -> float:
    """How pure the figure's colours are: mean over its pixels of exp(-d^2 / 2 TOLERANCE^2), in [0, 1].

    d is the distance to the nearest shade of the two clothes' colours that the video shows, of skin, hair, shoes, eyes.
    """
    clothes = [COLOURS[name] for name in read_colours(frames)]
    tones = np.array([np.multiply(rgb, shade) for rgb in (*clothes, *SKINS, *HAIRS, *DARK) for shade in SHADES])
    pixels = frames[figure].astype(np.float64)  # (n, 3)
    square = (pixels**2).sum(1)[:, None] + (tones**2).sum(1) - 2 * pixels @ tones.T  # (n, tones)
    return float(np.exp(-square.min(1).clip(0) / (2 * TOLERANCE**2)).mean())


def limb_fidelity(figure: np.ndarray, scene: toy.Clip) -> float:
    """How possible the figure's shape is: mean over frames of the best overlap with a true one, in [0, 1].

    Overlap = shared area / joint area; the true ones dance the same genre, in POSES poses of that figure.
    """
    shown = figure.reshape(len(figure), -1).astype(np.float32)  # (F, P)
    true = true_figures(scene.genre, scene.figures, figure.shape[1])  # (POSES, P)
    shared = shown @ true.T  # (F, POSES)
    joint = shown.sum(1)[:, None] + true.sum(1) - shared
    return float((shared / joint).max(1).mean())


@cache
def true_figures(genre: str, figures: tuple[str, ...], size: int) -> np.ndarray:
    """POSES true figures of a genre as (POSES, P) float32, 0 or 1: dances of all kinds at all phases of the beat."""
    rng, few = np.random.default_rng(15), 24
    clip = replace(toy.sample_clip(rng), genre=genre, figures=figures, camera=1, setting=WHITE_STUDIO, shirt="blue",
                   trousers="black")  # fmt: skip
    shown = []
    for k in range(POSES // few):
        start_s, dance_seed = float(rng.uniform(0, 40)), int(rng.integers(10**6))
        dance = replace(clip, situation=("BM", "FM")[k % 2], dance_seed=dance_seed, start_s=start_s)
        frames = render(dance, few, size, fps=3.7)  # a rate that no tempo divides: all phases
        shown.append((figure_share(frames) > 0.5).reshape(few, -1))
    return np.concatenate(shown).astype(np.float32)


def musiq(folder: Path, device: torch.device) -> Callable[[np.ndarray, toy.Clip], float]:
    """VBench's imaging quality (vbench.py), times 100; folder: with MUSIQ's weights."""
    import vbench  # here, for the toy world needs none of it

    network = vbench.load_imaging(folder, device)
    return lambda frames, scene: 100 * vbench.score(network, frames[::EVERY], device)
