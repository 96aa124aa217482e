"""The sampler against Eq. (2)-(4) written out in EDM coordinates, and the command from music to mp4."""

import json
import shutil
import subprocess
import sys
import weakref

import av
import numpy as np
import pytest
import soundfile
import torch
from test_model import inputs, tiny_adapters, tiny_dit, trained
from tiny import AUDIO_DIM, FRAMES, SIZE, make_tiny_weights

import check
import config
import media
import sample as command
import tensors
from mochi_dit import load_dit
from model import MusicInfuser, save_adapter
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
    gamma, weight, layer = 3.0, 0.7, 1
    sigmas = [0.9, 0.6, 0.3, 0.1, 0.0]  # not from 1, where s is infinite
    unconditional_audio = audio if null_audio == "keep" else None
    ours = sample(m, z, sigmas, text, null_of(text), audio, null_audio, gamma, [layer], weight)
    for sigma, following in zip(sigmas, sigmas[1:]):
        x, s = to_edm(z, sigma)
        level = torch.full((2,), s)
        conditional = m.denoise(x, level, *text, audio)
        unconditional = m.denoise(x, level, *null_of(text), unconditional_audio)
        skipped = m.denoise(x, level, *text, audio, [layer])
        dx_ds = -gamma * (conditional - x) / s + (gamma - 1) * (unconditional - x) / s  # Eq. (3)
        dx_ds = dx_ds - weight * (conditional - skipped) / s  # climbs G: its gradient is Eq. (4)
        # the same ODE in (z, sigma): x = z / (1 - sigma), ds/dsigma = 1 / (1 - sigma)^2
        dz_dsigma = (1 - sigma) * dx_ds / (1 - sigma) ** 2 - z / (1 - sigma)
        z = z + (following - sigma) * dz_dsigma
    torch.testing.assert_close(ours, z, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_cfg_one_is_the_conditional_model_and_runs_nothing_else(m, given):
    noise, text, audio = given
    calls = []
    m.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    out = sample(m, noise, SIGMAS, text, null_of(text), audio, cfg=1.0)
    assert len(calls) == 4 and all(arguments[2] is text[0] and arguments[4] is audio for arguments in calls)
    z = noise
    for sigma, following in zip(SIGMAS, SIGMAS[1:]):
        z = z + (sigma - following) * m(z, torch.full((2,), sigma), *text, audio)
    assert torch.equal(out, z) and out.dtype == torch.float32


@pytest.mark.parametrize(("made_for", "asked", "hears"), [("keep", None, True), ("drop", None, False)])
def test_unconditional_pass_hears_music_as_the_adapter_was_made_for(given, made_for, asked, hears):
    noise, text, audio = given
    dit = tiny_dit()
    m = trained(MusicInfuser(dit, tiny_adapters(dit, null_audio=made_for)))
    heard = []
    m.register_forward_pre_hook(lambda module, arguments: heard.append(arguments[4] is audio))
    sample(m, noise, [1.0, 0.0], text, null_of(text), audio, asked, cfg=2.0)
    assert heard == [True, hears]
    sample(m, noise, [1.0, 0.0], text, null_of(text), audio, "keep", cfg=2.0)
    sample(m, noise, [1.0, 0.0], text, null_of(text), audio, "drop", cfg=2.0)
    assert heard[2:] == [True, True, True, False]


@torch.no_grad()
def test_sampler_does_the_same_twice_and_each_clip_of_a_batch_alone(m, given):
    noise, text, audio = given
    arguments = (SIGMAS, text, null_of(text), audio)
    first = sample(m, noise, *arguments)
    assert torch.equal(first, sample(m, noise, *arguments))
    alone = [sample(m, noise[i : i + 1], SIGMAS, (text[0][i : i + 1], text[1][i : i + 1]),
                    null_of((text[0][i : i + 1], text[1][i : i + 1])), audio[i : i + 1]) for i in range(2)]  # fmt: skip
    torch.testing.assert_close(first, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert (first - sample(m, noise + 0.1, *arguments)).abs().max() > 1e-2


@torch.no_grad()
def test_bare_prior_samples_without_music(given):
    noise, text, audio = given
    m = MusicInfuser(tiny_dit()).eval()
    assert torch.equal(
        sample(m, noise, SIGMAS, text, null_of(text)), sample(m, noise, SIGMAS, text, null_of(text), audio)
    )


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
    monkeypatch.setattr(media, "filmstrip", lambda *_, **__: None)  # drawing takes longer than all the rest
    assert start("--out", "a.mp4")[0] == 0
    reference = frames_of("a.mp4")
    same = [("--seed", 0), ("--height", SIZE), ("--skip-layer", 1, "--skip-scale", 0), ("--dtype", "float32")]
    for i, flags in enumerate(same):
        assert start("--out", f"same{i}.mp4", *flags)[0] == 0
        assert np.array_equal(frames_of(f"same{i}.mp4"), reference), flags
    changes = [("--seed", 1), ("--prompt", "break"), ("--cfg", 1), ("--steps", 3), ("--start", 1), ("--speed", 1.5)]
    changes += [("--adapter", "none"), ("--skip-layer", 1), ("--dtype", "bfloat16")]
    for i, flags in enumerate(changes):
        status, _, err = start("--out", f"b{i}.mp4", *flags)
        assert status == 0, err
        assert not np.array_equal(frames_of(f"b{i}.mp4"), reference), flags


def test_saved_latents_decode_again_to_the_same_frames_and_sound_with_the_decoder_alone(start, shared, tmp_path):
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
    real = getattr(command, network)
    only = {"device": "meta"}  # the check of the headers, before, goes through
    monkeypatch.setattr(command, network, lambda *a, **k: real(*a, **k) if k == only else fail())
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
    monkeypatch.setattr(media, "filmstrip", lambda path, frames, *_, **__: shown.extend(frames))
    assert start("--frames", 73)[0] == 0
    assert len(seen) == 73 and most <= 2
    assert len(shown) == 12 and all(np.array_equal(a, seen[int((i + 0.5) * 73 / 12)]) for i, a in enumerate(shown))


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
        (("--frames", 0), "use 73"),
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


def test_help_names_every_flag():
    done = subprocess.run([sys.executable, "sample.py", "--help"], capture_output=True, text=True, timeout=120)
    flags = ["audio", "prompt", "weights", "adapter", "out", "frames", "steps", "cfg", "seed", "start", "speed"]
    flags += ["skip-layer", "skip-scale", "height", "width", "latents", "device", "dtype"]
    assert done.returncode == 0 and all(f"--{name} " in done.stdout for name in flags)
