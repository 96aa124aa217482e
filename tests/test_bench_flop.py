"""Operations are counted from shapes: against the sizes written out by hand, at the official size."""

import pytest
import torch

from bench_flop import pass_flop, train_flop
from mochi_dit import MochiDiT
from model import Adapters, MusicInfuser


def official() -> MochiDiT:
    with torch.device("meta"):
        return MochiDiT(depth=48, width=3072, text_width=1536, num_heads=24, text_dim=4096)


@pytest.mark.parametrize("T, tera", [(7, 198), (13, 484), (25, 1377), (28, 1668)])
def test_a_pass_at_the_official_size_takes_the_operations_computed_by_hand(T, tera):
    D, E, S, L = 3072, 1536, T * 30 * 53, 256
    video = 2 * S * (3 * D * D + D * D + 3 * D * 8192)  # qkv, projection, gated MLP
    text = 2 * L * (3 * D * E + D * E + 3 * E * 4096)
    last = 2 * L * (D * E + 3 * E * 4096)  # the last block has no text output
    ends = 2 * S * 48 * D * 2 + 2 * L * 4096 * E
    wanted = 48 * (video + text + 4 * (S + L) ** 2 * D) - last + ends
    assert pass_flop(official(), S, L) == wanted
    assert wanted / 1e12 == pytest.approx(tera, rel=0.02)


def test_recomputation_adds_a_forward_to_a_training_step():
    with torch.device("meta"):
        model = MusicInfuser(official(), Adapters(official()))
    S, L, T = 13 * 30 * 53, 50, 13
    none, all_48 = (train_flop(model, S, L, T, blocks) for blocks in (0, 48))
    forward = pass_flop(model.dit, S, L, T, hears=16)
    assert forward < all_48 - none < 1.01 * forward  # LoRA is the rest
    assert all_48 / 1e15 == pytest.approx(1.62, rel=0.1)
