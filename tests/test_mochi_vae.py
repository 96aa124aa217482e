"""The video VAE by itself: official names and sizes, causality, streaming, frame counts, files, latent spaces."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mochi_vae
import tensors
from config import UserError
from mochi_vae import Decoder, Encoder, load_decoder, load_encoder, to_dit_space, to_vae_space

MANIFESTS = Path(__file__).parent / "manifests"
FACTORS = ((1, 4, 4), (2, 2, 2), (3, 1, 1))  # the baby's
OFFICIAL = ((1, 2, 2), (2, 2, 2), (3, 2, 2))


def randomised(module, seed=0):
    """Weights that make every tensor matter, at a scale that keeps activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        scale = (2 / p[0].numel()) ** 0.5 if p.dim() > 1 else 0.3
        p.data = noise * scale + (1.0 if p.dim() == 1 and name.endswith("weight") else 0.0)
    return module.eval().requires_grad_(False)


def small_encoder(attention=(False, False, False, True, True)):
    return randomised(Encoder((8, 12, 16, 32), (1, 1, 1, 1, 1), FACTORS, attention, norm_groups=4))


def small_decoder(expansions=FACTORS, res_blocks=(1, 1, 1, 1, 1)):
    return randomised(Decoder((8, 12, 16, 24), res_blocks, expansions, norm_groups=4))


def film(frames=7, size=16, batch=1):
    return torch.rand(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latent(frames, size=2, batch=1):
    return torch.randn(batch, 12, frames, size, size, generator=torch.Generator().manual_seed(2))


def manifest(name):
    return {k: tuple(v[0]) for k, v in json.loads((MANIFESTS / f"{name}.json").read_text())["tensors"].items()}


# ---------------------------------------------------------------------------------------------- official checkpoints


@pytest.mark.parametrize("half, kind", [("encoder", Encoder), ("decoder", Decoder)])
def test_default_sizes_have_exactly_the_official_names_and_shapes(half, kind):
    with torch.device("meta"):
        module = kind()
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == manifest(half)


@pytest.mark.parametrize("layout", ["genmo", "diffusers"])
@pytest.mark.parametrize("half, load", [("encoder", load_encoder), ("decoder", load_decoder)])
def test_official_file_is_accounted_for_name_by_name(half, load, layout, monkeypatch):
    shapes = manifest(half if layout == "genmo" else "diffusers_vae")
    header = SimpleNamespace(shapes=shapes, metadata={}, path="official")
    monkeypatch.setattr(tensors, "open_weights", lambda path: header)
    module = load("official", device="meta")  # strict: nothing missing, unexpected or mis-shaped
    assert {name: tuple(t.shape) for name, t in module.state_dict().items()} == manifest(half)
    del shapes[max(name for name in shapes if half in name or layout == "genmo")]
    with pytest.raises(UserError):
        load("official", device="meta")


def test_official_sizes_have_the_official_parameter_counts():
    with torch.device("meta"):
        count = [sum(p.numel() for p in kind().parameters()) for kind in (Encoder, Decoder)]
    assert count == [97_222_016, 362_526_595]


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("res_blocks", [(1, 1, 1, 1, 1), (0, 2, 0, 1, 0), (2, 0, 1, 0, 3)])
def test_sizes_and_norm_groups_are_read_back_from_a_saved_file(tmp_path, res_blocks):
    encoder = randomised(Encoder((8, 12, 16, 32), res_blocks, FACTORS, (False,) * 4 + (True,), norm_groups=4))
    decoder = small_decoder(res_blocks=res_blocks)
    for name, module in [("encoder", encoder), ("decoder", decoder)]:
        path = tmp_path / f"{name}.safetensors"
        tensors.save(path, module.state_dict(), {"norm_groups": str(module.norm_groups)})
    frames, z = film(), latent(2)
    assert torch.equal(load_encoder(tmp_path / "encoder.safetensors")(frames)[0], encoder(frames)[0])
    assert torch.equal(load_decoder(tmp_path / "decoder.safetensors")(z), decoder(z))


@pytest.mark.parametrize("metadata", [{}, {"norm_groups": "many"}, {"norm_groups": "5"}, {"norm_groups": "0"}])
def test_norm_groups_that_do_not_fit_are_refused(tmp_path, metadata):
    tensors.save(tmp_path / "d.safetensors", small_decoder().state_dict(), metadata)  # without: 32, more than channels
    with pytest.raises(UserError, match="decoder"):
        load_decoder(tmp_path / "d.safetensors")


def test_the_other_half_or_a_foreign_file_is_refused(tmp_path):
    tensors.save(tmp_path / "d.safetensors", small_decoder().state_dict(), {"norm_groups": "4"})
    tensors.save(tmp_path / "f.safetensors", {"layers.0.weight": torch.zeros(3), "x": torch.zeros(1)})
    for load, name in [(load_encoder, "d"), (load_encoder, "f"), (load_decoder, "f")]:
        with pytest.raises(UserError, match=name):
            load(tmp_path / f"{name}.safetensors")


def test_an_encoder_that_shrinks_height_and_width_differently_is_refused(tmp_path):
    state = small_encoder().state_dict()
    state["layers.3.layers.0.weight"] = state["layers.3.layers.0.weight"].repeat(1, 1, 1, 1, 2)
    tensors.save(tmp_path / "x.safetensors", state, {"norm_groups": "4"})
    with pytest.raises(
        UserError, match=r"layers.3.layers.0.weight \(16, 12, 2, 2, 4\) shrinks height and width differently"
    ):
        load_encoder(tmp_path / "x.safetensors")


def test_every_expansion_a_decoder_accepts_can_be_read_back():
    assert [mochi_vae.factors(n) for n in (3, 4, 8, 12, 16)] == [(3, 1, 1), (1, 2, 2), (2, 2, 2), (3, 2, 2), (1, 4, 4)]
    with pytest.raises(UserError, match=r"\(4, 2, 2\)"):
        small_decoder(((1, 2, 2), (2, 2, 2), (4, 2, 2)))


# ------------------------------------------------------------------------------------------------ shapes and refusals


@pytest.mark.parametrize("frames, packed", [(1, 1), (7, 2), (13, 3)])
def test_one_plus_six_k_frames_make_one_plus_k_latent_frames_and_back(frames, packed):
    mean, logvar = small_encoder()(film(frames, 16))
    assert mean.shape == logvar.shape == (1, 12, packed, 2, 2)
    assert small_decoder()(mean).shape == (1, 3, frames, 16, 16)


def test_frame_count_off_by_one_names_the_two_valid_counts():
    with pytest.raises(UserError, match="74 frames.* use 73 or 79"):
        small_encoder()(film(74, 8))


def test_frame_size_that_eight_does_not_divide_is_refused():
    with pytest.raises(UserError, match="8x20.*multiple of 8"):
        small_encoder().check(7, 8, 20)


def test_sin_and_cos_stand_side_by_side_for_each_colour_in_float32():
    frames = torch.tensor([0.0, 1 / 256, 1 / 512]).view(1, 3, 1, 1, 1)  # angles: 0; pi/2, pi; pi/4, pi/2
    features = mochi_vae.fourier_features(frames.bfloat16())
    r = 0.5**0.5
    expected = torch.tensor([0, 1 / 256, 1 / 512, 0, 0, 1, 0, r, 1, 1, 1, 0, -1, r, 0])
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.flatten(), expected, atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------- causality, streaming


def test_later_frames_do_not_change_earlier_latents():
    encoder, frames = small_encoder(), film(13)
    changed = frames.clone()
    changed[:, :, 7:] = -changed[:, :, 7:]
    for before, after in zip(encoder(frames), encoder(changed)):
        torch.testing.assert_close(after[:, :, :2], before[:, :, :2], atol=1e-6, rtol=0)
        assert (after[:, :, 2] - before[:, :, 2]).abs().max() > 0.1


def test_later_latents_do_not_change_earlier_frames():
    decoder, z = small_decoder(), latent(4)
    changed = z.clone()
    changed[:, :, 2:] = -changed[:, :, 2:]
    before, after = decoder(z), decoder(changed)
    torch.testing.assert_close(after[:, :, :7], before[:, :, :7], atol=1e-6, rtol=0)
    assert ((after - before)[:, :, 7:].abs().amax((0, 1, 3, 4)) > 0.01).all()


@pytest.mark.parametrize("expansions", [FACTORS, OFFICIAL])
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_streamed_frames_equal_frames_decoded_whole(frames, expansions):
    decoder, z = small_decoder(expansions).double(), latent(frames, batch=2)  # double: rounding cannot hide anything
    whole, parts = decoder(z), list(decoder.stream(z))
    assert [part.shape[2] for part in parts] == [1] + [6] * (frames - 1)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-10, rtol=0)


def test_what_streaming_keeps_does_not_grow_with_the_film():
    decoder, past, kept = small_decoder(), {}, []
    for z in latent(4).split(1, dim=2):
        decoder(z, past)
        kept.append(sum(t.untyped_storage().nbytes() for t in past.values() if isinstance(t, torch.Tensor)))
    assert kept[0] == kept[1] == kept[3] > 0


def test_convolutions_split_for_size_give_the_same_result(monkeypatch):
    encoder, decoder, frames, z = small_encoder().double(), small_decoder().double(), film(13), latent(3)
    whole, longest, conv = (encoder(frames)[0], decoder(z)), [], torch.nn.Conv3d.forward
    monkeypatch.setattr(torch.nn.Conv3d, "forward", lambda self, x: longest.append(x.shape[2]) or conv(self, x))
    monkeypatch.setattr(mochi_vae, "LARGEST", 1000)
    torch.testing.assert_close((encoder(frames)[0], decoder(z)), whole, atol=1e-10, rtol=0)
    torch.testing.assert_close(torch.cat(list(decoder.stream(z)), 2), whole[1], atol=1e-10, rtol=0)
    assert max(longest) < 13 + 2  # frames of the film and their past


# ------------------------------------------------------------------------------------------------------------ training


def test_fresh_residual_block_is_the_identity():
    x = torch.randn(1, 8, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(mochi_vae.ResBlock(8, 4)(x), x)


def test_gradients_of_a_block_equal_finite_differences():
    block = randomised(mochi_vae.ResBlock(32, 4, attention=True)).double()
    x = torch.randn(1, 32, 2, 2, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x)


def test_inference_does_not_write_into_its_input():
    frames, z = film(), latent(2)
    copies = frames.clone(), z.clone()
    small_encoder()(frames), small_decoder()(z), list(small_decoder().stream(z))
    assert torch.equal(frames, copies[0]) and torch.equal(z, copies[1])


# ------------------------------------------------------------------------------------------------------ latent spaces


def test_dit_space_is_vae_space_less_mean_over_std():
    zero, one = torch.zeros(1, 12, 1, 1, 1), torch.ones(12, 2, 1, 1)
    assert to_vae_space(zero).flatten().tolist() == pytest.approx(mochi_vae.MEAN)
    assert (to_vae_space(one) - to_vae_space(0 * one))[:, 1, 0, 0].tolist() == pytest.approx(mochi_vae.STD, rel=1e-5)
    z = latent(2)
    torch.testing.assert_close(to_vae_space(to_dit_space(z)), z)
