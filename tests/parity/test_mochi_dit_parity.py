"""The prior against diffusers' MochiTransformer3DModel, with tiny random weights.

diffusers takes the time as 1000 (1 - sigma) and estimates the same velocity z0 - eps. It attends to each sample's valid
text alone, so the empty prompt leaves its video tokens only, as genmo's code does: one reference for every mask. Its
MLPs are not rounded to 256s, which is no difference where 8/3 of a width is such a multiple already: 96.
"""

import pytest
import torch

import tensors
from mochi_dit import MochiDiT, load_dit

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # diffusers asks for a float32 autocast

TOLERANCE = 5e-5  # of the largest output
TEXT_DIM, LENGTH = 64, 9
MASKS = {
    "full": [9, 9],
    "partial": [4, 4],
    "mixed": [9, 3],
    "one token": [1, 9],
    "one empty": [0, 5],
    "all empty": [0, 0],
}


def reference(depth: int):
    """diffusers' transformer, 4 heads of 24, with random weights everywhere."""
    torch.manual_seed(0)
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        num_layers=depth,
        pooled_projection_dim=96,
        text_embed_dim=TEXT_DIM,
    )
    return shaken(model).eval()


def shaken(model):
    """Positions, gains and modulations that matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "pos_frequencies":
                parameter.normal_(std=0.1)
            elif ".norm_" in name or "_norm_" in name:
                parameter.normal_(1, 0.3)
    return model.requires_grad_(False)


def inputs(lengths, T=2, H=4, W=6, sigma=0.5):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(len(lengths), 12, T, H, W, generator=generator)
    text = torch.randn(len(lengths), LENGTH, TEXT_DIM, generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    return z, torch.full((len(lengths),), sigma), text, mask


def theirs(model, z, sigma, text, mask):
    return model(z, text, 1000 * (1 - sigma), mask, return_dict=False)[0]


def error(ours, wanted):
    assert wanted.isfinite().all()
    return ((ours - wanted).abs().max() / wanted.abs().max()).item()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """diffusers' model, and ours loaded from its weights as diffusers saves them."""
    model = reference(depth=3)
    folder = tmp_path_factory.mktemp("transformer")
    model.save_pretrained(folder)
    return model, load_dit(folder)


@pytest.mark.parametrize("lengths", MASKS.values(), ids=MASKS.keys())
def test_velocity_equals_diffusers_for_every_mask(pair, lengths):
    model, dit = pair
    arguments = inputs(lengths)
    assert error(dit(*arguments), theirs(model, *arguments)) <= TOLERANCE


@pytest.mark.parametrize("size", [(1, 2, 2), (1, 8, 4), (3, 4, 10), (5, 6, 2), (7, 4, 6)])
def test_velocity_equals_diffusers_for_every_size(pair, size):
    model, dit = pair
    arguments = inputs([9, 3], *size)
    assert error(dit(*arguments), theirs(model, *arguments)) <= TOLERANCE


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_velocity_equals_diffusers_at_every_noise_level(pair, sigma):
    model, dit = pair
    arguments = inputs([9, 3], sigma=sigma)
    assert error(dit(*arguments), theirs(model, *arguments)) <= TOLERANCE


def test_gradients_equal_diffusers(pair):
    model, dit = pair
    found = []
    for forward, weight in (
        (lambda *a: dit(*a), dit.blocks[0].attn.proj_y.weight),
        (lambda *a: theirs(model, *a), model.transformer_blocks[0].attn1.to_add_out.weight),
    ):
        z, *rest = inputs([9, 3])
        z.requires_grad_()
        weight.requires_grad_()
        found.append(torch.autograd.grad(forward(z, *rest).square().sum(), (z, weight)))
        weight.requires_grad_(False)
    for ours, wanted in zip(*found):
        assert error(ours, wanted) <= TOLERANCE


def test_both_layouts_of_one_model_give_the_velocity_of_diffusers(tmp_path):
    """Through diffusers' own converter, which knows the full depth only."""
    from diffusers.loaders.single_file_utils import convert_mochi_transformer_checkpoint_to_diffusers as convert

    torch.manual_seed(2)
    dit = shaken(MochiDiT(depth=48, width=96, text_width=96, num_heads=4, text_dim=TEXT_DIM))
    tensors.save(tmp_path / "genmo.safetensors", dit.state_dict())
    converted = convert(dict(dit.state_dict()))
    tensors.save(tmp_path / "diffusers.safetensors", converted)
    model = reference(depth=48)
    model.load_state_dict(converted)
    arguments = inputs([9, 3])
    ours = load_dit(tmp_path / "genmo.safetensors")(*arguments)
    assert torch.equal(load_dit(tmp_path / "diffusers.safetensors")(*arguments), ours)
    assert error(ours, theirs(model, *arguments)) <= TOLERANCE
