"""Floating-point operations of a pass and of a training step, from the shapes; a multiply-add is two.

Concept   products of matrices and attention scores; norms, gates and single vectors do not count.
Paper     none.

Dimension key   S video tokens   L text tokens   T latent frames (= music tokens of ZICA)
"""

import torch

from mochi_dit import MochiDiT
from model import MusicInfuser


def tokens_of(z: torch.Tensor) -> int:
    return z.shape[2] * z.shape[3] * z.shape[4] // 4


def products_flop(dit: MochiDiT, S: int, L: int) -> int:
    """Of the matrix products of one pass over S video and L text tokens; those of single vectors do not count."""
    flop = 0
    for name, weight in dit.named_parameters():
        if weight.ndim > 1 and "lora" not in name and "mod" not in name and name != "pos_frequencies":
            tokens = (
                0 if "embedder" in name and "x_embedder" not in name else L if "_y" in name or "yproj" in name else S
            )
            flop += 2 * tokens * weight.numel()
    return flop


def attention_flop(dit: MochiDiT, S: int, L: int) -> int:
    return len(dit.blocks) * 4 * (S + L) ** 2 * dit.x_embedder.proj.out_channels


def pass_flop(dit: MochiDiT, S: int, L: int, T: int = 0, hears: int = 0) -> int:
    """Of one pass; `hears` layers with ZICA over T music tokens."""
    width = dit.x_embedder.proj.out_channels
    zica = hears * (2 * 2 * S * width**2 + 4 * S * T * width)  # to_q and to_out; scores and values
    return products_flop(dit, S, L) + attention_flop(dit, S, L) + zica


def train_flop(model: MusicInfuser, S: int, L: int, T: int, recompute: int) -> float:
    """Of one step: forward, recomputation of that many blocks, backward.

    A product goes back once where its weight is frozen; attention, and the products of ZICA and LoRA, twice.
    """
    dit, hears = model.dit, len(model.layers)
    again = recompute / len(dit.blocks)
    products, scores = products_flop(dit, S, L), attention_flop(dit, S, L)
    zica = pass_flop(dit, S, L, T, hears) - products - scores
    lora = 2 * S * sum(p.numel() for name, p in model.named_parameters() if "lora" in name and "_x." in name)
    return (1 + again) * (products + scores + zica + lora) + products + 2 * (scores + zica + lora)
