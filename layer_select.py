"""Which blocks of the prior hear the music: every strategy of Fig. 5, and the command that measures adaptability.

Concept   cross-attention in every block costs much and harms the prior; a third of the blocks is enough, if it is the
          right third. A block's adaptability is how good videos look when it is the one left out in layer-skip guidance
          (Eq. 4): blocks that structure depends on make good guidance. The prior alone is sampled, no music.
Paper     arXiv 2503.14505v2, Sec. 4.1, Eq. (4), Fig. 5 (b)-(d), App. G, Fig. 15; rows "All", "Evenly Distributed",
          "First", "Middle" and "Last Layers" of Tables 1 and 5. The published choice is model.OFFICIAL_LAYERS.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import media
import mochi_vae
from beats import bootstrap_interval
from check import Files, check_networks, find_files, made_for
from config import UserError, check_frames, flag, from_cli, make_folder, run
from data_encode import fingerprint_weights, hash_of
from layer_score import SCORERS, make_scorer, prompt_of, scenes
from model import load_musicinfuser
from sample import null_of, sample
from schedule import linear_quadratic
from stages import encode_text, pick_device, to_pixels

# ------------------------------------------------------------------------------------------------------- strategies


def every(depth: int, count: int) -> list[int]:
    """All blocks, whatever `count`."""
    return list(range(depth))


def even(depth: int, count: int) -> list[int]:
    """Fig. 5 (b): floor(i depth / count), the first block of each of `count` equal parts."""
    return [i * depth // count for i in range(count)]


def first(depth: int, count: int) -> list[int]:
    """Fig. 5 (c): the earliest blocks."""
    return list(range(count))


def middle(depth: int, count: int) -> list[int]:
    """As many blocks are left out at both ends; one more at the end if that is not possible."""
    start = (depth - count) // 2
    return list(range(start, start + count))


def last(depth: int, count: int) -> list[int]:
    """The latest blocks."""
    return list(range(depth - count, depth))


def most_adaptable(adaptability: Sequence[float], count: int) -> list[int]:
    """Fig. 5 (d): the `count` blocks with the highest scores, ascending; the earlier one of two equals."""
    ranked = sorted(range(len(adaptability)), key=lambda layer: -adaptability[layer])
    return sorted(ranked[:count])


STRATEGIES = {"all": every, "even": even, "first": first, "middle": middle, "last": last}


def select_layers(strategy: str, depth: int, count: int) -> list[int]:
    """`count` of the blocks 0 ... depth - 1, ascending, by one of STRATEGIES.

    raises   UserError if there is no such strategy, or no such number of blocks
    """
    if strategy not in STRATEGIES or not 1 <= count <= depth:
        raise UserError(f"{count} of {depth} layers by {strategy!r}: expected 1 to {depth} by {', '.join(STRATEGIES)}")
    return STRATEGIES[strategy](depth, count)


# ------------------------------------------------------------------------------------------------------ the command


@dataclass(frozen=True)
class LayerSelectConfig:
    """Rank the blocks of a prior by adaptability: OUT/layers.json, which train.py --layers takes, and OUT/layers.png.

    What is in OUT/layers.json already is not measured again."""

    weights: Path = flag(Path("weights/baby"), help="folder of checkpoints")
    out: Path = flag(Path("runs/layers"), help="folder for layers.json and layers.png")
    prompts: int = flag(40, help="videos for each block")
    top: int | None = flag(None, help="blocks to choose (default: a third of them)")
    scorer: str = flag("toy", help="toy: fidelity to the toy world; musiq: imaging quality as in VBench, needs pyiqa")
    vbench: Path = flag(Path("weights/vbench"), help="for musiq: folder of its network (README, VBench's scores)")
    skip_scale: float = flag(
        0.25, help="scale of layer-skip guidance; 1 for 48 blocks, less for fewer, each of which weighs more"
    )
    frames: int = flag(73, help="video frames, 1 + 6k")
    steps: int | None = flag(None, help="sampling steps (default: what the weights were made for, else 64)")
    cfg: float | None = flag(None, help="classifier-free guidance scale (default: of the weights, else 6)")
    seed: int = flag(0, help="of prompts and noise, which are the same for every block")
    batch: int = flag(8, help="videos to sample at once")
    device: str | None = flag(None, help="cpu, cuda or cuda:N (default: cuda if there is one)")
    dtype: str | None = flag(None, help="float32 or bfloat16 (default: bfloat16 on cuda, float32 on cpu)")

    def __post_init__(self):
        check_frames(self.frames)
        for name, least in (("prompts", 2), ("batch", 1), ("steps", 1), ("top", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: expected at least {least}")
        if self.scorer not in SCORERS:
            raise UserError(f"--scorer {self.scorer}: expected {' or '.join(SCORERS)}")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype}: expected float32 or bfloat16")
        if not math.isfinite(self.skip_scale) or not self.skip_scale:
            raise UserError(f"--skip-scale {self.skip_scale}: expected a finite number other than 0")


PLAIN = "none"  # the row of scores without layer-skip guidance
IRRELEVANT = {"weights", "vbench", "out", "top", "batch", "device", "prompts"}  # flags that do not change a score


class Scores:
    """OUT/layers.json: {row: the scores of its prompts so far}, a row for each block and one without skip guidance."""

    def __init__(self, path: Path, settings: dict, rows: Sequence[str]):
        self.path, self.settings, self.rows = path, settings, {row: [] for row in rows}
        if path.exists():
            try:
                told = json.loads(path.read_text(encoding="utf-8"))
                same, kept = told["settings"] == settings, {row: list(told["scores"][row]) for row in rows}
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}: not what this command writes; give --out another folder") from error
            if not same:
                raise UserError(f"{path}: was measured with other settings; give --out another folder")
            self.rows = kept

    def write(self, **results) -> None:
        """All scores and, when everything is measured, `results`: whole or not at all."""
        told = results | {"settings": self.settings, "scores": self.rows}
        with media.new_file(self.path) as temporary:
            temporary.write_text(json.dumps(told, indent=1), encoding="utf-8")


@torch.no_grad()
def measure(
    cfg: LayerSelectConfig, scores: Scores, rate: Callable, files: Files, size: tuple[int, int], device: torch.device
) -> None:
    """Sample, decode and `rate` what is still missing, block after block; size = height and width in pixels."""
    shown = scenes(cfg.prompts, cfg.seed)
    dtype = getattr(torch, scores.settings["dtype"])
    features, mask = encode_text(files, [prompt_of(scene) for scene in shown], device, dtype)
    m = load_musicinfuser(files.dit, None, device=device, dtype=dtype)
    decoder = mochi_vae.load_decoder(files.decoder, device, dtype)
    shape = (mochi_vae.LATENT, (cfg.frames - 1) // 6 + 1, size[0] // 8, size[1] // 8)
    sigmas = linear_quadratic(scores.settings["steps"])
    done = sum(min(len(row), cfg.prompts) for row in scores.rows.values())
    bar = tqdm(total=len(scores.rows) * cfg.prompts, initial=done, desc="layers", unit="video", dynamic_ncols=True)
    for name, row in scores.rows.items():
        skip, scale = ((), 0.0) if name == PLAIN else ((int(name),), cfg.skip_scale)
        while len(row) < cfg.prompts:
            some = range(len(row), min(len(row) + cfg.batch, cfg.prompts))
            draws = [torch.randn(shape, generator=torch.Generator().manual_seed(cfg.seed * 10**6 + i)) for i in some]
            text = features[some.start : some.stop], mask[some.start : some.stop]
            noise = torch.stack(draws).to(device)
            z = sample(m, noise, sigmas, text, null_of(text), None, None, scores.settings["cfg"], skip, scale)
            for i, one in zip(some, z.split(1)):
                film = [to_pixels(part) for part in decoder.stream(mochi_vae.to_vae_space(one))]
                row.append(rate(np.concatenate(film), shown[i]))
                bar.update()
            scores.write()
    bar.close()


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two sets of scores of the same layers, in [-1, 1]."""
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def halves(scores: np.ndarray, splits: int = 200) -> float:
    """Rank correlation of the layers between random halves of the prompts, the mean over splits; scores (layers, N)."""
    rng, n = np.random.default_rng(0), scores.shape[1]
    orders = [rng.permutation(n) for _ in range(splits)]
    return float(np.mean([
        spearman(scores[:, order[: n // 2]].mean(1), scores[:, order[n // 2 :]].mean(1)) for order in orders
    ]))  # fmt: skip


def report(cfg: LayerSelectConfig, scores: Scores) -> None:
    """Rank, print, write the JSON and draw Fig. 15."""
    rows = {name: np.array(row[: cfg.prompts]) for name, row in scores.rows.items()}
    plain, table = rows.pop(PLAIN), np.stack(list(rows.values()))  # (N,), (layers, N)
    adaptability, depth = table.mean(1), len(table)
    chosen = most_adaptable(adaptability, cfg.top or max(1, depth // 3))
    gain = table - plain  # paired: the same prompt and noise
    intervals = [bootstrap_interval(row) for row in gain]
    rho = halves(table) if depth > 1 else math.nan
    print(f"{'layer':>7} {'score':>7}   {'gain over plain guidance, 95 %':<32}")
    for layer in range(depth):
        low, high = intervals[layer]
        mark = "*" * (layer in chosen)
        print(f"{layer:>7} {adaptability[layer]:7.2f}   {gain[layer].mean():+.2f} [{low:+.2f}, {high:+.2f}] {mark}")
    print(f"{'plain':>7} {plain.mean():7.2f}   over {cfg.prompts} prompts")
    print(f"rank correlation between halves of the prompts: {rho:.2f} (mean of 200 random halvings)")
    print(f"layers     {', '.join(map(str, chosen))}")
    scores.write(
        layers=chosen, adaptability=adaptability.tolist(), plain=plain.mean(), gain=gain.mean(1).tolist(),
        gain_interval=intervals, rank_correlation_of_halves=rho, prompts=cfg.prompts,
    )  # fmt: skip
    draw(cfg.out / "layers.png", adaptability, intervals, plain.mean(), chosen, cfg.scorer)
    print(f"wrote      {scores.path}: train.py --layers {scores.path}")
    print(f"wrote      {cfg.out / 'layers.png'}")


def draw(path: Path, adaptability: np.ndarray, intervals: list, plain: float, chosen: list[int], scorer: str) -> None:
    """Fig. 15: score against the layer that is left out, the chosen ones in colour; bars: 95 % of the paired gain."""
    from matplotlib.figure import Figure

    depth = len(adaptability)
    figure = Figure(figsize=(max(6, depth / 5), 3.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(range(depth), adaptability, color="0.6", zorder=1)
    around = np.array(
        [(score - plain - low, high - score + plain) for score, (low, high) in zip(adaptability, intervals)]
    )
    axis.errorbar(range(depth), adaptability, around.T.clip(0), fmt="none", ecolor="0.6", capsize=2, zorder=1)
    colours = ["tab:red" if layer in chosen else "0.4" for layer in range(depth)]
    axis.scatter(range(depth), adaptability, c=colours, zorder=2)
    axis.axhline(plain, color="tab:blue", linestyle="--", linewidth=1, label="without layer-skip guidance")
    axis.legend(frameon=False, fontsize=8)
    axis.set_xticks(range(0, depth, max(1, depth // 24)))
    axis.set_xlabel("layer left out to guide")
    axis.set_ylabel({"toy": "fidelity to the toy world, %", "musiq": "imaging quality (MUSIQ)"}[scorer])
    with media.new_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def main() -> None:
    cfg = from_cli(LayerSelectConfig)
    files = find_files(cfg.weights, None)
    depth, made, device = len(check_networks(files).dit.blocks), made_for(files.dit), pick_device(cfg.device)
    if cfg.top is not None and cfg.top > depth:
        raise UserError(f"--top {cfg.top}: the prior has {depth} blocks")
    if cfg.scorer == "toy" and made["height"] != made["width"]:
        raise UserError(f"--scorer toy: the toy world is square, these weights make {made['width']}x{made['height']}")
    make_folder(cfg.out, "--out")
    rate = make_scorer(cfg.scorer, cfg.vbench, device)
    settings = {key: str(value) for key, value in asdict(cfg).items() if key not in IRRELEVANT}
    settings |= {key: made[key] if getattr(cfg, key) is None else getattr(cfg, key) for key in ("steps", "cfg")}
    settings |= {"dtype": cfg.dtype or ("bfloat16" if device.type == "cuda" else "float32")}
    settings |= {"networks": hash_of([fingerprint_weights(path) for path in (files.text, files.dit, files.decoder)])}
    scores = Scores(cfg.out / "layers.json", settings, [PLAIN, *map(str, range(depth))])
    measure(cfg, scores, rate, files, (made["height"], made["width"]), device)
    report(cfg, scores)


if __name__ == "__main__":
    run(main)
