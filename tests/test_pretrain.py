import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import audio
import mochi_vae
import pretrain
import t5
import tensors
import toy
from config import UserError
from mochi_dit import load_dit
from pretrain_audio import baby_audio, log_mel, music_section
from pretrain_fit import FRAMES, HELD_OUT, SIZE, PretrainConfig, fit
from pretrain_vae import (
    baby_vae,
    draw_frames,
    export_vae,
    load_vae,
    pixel_loss,
    psnr,
    scale_latents,
    to_frames,
    to_video,
    train_decoder,
)

BABY = Path(__file__).parents[1] / "weights" / "baby"


def config(out, **changes):
    return PretrainConfig(**{"out": out, "save_every": 3, "look_every": 100} | changes)


def regression(seed=0):
    """A small network and a loss that is a function of (weights, step)."""
    torch.manual_seed(seed)
    networks = nn.ModuleDict({"line": nn.Linear(4, 2)})

    def loss_of(step, generator):
        x = torch.randn(8, 4, generator=generator)
        return (networks["line"](x) - x[:, :2]).square().mean()

    return networks, loss_of


def test_a_killed_stage_that_is_resumed_equals_one_that_was_not(tmp_path):
    networks, loss_of = regression()
    whole = fit("s", config(tmp_path / "a"), networks, 10, 0.1, 0.9, loss_of, str)

    networks, loss_of = regression()

    def killed(step, generator):
        if step == 7:
            raise KeyboardInterrupt
        return loss_of(step, generator)

    with pytest.raises(KeyboardInterrupt):
        fit("s", config(tmp_path / "b"), networks, 10, 0.1, 0.9, killed, str)
    networks, loss_of = regression(seed=1)  # other fresh weights: all must come from the checkpoint
    again = fit("s", config(tmp_path / "b"), networks, 10, 0.1, 0.9, loss_of, str)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_a_finished_stage_is_read_and_not_trained_again(tmp_path):
    networks, loss_of = regression()
    first = fit("s", config(tmp_path), networks, 4, 0.1, 0.9, loss_of, str).state_dict()

    def never(step, generator):
        raise AssertionError("trained again")

    second = fit("s", config(tmp_path), regression(seed=1)[0], 4, 0.1, 0.9, never, str).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_returned_and_looked_at_is_the_average_of_the_weights(tmp_path):
    networks, loss_of = regression()
    seen, looked = [networks["line"].bias.detach().clone()], []

    def watched(step, generator):
        if step:
            seen.append(networks["line"].bias.detach().clone())
        return loss_of(step, generator)

    def look():
        looked.append(networks["line"].bias.detach().clone())
        return ""

    fit("s", config(tmp_path), networks, 3, 0.1, 0.5, watched, look)
    saved = tensors.open_weights(tmp_path / "s.safetensors").read("weights/line.bias")
    average = seen[0]
    for step, bias in enumerate([*seen[1:], saved]):
        decay = min(0.5, (step + 1) / (step + 10))
        average = decay * average + (1 - decay) * bias
    torch.testing.assert_close(networks["line"].bias, average)
    assert torch.equal(looked[0], networks["line"].bias) and not torch.allclose(average, saved)


def test_a_loss_that_is_not_a_number_stops_with_stage_and_step(tmp_path):
    networks, _ = regression()
    bad = lambda step, generator: networks["line"].bias.sum() * (math.nan if step == 2 else 1.0)  # noqa: E731
    with pytest.raises(UserError, match="s: the loss is nan at step 2"):
        fit("s", config(tmp_path), networks, 5, 0.1, 0.9, bad, str)


def test_the_world_is_a_function_of_seed_and_index_and_every_other_clip_is_wild():
    frames, captions = pretrain.make_clip(0, 3)
    again, same = pretrain.make_clip(0, 3)
    assert np.array_equal(frames, again) and captions == same and len(captions) == 4
    assert not np.array_equal(frames, pretrain.make_clip(1, 3)[0])
    rng = np.random.default_rng([0, 3])
    assert np.array_equal(frames, toy.render(toy.sample_clip(rng, wild=True), FRAMES, SIZE))


def test_video_and_frames_are_inverse():
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4, 3), dtype=np.uint8)
    video = to_video(frames)
    assert video.shape == (2, 3, 3, 4, 4) and -1 <= video.min() < video.max() <= 1
    assert np.array_equal(to_frames(video), frames)


def test_pixel_loss_counts_what_stands_before_the_backdrop_five_times():
    video = torch.zeros(1, 3, 1, 4, 4)
    video[..., 1, 1] = 1.0  # one pixel of figure among 16
    background, figure = video.clone(), video.clone()
    background[..., 2, 2] += 0.5
    figure[..., 1, 1] += 0.5
    weights = 15 + 5
    assert pixel_loss(background, video).item() == pytest.approx((0.5 + 0.25) / weights)
    assert pixel_loss(figure, video).item() == pytest.approx(5 * (0.5 + 0.25) / weights)


def test_psnr_of_one_grey_level_everywhere_is_48_13_decibels():
    a = np.zeros((4, 4, 3), np.uint8)
    assert psnr(a, a + 1) == pytest.approx(20 * math.log10(255))


def test_batches_of_frames_are_draws_of_the_step_and_leave_out_the_held_out_clips():
    frames = np.zeros((70, FRAMES, 2, 2, 3), np.uint8)
    frames[6:] = 255  # the last 64 are held out
    shapes = set()
    for step in range(20):
        a, b = (draw_frames(frames, 24, torch.Generator().manual_seed(step)) for _ in range(2))
        assert np.array_equal(a, b) and a.max() == 0
        shapes.add(a.shape[:2])
    assert shapes == {(24, 1), (6, 7), (3, 13)}


@torch.no_grad()
def test_scaled_latents_have_mochis_spread_and_decode_to_the_same_frames():
    torch.manual_seed(0)
    vae = baby_vae()
    frames = np.random.default_rng(0).integers(0, 256, (66, 7, 16, 16, 3), dtype=np.uint8)
    video = to_video(frames[:1])
    before = vae["decoder"](vae["encoder"](video)[0])
    scale_latents(vae, frames)
    torch.testing.assert_close(vae["decoder"](vae["encoder"](video)[0]), before, rtol=1e-3, atol=1e-4)
    means = torch.cat([vae["encoder"](to_video(clip[None]))[0] for clip in frames[:2]])
    torch.testing.assert_close(means.std(dim=(0, 2, 3, 4)), torch.tensor(mochi_vae.STD), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("hz", [200, 1000, 5000])
def test_a_tone_is_loudest_in_the_band_of_its_mel(hz):
    tone = torch.sin(2 * math.pi * hz * torch.arange(16000) / 16000)[None]
    bands = log_mel(tone).mean(2)[0]
    step = 2595 * math.log10(1 + 8000 / 700) / 33
    assert abs(bands.argmax().item() - (2595 * math.log10(1 + hz / 700) / step - 1)) <= 0.75


def test_sections_of_music_are_normalised_and_a_function_of_seed_and_index():
    section = music_section([0, 1], 3)
    assert section.shape == (1, audio.clip_samples(FRAMES))
    torch.testing.assert_close(section.std(1), torch.ones(1), atol=0.01, rtol=0)
    assert torch.equal(section, music_section([0, 1], 3))
    assert not torch.equal(section, music_section([0, 2], 3)) and not torch.equal(section, music_section([0, 1], 4))


@torch.no_grad()
def test_exported_weights_load_and_compute_what_the_networks_did(tmp_path):
    torch.manual_seed(0)
    cfg = PretrainConfig(out=tmp_path, weights=tmp_path / "weights")
    tokenizer = pretrain.train_tokenizer(cfg, [["a dancer dancing House", "a rabbit on a beach"] * 2] * 30)
    vae, encoder, prior = baby_vae(), baby_audio(), pretrain.baby_prior(tokenizer.vocab_size)
    export_vae(cfg, vae.bfloat16())
    pretrain.export(cfg, encoder, prior)  # casts the networks to bf16, as the files are
    texts, mask = t5.encode(t5.load_t5(cfg.weights / "t5"), tokenizer, ["a rabbit dancing"])
    expected, _ = t5.encode(prior["t5"].float(), tokenizer, ["a rabbit dancing"])
    torch.testing.assert_close(texts, expected)
    heard = music_section([0], 0)
    torch.testing.assert_close(audio.load_wav2vec2(cfg.weights / "wav2vec2")(heard), encoder.float()(heard))
    z, sigma = torch.randn(1, 12, 2, 4, 4), torch.tensor([0.5])
    dit = load_dit(cfg.weights / "dit.safetensors")
    torch.testing.assert_close(dit(z, sigma, texts, mask), prior["dit"].float()(z, sigma, texts, mask))
    video = to_video(np.zeros((1, 7, 16, 16, 3), np.uint8))
    mean, _ = mochi_vae.load_encoder(cfg.weights / "encoder.safetensors")(video)
    torch.testing.assert_close(mean, vae["encoder"].float()(video)[0])
    frames = mochi_vae.load_decoder(cfg.weights / "decoder.safetensors")(mean)
    torch.testing.assert_close(frames, vae["decoder"].float()(mean))


def test_the_decoder_of_a_given_vae_goes_on_and_its_encoder_stays_to_the_bit(tmp_path):
    cfg = config(tmp_path, vae=BABY, weights=tmp_path / "weights", decoder_steps=2, vae_batch=8)
    frames = np.random.default_rng(0).integers(0, 256, (HELD_OUT + 2, FRAMES, 16, 16, 3), np.uint8)
    export_vae(cfg, train_decoder(cfg, frames, load_vae(cfg)))
    before, after = (tensors.open_weights(folder / "encoder.safetensors") for folder in (BABY, cfg.weights))
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.shapes)
    before, after = (tensors.open_weights(folder / "decoder.safetensors") for folder in (BABY, cfg.weights))
    changed = [name for name in before.shapes if not torch.equal(before.read(name), after.read(name))]
    assert len(changed) > len(before.shapes) / 2


def test_a_given_vae_is_refused_beside_one_of_its_own_and_where_there_is_none(tmp_path):
    with pytest.raises(UserError, match="leave one of them out"):
        PretrainConfig(vae=BABY, stage="vae")
    with pytest.raises(UserError, match="video encoder missing"):
        load_vae(PretrainConfig(vae=tmp_path, out=tmp_path))
    (tmp_path / "vae.safetensors").touch()
    with pytest.raises(UserError, match="holds a VAE of its own"):
        load_vae(PretrainConfig(vae=BABY, out=tmp_path))


def test_unknown_stages_and_tiny_worlds_are_refused():
    with pytest.raises(UserError, match="--stage vea"):
        PretrainConfig(stage="vea")
    with pytest.raises(UserError, match="--clips 128"):
        PretrainConfig(clips=128)
    with pytest.raises(UserError, match="--dtype float16"):
        PretrainConfig(dtype="float16")
