"""Media files: what goes in comes out, at the right time; what cannot be read or written is refused in one line."""

import os
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile

import drawing
import media
import toy
from config import UserError

SR = 16000


def stamp(index, size=64):
    """A picture that says its number: eight vertical bars, black for 0 and white for 1."""
    bits = (index >> np.arange(8)) & 1
    return np.repeat(255 * bits, size // 8)[None, :, None].repeat(size, 0).repeat(3, 2).astype(np.uint8)


def numbers(frames):
    bits = frames[:, 32, 4::8, 0] > 128  # (F, 8)
    return (bits * 2 ** np.arange(8)).sum(axis=1).tolist()


def write_stamps(path, times, clock, codec="libx264", rotation=None, format=None):
    """A video whose frame k, stamped k, comes at times[k]; `clock` is the stream's time base."""
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=30)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", clock
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for k, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(stamp(k), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = round(time / clock), clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def tone(dur_s, sr_hz, hz=440.0):
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(dur_s * sr_hz)) / sr_hz)).astype(np.float32)


def encode_audio(path, format, codec, wave, sr_hz):
    """wave (S, 2) into any container, by PyAV alone."""
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=sr_hz, layout="stereo")
        stream.bit_rate = 192_000
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave.T), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = sr_hz, 0, Fraction(1, sr_hz)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def refusal(call, *args, **named):
    """The message of the UserError that the call raises, checked to be one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def dance(num_frames=30, height=64, width=64):
    """A bright square that wanders over a coloured ground."""
    frames = np.full((num_frames, height, width, 3), (200, 30, 40), np.uint8)
    for i, frame in enumerate(frames):
        frame[20:40, i : i + 20] = (20, 220, 60)
    return frames


# ----------------------------------------------------------------------------------------------------- mp4 out


def test_mp4_has_h264_yuv420p_and_aac_both_from_zero_and_as_long_as_the_frames(tmp_path):
    path = tmp_path / "new folder" / "a.mp4"
    for seconds in (0.5, 9):  # sound too short and too long
        media.write_mp4(path, dance(73), 30, tone(seconds, SR), SR)
        with av.open(str(path)) as container:
            (video,), (audio,) = container.streams.video, container.streams.audio
            assert (video.codec_context.name, video.pix_fmt, audio.codec_context.name) == ("h264", "yuv420p", "aac")
            assert video.start_time == audio.start_time == 0
            assert (video.frames, video.average_rate) == (73, 30)
            assert audio.duration * audio.time_base == pytest.approx(73 / 30, abs=0.002)
        assert media.video_info(path) == (pytest.approx(73 / 30), 64, 64, 30.0, True)
        assert media.audio_duration(path) == pytest.approx(73 / 30, abs=0.002)
        assert b"moov" in path.read_bytes()[:4096]  # the index comes first: playback starts before the download ends
    loud = np.abs(media.read_audio(path, dur_s=73 / 30))
    assert loud[-800:].max() > 0.4 and len(loud) == round(73 / 30 * SR)


def test_frames_come_back_in_number_order_and_colour(tmp_path):
    path = tmp_path / "a.mp4"
    frames = dance()
    media.write_mp4(path, frames, 30)
    back = media.read_video(path)
    assert back.shape == frames.shape and back.dtype == np.uint8
    error = np.abs(back.astype(int) - frames).mean(axis=(1, 2, 3))
    assert error.max() < 4  # 4:2:0 blurs the colours at the edges
    assert np.abs(back[:, 5:15].astype(int) - frames[:, 5:15]).max() < 8
    media.write_mp4(path, map(stamp, range(40)), 30)
    assert numbers(media.read_video(path)) == list(range(40))


def test_click_and_flash_written_together_are_decoded_together(tmp_path):
    path, sr_hz = tmp_path / "a.mp4", 44100
    frames = np.zeros((60, 64, 64, 3), np.uint8)
    wave = np.zeros((2 * sr_hz, 2), np.float32)
    for k in (13, 44):
        frames[k] = 255
        wave[round(k / 30 * sr_hz) :][:100] = 0.9
    media.write_mp4(path, frames, 30, wave, sr_hz)
    seen = np.flatnonzero(media.read_video(path)[:, 32, 32, 0] > 128) / 30
    sound = np.abs(media.read_audio(path, sr_hz))
    heard = [(begin + sound[begin : begin + sr_hz].argmax()) / sr_hz for begin in (0, sr_hz)]
    assert seen.tolist() == [13 / 30, 44 / 30]
    assert heard == pytest.approx(seen, abs=0.005)


def test_sound_comes_back_as_it_was_at_every_rate_mono_and_stereo(tmp_path):
    for sr_hz in (11025, 16000, 44100, 96000):
        wave = tone(1, sr_hz)
        for sound in (wave, np.stack([wave, -wave], axis=1)):
            media.write_mp4(tmp_path / "a.mp4", dance(30), 30, sound, sr_hz)
            back = media.read_audio(tmp_path / "a.mp4", SR, dur_s=1)
            assert np.abs(back - tone(1, SR))[800:-800].max() < 0.03


def test_same_input_twice_gives_the_same_bytes(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        media.write_mp4(tmp_path / name, dance(), 30, tone(1, SR), SR)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_bytes_do_not_depend_on_what_memory_held_before(tmp_path):
    rng, made = np.random.default_rng(0), set()
    frames = toy.render(toy.sample_clip(rng, wild=False), 19, 96)
    for _ in range(12):
        junk = [rng.integers(0, 256, int(n), dtype=np.uint8) for n in rng.integers(10_000, 900_000, 60)]
        del junk  # but the memory stays with the process, full of it
        media.write_mp4(tmp_path / "a.mp4", frames, 30, scale=5)
        made.add((tmp_path / "a.mp4").read_bytes())
    assert len(made) == 1


def test_scale_enlarges_every_side_and_keeps_the_picture(tmp_path):
    media.write_mp4(tmp_path / "a.mp4", dance(5, 31, 63), 30, scale=4)
    back = media.read_video(tmp_path / "a.mp4")
    assert back.shape == (5, 124, 252, 3)
    assert np.abs(back[2, 100, 40].astype(int) - (20, 220, 60)).max() < 8


def test_frames_are_made_a_few_ahead_of_the_encoder_and_never_collected(tmp_path):
    alive, most = 0, 0

    class Picture(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def stream():
        nonlocal alive, most
        for i in range(120):
            alive += 1
            most = max(most, alive)
            yield np.array(stamp(i)).view(Picture)

    media.write_mp4(tmp_path / "a.mp4", stream(), 30)
    assert most <= media.AHEAD + 4


def test_the_thread_that_makes_frames_ends_with_the_writing_also_when_that_fails(tmp_path):
    made, threads = [], threading.active_count()

    def stream():
        for i in range(200):
            made.append(i)
            yield np.zeros((16, 16 if i < 20 else 32, 3), np.uint8)

    with pytest.raises(UserError, match="frame 20"):
        media.write_mp4(tmp_path / "a.mp4", stream(), 30)
    assert threading.active_count() == threads and len(made) <= 22 + media.AHEAD


def test_frames_are_made_while_earlier_ones_are_encoded():
    made = []
    items = media.ahead((made.append(i) or i for i in range(9)), 4)
    assert next(items) == 0
    for _ in range(200):
        if len(made) >= 5:
            break
        time.sleep(0.01)
    assert made == [0, 1, 2, 3, 4]
    assert list(items) == list(range(1, 9))


def test_an_error_in_the_stream_leaves_no_file_and_an_older_one_untouched(tmp_path):
    path = tmp_path / "a.mp4"

    def broken(count):
        yield from dance(count)
        raise RuntimeError("power cut")

    for count in (0, 20):
        with pytest.raises(RuntimeError, match="power cut"):
            media.write_mp4(path, broken(count), 30, tone(1, SR), SR)
        assert os.listdir(tmp_path) == []
    path.write_bytes(b"older")
    with pytest.raises(RuntimeError):
        media.write_mp4(path, broken(20), 30)
    assert os.listdir(tmp_path) == ["a.mp4"] and path.read_bytes() == b"older"


def test_what_cannot_be_written_is_refused_in_one_line_and_leaves_nothing(tmp_path):
    path = tmp_path / "a.mp4"
    assert "use 62x64" in refusal(media.write_mp4, path, dance(3, 64, 63), 30)
    assert "no frames" in refusal(media.write_mp4, path, [], 30)
    assert "frame 1" in refusal(media.write_mp4, path, [dance()[0], dance(1, 32)[0]], 30)
    assert "float32" in refusal(media.write_mp4, path, np.zeros((2, 64, 64, 3), np.float32), 30)
    assert "(samples, 2)" in refusal(media.write_mp4, path, dance(3), 30, np.zeros((9, 3), np.float32), SR)
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(media.write_mp4, tmp_path / "file" / "a.mp4", dance(3), 30)
    assert "folder" in refusal(media.write_mp4, tmp_path, dance(3), 30)
    assert os.listdir(tmp_path) == ["file"]


# --------------------------------------------------------------------------------------------------- pictures in


@pytest.mark.parametrize(
    ("name", "times"),
    {
        "25": np.arange(50) / 25,
        "29.97": np.arange(60) * 1001 / 30000,
        "60": np.arange(90) / 60,
        "variable": np.cumsum(np.random.default_rng(0).choice([1 / 60, 1 / 30, 1 / 24, 0.1], 50)),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_rate_becomes_thirty_by_time_stamps(tmp_path, name, times):
    path, times = tmp_path / "a.mp4", np.round((times - times[0]) * 30000) / 30000
    write_stamps(path, times, Fraction(1, 30000))
    got = numbers(media.read_video(path))
    expected = [int((times <= i / 30 + 1e-5).sum()) - 1 for i in range(len(got))]
    assert got == expected
    assert len(got) / 30 == pytest.approx(times[-1] + 1 / 30, abs=0.05)
    assert numbers(media.read_video(path, start_s=1.1, num_frames=7)) == expected[33:40]


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.ts", "libx264")])
def test_other_containers_keep_every_frame_and_can_be_entered_in_the_middle(tmp_path, name, codec):
    write_stamps(tmp_path / name, np.arange(60) / 30, Fraction(1, 30), codec)
    assert numbers(media.read_video(tmp_path / name)) == list(range(60))
    assert numbers(media.read_video(tmp_path / name, start_s=1.2, num_frames=5)) == [36, 37, 38, 39, 40]


def test_a_file_that_cannot_be_entered_in_the_middle_is_read_from_its_start(tmp_path):
    with av.open(str(tmp_path / "a.ts"), "w") as container:  # too small for MPEG-TS to find a place to enter
        stream = container.add_stream("libx264", rate=30)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(60):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 4 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    grey = media.read_video(tmp_path / "a.ts", start_s=1.2, num_frames=3)[:, 32, 32, 0]
    assert grey == pytest.approx([144, 148, 152], abs=2)


def test_reading_at_another_rate_picks_the_frames_on_screen(tmp_path):
    write_stamps(tmp_path / "a.mp4", np.arange(60) / 30, Fraction(1, 30))
    assert numbers(media.read_video(tmp_path / "a.mp4", fps=10)) == list(range(0, 60, 3))
    assert numbers(media.read_video(tmp_path / "a.mp4", fps=60, num_frames=5)) == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_a_turned_video_is_read_the_way_players_show_it(tmp_path, degrees):
    write_stamps(tmp_path / "a.mp4", [0, 1 / 30], Fraction(1, 30), rotation=degrees)
    (first, second) = media.read_video(tmp_path / "a.mp4")
    upright = np.rot90(stamp(1), degrees // 90)  # counter-clockwise, as FFmpeg's display matrix
    assert np.abs(second.astype(int) - upright).mean() < 12
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert next(container.decode(video=0)).rotation % 360 == degrees % 360


@pytest.mark.parametrize(("matrix", "name"), [(1, "ITU709"), (6, "ITU601")])
def test_colours_follow_the_matrix_the_file_names(tmp_path, matrix, name):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.codec_context.colorspace = "yuv420p", matrix
        image = np.full((64, 64, 3), (20, 220, 60), np.uint8)
        frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p", dst_colorspace=name)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert np.abs(media.read_video(tmp_path / "a.mp4")[0].astype(int) - image).max() < 8


def test_long_videos_are_decoded_only_as_far_as_they_are_asked_for(tmp_path):
    write_stamps(tmp_path / "a.mp4", np.arange(90) / 30, Fraction(1, 30))
    frames, count = media.video_frames(tmp_path / "a.mp4"), 0
    decode = media.rotated
    try:
        media.rotated = lambda frame: decode(frame) if count < 3 else pytest.fail("decoded ahead")
        for count, _ in enumerate(frames):
            if count == 2:
                break
    finally:
        media.rotated = decode


# ------------------------------------------------------------------------------------------------------ sound in


@pytest.mark.parametrize(
    ("format", "codec"),
    [("wav", "pcm_s16le"), ("flac", "flac"), ("mp3", "libmp3lame"), ("ipod", "aac"), ("ogg", "libopus")],
)
def test_the_first_channel_of_any_container_comes_back_in_its_place(tmp_path, format, codec):
    sr_hz = 48000
    left = np.random.default_rng(0).normal(0, 0.15, 2 * sr_hz).astype(np.float32)
    left = np.convolve(left, np.ones(24, np.float32) / 5, mode="same").clip(
        -0.9, 0.9
    )  # low enough to survive 16 kHz and codecs
    encode_audio(tmp_path / "a", format, codec, np.stack([left, tone(2, sr_hz, 3000)], axis=1), sr_hz)
    soundfile.write(tmp_path / "reference.wav", left, sr_hz, subtype="FLOAT")
    reference, back = media.read_audio(tmp_path / "reference.wav"), media.read_audio(tmp_path / "a")
    assert back.dtype == np.float32 and len(reference) == 2 * SR and len(back) >= 1.98 * SR
    corr = [np.corrcoef(reference[800 + lag : 30800 + lag], back[800:30800])[0, 1] for lag in range(-40, 41)]
    assert np.argmax(corr) == 40 and max(corr) > 0.97
    part = media.read_audio(tmp_path / "a", start_s=0.7003, dur_s=0.5)
    assert np.array_equal(part, back[11205:19205])  # not nearly: exactly


def test_ogg_vorbis_is_not_shifted_by_the_late_stamp_ffmpeg_gives_it(tmp_path):
    soundfile.write(tmp_path / "a.ogg", tone(1, 44100), 44100)
    back = media.read_audio(tmp_path / "a.ogg")
    assert len(back) > 0.99 * SR and np.abs(back - tone(1, SR)[: len(back)])[800:-800].max() < 0.03


def test_a_name_that_looks_like_a_protocol_is_still_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", tone(1, SR), SR)
    os.rename("a.wav", "concat:a.wav")
    assert len(media.read_audio("concat:a.wav")) == SR
    media.write_mp4("pipe:1.mp4", dance(3), 30)
    assert len(media.read_video("pipe:1.mp4")) == 3


def test_resampling_keeps_time_and_level(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(2, 44100), 44100, subtype="FLOAT")
    back = media.read_audio(tmp_path / "a.wav")
    assert len(back) == 2 * SR and np.abs(back - tone(2, SR))[200:-200].max() < 1e-3


def test_eight_bit_and_three_channel_wavs_are_read(tmp_path):
    soundfile.write(tmp_path / "u8.wav", tone(1, SR), SR, subtype="PCM_U8")
    soundfile.write(tmp_path / "three.wav", np.stack([tone(1, SR), tone(1, SR, 900), 0 * tone(1, SR)], 1), SR)
    for name in ("u8.wav", "three.wav"):
        assert np.abs(media.read_audio(tmp_path / name) - tone(1, SR)).max() < 0.01


def test_sound_that_starts_late_in_a_video_is_read_in_step_with_the_picture(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("libx264", rate=30), container.add_stream("pcm_s16le", rate=SR)
        video.width = video.height = 64
        video.pix_fmt, audio.layout = "yuv420p", "mono"
        for i in range(30):
            frame = av.VideoFrame.from_ndarray(stamp(i), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 30)
            container.mux(video.encode(frame))
        for begin in (0.04, 0.8):  # and a hole from 0.24 to 0.8
            frame = av.AudioFrame.from_ndarray(np.full((1, 3200), 16000, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SR, round(begin * SR), Fraction(1, SR)
            container.mux(audio.encode(frame))
        container.mux([*video.encode(None), *audio.encode(None)])
    loud = np.abs(media.read_audio(path)) > 0.2
    assert np.flatnonzero(np.diff(loud.astype(int))).tolist() == pytest.approx([639, 3839, 12799], abs=20)
    assert len(loud) == pytest.approx(16000, abs=20)


def test_less_sound_than_asked_for_is_returned_as_it_is(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1, SR), SR)
    assert len(media.read_audio(tmp_path / "a.wav", start_s=0.75, dur_s=2)) == 4000
    assert media.audio_duration(tmp_path / "a.wav") == 1.0


def test_a_cut_off_mp3_is_read_up_to_the_cut(tmp_path):
    encode_audio(tmp_path / "a.mp3", "mp3", "libmp3lame", np.stack([tone(2, 44100)] * 2, 1), 44100)
    whole = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(whole[: len(whole) // 2] + b"TAG" + bytes(125))
    back = media.read_audio(tmp_path / "a.mp3")
    assert 0.9 < len(back) / SR < 1.2 and np.abs(back - tone(2, SR)[: len(back)])[800:12000].max() < 0.05


def test_each_file_that_cannot_be_read_is_refused_in_one_line(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.mp3").write_text("not music\n" * 100)
    soundfile.write(tmp_path / "a.wav", tone(1.5, SR), SR)
    media.write_mp4(tmp_path / "mute.mp4", dance(30), 30)
    for read in (media.read_audio, media.read_video, media.video_info):
        assert "no such file" in refusal(read, tmp_path / "none.wav")
        assert "empty" in refusal(read, tmp_path / "empty.wav")
        assert "folder" in refusal(read, tmp_path)
        assert "text.mp3" in refusal(read, tmp_path / "text.mp3")
        assert "no such file" in refusal(read, "http://localhost/a.mp4")
    for read in (media.read_audio, media.audio_duration):
        assert "has no sound" in refusal(read, tmp_path / "mute.mp4")
    for read in (media.read_video, media.video_info):
        assert "has no pictures" in refusal(read, tmp_path / "a.wav")
    assert "lasts 1.50 s" in refusal(media.read_audio, tmp_path / "a.wav", start_s=1.5)
    assert "lasts 1.00 s" in refusal(media.read_video, tmp_path / "mute.mp4", start_s=3)


# ---------------------------------------------------------------------------------------------------- filmstrips


def picture(path):
    return media.read_video(path)[0]


def test_filmstrip_shows_each_frame_at_its_own_time(tmp_path):
    frames = np.zeros((48, 32, 32, 3), np.uint8)
    frames[24:] = (0, 0, 255)  # the second half of the clip is blue
    drawing.filmstrip(tmp_path / "a.png", frames, tone(1.6, SR), SR, 30, [0.4], np.arange(48.0), "title")
    image = picture(tmp_path / "a.png").astype(int)
    blue = np.flatnonzero(((image[..., 2] > 200) & (image[..., :2].max(axis=-1) < 60)).any(axis=0))
    left, right = drawing.MARGIN * drawing.DPI, (drawing.MARGIN + drawing.STRIP_W) * drawing.DPI
    assert blue.min() == pytest.approx((left + right) / 2, abs=10) and blue.max() == pytest.approx(right, abs=10)
    orange = np.abs(image - (0xE4, 0x57, 0x2E)).max(axis=-1) < 8
    column = orange.sum(axis=0).argmax()  # the beat's line
    assert column == pytest.approx(left + 0.25 * (right - left), abs=2)
    assert os.listdir(tmp_path) == ["a.png"]


def test_filmstrip_takes_one_frame_stereo_sound_and_no_beats(tmp_path):
    drawing.filmstrip(tmp_path / "a.png", dance(1, 32, 64), np.zeros((SR, 2), np.float32), SR)
    assert picture(tmp_path / "a.png").shape[1] == (drawing.STRIP_W + 2 * drawing.MARGIN) * drawing.DPI


def test_sheet_is_one_row_a_clip(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    drawing.sheet(tmp_path / "a.png", [(np.full((20, 16, 16, 3), c, np.uint8), f"clip {c}") for c in colours])
    image = picture(tmp_path / "a.png")
    rows = [np.flatnonzero((image == c).all(axis=-1).mean(axis=1) > 0.8) for c in colours]
    assert all(len(row) > 50 for row in rows)
    assert rows[0].max() < rows[1].min() and rows[1].max() < rows[2].min()
