"""The contact sheet shows what the model will see, from the files that can be used."""

import os

import numpy as np
import pytest
from tiny import write_video

import media
from config import UserError
from data_clips import Cut, DataConfig
from data_names import Source
from look import draw_clips, spread


def config(folder, **changes):
    return DataConfig(data=folder, weights=folder, frames=7, **{"height": 32, "width": 32} | changes)


def close_to(image, colour):
    return (np.abs(image.astype(int) - colour).max(axis=-1) < 40).sum()


def test_the_sheet_shows_what_is_left_after_the_crop_and_the_beats(tmp_path):
    frames = np.full((60, 40, 60, 3), (255, 0, 0), np.uint8)  # red at both sides: cut away
    frames[:, :, 10:50] = (0, 255, 0)
    clicks = np.zeros(32000, np.float32)
    for beat in range(0, 32000, 2000):
        clicks[beat : beat + 400] = np.sin(np.arange(400) / 3)
    media.write_mp4(tmp_path / "a.mp4", frames, 30, clicks, 16000)
    (tmp_path / "b.mp4").touch()
    out = draw_clips(config(tmp_path))
    image = media.read_video(out)[0]
    assert out == tmp_path / ".encoded" / "look.png" and os.listdir(out.parent) == ["look.png"]
    assert close_to(image, (0, 255, 0)) > 0.1 * image[..., 0].size
    assert close_to(image, (255, 0, 0)) == 0
    assert close_to(image, (0xE4, 0x57, 0x2E)) > 20  # beats
    assert close_to(image, (0x8F, 0xA8, 0xC8)) > 100  # sound


def test_nothing_but_the_picture_is_made_and_reasons_are_told(tmp_path, capsys):
    write_video(tmp_path / 'wild $1 "é".mp4', size=32)
    write_video(tmp_path / "short.mp4", dur_s=0.1, size=32)
    draw_clips(config(tmp_path, cache=tmp_path / "elsewhere"))
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "short.mp4", 'wild $1 "é".mp4']
    assert "left out: short.mp4: too short" in capsys.readouterr().out


def test_a_folder_without_a_usable_video_is_refused_with_a_reason(tmp_path):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(UserError, match="empty"):
        draw_clips(config(tmp_path))


def test_both_kinds_are_shown_and_each_from_first_to_last(tmp_path):
    aist = [Cut(Source(tmp_path / f"{i}", aist="name"), i, ("", 0)) for i in range(30)]
    wild = [Cut(Source(tmp_path / f"{i}"), i, ("", 0)) for i in range(2)]
    assert [(bool(c.source.aist), c.start) for c in spread(aist + wild)] == [
        (True, 0), (True, 10), (True, 20), (False, 0), (False, 1)
    ]  # fmt: skip
