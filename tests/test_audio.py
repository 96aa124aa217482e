"""Clip lengths, normalisation, speed, and the parts and files of Wav2Vec 2.0 in audio.py."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import audio
import tensors
from config import UserError

MANIFEST = Path(__file__).parent / "manifests" / "wav2vec2_base_960h.json"
SMALL = {"width": 32, "depth": 2, "ffn": 48, "heads": 2, "conv_widths": (8, 12, 8, 8, 8, 8, 16)}
SMALL |= {"pos_kernel": 8, "pos_groups": 4}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return audio.Wav2Vec2(**SMALL).eval().requires_grad_(False)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- waveforms


def test_145_frames_are_78774_samples():
    assert audio.clip_samples(145) == 78_774


def test_clip_length_is_the_ceiling_of_duration_plus_margin_for_every_valid_frame_count():
    for frames in range(1, 600, 6):
        assert audio.clip_samples(frames) == math.ceil(16000 * (frames / 30 + 0.09))


def test_prepared_clip_has_mean_zero_and_variance_one():
    x = audio.prepare(3 + 0.1 * noise(200_000), 145)
    assert x.shape == (1, 78_774)
    assert abs(x.mean()) < 1e-4 and abs(x.var(correction=0) - 1) < 1e-3


def test_normalisation_follows_the_formula_over_the_padded_clip():
    n, short = audio.clip_samples(7), 1000 + noise(4000).double()
    padded = np.concatenate([short.numpy(), np.zeros(n - 4000)])
    expected = (padded - padded.mean()) / np.sqrt(padded.var() + 1e-7)
    assert np.abs(audio.prepare(short, 7)[0].numpy() - expected).max() < 1e-4


def test_quiet_music_is_not_blown_up_to_full_volume():
    x = audio.prepare(1e-4 * torch.sin(torch.arange(30_000.0)), 25)  # var 5e-9, well under the 1e-7
    assert 0.1 < x.std() < 0.3


def test_short_music_is_padded_at_the_end_and_long_music_cut_there():
    n, x = audio.clip_samples(7), noise(20_000)
    short = audio.prepare(x[:3000], 7)[0]
    assert (short[3000:] == short[-1]).all() and short[:3000].std() > 0.5
    assert torch.equal(audio.prepare(x, 7), audio.prepare(x[:n], 7))
    assert not torch.equal(audio.prepare(x, 7), audio.prepare(x[1:], 7))


def test_silence_stays_silence():
    assert not audio.prepare(torch.zeros(100), 7).any()


def test_empty_and_broken_and_many_channelled_music_is_refused():
    with pytest.raises(UserError, match="empty"):
        audio.prepare(torch.zeros(0), 7)
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match="not numbers"):
            audio.prepare(torch.tensor([0.0, bad]), 7)
    with pytest.raises(ValueError, match="one channel"):
        audio.prepare(torch.zeros(2, 5000), 7)


@pytest.mark.parametrize("speed", [0.75, 1.25, 1.6, 2.0])
def test_speed_raises_tempo_and_pitch_by_the_factor(speed):
    t = torch.arange(16_000.0)
    y = audio.change_speed(torch.sin(0.3 * t), speed)
    assert len(y) == round(16_000 / speed)
    inside = slice(100, -100)  # away from the ends, where the sine begins and stops
    assert (y - torch.sin(0.3 * speed * torch.arange(len(y))))[inside].abs().max() < 2e-3


def test_speeding_up_removes_what_would_alias():
    hiss = torch.sin(0.9 * math.pi * torch.arange(8000.0))  # 7200 Hz, which twice as fast is above 8000
    assert audio.change_speed(hiss, 2.0)[100:-100].abs().max() < 2e-3


def test_speed_change_in_pieces_leaves_no_seams():
    t = torch.arange(150_000.0, dtype=torch.float64)
    y = audio.change_speed(torch.sin(0.1 * t), 0.9)  # 166,667 samples, three pieces
    assert (y - torch.sin(0.09 * torch.arange(len(y), dtype=torch.float64)))[100:-100].abs().max() < 2e-3


def test_speed_one_changes_nothing_and_the_formula_agrees():
    x = noise(1000)
    assert audio.change_speed(x, 1) is x
    assert (audio.change_speed(x, 1 + 1e-12) - x).abs().max() < 1e-6


def test_speeds_out_of_range_are_refused():
    for speed in (0, -1, 0.2, 5, math.nan, math.inf):
        with pytest.raises(UserError, match="0.25 to 4"):
            audio.change_speed(noise(100), speed)


# ---------------------------------------------------------------- the network


def test_78774_samples_become_245_tokens(model):
    assert model(torch.zeros(1, 78_774)).shape == (1, 245, 32)


def test_forward_is_features_then_encode(model):
    x = noise(2, 4000)
    assert torch.equal(model(x), model.encode(model.features(x)))


def test_features_know_only_their_own_25_ms_but_for_the_first_norm(model):
    norm = model.feature_extractor.conv_layers[0].layer_norm
    x = noise(1, 8000)
    y = x.clone()
    y[0, 4000:] = x[0, 4000:].flip(0)  # a permutation: the norm's statistics change little, the late samples much
    late = (model.features(x) - model.features(y)).abs().amax((0, 2))
    assert norm.num_groups == norm.num_channels == 8
    assert late[:11].max() < 0.2 * late[13:].max()
    encoded = (model(x) - model(y)).abs().amax((0, 2))
    assert encoded[:11].min() > late[:11].min()  # encode() spreads it over the whole clip


def test_first_convolution_alone_norms_each_channel_over_time(model):
    first, *others = model.feature_extractor.conv_layers
    x = noise(2, 1, 4000)
    y = F.conv1d(x, first.conv.weight, stride=5)
    y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, correction=0, keepdim=True) + 1e-5)
    assert (first(x) - F.gelu(y)).abs().max() < 1e-5
    assert all(layer.layer_norm is None and layer.conv.bias is None for layer in others)


@pytest.mark.parametrize("kernel", [8, 7])
def test_position_conv_keeps_the_length_and_an_even_kernel_drops_the_last_step(kernel):
    torch.manual_seed(0)
    conv = audio.WeightNormConv(8, kernel, groups=2)
    x = noise(1, 8, 20)
    full = F.conv1d(x, conv.weight_v, conv.bias, padding=kernel // 2, groups=2)
    assert full.shape[-1] == 20 + (kernel % 2 == 0)
    assert (conv(x) - full[..., :20]).abs().max() < 1e-5  # a fresh g equals |v|


def test_weight_norm_has_one_length_per_kernel_position():
    torch.manual_seed(0)
    conv = audio.WeightNormConv(4, 3, groups=2)
    with torch.no_grad():
        conv.weight_g.copy_(torch.tensor([2.0, 0.0, 5.0]))
    impulse = torch.zeros(4, 4, 9)
    impulse[range(4), range(4), 4] = 1.0
    response = conv(impulse)  # (input channel, output channel, time): the weight, reversed in time
    assert torch.allclose(response.norm(dim=(0, 1))[3:6], torch.tensor([5.0, 0.0, 2.0]), atol=1e-5)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    fresh = audio.Wav2Vec2(**SMALL)
    (fresh(noise(1, 3000)) * noise(1, 9, 32, seed=1)).sum().backward()
    for name, p in fresh.named_parameters():
        if not name.endswith("k_proj.bias"):  # softmax does not see it: its true gradient is zero
            assert p.grad.isfinite().all() and p.grad.abs().max() > 1e-6, name


# ---------------------------------------------------------------- files


def test_saved_and_loaded_model_is_the_same(model, tmp_path):
    audio.save_wav2vec2(model, tmp_path / "a.safetensors")
    loaded = audio.load_wav2vec2(tmp_path / "a.safetensors")  # 2 heads: width 32 / 64 would not say so
    assert torch.equal(loaded(noise(1, 4000)), model(noise(1, 4000)))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert all(name.startswith("wav2vec2.") for name in tensors.open_weights(tmp_path / "a.safetensors").shapes)


def test_argument_overrides_the_header_and_the_default_is_width_over_64(model, tmp_path):
    audio.save_wav2vec2(model, tmp_path / "a.safetensors")
    assert audio.load_wav2vec2(tmp_path / "a.safetensors", num_heads=4).encoder.layers[0].attention.heads == 4
    torch.manual_seed(0)
    wide = audio.Wav2Vec2(**SMALL | {"width": 128, "depth": 1})
    tensors.save(tmp_path / "b.safetensors", wide.state_dict())
    assert audio.load_wav2vec2(tmp_path / "b.safetensors").encoder.layers[0].attention.heads == 2


def test_both_spellings_and_pretraining_heads_load_alike(model, tmp_path):
    state = model.state_dict()
    for prefix in ("", "wav2vec2."):
        renamed = {
            prefix
            + k.replace("weight_g", "parametrizations.weight.original0").replace(
                "weight_v", "parametrizations.weight.original1"
            ): v
            for k, v in state.items()
        }
        heads = {"lm_head.weight": torch.ones(3), prefix + "masked_spec_embed": torch.ones(32)}
        heads |= {f"{name}.weight": torch.ones(3) for name in ("quantizer.weight_proj", "project_q", "project_hid")}
        tensors.save(tmp_path / "a.safetensors", renamed | heads)
        loaded = audio.load_wav2vec2(tmp_path / "a.safetensors", num_heads=2)
        assert torch.equal(loaded(noise(1, 4000)), model(noise(1, 4000)))


def test_bfloat16_stays_near_float32(model, tmp_path):
    audio.save_wav2vec2(model, tmp_path / "a.safetensors")
    rough = audio.load_wav2vec2(tmp_path / "a.safetensors", dtype=torch.bfloat16)(noise(1, 4000).bfloat16())
    exact = model(noise(1, 4000))
    assert rough.dtype == torch.bfloat16 and (rough.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_official_size_has_exactly_the_published_names_and_shapes():
    published = {name: tuple(shape) for name, (shape, _) in json.loads(MANIFEST.read_text())["tensors"].items()}
    with torch.device("meta"):
        model = audio.Wav2Vec2()
    ours = {audio.PREFIX + name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert ours == {name: shape for name, shape in published.items() if not name.startswith("lm_head.")}


def test_a_file_that_is_not_a_wav2vec2_is_refused_with_names(model, tmp_path):
    file = tmp_path / "a.safetensors"
    tensors.save(file, {"a": torch.ones(2)})
    with pytest.raises(UserError, match="not a Wav2Vec 2.0 encoder.*conv_layers.0.conv.weight"):
        audio.load_wav2vec2(file)
    state = dict(model.state_dict())
    tensors.save(file, state | {"encoder.pos_conv_embed.conv.weight_v": torch.ones(32, 0, 8)})
    with pytest.raises(UserError, match="no usable tensor named encoder.pos_conv_embed.conv.weight_v"):
        audio.load_wav2vec2(file, num_heads=2)
    tensors.save(file, state | {"feature_extractor.conv_layers.3.layer_norm.weight": torch.ones(8)})
    with pytest.raises(UserError, match="unexpected: feature_extractor.conv_layers.3.layer_norm.weight"):
        audio.load_wav2vec2(file, num_heads=2)
    del state["encoder.layers.1.attention.k_proj.bias"]
    tensors.save(file, state)
    with pytest.raises(UserError, match="missing: encoder.layers.1.attention.k_proj.bias"):
        audio.load_wav2vec2(file, num_heads=2)


def test_heads_that_do_not_divide_the_width_are_refused(model, tmp_path):
    file = tmp_path / "a.safetensors"
    audio.save_wav2vec2(model, file)
    with pytest.raises(UserError, match="width 32 does not divide into 5 heads"):
        audio.load_wav2vec2(file, num_heads=5)
    for told in ("0", "many", "-2", "99999999999999999999"):
        tensors.save(file, model.state_dict(), {"num_heads": told})
        with pytest.raises(UserError, match="does not divide"):
            audio.load_wav2vec2(file)
