"""Blocks through torch.compile: whole graphs, the same numbers, no compilation per prompt length.

The graphs run in plain PyTorch here: what is checked is what the compiler is given, not the compiler.
"""

import pytest
import torch

from mochi_dit import MochiDiT, compile_blocks
from model import Adapters, MusicInfuser


def model(dtype=torch.float32) -> MusicInfuser:
    torch.manual_seed(0)
    dit = MochiDiT(depth=3, width=48, text_width=24, num_heads=2, text_dim=16)
    with torch.no_grad():
        dit.pos_frequencies.normal_(std=0.1)
    adapters = Adapters(dit, [0, 2], 64, rank=4, alpha=4.0, zero_init=False)
    with torch.no_grad():
        for name, parameter in adapters.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return MusicInfuser(dit, adapters)


def inputs(length: int):
    generator = torch.Generator().manual_seed(length)
    z, text = torch.randn(1, 12, 2, 4, 6, generator=generator), torch.randn(1, 9, 16, generator=generator)
    audio = torch.randn(1, 12, 64, generator=generator)
    return z, torch.tensor([0.3]), text, (torch.arange(9) < length)[None], audio


def largest_error(ours, theirs) -> float:
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True)]
    return max((a - b).abs().max().item() for a, b in pairs) / max(b.abs().max().item() for _, b in pairs)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    m = model()
    compile_blocks(m.dit, backend="eager")
    yield m
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@torch.no_grad()
def test_compiled_blocks_give_the_same_velocity_for_any_prompt_and_compile_for_few(compiled):
    plain, counts = model(), []
    for length in (5, 3, 9, 7, 4, 0):
        assert largest_error([compiled(*inputs(length))], [plain(*inputs(length))]) < 2e-6, length
        counts.append(graphs())
    assert counts[0] == 1, "blocks that are alike share a graph"
    assert counts[1] == counts[4], "the form for any length is made with the second length"


@pytest.mark.parametrize("recompute", [0, 3])
def test_compiled_blocks_give_the_same_gradients(compiled, recompute):
    plain, found = model(), []
    for m in (compiled, plain):
        m.recompute = recompute
        m(*inputs(5)).square().sum().backward()
        found.append([p.grad for p in m.adapter_parameters() if p.grad is not None])
    assert graphs() == 2  # the first block has no gradient to pass on
    assert len(found[0]) > 20 and largest_error(*found) < 2e-6
