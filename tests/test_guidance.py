"""The pictures of what each guidance does: their rows are what sample.py makes with the flags written above them."""

import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_model import tiny_adapters, trained
from tiny import AUDIO_DIM, FRAMES, SIZE, make_tiny_weights

import config
import guidance
import sample as command
import tensors
from check import find_files
from guidance import PICTURES, GuidanceConfig, label
from mochi_dit import load_dit
from model import MusicInfuser, save_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny weights with an adapter that does something, and a second of sound."""
    folder = tmp_path_factory.mktemp("tiny")
    weights = make_tiny_weights(folder / "weights", depth=3)
    dit = load_dit(weights / "dit.safetensors")
    adapters = tiny_adapters(dit, layers=(0, 1), audio_dim=AUDIO_DIM)
    save_adapter(trained(MusicInfuser(dit, adapters)), weights / "musicinfuser.safetensors")
    soundfile.write(folder / "music.wav", np.sin(np.arange(16_000) * 0.2).astype(np.float32), 16_000)
    return folder


@pytest.fixture
def args(folder):
    given = GuidanceConfig(audio=folder / "music.wav", weights=folder / "weights", frames=FRAMES, steps=2, device="cpu")
    return given.as_sample()


def test_every_row_is_what_sample_makes_with_its_flags(args, folder, tmp_path, monkeypatch):
    latents = []

    def decode(path, z, dtype):
        latents.append(z)
        return [np.zeros((SIZE, SIZE, 3), np.uint8)]

    monkeypatch.setattr(guidance, "decode", decode)
    args = command.replace(args, skip_scale=0.0)
    rows = [flags for _, every in PICTURES.values() for flags in every]
    assert len(guidance.dance(args, rows)) == len(rows) == len(latents)
    files, cpu = find_files(folder / "weights"), torch.device("cpu")
    heard = command.read_section(args.audio, 16_000, 0.0, command.audio.clip_samples(FRAMES) / 16_000, 1.0)
    for number, flags in enumerate(rows):
        video = tmp_path / f"{number}.mp4"
        command.dance(command.replace(args, **flags), files, heard, {args.seed: video}, cpu, torch.float32)
        theirs = tensors.open_weights(command.latents_of(video)).read("z_dit")
        assert torch.equal(latents[number], theirs), flags
    different = {z.numpy().tobytes() for z in latents}
    assert len(different) >= len(rows) - 2, "but for the rows that stand in two pictures, each flag does something"


def test_rows_of_a_picture_differ_in_their_flags_and_all_flags_are_those_of_sample(args):
    known = {field.name for field in fields(command.SampleConfig)}
    for _, every in PICTURES.values():
        assert len({label(args, flags) for flags in every}) == len(every) and all(
            known >= set(flags) for flags in every
        )
    assert label(args, {"skip_scale": 1.0}) == "--skip-layer 0  --skip-scale 1"
    assert label(args, {"null_audio": "keep", "music_scale": 3.0}) == "--null-audio keep  --music-scale 3"


def test_command_draws_one_picture_for_each_guidance_and_refuses_blocks_that_are_not_there(
    folder, tmp_path, monkeypatch, capsys
):
    flags = ["--audio", folder / "music.wav", "--weights", folder / "weights", "--frames", FRAMES, "--steps", 2]
    flags = ["guidance.py", "--device", "cpu", "--out", tmp_path, *flags]
    monkeypatch.setattr(guidance, "dance", lambda args, rows: [np.zeros((FRAMES, SIZE, SIZE, 3), np.uint8)] * len(rows))
    monkeypatch.setattr(sys, "argv", [str(word) for word in flags])
    config.run(guidance.main)
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == sorted(f"{name}.webp" for name in PICTURES)
    assert all((tmp_path / f"{name}.webp").read_bytes()[8:12] == b"WEBP" for name in PICTURES)
    monkeypatch.setattr(sys, "argv", [str(word) for word in (*flags, "--skip-layer", 3)])
    with pytest.raises(SystemExit) as stop:
        config.run(guidance.main)
    assert stop.value.code == 2 and "--skip-layer 3: expected 0 to 2" in capsys.readouterr().err
