"""The sampler against Eq. (2)-(4) written out in EDM coordinates, and the command from music to mp4."""

import json
import os
import shutil
import socket
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import soundfile
import torch
from test_model import inputs, tiny_adapters, tiny_dit, trained
from tiny import AUDIO_DIM, FRAMES, SIZE, make_tiny_weights

import check
import config
import drawing
import media
import sample as command
import stages
import tensors
from mochi_dit import load_dit
from model import MusicInfuser, load_musicinfuser, save_adapter
from sample import null_of, sample
from schedule import linear_quadratic, to_edm

SIGMAS = linear_quadratic(4)


@pytest.fixture
def m():
    dit = tiny_dit()
    return trained(MusicInfuser(dit, tiny_adapters(dit)))


@pytest.fixture
def given():
    z, _, text, mask, audio = inputs()
    return z, (text, mask), audio


@pytest.mark.parametrize("null_audio", ["keep", "drop"])
@torch.no_grad()
def test_guided_update_is_equations_2_to_4_in_edm_coordinates(m, given, null_audio):
    z, text, audio = given
    gamma, weight, layers = 3.0, 0.7, [1, 2]
    sigmas = [0.9, 0.6, 0.3, 0.1, 0.0]  # not from 1, where s is infinite
    unconditional_audio = audio if null_audio == "keep" else None
    ours = sample(m, z, sigmas, text, null_of(text), audio, null_audio, gamma, layers, weight)
    for sigma, following in zip(sigmas, sigmas[1:]):
        x, s = to_edm(z, sigma)
        level = torch.full((2,), s)
        conditional = m.denoise(x, level, *text, audio)
        unconditional = m.denoise(x, level, *null_of(text), unconditional_audio)
        skipped = m.denoise(x, level, *text, audio, layers)
        dx_ds = -gamma * (conditional - x) / s + (gamma - 1) * (unconditional - x) / s  # Eq. (3)
        dx_ds = dx_ds - weight * (conditional - skipped) / s  # climbs G: its gradient is Eq. (4)
        # the same ODE in (z, sigma): x = z / (1 - sigma), ds/dsigma = 1 / (1 - sigma)^2
        dz_dsigma = (1 - sigma) * dx_ds / (1 - sigma) ** 2 - z / (1 - sigma)
        z = z + (following - sigma) * dz_dsigma
    torch.testing.assert_close(ours, z, atol=1e-4, rtol=1e-4)


def watch(m):
    """Note of each pass that m runs from now on: does it read words, does it hear music, which blocks does it skip."""
    calls, real = [], m.velocity

    def velocity(z, sigma, given, rope, skip_layers=()):
        words = "words" if given.prompt.y.shape[1] else "no words"
        calls.append((words, "music" if given.heard else "no music", tuple(skip_layers)))
        return real(z, sigma, given, rope, skip_layers)

    m.velocity = velocity
    return calls


@torch.no_grad()
def test_cfg_one_is_the_conditional_model_and_runs_nothing_else(m, given):
    noise, text, audio = given
    calls = watch(m)
    out = sample(m, noise, SIGMAS, text, null_of(text), audio, cfg=1.0)
    assert calls == [("words", "music", ())] * 4
    z = noise
    for sigma, following in zip(SIGMAS, SIGMAS[1:]):
        z = z + (sigma - following) * m(z, torch.full((2,), sigma), *text, audio)
    assert torch.equal(out, z) and out.dtype == torch.float32


@pytest.mark.parametrize(("made_for", "asked", "hears"), [("keep", None, True), ("drop", None, False)])
def test_unconditional_pass_hears_music_as_the_adapter_was_made_for(given, made_for, asked, hears):
    noise, text, audio = given
    dit = tiny_dit()
    m = trained(MusicInfuser(dit, tiny_adapters(dit, null_audio=made_for)))
    calls = watch(m)
    sample(m, noise, [1.0, 0.0], text, null_of(text), audio, asked, cfg=2.0)
    sample(m, noise, [1.0, 0.0], text, null_of(text), audio, "keep", cfg=2.0)
    sample(m, noise, [1.0, 0.0], text, null_of(text), audio, "drop", cfg=2.0)
    assert calls[0::2] == [("words", "music", ())] * 3
    assert calls[1::2] == [("no words", "music" if hear else "no music", ()) for hear in (hears, True, False)]


@pytest.mark.parametrize("form", ["published", "aligned", "add"])
@torch.no_grad()
def test_what_is_made_once_for_all_steps_changes_nothing(given, form):
    noise, text, audio = given
    dit = tiny_dit()
    m = trained(MusicInfuser(dit, tiny_adapters(dit, form=form)))
    made = []

    def noted(real):
        return lambda *arguments: made.append(real.__name__) or real(*arguments)

    for owner, name in ((m.dit, "embed_text"), (m.dit, "embed_positions"), (m.adapters, "listen")):
        setattr(owner, name, noted(getattr(owner, name)))
    out = sample(m, noise, SIGMAS, text, null_of(text), audio, "drop", cfg=3.0, skip_layers=[1], skip_scale=0.5)
    assert sorted(made) == ["embed_positions", "embed_text", "embed_text", "listen"]
    z = noise
    for sigma, following in zip(SIGMAS, SIGMAS[1:]):  # the public forward, which makes all of it anew
        level = torch.full((2,), sigma)
        conditional = m(z, level, *text, audio)
        v = 3 * conditional - 2 * m(z, level, *null_of(text)) + 0.5 * (conditional - m(z, level, *text, audio, [1]))
        z = z + (sigma - following) * v
    torch.testing.assert_close(out, z, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["published", "aligned", "add"])
def test_no_step_waits_for_the_device(given, form, monkeypatch):
    """On the meta device nothing can be read back: a sampler that looked at a number there would fail."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which that device has not
    noise, text, audio = given
    dit = tiny_dit()
    m = MusicInfuser(dit, tiny_adapters(dit, form=form)).to("meta")
    words, nothing = (text[0].to("meta"), text[1]), (torch.zeros_like(text[0], device="meta"), text[1] & False)
    every = {"cfg": 2.0, "skip_layers": [1], "skip_scale": 1.0, "music_scale": 2.0, "rescale": 0.7}
    out = sample(m, noise.to("meta"), SIGMAS, words, nothing, audio.to("meta"), **every)
    assert out.is_meta and out.shape == noise.shape
    with pytest.raises((RuntimeError, NotImplementedError)):
        sample(m, noise.to("meta"), SIGMAS, (words[0], text[1].to("meta")), nothing)


@torch.no_grad()
def test_layer_skip_guidance_of_weight_zero_is_plain_guidance_bit_for_bit(m, given):
    noise, text, audio = given
    calls, plain = watch(m), sample(m, noise, SIGMAS, text, null_of(text), audio, cfg=3.0)
    passes = len(calls)
    assert torch.equal(sample(m, noise, SIGMAS, text, null_of(text), audio, None, 3.0, [1], 0.0), plain)
    assert torch.equal(sample(m, noise, SIGMAS, text, null_of(text), audio, None, 3.0, [], 1.0), plain)
    assert len(calls) == 3 * passes
    one, two = (sample(m, noise, SIGMAS, text, null_of(text), audio, None, 3.0, skip, 1.0) for skip in ([1], [0, 1]))
    assert (one - plain).abs().max() > 1e-2 and (two - one).abs().max() > 1e-2
    assert {skip for _, _, skip in calls} == {(), (1,), (0, 1)}


@torch.no_grad()
def test_music_guidance_of_one_is_the_form_without_it_bit_for_bit_and_else_its_equation(m, given):
    noise, text, audio = given
    calls, plain = watch(m), sample(m, noise, SIGMAS, text, null_of(text), audio, cfg=3.0)
    passes = len(calls)
    assert torch.equal(sample(m, noise, SIGMAS, text, null_of(text), audio, cfg=3.0, music_scale=1.0), plain)
    assert len(calls) == 2 * passes
    out = sample(m, noise, [0.8, 0.3], text, null_of(text), audio, cfg=3.0, music_scale=2.5)
    assert calls[2 * passes :] == [("words", "music", ()), ("no words", "music", ()), ("words", "no music", ())]
    level = torch.full((2,), 0.8)
    heard, deaf, nothing = m(noise, level, *text, audio), m(noise, level, *text), m(noise, level, *null_of(text), audio)
    v = 3 * heard - 2 * nothing + (2.5 - 1) * (heard - deaf)
    torch.testing.assert_close(out, noise + 0.5 * v, atol=1e-5, rtol=1e-5)
    bare, music_scale = MusicInfuser(tiny_dit()).eval(), {"music_scale": 3.0}
    wanted = sample(bare, noise, SIGMAS, text, null_of(text), audio)
    assert torch.equal(sample(bare, noise, SIGMAS, text, null_of(text), audio, **music_scale), wanted)


@torch.no_grad()
def test_rescale_of_one_gives_each_sample_the_spread_of_its_conditional_velocity(m, given):
    noise, text, audio = given
    settings = {"cfg": 6.0, "skip_layers": [1], "skip_scale": 1.0}
    steps = {r: sample(m, noise, [1.0, 0.0], text, null_of(text), audio, rescale=r, **settings) - noise
             for r in (0.0, 0.7, 1.0)}  # fmt: skip
    conditional = sample(m, noise, [1.0, 0.0], text, null_of(text), audio, cfg=1.0) - noise
    plain, wanted = steps[0.0].flatten(1).std(1), conditional.flatten(1).std(1)
    assert (plain / wanted - 1).abs().min() > 0.05
    torch.testing.assert_close(steps[1.0].flatten(1).std(1), wanted)
    torch.testing.assert_close(steps[0.7].flatten(1).std(1), 0.7 * wanted + 0.3 * plain)
    direction = torch.cosine_similarity(steps[0.7].flatten(1), steps[0.0].flatten(1))
    torch.testing.assert_close(direction, torch.ones(2))


@torch.no_grad()
def test_sampler_does_the_same_twice_and_each_clip_of_a_batch_alone(m, given):
    noise, text, audio = given
    arguments = (SIGMAS, text, null_of(text), audio)
    first = sample(m, noise, *arguments)
    assert torch.equal(first, sample(m, noise, *arguments))
    every = {"skip_layers": [0, 2], "skip_scale": 0.5, "music_scale": 2.0, "rescale": 0.7}
    for guidance in ({}, every):
        together, alone = sample(m, noise, *arguments, **guidance), []
        for i in range(2):
            words = text[0][i : i + 1], text[1][i : i + 1]
            alone.append(sample(m, noise[i : i + 1], SIGMAS, words, null_of(words), audio[i : i + 1], **guidance))
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert (first - sample(m, noise + 0.1, *arguments)).abs().max() > 1e-2


@torch.no_grad()
def test_bare_prior_samples_without_music(given):
    noise, text, audio = given
    m = MusicInfuser(tiny_dit()).eval()
    assert torch.equal(
        sample(m, noise, SIGMAS, text, null_of(text)), sample(m, noise, SIGMAS, text, null_of(text), audio)
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_side_by_side_a_process_runs_every_other_pass_and_is_told_the_rest(m, given, monkeypatch, rank):
    noise, text, audio = given
    sources, calls = [], watch(m)
    others = {"get_rank": lambda: rank, "get_world_size": lambda: 2}
    monkeypatch.setattr(command, "dist", SimpleNamespace(broadcast=lambda v, src: sources.append(src), **others))
    every = {"cfg": 3.0, "skip_layers": [1], "skip_scale": 0.5, "music_scale": 2.0}
    sample(m, noise, [1.0, 0.0], text, null_of(text), audio, side_by_side=True, **every)
    given_and_skipped = [("words", "music", ()), ("words", "music", (1,))]
    empty_and_deaf = [("no words", "music", ()), ("words", "no music", ())]
    assert calls == [given_and_skipped, empty_and_deaf][rank] and sources == [0, 1, 0, 1]


def test_empty_prompt_has_zero_features_and_no_tokens():
    features, mask = null_of((torch.ones(1, 3, 4), torch.ones(1, 3, dtype=torch.bool)))
    assert not features.any() and not mask.any() and mask.dtype == torch.bool and features.shape == (1, 3, 4)


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Tiny weights with an adapter that does something, and three seconds of clicks over a tone."""
    folder = tmp_path_factory.mktemp("tiny")
    weights = make_tiny_weights(folder / "weights", depth=3)
    dit = load_dit(weights / "dit.safetensors")
    adapters = tiny_adapters(dit, layers=(0, 1), audio_dim=AUDIO_DIM)
    save_adapter(trained(MusicInfuser(dit, adapters)), weights / "musicinfuser.safetensors")
    t = np.arange(3 * 44_100) / 44_100
    wave = 0.2 * np.sin(2 * np.pi * (200 + 100 * t) * t) + 0.6 * (t % 0.5 < 0.01)
    soundfile.write(folder / "music.wav", wave.astype(np.float32), 44_100)
    return folder


@pytest.fixture
def start(shared, tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder: start(*flags) -> (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def start(*flags, audio=shared / "music.wav", weights=shared / "weights"):
        argv = [
            "sample.py",
            "--audio",
            audio,
            "--weights",
            weights,
            "--frames",
            FRAMES,
            "--steps",
            2,
            "--device",
            "cpu",
        ]
        monkeypatch.setattr(sys, "argv", [str(word) for word in (*argv, *flags)])
        status = 0
        try:
            config.run(command.main)
        except SystemExit as stop:
            status = stop.code
        told = capsys.readouterr()
        return status, told.out, told.err

    return start


def test_command_writes_the_video_with_its_music_and_the_filmstrip(start, tmp_path):
    status, out, err = start("--seed", 5)
    assert status == 0, err
    names = ["music_5.latents.safetensors", "music_5.mp4", "music_5.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    video = tmp_path / "out" / "music_5.mp4"
    info = media.video_info(video)
    assert (info.width, info.height, info.fps, info.has_audio) == (512, 512, 30, True)  # 16 x 32
    assert media.read_video(video).shape[0] == FRAMES
    for told in (
        "music_5.mp4",
        "music_5.png",
        "music_5.latents.safetensors",
        "enlarged 32 times",
        "seed 5",
        "0.00 to 0.32 s",
        "peak memory",
        "2 steps",
    ):
        assert told in out
    assert all(f"\n{stage}" in out for stage in ("text", "music", "sample", "decode"))


@pytest.mark.parametrize("place", [("--start", 0.5), ("--start", 0.5, "--speed", 1.25)])
def test_sound_of_the_video_is_the_section_that_was_heard(start, tmp_path, shared, place):
    status, out, err = start(*place, "--frames", 31, "--out", "x.mp4")
    assert status == 0, err
    sound = media.read_audio("x.mp4", 16_000)
    speed = place[3] if len(place) > 2 else 1.0
    whole = media.read_audio(shared / "music.wav", 16_000)
    at = (0.5 + np.arange(31 * 16_000 // 30) / 16_000 * speed) * 16_000
    wanted = np.interp(at, np.arange(len(whole)), whole)
    n = min(len(sound), len(wanted))
    assert n > 16_000 and np.corrcoef(sound[:n], wanted[:n])[0, 1] > 0.95
    assert f"0.50 to {0.5 + (31 / 30 + 0.09) * speed:.2f} s" in out and ("at 1.25x" in out) == (speed != 1)


def frames_of(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_one_seed_gives_identical_frames_and_each_flag_changes_them(start, monkeypatch):
    monkeypatch.setattr(drawing, "filmstrip", lambda *_, **__: None)  # drawing takes longer than all the rest
    assert start("--out", "a.mp4")[0] == 0
    reference = frames_of("a.mp4")
    same = [("--seed", 0), ("--height", SIZE), ("--skip-layer", 1, "--skip-scale", 0), ("--dtype", "float32")]
    same += [("--null-audio", "keep"), ("--music-scale", 1)]
    for i, flags in enumerate(same):
        assert start("--out", f"same{i}.mp4", *flags)[0] == 0
        assert np.array_equal(frames_of(f"same{i}.mp4"), reference), flags
    changes = [("--seed", 1), ("--prompt", "break"), ("--cfg", 1), ("--steps", 3), ("--start", 1), ("--speed", 1.5)]
    changes += [("--adapter", "none"), ("--skip-layer", 1), ("--skip-layer", "0,1"), ("--dtype", "bfloat16")]
    changes += [("--null-audio", "drop"), ("--music-scale", 3), ("--rescale", 0.7)]
    for i, flags in enumerate(changes):
        status, _, err = start("--out", f"b{i}.mp4", *flags)
        assert status == 0, err
        assert not np.array_equal(frames_of(f"b{i}.mp4"), reference), flags


def latents_in(folder):
    return {
        path.name: tensors.open_weights(path).read("z_dit") for path in sorted(folder.glob("*.latents.safetensors"))
    }


def test_several_samples_are_those_of_consecutive_seeds_in_any_batch(start, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "filmstrip", lambda *_, **__: None)
    for batch in (1, 2, 3):
        status, out, err = start("--num-samples", 3, "--seed", 4, "--batch", batch, "--out", f"{batch}/x.mp4")
        assert status == 0 and "seed 4, 5, 6" in out, err
        assert sorted(p.name for p in (tmp_path / f"{batch}").glob("*.mp4")) == ["x_4.mp4", "x_5.mp4", "x_6.mp4"]
    assert start("--seed", 5, "--out", "alone/x_5.mp4")[0] == 0
    one = latents_in(tmp_path / "1")
    assert torch.equal(one["x_5.latents.safetensors"], latents_in(tmp_path / "alone")["x_5.latents.safetensors"])
    assert (one["x_5.latents.safetensors"] - one["x_4.latents.safetensors"]).abs().max() > 0.1
    for batch in ("2", "3"):
        for name, z in latents_in(tmp_path / batch).items():
            torch.testing.assert_close(z, one[name], atol=1e-4, rtol=1e-4)
    assert start("--num-samples", 2)[0] == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.mp4")) == ["music_0.mp4", "music_1.mp4"]


def test_processes_divide_the_samples_and_change_nothing(start, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "filmstrip", lambda *_, **__: None)
    assert start("--num-samples", 3, "--out", "alone/x.mp4")[0] == 0
    for rank in range(2):
        monkeypatch.setattr(command, "join_others", lambda name, rank=rank: (rank, 2, torch.device("cpu")))
        status, out, err = start("--num-samples", 3, "--out", "divided/x.mp4")
        assert status == 0 and [f"x_{seed}.mp4" in out for seed in range(3)] == [rank == 0, rank == 1, rank == 0], err
    alone, divided = latents_in(tmp_path / "alone"), latents_in(tmp_path / "divided")
    assert len(divided) == 3 and all(torch.equal(z, alone[name]) for name, z in divided.items())


def test_two_processes_share_the_passes_of_one_sample_and_change_nothing(start, shared, tmp_path, monkeypatch):
    """Two processes that talk through gloo, as torchrun starts them."""
    monkeypatch.setattr(command, "write_video", lambda *_: None)
    every = ["--null-audio", "drop", "--skip-layer", "1", "--music-scale", "2", "--rescale", "0.7"]
    assert start("--out", "alone/x.mp4", *every)[0] == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    argv = ["--audio", shared / "music.wav", "--weights", shared / "weights", "--device", "cpu", "--out", "side/x.mp4"]
    program = (
        "import beats, config, drawing, numpy, sample"  # without the filmstrip, which takes longer than all the rest
    )
    program += "; drawing.filmstrip = beats.music_beats = lambda *_, **__: (0, numpy.zeros(0)); config.run(sample.main)"
    argv = [sys.executable, "-c", program, *map(str, argv), "--frames", f"{FRAMES}", "--steps", "2", *every]
    others = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in ("0", "1"):
        environment = others | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(Path(command.__file__).parent)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(argv, cwd=tmp_path, env=environment, **pipes))
    told = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    assert "wrote      side/x.mp4" in told[0] and "wrote" not in told[1]
    alone, side = latents_in(tmp_path / "alone"), latents_in(tmp_path / "side")
    torch.testing.assert_close(side["x.latents.safetensors"], alone["x.latents.safetensors"], atol=1e-5, rtol=1e-5)


def test_more_processes_than_samples_are_refused(start, monkeypatch):
    monkeypatch.setattr(command, "join_others", lambda name: (0, 3, torch.device("cpu")))
    status, _, err = start("--num-samples", 2)
    assert status == 2 and "--num-samples 2: fewer than the 3 processes; give at least 3" in err


def test_saved_latents_decode_again_to_the_same_frames_and_sound_with_the_decoder_alone(
    start, shared, tmp_path, monkeypatch
):
    place = ("--start", 0.5, "--speed", 1.25, "--height", 32, "--seed", 3, "--out", "a.mp4")
    assert start(*place)[0] == 0
    latents = tensors.open_weights("a.latents.safetensors")
    assert latents.shapes == {"z_dit": (1, 12, 2, 4, 2)} and latents.dtypes["z_dit"] == torch.float32
    told = json.loads(latents.metadata["settings"])
    assert (told["seed"], told["speed"], told["steps"], told["height"], told["width"]) == (3, 1.25, 2, 32, SIZE)
    (tmp_path / "w").mkdir()
    shutil.copy(shared / "weights" / "decoder.safetensors", tmp_path / "w")
    status, out, err = start("--latents", "a.latents.safetensors", "--out", "b.mp4", weights="w")
    assert status == 0, err
    assert "\nsample" not in out and "wrote      b.mp4" in out and "wrote      b.png" in out
    assert np.array_equal(frames_of("a.mp4"), frames_of("b.mp4"))
    assert np.array_equal(media.read_audio("a.mp4"), media.read_audio("b.mp4"))
    (tmp_path / "a.mp4").unlink()
    assert start("--latents", "a.latents.safetensors", weights="w")[0] == 0 and (tmp_path / "a.mp4").exists()
    assert not list(tmp_path.glob("b.latents*"))
    monkeypatch.setattr(command, "join_others", lambda name: (1, 2, torch.device("cpu")))  # the second of two
    assert start("--latents", "a.latents.safetensors", "--out", "c.mp4", weights="w")[0] == 0
    assert not (tmp_path / "c.mp4").exists(), "the first one writes it"


@pytest.mark.parametrize("settings", ["{", "[]", "{}", '{"prompt": "x", "start": "y", "speed": 1}', None])
def test_a_file_without_latents_is_refused(start, tmp_path, settings):
    header = {} if settings is None else {"settings": settings}
    tensors.save(tmp_path / "x.safetensors", {"z_dit": torch.zeros(1, 12, 2, 4, 2)}, header)
    status, out, err = start("--latents", "x.safetensors")
    assert status == 2 and err.count("\n") == 1 and "not latents that this command saved" in err and out == ""
    good = {"settings": '{"prompt": "x", "start": 0, "speed": 1}'}
    for shape in ((1, 12, 2, 4), (2, 12, 2, 4, 2), (1, 8, 2, 4, 2), (1, 12, 0, 4, 2)):
        tensors.save(tmp_path / "x.safetensors", {"z_dit": torch.zeros(shape)}, good)
        assert "z_dit is" in start("--latents", "x.safetensors")[2]


def too_much(*_, **__):
    torch.empty(2**50)  # a petabyte


def too_much_on_a_gpu(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def too_much_for_python(*_, **__):
    raise MemoryError


@pytest.mark.parametrize("fail", [too_much, too_much_on_a_gpu, too_much_for_python])
@pytest.mark.parametrize(
    ("name", "network", "advice"),
    [
        ("text", "encode_text", "--device cpu"),
        ("music", "encode_music", "fewer --frames"),
        ("sample", "load_musicinfuser", "smaller --height"),
        ("decode", "decode", "--latents x.latents.safetensors decodes them again"),
    ],
)
def test_too_little_memory_costs_one_line_that_says_what_to_change(
    start, tmp_path, monkeypatch, fail, name, network, advice
):
    owner = stages if network == "decode" else command
    real = getattr(owner, network)
    only = {"device": "meta"}  # the check of the headers, before, goes through
    monkeypatch.setattr(owner, network, lambda *a, **k: real(*a, **k) if k == only else fail())
    status, _, err = start("--out", "x.mp4")
    message = err.splitlines()[-1]
    assert status == 2 and f"too little memory for the stage '{name}'" in message and advice in message
    assert [p.name for p in tmp_path.iterdir()] == (["x.latents.safetensors"] if name == "decode" else [])


def test_other_errors_of_a_stage_are_not_taken_for_a_lack_of_memory(start, monkeypatch):
    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(command, "encode_text", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        start()


def test_frames_go_to_the_file_one_by_one_and_only_the_filmstrips_stay(start, monkeypatch):
    alive, most, seen, shown = [], 0, [], []

    def write(path, frames, fps, sound, sr_hz, scale):
        nonlocal most
        assert iter(frames) is frames
        for frame in frames:
            alive.append(weakref.ref(frame.base))  # the piece of film that the frame is a part of
            most = max(most, len({id(ref()) for ref in alive if ref() is not None}))
            seen.append(frame.copy())

    monkeypatch.setattr(media, "write_mp4", write)
    monkeypatch.setattr(drawing, "filmstrip", lambda path, frames, *_, **__: shown.extend(frames))
    assert start("--frames", 73)[0] == 0
    assert len(seen) == 73 and most <= 2
    assert len(shown) == 12 and all(np.array_equal(a, seen[int((i + 0.5) * 73 / 12)]) for i, a in enumerate(shown))


def test_clip_four_times_as_long_is_made_and_its_memory_is_told(start):
    status, out, err = start("--frames", 4 * FRAMES + 3, "--out", "long.mp4")
    assert status == 0, err
    assert media.read_video("long.mp4").shape[0] == 31
    told = [line.split() for line in out.splitlines() if line.startswith(("sample ", "decode "))]
    assert len(told) == 2 and all(words[3:5] == ["peak", "memory"] and float(words[5]) > 0 for words in told), out


@torch.no_grad()
def test_shipped_adapter_stays_finite_and_does_not_fade_on_four_times_the_frames_it_was_trained_on():
    m = load_musicinfuser("weights/baby/dit.safetensors", "weights/baby/musicinfuser.safetensors")
    read, width = m.adapters.audio_projection.projection[0].in_features, m.dit.t5_yproj.in_features
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 12, 4 * 12 + 1, 4, 4, generator=rng)  # 289 frames
    text = torch.randn(1, 5, width, generator=rng), torch.ones(1, 5, dtype=torch.bool)
    audio = torch.randn(1, 490, read, generator=rng)
    z = sample(m, noise, linear_quadratic(8), text, null_of(text), audio, cfg=3.0, skip_layers=[2], skip_scale=0.5)
    first, last = z[:, :, :13].std(), z[:, :, -13:].std()
    assert z.isfinite().all() and 0.5 < last / first < 2


def test_short_music_is_padded_with_silence_and_that_is_said(start):
    status, out, _ = start("--start", 2.9, "--frames", 13)
    assert status == 0 and "it ends 0.42 s before the clip does: silence" in out and "2.90 to 3.00 s" in out


def test_defaults_are_what_the_weights_were_made_for_and_else_the_official_ones(shared, tmp_path):
    dit = tensors.open_weights(shared / "weights" / "dit.safetensors")
    told = check.made_for(shared / "weights" / "dit.safetensors")
    assert told == check.OFFICIAL | {"height": SIZE, "width": SIZE}
    assert (check.OFFICIAL["height"], check.OFFICIAL["width"]) == (480, 848)
    assert (check.OFFICIAL["steps"], check.OFFICIAL["cfg"]) == (64, 6.0)
    ours = {"height": 32, "width": 48, "steps": 7, "cfg": 2.5, "prompt": "hop"}
    header = {f"default_{key}": str(value) for key, value in ours.items()}
    tensors.save(tmp_path / "d.safetensors", {"x": dit.read("pos_frequencies")}, header)
    assert check.made_for(tmp_path / "d.safetensors") == ours
    tensors.save(tmp_path / "d.safetensors", {"x": dit.read("pos_frequencies")}, {"default_steps": "many"})
    with pytest.raises(config.UserError, match="default_"):
        check.made_for(tmp_path / "d.safetensors")


def test_command_takes_the_size_from_the_header(start):
    status, out, _ = start()
    assert status == 0 and f"{FRAMES} frames of {SIZE}x{SIZE}" in out
    status, out, _ = start("--height", 32)
    assert status == 0 and f"{FRAMES} frames of {SIZE}x32" in out and "enlarged 16 times" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--frames", 74), "use 73 or 79"),
        (("--frames", 0), "use 1 or 7"),
        (("--height", 100), "use 96"),
        (("--width", -16), "multiple of 16"),
        (("--steps", 0), "at least 1"),
        (("--start", -1), "--start"),
        (("--start", "nan"), "--start"),
        (("--start", 60), "nothing is left after a start at 60 s"),
        (("--speed", 9), "0.25 to 4"),
        (("--speed", "nan"), "0.25 to 4"),
        (("--cfg", "inf"), "finite"),
        (("--seed", -1), "--seed"),
        (("--device", "tpu9"), "--device tpu9"),
        (("--device", "meta"), "--device meta"),
        (("--dtype", "float16"), "float16 overflows"),
        (("--skip-layer", 3), "expected 0 to 2"),
        (("--skip-layer", "1,-1"), "expected 0 to 2"),
        (("--skip-layer", "1;2"), "block numbers such as 3 or 3,4"),
        (("--music-scale", "nan"), "--music-scale nan: expected a finite number"),
        (("--rescale", 1.5), "0 to 1"),
        (("--null-audio", "half"), "keep or drop"),
        (("--num-samples", 0), "--num-samples 0: expected at least 1"),
        (("--batch", 0), "--batch 0: expected at least 1"),
        (("--seed", 2**63 - 1, "--num-samples", 2), "--seed"),
        (("--out", "x.avi"), ".mp4"),
        (("--out", "taken/x.mp4"), "cannot be written"),
        (("--out", "folder.mp4"), "cannot be written"),
        (("--adapter", "nothing.safetensors"), "nothing.safetensors: no such adapter"),
        (("--audio", "nothing.wav"), "nothing.wav: no such file"),
        (("--audio", "taken"), "taken: cannot be read as audio"),
        (("--weights", "nowhere"), "nowhere: no such folder"),
        (("--latents", "nothing.safetensors"), "nothing.safetensors: no such"),
    ],
)
def test_mistakes_cost_one_line_and_status_2_and_leave_nothing(start, tmp_path, monkeypatch, flags, message):
    (tmp_path / "taken").write_text("text")
    (tmp_path / "folder.mp4").mkdir()
    monkeypatch.setattr(command, "encode_text", lambda *_: pytest.fail("found out only after long work"))
    before = sorted(tmp_path.rglob("*"))
    status, out, err = start(*flags)
    assert status == 2 and err.count("\n") == 1 and message in err and out == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("dit.safetensors", "video transformer missing"),
        ("decoder.safetensors", "video decoder missing"),
        ("musicinfuser.safetensors", "no such adapter"),
        ("t5/spiece.model", "vocabulary of the text encoder missing"),
        ("t5", "text encoder missing"),
        ("wav2vec2", "music encoder missing"),
    ],
)
def test_a_missing_network_is_named_with_the_place_it_is_expected_at(start, shared, tmp_path, gone, message):
    shutil.copytree(shared / "weights", tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / gone) if gone in ("t5", "wav2vec2") else (tmp_path / "w" / gone).unlink()
    status, _, err = start(weights="w")
    assert status == 2 and err.count("\n") == 1 and message in err and f"w/{gone}" in err
    assert not (tmp_path / "out").exists()


def test_networks_that_do_not_fit_each_other_are_refused_before_long_work(start, shared, tmp_path):
    dit = load_dit(shared / "weights" / "dit.safetensors")
    save_adapter(MusicInfuser(dit, tiny_adapters(dit, layers=(0,), audio_dim=9)), tmp_path / "a.safetensors")
    status, _, err = start("--adapter", "a.safetensors")
    assert status == 2 and f"makes features of width {AUDIO_DIM}" in err and "a.safetensors reads 9" in err


def test_diverging_sampler_is_an_error_and_writes_no_video(start, tmp_path):
    status, _, err = start("--cfg", "1e38")
    assert status == 2 and "left the range of numbers" in err and not (tmp_path / "out").exists()


def test_finding_out_what_is_wrong_imports_nothing_slow(shared):
    """A compiler for tensors without values, and what only the filmstrip needs: seconds before a video begins."""
    program = (
        "import sys, pathlib, sample; sample.check_networks(sample.find_files(pathlib.Path(sys.argv[1])));"
        "print([name for name in ('torch._dynamo', 'librosa', 'scipy.signal', 'matplotlib') if name in sys.modules])"
    )
    argv = [sys.executable, "-c", program, str(shared / "weights")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, cwd=Path(command.__file__).parent)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_help_names_every_flag():
    done = subprocess.run([sys.executable, "sample.py", "--help"], capture_output=True, text=True, timeout=120)
    flags = ["audio", "prompt", "weights", "adapter", "out", "frames", "steps", "cfg", "seed", "start", "speed"]
    flags += ["skip-layer", "skip-scale", "height", "width", "latents", "device", "dtype"]
    flags += ["num-samples", "batch", "null-audio", "music-scale", "rescale"]
    assert done.returncode == 0 and all(f"--{name} " in done.stdout for name in flags)
