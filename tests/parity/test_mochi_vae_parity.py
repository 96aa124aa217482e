"""The video VAE against diffusers' AutoencoderKLMochi on small random weights, and where the two decoders differ."""

import re

import pytest
import torch
from diffusers import AutoencoderKLMochi

import mochi_vae
import tensors

TIMES = (1, 2, 3)


def reference(times=TIMES, spaces=(2, 2, 2), layers=(1, 1, 2, 1, 1), seed=0):
    """A small diffusers VAE in which every tensor, norms included, is random."""
    torch.manual_seed(seed)
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 64, 32, 96),
        decoder_block_out_channels=(32, 64, 32, 96),
        layers_per_block=layers,
        temporal_expansions=times,
        spatial_expansions=spaces,
    )
    for p in vae.parameters():
        p.data += 0.2 * torch.randn_like(p) if p.dim() == 1 else 0.02 * torch.randn_like(p)
    return vae.eval().requires_grad_(False)


@pytest.fixture
def save(tmp_path):
    def write(state):
        tensors.save(tmp_path / "vae.safetensors", state)
        return tmp_path / "vae.safetensors"

    return write


def assert_near(ours, theirs, tolerance):
    """Largest difference, relative to the largest output."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def latent(frames):
    return torch.randn(2, 12, frames, 2, 3, generator=torch.Generator().manual_seed(2))


def genmo_to_diffusers(name, layers):
    """diffusers' name of a tensor of genmo's encoder ("layers.", "output_norm") or decoder ("blocks.").

    The published conversion, written once more from the other side; `layers` counts the blocks of each level.
    """
    stem, levels = layers[0], len(layers) - 2
    block = {
        "stack.0": "resnets.{}.norm1.norm_layer",
        "stack.2": "resnets.{}.conv1.conv",
        "stack.3": "resnets.{}.norm2.norm_layer",
        "stack.5": "resnets.{}.conv2.conv",
        "attn_block.norm": "norms.{}.norm_layer",
        "attn_block.attn.out": "attentions.{}.to_out.0",
        "attn_block.attn.qkv": "attentions.{}.to_qkv",
    }
    module, leaf = name.rsplit(".", 1)
    if m := re.fullmatch(r"layers\.(\d+)\.layers\.(\d+)(?:\.(.+))?", module):
        level, i = int(m[1]) - stem - 1, int(m[2])
        inner = block[m[3]].format(i - 1) if i else "conv_in.conv"
        return f"encoder.down_blocks.{level}.{inner}.{leaf}"
    if m := re.fullmatch(r"layers\.(\d+)\.(.+)", module):
        i = int(m[1])
        where, i = ("block_in", i - 1) if i <= stem else ("block_out", i - stem - levels - 1)
        return f"encoder.{where}.{block[m[2]].format(i)}.{leaf}"
    if m := re.fullmatch(r"blocks\.(\d+)\.blocks\.(\d+)\.(.+)", module):
        return f"decoder.up_blocks.{int(m[1]) - 1}.{block[m[3]].format(m[2])}.{leaf}"
    if m := re.fullmatch(r"blocks\.(\d+)\.proj", module):
        return f"decoder.up_blocks.{int(m[1]) - 1}.proj.{leaf}"
    if m := re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(.+)", module):
        where, i = ("block_out", int(m[2])) if int(m[1]) else ("block_in", int(m[2]) - 1)
        return f"decoder.{where}.{block[m[3]].format(i)}.{leaf}"
    ends = {
        "layers.0": "encoder.proj_in",
        "output_norm": "encoder.norm_out.norm_layer",
        "blocks.0.0": "decoder.conv_in",
    }
    return f"{ends[module]}.{leaf}"


def test_genmo_names_and_diffusers_names_load_the_same_weights(save):
    layers = (2, 0, 3, 1, 2)
    vae = reference(layers=layers)
    state = vae.state_dict()
    path = save(state)
    seen = {"encoder.proj_out.weight", "decoder.proj_out.weight", "decoder.proj_out.bias"}
    encoder, decoder = mochi_vae.load_encoder(path), mochi_vae.load_decoder(path)
    assert torch.equal(encoder.output_proj.weight, state["encoder.proj_out.weight"])
    assert torch.equal(decoder.output_proj.weight, state["decoder.proj_out.weight"])
    assert torch.equal(decoder.output_proj.bias, state["decoder.proj_out.bias"])
    for module in (encoder, decoder):
        for name, tensor in module.state_dict().items():
            if not name.startswith("output_proj"):
                theirs = genmo_to_diffusers(name, layers)
                parts = [theirs.replace("to_qkv", f"to_{x}") for x in "qkv"] if "to_qkv" in theirs else [theirs]
                seen |= set(parts)
                assert torch.equal(tensor, torch.cat([state[part] for part in parts])), name
    assert seen == set(state)


@pytest.mark.parametrize("frames", [1, 7, 13])
@pytest.mark.parametrize("spaces", [(2, 2, 2), (4, 2, 1)])
def test_our_encoder_equals_diffusers_encoder(save, frames, spaces):
    vae = reference(spaces=spaces)
    frames = torch.rand(2, 3, frames, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ours = torch.cat(mochi_vae.load_encoder(save(vae.state_dict()))(frames), 1)
    assert_near(ours, vae.encoder(frames)[0], 1e-4)


@pytest.mark.parametrize("spaces", [(2, 2, 2), (4, 2, 1)])
def test_our_decoder_equals_diffusers_decoder_where_time_is_not_expanded(save, spaces):
    vae = reference((1, 1, 1), spaces)
    z = latent(4)
    assert_near(mochi_vae.load_decoder(save(vae.state_dict()))(z), vae.decode(z).sample, 5e-5)


def test_our_decoder_equals_diffusers_decoder_if_that_drops_frames_inside_each_level(save):
    vae = reference()
    for level, t in zip(vae.decoder.up_blocks, TIMES[::-1]):
        level.register_forward_hook(lambda module, args, out, t=t: (out[0][:, :, t - 1 :], out[1]))
    z = latent(4)
    assert_near(mochi_vae.load_decoder(save(vae.state_dict()))(z), vae.decoder(z)[0], 5e-5)


def test_unchanged_diffusers_decoder_differs_in_the_first_frames_and_only_there(save):
    # Its convolutions see the surplus first frames, ours see copies of the first frame that is kept. A residual block
    # looks back 4 frames and group norm looks at one frame, so the difference ends: after a block at the rate x3 it
    # has reached 4 frames, after the expansion x2 that drops one 2*4 - 1 = 7, after two more blocks 7 + 4 + 4 = 15.
    vae = reference(layers=(1, 1, 1, 1, 1))
    z = latent(4)
    ours, theirs = mochi_vae.load_decoder(save(vae.state_dict()))(z), vae.decode(z).sample
    assert_near(ours[:, :, 15:], theirs[:, :, 15:], 5e-5)
    error = (ours - theirs).abs().amax((0, 1, 3, 4)) / theirs.abs().max()
    assert error[0] > 0.05 and (error[:12] > 1e-3).all()


def test_latent_statistics_equal_those_of_diffusers():
    config = reference().config
    assert mochi_vae.MEAN == pytest.approx(config.latents_mean, abs=1e-8)
    assert mochi_vae.STD == pytest.approx(config.latents_std, abs=1e-7)
