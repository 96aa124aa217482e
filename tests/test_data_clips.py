"""Clips: the right frame at each time, the sound that belongs to it, and the pictures that cannot serve."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch

import audio
from data_clips import DataConfig, crop_starts, cut_videos, fit_frames, misfit, read_clip

SR = 44100
F, SIZE = 31, 64
NTSC = Fraction(30000, 1001)


def counter(number, size=2 * SIZE):
    """A picture that says its number: eight vertical bars, black for 0 and white for 1."""
    bits = (number >> np.arange(8)) & 1
    return np.repeat(255 * bits, size // 8)[None, :, None].repeat(size, 0).repeat(3, 2).astype(np.uint8)


def numbers(video):
    """The numbers in a clip (3, F, H, W) as the networks see it."""
    bits = (video[0, :, SIZE // 2, SIZE // 16 :: SIZE // 8] > 0).int()  # (F, 8)
    return (bits.numpy() * 2 ** np.arange(8)).sum(axis=1).tolist()


def chirp(times_s):
    """A sound that is never the same twice: 200 Hz rising by 300 Hz a second."""
    return (0.5 * np.sin(2 * np.pi * (200 + 150 * times_s) * times_s)).astype(np.float32)


def write_counter(path, rate, dur_s=4, audio_codec="aac", jitter=0.0, rotation=None, shape=None):
    """Frame k says k and comes at k / rate (late by up to `jitter` seconds); under it the chirp.

    Returns the seconds at which the frames come."""
    times = np.arange(int(dur_s * rate)) / float(rate)
    times[1:] += np.random.default_rng(0).uniform(0, jitter, len(times) - 1)
    ticks = np.round(times * 30000).astype(int)
    sound = chirp(np.arange(dur_s * SR) / SR)
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("libx264", rate=rate), container.add_stream(audio_codec, rate=SR)
        video.height, video.width = shape or (2 * SIZE, 2 * SIZE)
        video.pix_fmt, video.codec_context.time_base = "yuv420p", Fraction(1, 30000)
        audio.layout = "mono"
        if rotation:
            video.set_display_rotation(rotation)
        for k, tick in enumerate(ticks):
            image = np.ascontiguousarray(counter(k)[: video.height, : video.width])
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = int(tick), Fraction(1, 30000)
            container.mux(video.encode(frame))
        frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = SR, 0, Fraction(1, SR)
        container.mux(audio.encode(frame))
        container.mux([*video.encode(None), *audio.encode(None)])
    return ticks / 30000


def config(folder, **changes):
    return DataConfig(data=folder, frames=F, **{"height": SIZE, "width": SIZE} | changes)


def lag_s(sound, start_s):
    """How much later the chirp is heard than it belongs to a clip from start_s on."""
    lags = range(-800, 801)  # 50 ms
    middle = sound[1000:-1000]
    at = start_s + (1000 + np.arange(len(middle))) / 16000
    return max(lags, key=lambda lag: float(middle @ chirp(at - lag / 16000))) / 16000


CASES = {
    "25.mp4": {"rate": Fraction(25)},
    "29.97.mp4": {"rate": NTSC},
    "60.mp4": {"rate": Fraction(60)},
    "variable.mp4": {"rate": Fraction(24), "jitter": 0.03},
    "25.mkv": {"rate": Fraction(25), "audio_codec": "flac"},
}


@pytest.mark.parametrize("name", CASES)
def test_every_frame_of_a_clip_is_the_one_on_screen_and_the_sound_is_within_half_a_frame(tmp_path, name):
    times = write_counter(tmp_path / name, **CASES[name])
    _, (cut,), skipped = cut_videos(config(tmp_path), (F, SIZE, SIZE))
    assert skipped == [] and 3 < cut.start < 86
    for start in (0, cut.start, 83):
        video, sound = read_clip(cut.source, start, F, SIZE, SIZE)
        tick = 0.5 / 1000 if name.endswith("mkv") else 1e-5  # Matroska counts milliseconds
        on_screen = [int((times <= (start + i) / 30 + tick).sum()) - 1 for i in range(F)]
        assert numbers(video) == on_screen
        assert video.shape == (3, F, SIZE, SIZE)
        assert abs(lag_s(sound.numpy(), start / 30)) < 1 / 60


@pytest.mark.parametrize(
    "picture, wanted, aist, told",
    [
        ((1080, 1920), (480, 848), True, ""),
        ((1080, 1920), (480, 848), False, ""),
        ((480, 640), (480, 848), False, ""),
        ((360, 640), (480, 848), False, ""),
        ((1080, 1080), (480, 848), False, ""),
        ((1920, 1080), (848, 480), False, ""),
        ((240, 320), (480, 848), False, "too small: 320x240 pixels would be enlarged 2.7 times to 848x480"),
        ((240, 320), (480, 848), True, "too small"),
        ((1920, 1080), (480, 848), False, "wrong shape: of 1080x1920 pixels 848x480 would keep only 32 %"),
    ],
)
def test_pictures_serve_unless_too_small_or_cut_to_less_than_half(picture, wanted, aist, told):
    why = misfit(*picture, *wanted, aist)
    assert why.startswith(told) and bool(why) == bool(told)


def test_small_upright_and_turned_videos_are_left_out_with_the_reason(tmp_path):
    write_counter(tmp_path / "good.mp4", Fraction(30), dur_s=2)
    write_counter(tmp_path / "small.mp4", Fraction(30), dur_s=2, shape=(24, 24))
    write_counter(tmp_path / "upright.mp4", Fraction(30), dur_s=2, shape=(128, 48))
    write_counter(tmp_path / "turned.mp4", Fraction(30), dur_s=2, shape=(48, 128), rotation=90)
    paths, cuts, skipped = cut_videos(config(tmp_path), (F, SIZE, SIZE))
    assert {cut.source.path.name for cut in cuts} == {"good.mp4"} and len(paths) == 4
    reasons = {path.name: why for path, why in skipped}
    assert reasons["small.mp4"].startswith("too small: 24x24")
    assert reasons["upright.mp4"].startswith("wrong shape: of 48x128")
    assert reasons["turned.mp4"].startswith("wrong shape: of 48x128")


def test_a_file_gets_another_print_when_it_changes(tmp_path):
    write_counter(tmp_path / "a.mp4", Fraction(30), dur_s=2)
    before = cut_videos(config(tmp_path), (F, SIZE, SIZE))[1][0].source_print
    assert cut_videos(config(tmp_path), (F, SIZE, SIZE))[1][0].source_print == before
    write_counter(tmp_path / "a.mp4", Fraction(25), dur_s=2)
    assert cut_videos(config(tmp_path), (F, SIZE, SIZE))[1][0].source_print != before


def test_crops_are_five_a_minute_inside_the_middle_ninety_percent():
    starts = crop_starts("a.mp4", 120.0, 73)
    assert len(starts) == 10 and starts == sorted(starts) == crop_starts("a.mp4", 120.0, 73)
    clip_s = audio.clip_samples(73) / 16000
    assert all(6.0 - 1 / 60 <= start / 30 <= 114.0 - clip_s + 1 / 60 for start in starts)
    assert starts != crop_starts("b.mp4", 120.0, 73) and starts != crop_starts("a.mp4", 120.0, 73, seed=1)


def test_short_files_give_one_crop_and_too_short_ones_none():
    assert crop_starts("a.mp4", 73 / 30, 73) == [0]
    assert crop_starts("a.mp4", 72 / 30, 73) == []
    assert len(crop_starts("a.mp4", 2.7, 73)) == 1 and 0 <= crop_starts("a.mp4", 2.7, 73)[0] <= 5


def test_a_video_of_the_wanted_size_is_taken_as_it_is():
    frames = torch.randint(0, 256, (9, 16, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = fit_frames(frames, 16, 32, aist=True)
    assert torch.equal(ours, (frames.float() / 127.5 - 1).permute(3, 0, 1, 2))


@pytest.mark.parametrize("aist, box", [(True, (270, 990, 324, 1596)), (False, (0, 1080, 6, 1914))])
def test_crop_is_the_official_one_for_aist_and_the_largest_centred_one_else(aist, box):
    top, bottom, left, right = box
    outside = torch.full((1, 1080, 1920, 3), 255, dtype=torch.uint8)
    outside[:, top:bottom, left:right] = 0
    assert fit_frames(outside, 480, 848, aist).max() < -0.9
    outside[:, top : top + 8] = outside[:, bottom - 8 : bottom] = 255
    outside[:, :, left : left + 8] = outside[:, :, right - 8 : right] = 255
    video = fit_frames(outside, 480, 848, aist)
    edges = (video[:, 0, 0], video[:, 0, -1], video[:, 0, :, 0], video[:, 0, :, -1])
    assert video.shape == (3, 1, 480, 848) and min(edge.min() for edge in edges) > 0.9


def test_shrinking_averages_instead_of_dropping_pixels():
    stripes = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 254
    assert fit_frames(stripes, 16, 16, aist=False)[..., 2:-2].abs().max() < 0.05
