"""The prior on its own: shapes, names, masks, invariances, precision, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tensors
from config import UserError
from mochi_dit import (
    BASE_AREA,
    KEEP_FLOAT32,
    MochiDiT,
    from_diffusers,
    load_dit,
    patchify,
    positions,
    rms_norm,
    rotate,
    unpatchify,
)

MANIFESTS = Path(__file__).parent / "manifests"
LENGTHS = (5, 2, 0)  # valid text tokens of each sample of `batch`


def lively(depth=3, width=48, text_width=24, num_heads=2, text_dim=16) -> MochiDiT:
    """A tiny model in which everything matters: positions, gains and all."""
    torch.manual_seed(0)
    dit = MochiDiT(depth, width, text_width, num_heads, text_dim)
    with torch.no_grad():
        dit.pos_frequencies.normal_(std=0.1)
        for name, parameter in dit.named_parameters():
            if "_norm_" in name:
                parameter.normal_(1, 0.3)
    return dit.requires_grad_(False)


def batch(length=5):
    """z, sigma, text and mask: three samples with LENGTHS valid tokens, in texts of `length` columns."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, 12, 2, 4, 6, generator=generator)
    text = torch.randn(3, 5, 16, generator=generator)
    text = F.pad(text, (0, 0, 0, length - 5), value=3.0)
    mask = torch.arange(length) < torch.tensor(LENGTHS)[:, None]
    return z, torch.tensor([0.1, 0.5, 1.0]), text, mask


def close(ours, theirs, tolerance=2e-6):
    return (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def manifest(name):
    return {key: tuple(shape) for key, (shape, _) in json.loads((MANIFESTS / name).read_text())["tensors"].items()}


def official_size() -> MochiDiT:
    with torch.device("meta"):
        return MochiDiT(depth=48, width=3072, text_width=1536, num_heads=24, text_dim=4096)


def test_official_size_has_exactly_the_official_names_and_shapes():
    assert {name: tuple(t.shape) for name, t in official_size().state_dict().items()} == manifest("dit.json")


def test_diffusers_sources_cover_exactly_the_diffusers_names_with_our_shapes():
    dit = official_size()
    theirs, sources = manifest("diffusers_transformer.json"), from_diffusers(dit)
    assert sorted(name for names, _ in sources.values() for name in names) == sorted(theirs)
    for name, wanted in dit.state_dict().items():
        names, join = sources[name]
        assert join(*(torch.empty(theirs[n], device="meta") for n in names)).shape == wanted.shape, name


@pytest.mark.parametrize("width, hidden", [(3072, 8192), (1536, 4096), (96, 256), (97, 512), (192, 512), (193, 768)])
def test_mlp_is_eight_thirds_of_the_width_rounded_up_to_256(width, hidden):
    with torch.device("meta"):
        dit = MochiDiT(depth=1, width=width * 2, text_width=24, num_heads=1, text_dim=16)
        small = MochiDiT(depth=2, width=2, text_width=width, num_heads=1, text_dim=16)
    assert small.blocks[0].mlp_y.w2.in_features == hidden
    assert dit.blocks[0].mlp_x.w1.out_features == 2 * dit.blocks[0].mlp_x.w2.in_features


def test_last_block_has_no_text_output():
    last = lively().blocks[-1]
    names = [name for name, _ in last.named_parameters()]
    assert not any("proj_y" in name or "mlp_y" in name for name in names)
    assert last.mod_y.out_features == 24


@pytest.mark.parametrize("T, H, W", [(1, 2, 2), (2, 4, 6), (3, 8, 2)])
def test_unpatchify_inverts_patchify(T, H, W):
    z = torch.randn(2, 12, T, H, W, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpatchify(patchify(z, 2), (T, H // 2, W // 2), 2), z)


def test_patch_is_row_then_column_then_channel_and_tokens_are_time_then_row_then_column():
    z = torch.arange(2 * 3 * 4 * 6).reshape(1, 2, 3, 4, 6)
    tokens = patchify(z, 2)
    assert tokens.shape == (1, 18, 8)
    token = tokens[0, 1 * 6 + 1 * 3 + 2]  # frame 1, patch row 1, patch column 2
    assert token.tolist() == [z[0, c, 1, 2 + row, 4 + column] for row in (0, 1) for column in (0, 1) for c in (0, 1)]


def test_patch_embedding_is_the_convolution_its_weight_belongs_to():
    embed = lively().x_embedder
    z = batch()[0]
    wanted = embed.proj(z.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2).reshape(3, -1, 48)
    assert close(embed(z), wanted)


@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 2, 5), (7, 30, 53)])
def test_positions_are_symmetric_bin_centres_of_one_area(grid):
    t, h, w = positions(grid)
    assert t.tolist() == list(range(grid[0]))
    assert torch.equal(h, -h.flip(0)) and torch.equal(w, -w.flip(0))
    stretch = math.sqrt(192 * 192 / (grid[1] * grid[2]))
    assert h[0].item() == pytest.approx(-(grid[1] * stretch / 2) + stretch / 2, rel=1e-6, abs=1e-5)
    assert BASE_AREA == 192 * 192
    steps = torch.cat((h.diff(), w.diff()))
    assert torch.allclose(steps, torch.full_like(steps, stretch), rtol=1e-5)


def test_rotation_turns_even_odd_pairs_by_the_angle():
    x = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(0))
    angle = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(1))
    turned = rotate(x, torch.stack((angle.cos(), angle.sin()), -1))
    cos, sin = angle.cos(), angle.sin()
    assert torch.allclose(turned[..., 0::2], x[..., 0::2] * cos - x[..., 1::2] * sin, atol=1e-6)
    assert torch.allclose(turned[..., 1::2], x[..., 0::2] * sin + x[..., 1::2] * cos, atol=1e-6)


def test_rms_norm_and_its_gradients_equal_the_formula_even_on_rows_of_zeros():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=generator)
    x[1, 2] = 0
    gain, grad = torch.randn(3, 1, 8, generator=generator), torch.randn(3, 5, 8, generator=generator)
    found = []
    for norm in (rms_norm, lambda x, g: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * g):
        inputs = [x.clone().requires_grad_(), gain.clone().requires_grad_()]
        out = norm(*inputs)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, grad)])
    assert all(close(ours, theirs) for ours, theirs in zip(*found))


def test_velocity_has_the_shape_of_z():
    z, sigma, text, mask = batch()
    assert lively()(z, sigma, text, mask).shape == z.shape


def test_content_of_the_padding_does_not_matter_even_if_it_is_not_a_number():
    dit, (z, sigma, text, mask) = lively(), batch()
    wanted = dit(z, sigma, text, mask)
    for rubbish in (100.0, math.inf, math.nan):
        assert torch.equal(dit(z, sigma, text.masked_fill(~mask[..., None], rubbish), mask), wanted)


def test_content_of_the_prompt_matters():
    dit, (z, sigma, text, mask) = lively(), batch()
    changed = dit(z, sigma, text + 1, mask) - dit(z, sigma, text, mask)
    assert changed[:2].abs().amax((1, 2, 3, 4)).min() > 1e-3
    assert changed[2].abs().max() == 0  # the empty prompt has no content


def test_length_of_the_padding_does_not_matter():
    dit = lively()
    assert torch.equal(dit(*batch(length=5)), dit(*batch(length=64)))


def test_place_of_the_padding_does_not_matter():
    dit, (z, sigma, text, mask) = lively(), batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    assert close(dit(z, sigma, text[:, order], mask[:, order]), dit(z, sigma, text, mask))


def test_batch_equals_its_samples_alone():
    dit, (z, sigma, text, mask) = lively(), batch()
    together = dit(z, sigma, text, mask)
    for i in range(3):
        alone = dit(z[i : i + 1], sigma[i : i + 1], text[i : i + 1], mask[i : i + 1])
        assert close(alone, together[i : i + 1]), f"prompt of {LENGTHS[i]} tokens"


def test_prompts_of_one_length_need_no_mask_and_others_do():
    dit, (_, _, text, mask) = lively(), batch()
    assert dit.embed_text(text[:1], mask[:1]).mask is None
    assert dit.embed_text(text[1:2], mask[1:2]).y.shape == (1, 2, 24)
    assert dit.embed_text(text, mask).mask.tolist() == mask.tolist()


def test_batch_of_empty_prompts_gives_finite_velocity_and_gradients():
    dit, (z, sigma, text, mask) = lively().requires_grad_(True), batch()
    out = dit(z, sigma, text, torch.zeros_like(mask))
    out.square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in dit.parameters())


def test_skipped_layers_are_the_identity_on_both_streams():
    dit, inputs = lively(), batch()
    x, y, c, rope, mask, grid = dit.embed(*inputs)
    wanted = dit.unembed(dit.blocks[2](x, y, c, rope, mask)[0], c, grid)
    assert torch.equal(dit(*inputs, skip_layers=(0, 1)), wanted)
    assert not close(dit(*inputs), wanted, tolerance=1e-3)


def test_last_block_passes_the_text_through():
    dit = lively()
    x, y, c, rope, mask, _ = dit.embed(*batch())
    assert torch.equal(dit.blocks[-1](x, y, c, rope, mask)[1], y)
    assert not torch.equal(dit.blocks[0](x, y, c, rope, mask)[1], y)


def test_prompt_and_positions_made_once_give_the_same_state():
    dit, (z, sigma, text, mask) = lively(), batch()
    prompt, rope = dit.embed_text(text, mask), dit.embed_positions(dit.grid_of(z))
    for ours, theirs in zip(dit.embed_noisy(z, sigma, prompt, rope), dit.embed(z, sigma, text, mask)):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


def test_gradient_reaches_z_and_every_parameter():
    dit, (z, sigma, text, mask) = lively().requires_grad_(True), batch()
    z.requires_grad_()
    dit(z, sigma, text, mask).square().mean().backward()
    silent = [name for name, p in dit.named_parameters() if p.grad is None or not p.grad.any()]
    assert z.grad.abs().amax((1, 2, 3, 4)).min() > 0
    assert silent == ["blocks.2.attn.q_norm_y.weight"]  # nobody reads the text of the last block


def saved(dit, folder):
    tensors.save(folder / "dit.safetensors", dit.state_dict())
    return folder / "dit.safetensors"


def test_saved_model_loads_with_all_sizes_and_the_same_output(tmp_path):
    dit = lively(depth=2, width=96, text_width=40, num_heads=3, text_dim=16)
    loaded = load_dit(saved(dit, tmp_path))
    assert torch.equal(loaded(*batch()), dit(*batch()))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_bf16_model_keeps_positions_and_head_norms_in_float32_and_stays_close(tmp_path):
    dit = lively()
    half = load_dit(saved(dit, tmp_path), dtype=torch.bfloat16)
    wide = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert wide == {name for name, _ in dit.named_parameters() if name.endswith(KEEP_FLOAT32)}
    assert len(wide) == 1 + 3 * 4
    out = half(*batch())
    assert out.dtype == torch.bfloat16
    assert close(out.float(), dit(*batch()), tolerance=0.03)


def test_bf16_autocast_stays_close_and_keeps_the_streams_in_float32():
    dit, inputs = lively(), batch()
    wanted, rope = dit(*inputs), dit.embed(*inputs).rope
    with torch.autocast("cpu", torch.bfloat16):
        state = dit.embed(*inputs)
        x, y = dit.blocks[0](*state[:5])
        out = dit(*inputs)
    assert {t.dtype for t in (state.x, state.y, state.c, x, y)} == {torch.float32}
    assert torch.equal(state.rope, rope)
    assert close(out.float(), wanted, tolerance=0.03)


def test_initialised_model_is_the_identity_and_rotates_by_half_turns_of_1_to_16_patches():
    dit = lively()
    grid = (2, 2, 3)
    dit.initialise(grid)
    x, y, c, rope, mask, _ = dit.embed(*batch())
    for block in dit.blocks:
        assert torch.equal(block(x, y, c, rope, mask)[0], x)
    assert dit(*batch()).abs().max() == 0
    spacing = torch.tensor([1, *[math.sqrt(BASE_AREA / 6)] * 2])[:, None, None]
    half_period = math.pi / (dit.pos_frequencies * spacing).norm(dim=0)  # in patches, along each pair's own direction
    assert half_period.amin().item() == pytest.approx(1, rel=1e-4)
    assert half_period.amax().item() == pytest.approx(16, rel=1e-4)


def test_odd_latent_is_refused_with_its_size():
    with pytest.raises(ValueError, match="4 x 5"):
        lively()(torch.zeros(1, 12, 1, 4, 5), torch.zeros(1), torch.zeros(1, 2, 16), torch.ones(1, 2))


def test_foreign_file_is_refused_with_what_it_lacks_and_what_it_holds(tmp_path):
    path = tmp_path / "vae.safetensors"
    tensors.save(path, {"decoder.conv.weight": torch.zeros(2), "decoder.conv.bias": torch.zeros(2)})
    with pytest.raises(UserError, match=r"x_embedder\.proj\.weight.*decoder\.conv\.bias, decoder\.conv\.weight"):
        load_dit(path)


@pytest.mark.parametrize(
    "name, shape, told",
    [
        ("blocks.1.mlp_y.w2.weight", None, r"missing: blocks\.1\.mlp_y\.w2\.weight"),
        ("blocks.7.mod_x.weight", (1,), r"unexpected: blocks\.7\.mod_x\.weight"),
        ("final_layer.linear.bias", (7,), r"mis-shaped: final_layer\.linear\.bias \(7,\)"),
        ("pos_frequencies", (3, 5, 12), r"pos_frequencies \(3, 5, 12\) does not fit a width of 48"),
        ("pos_frequencies", (3, 0, 12), "no usable pos_frequencies"),
        ("x_embedder.proj.weight", (48, 12), r"no usable x_embedder\.proj\.weight"),
        ("t5_yproj.weight", (24, 15), "8 does not divide the text features' width, 15"),
    ],
)
def test_tensor_that_does_not_fit_is_refused_by_name(tmp_path, name, shape, told):
    changed = {**lively().state_dict(), name: torch.zeros(shape or 1)}
    if shape is None:
        del changed[name]
    tensors.save(tmp_path / "dit.safetensors", changed)
    with pytest.raises(UserError, match=told):
        load_dit(tmp_path / "dit.safetensors")
