"""The figures: what they show, and the command on tiny networks."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from PIL import Image
from tiny import AUDIO_DIM, make_tiny_weights

import figures
import toy
from claims_score import Row
from claims_studio import ClaimsConfig, solo_clips
from config import UserError
from mochi_dit import load_dit
from model import Adapters, MusicInfuser, save_adapter


@pytest.fixture(scope="module")
def clip():
    return solo_clips(ClaimsConfig())[0]


def open_picture(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_each_row_of_strips_shows_its_frames_its_motion_and_its_beats(clip, tmp_path):
    video, beats = toy.render(clip, 37, 48), toy.beat_times(clip, 37 / 30)
    with_beats = [figures.Strip("a", video, beats), figures.Strip("b", video, beats)]
    figures.strips(tmp_path / "two.webp", with_beats, "title")
    figures.strips(tmp_path / "none.webp", [row._replace(beats_s=np.zeros(0)) for row in with_beats], "title")
    two, none = open_picture(tmp_path / "two.webp"), open_picture(tmp_path / "none.webp")
    assert two.shape == none.shape
    differs = np.abs(two - none).max(-1) > 60
    columns = np.flatnonzero(differs.sum(0) > 60)  # a beat is a line through both curves
    assert len(np.split(columns, np.flatnonzero(np.diff(columns) > 3) + 1)) == len(beats)
    assert (np.abs(two - 255).max(-1) > 30).mean() > 0.1  # the pictures


def test_the_moving_picture_has_every_frame_and_a_bar_that_lights_up_on_the_beat(clip, tmp_path):
    video = toy.render(dataclasses.replace(clip, bpm=120.0), 16, 32)
    figures.moving(tmp_path / "dance.webp", [video, video], [np.array([10 / 30]), np.zeros(0)], 2)
    with Image.open(tmp_path / "dance.webp") as image:
        assert image.n_frames == 16 and image.size == (128, 70) and image.info["loop"] == 0
        seen = []
        for i in (9, 10):
            image.seek(i)
            seen.append(np.asarray(image.convert("RGB")).astype(int)[-4:, 20:40].mean((0, 1)))
    assert np.abs(seen[1] - (228, 87, 46)).max() < 30 < np.abs(seen[0] - seen[1]).max()


def test_the_chart_needs_a_measured_claim(tmp_path):
    with pytest.raises(UserError, match="run claims.py first"):
        figures.chart(tmp_path / "claims.webp", tmp_path)
    rows = [Row("true clips", "BAS", 0.9, (0.8, 1.0), 0.4, 1.0), Row("x", "tempo error", 0.1)]
    (tmp_path / "listens.json").write_text(json.dumps({"rows": [dataclasses.asdict(row) for row in rows]}))
    figures.chart(tmp_path / "claims.webp", tmp_path)
    one = open_picture(tmp_path / "claims.webp")
    more = [*rows, Row("prior", "PLV", 0.1, (0.05, 0.2), 0.1, 1.0)]
    (tmp_path / "listens.json").write_text(json.dumps({"rows": [dataclasses.asdict(row) for row in more]}))
    figures.chart(tmp_path / "claims.webp", tmp_path)
    assert open_picture(tmp_path / "claims.webp").shape[0] > one.shape[0]


def test_the_command_draws_all_figures_in_little_space(tmp_path, monkeypatch, capsys):
    weights = make_tiny_weights(tmp_path / "weights")
    for name, form in (("musicinfuser", "aligned"), ("published", "published")):
        dit = load_dit(weights / "dit.safetensors")
        adapters = Adapters(dit, (0, 1), AUDIO_DIM, rank=2, alpha=2, form=form)
        save_adapter(MusicInfuser(dit, adapters), weights / f"{name}.safetensors")
    out = tmp_path / "docs"
    command = ["figures.py", "--weights", str(weights), "--published", "published.safetensors", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "1", "--device", "cpu"])
    figures.main()
    names = {f"{name}.webp" for name in ("filmstrip", "shuffled", "speed", "forms", "diversity", "dance")}
    assert {path.name for path in out.iterdir()} == names
    assert sum(path.stat().st_size for path in out.iterdir()) < 2.5e6
    assert all(f"wrote {out / name}" in capsys.readouterr().out for name in sorted(names)[:1])
