from pathlib import Path

import numpy as np
import torch

import media
import sample
import toy_read
from check import check_networks, find_files, made_for

BABY = Path(__file__).parent.parent / "weights" / "baby"
DEMO = BABY.parent.parent / "demo" / "demo.ogg"


def test_baby_weights_fit_together_and_take_less_than_15_megabytes():
    m = check_networks(find_files(BABY))
    assert m.adapters.form == "aligned" and m.adapters.null_audio == "drop"
    assert made_for(find_files(BABY).dit)["height"] == 96
    assert sum(file.stat().st_size for file in BABY.rglob("*") if file.is_file()) < 15e6


def test_shipped_demo_makes_a_moving_dancer_with_sound_and_the_same_one_twice(tmp_path, monkeypatch):
    for name in ("a", "b"):
        command = (
            f"sample.py --audio {DEMO} --weights {BABY} --frames 19 --steps 6 --device cpu --out {tmp_path}/{name}.mp4"
        )
        monkeypatch.setattr("sys.argv", command.split())
        torch.manual_seed(len(name))
        sample.main()
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    frames = media.read_video(tmp_path / "a.mp4")
    assert frames.shape == (19, 480, 480, 3)
    backdrop, middle = frames[:, :80, :60].astype(float), frames[:, 100:400, 150:350].astype(float)
    assert backdrop.mean() > 200 and backdrop.std() < 15  # a white studio, and in front of it something else that moves
    assert middle.mean() < 190 and np.abs(np.diff(middle, axis=0)).mean() > 1
    assert toy_read.read_colours(frames[:, 2::5, 2::5]) == ("red", "blue")  # as the default prompt says
    assert np.abs(media.read_audio(tmp_path / "a.mp4", 16000)).max() > 0.1
