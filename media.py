"""Files in and out: decode sound and pictures, write mp4 with sound.

Concept   every file goes through PyAV (FFmpeg's libraries), placed in time by its own time stamps, so that a sound
          and the picture that belongs to it stay together whatever the container, codec or frame rate.
Paper     arXiv 2503.14505v2, Sec. 5.1 (30 fps clips with 16 kHz sound).
Differs   the official code samples frames by index and so lets pictures at 29.97 or 60 fps drift off the music;
          here the frame shown at second t is found by time stamps.

Time      seconds from the start of the file: the first time stamp of its earliest stream (never the priming samples of
          AAC, MP3 or Opus, which FFmpeg drops).
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from config import UserError

GAP_S = 0.05  # time stamps of Matroska and MPEG-TS jitter by milliseconds: only a larger jump is a hole in the sound
MAX_GAP_S = 60  # a longer jump is a broken time stamp
CRF = 16  # x264 quality: hardly visible loss, also for 64x64 pixels
AHEAD = 12  # frames that may be made before they are encoded
AAC_RATES = (16000, 22050, 24000, 32000, 44100, 48000)


class VideoInfo(NamedTuple):
    """What the header says: seconds, pixels as shown (after rotation), mean frames a second, whether there is sound."""

    dur_s: float
    width: int
    height: int
    fps: float
    has_audio: bool


@contextmanager
def open_media(path) -> Iterator:
    """Open a file for reading; what is missing, empty or no media is a UserError of one line."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected one audio or video file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty (0 bytes); expected audio or video")
    try:
        # "file:" keeps a name such as "http:x" or "concat:x" from being read as a protocol
        container = av.open(f"file:{path}", metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as audio or video ({error_text(error)})") from error
    with container:
        yield container


def error_text(error: Exception) -> str:
    """FFmpeg's own words without the file name and number."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def real_video(container):
    """The first video stream that is not a cover picture, or None."""
    covers = av.stream.Disposition.attached_pic
    return next((s for s in container.streams.video if not s.disposition & covers), None)


def origin_s(container) -> Fraction:
    """Time stamp of second 0: that of the earliest stream. Below zero there is only priming, which is never decoded."""
    streams = [s for s in (real_video(container), *container.streams.audio[:1]) if s is not None]
    starts = [s.start_time * s.time_base for s in streams if s.start_time is not None]
    return max(min(starts, default=Fraction(0)), Fraction(0))


def decoded(container, stream) -> Iterator:
    """Frames of one stream in order of display. Broken packets (a cut download, tags after an MP3) are passed over."""
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            continue
        yield from (frame for frame in frames if frame.pts is not None)


# ---------------------------------------------------------------------------------------------------- sound in


def read_audio(path, sr_hz: int = 16000, start_s: float = 0.0, dur_s: float | None = None) -> np.ndarray:
    """First channel of a file's sound (no down-mix, as the official code), resampled: float32 (S,) in [-1, 1].

    Sample i of the result is the sound at second (round(start_s * sr_hz) + i) / sr_hz of the file: reading a part
    gives the same numbers as reading the whole and cutting. Holes between time stamps are silent.

    start_s  seconds to skip, >= 0
    dur_s    seconds wanted; None is all there is. Fewer come back where the file ends earlier
    raises   UserError if missing, empty, no media, without sound, or over before start_s
    """
    begin = round(start_s * sr_hz)
    end = None if dur_s is None else begin + round(dur_s * sr_hz)
    pieces, done = [], 0  # done: samples that came out of the resampler, counted from second 0 of the file
    with open_media(path) as container:
        if not container.streams.audio:
            raise UserError(f"{path}: has no sound; expected a file with an audio track")
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=sr_hz)
        for frame in chain(first_channel(container), [None]):  # None: flush
            for piece in resampler.resample(frame):
                lo, hi = max(begin - done, 0), piece.samples if end is None else min(end - done, piece.samples)
                if lo < hi:
                    pieces.append(piece.to_ndarray()[0, lo:hi])
                done += piece.samples
            if end is not None and done >= end:
                break
    if done == 0:
        raise UserError(f"{path}: its sound cannot be decoded; expected a readable audio track")
    if not pieces:
        raise UserError(f"{path}: lasts {done / sr_hz:.2f} s, so nothing is left after a start at {start_s:g} s")
    return np.concatenate(pieces)


def first_channel(container) -> Iterator[av.AudioFrame]:
    """The first audio stream's first channel as mono float frames without holes, from second 0 on."""
    to_float = av.AudioResampler(format="fltp")
    origin, count = origin_s(container), 0  # count: samples given out
    # sound alone starts with its first sample, whatever its stamp: FFmpeg stamps Ogg Vorbis 128 samples late
    smallest_s = 0 if real_video(container) else GAP_S
    for source in decoded(container, container.streams.audio[0]):
        start = source.pts * source.time_base - origin
        for frame in to_float.resample(source):
            wave = frame.to_ndarray()[:1]  # (1, S)
            hole = round(start * frame.sample_rate) - count
            if smallest_s * frame.sample_rate < hole < MAX_GAP_S * frame.sample_rate:
                wave = np.concatenate([np.zeros((1, hole), np.float32), wave], axis=1)
            smallest_s = GAP_S
            mono = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave), format="fltp", layout="mono")
            mono.sample_rate, mono.pts, mono.time_base = frame.sample_rate, count, Fraction(1, frame.sample_rate)
            count += mono.samples
            yield mono


def audio_duration(path) -> float:
    """Seconds of sound as the header tells; decoded and counted where the header is silent. Errors as read_audio."""
    with open_media(path) as container:
        if not container.streams.audio:
            raise UserError(f"{path}: has no sound; expected a file with an audio track")
        stream = container.streams.audio[0]
        if stream.duration:
            return float(stream.duration * stream.time_base)
    return len(read_audio(path, sr_hz=16000)) / 16000


# -------------------------------------------------------------------------------------------------- pictures in


def video_info(path) -> VideoInfo:
    """Duration, size as shown, mean frame rate and presence of sound, from the header. UserError without pictures."""
    with open_media(path) as container:
        stream = video_stream(container, path)
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        if stream.duration:
            dur_s = float(stream.duration * stream.time_base)
        else:
            dur_s = (container.duration or 0) / av.time_base
        first = next(decoded(container, stream), None)
        if first is None:
            raise UserError(f"{path}: its pictures cannot be decoded; expected a readable video")
        height, width = rotated(first).shape[:2]
        return VideoInfo(dur_s, width, height, fps, bool(container.streams.audio))


def video_stream(container, path):
    """The first moving picture of a file, set up to decode on all cores, or a UserError."""
    stream = real_video(container)
    if stream is None:
        raise UserError(f"{path}: has no pictures; expected a video")
    stream.thread_type = "AUTO"
    return stream


def rotated(frame: av.VideoFrame) -> np.ndarray:
    """One decoded frame the way a player shows it: RGB uint8 (H, W, 3)."""
    image = frame.to_ndarray(format="rgb24")  # (H, W, 3)
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))


def video_frames(path, fps: float = 30.0, start_s: float = 0.0) -> Iterator[np.ndarray]:
    """Yield frames (H, W, 3) uint8 at exactly `fps`, one source frame in memory at a time.

    Frame i is the picture on screen at second start_s + i / fps: the last one whose time stamp is not later (within
    half a tick of the stream's clock, for stamps are rounded). The first picture also covers any time before it, the
    last one its own duration.

    raises   UserError if missing, empty, no video, or over before start_s
    """
    step = 1 / Fraction(fps).limit_denominator(1001)
    start = Fraction(start_s).limit_denominator(1_000_000)
    i, shown, leaves = 0, None, start  # shown: the frame on screen, leaves: the second at which it goes
    for frame, comes, goes in timed_frames(path, start):
        if shown is not None and start + i * step < comes:
            image = rotated(shown)
            while start + i * step < comes:
                yield image
                i += 1
        shown, leaves = frame, goes
    image = rotated(shown)
    while start + i * step < leaves:
        yield image
        i += 1
    if i == 0:
        raise UserError(f"{path}: lasts {float(leaves):.2f} s, so nothing is left after a start at {start_s:g} s")


def timed_frames(path, start: Fraction) -> Iterator[tuple[av.VideoFrame, Fraction, Fraction]]:
    """Yield (frame, second it comes, second it goes), the first at or before `start` or else the file's first."""
    for seek in (True, False) if start > 1 else (False,):
        with open_media(path) as container:
            stream = video_stream(container, path)
            origin, tick = origin_s(container) + stream.time_base / 2, stream.time_base
            if seek:
                container.seek(int((origin + start - 1) / tick), stream=stream)
            frames = decoded(container, stream)
            first = next(frames, None)
            if seek and (first is None or first.pts * tick - origin > start):
                continue  # some formats land late or nowhere: read from the beginning
            if first is None:
                raise UserError(f"{path}: its pictures cannot be decoded; expected a readable video")
            for frame in chain([first], frames):
                comes = frame.pts * tick - origin
                yield frame, comes, comes + (frame.duration * tick or 1 / (stream.average_rate or Fraction(30)))
            return


def read_video(path, fps: float = 30.0, start_s: float = 0.0, num_frames: int | None = None) -> np.ndarray:
    """The frames of `video_frames` as one array (F, H, W, 3) uint8; F <= num_frames where the file ends earlier."""
    return np.stack(list(islice(video_frames(path, fps, start_s), num_frames)))


# ------------------------------------------------------------------------------------------------ pictures out


@contextmanager
def new_file(path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it at the end or removed on any error. Makes the folder if needed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError("is a folder; expected a file name")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error_text(error)})") from error
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_mp4(path, frames: Iterable, fps: float, waveform=None, sr_hz: int | None = None, scale: int = 1) -> None:
    """Write a stream of frames, and sound under it, as an mp4 every browser plays (H.264 yuv420p, AAC).

    frames    any iterable of (H, W, 3) uint8; taken in a thread of its own, AHEAD of the encoder, never collected
    waveform  float (S,) or (S, 2) in [-1, 1] at sr_hz, starting with the first frame; cut or padded with silence to
              the length of the picture
    scale     whole-number bicubic enlargement: 8 makes a 64x64 clip 512x512
    raises    UserError for odd sizes, frames of other shapes, no frame at all, or an output that cannot be written.
              Whatever is raised, here or by the iterable, nothing is left behind and an older file stays as it was
    """
    with new_file(path) as temporary:
        try:
            with av.open(f"file:{temporary}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
                encode(
                    container, path, ahead(frames, AHEAD), Fraction(fps).limit_denominator(1001), waveform, sr_hz, scale
                )
        except av.FFmpegError as error:
            raise UserError(f"{path}: cannot be written ({error_text(error)})") from error


def ahead(items: Iterable, count: int) -> Iterator:
    """The items, of which a thread makes up to `count` before they are asked for; what it raises is raised here."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        pending = deque(pool.submit(next, iterator, end) for _ in range(count))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(pool.submit(next, iterator, end))
                yield item
        finally:
            pool.shutdown(cancel_futures=True)


def encode(container, path, frames, rate: Fraction, waveform, sr_hz, scale: int) -> None:
    """Fill an open mp4: each frame, then the sound up to that frame's end, so that neither waits for the other."""
    video = audio = shape = None
    heard = 0  # samples of the waveform written so far
    for i, image in enumerate(frames):
        image = np.ascontiguousarray(image)
        if video is None:
            shape = image.shape
            video = add_video(container, path, image, rate, scale)
            audio = None if waveform is None else add_audio(container, waveform, sr_hz)
        if image.shape != shape or image.dtype != np.uint8:
            raise UserError(f"{path}: frame {i} is {image.dtype} {image.shape}; expected uint8 {shape} like the first")
        picture = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
            video.width, video.height, "yuv420p", dst_colorspace="ITU601", interpolation="BICUBIC"
        )
        picture.pts, picture.time_base = i, 1 / rate
        container.mux(video.encode(picture))
        if audio is not None:
            until = round((i + 1) / rate * sr_hz)
            container.mux(audio.encode(sound_frame(waveform, heard, until, sr_hz)))
            heard = until
    if video is None:
        raise UserError(f"{path}: no frames to write; expected at least one")
    for stream in (video, audio):
        if stream is not None:
            container.mux(stream.encode(None))


def add_video(container, path, image: np.ndarray, rate: Fraction, scale: int):
    """A H.264 stream of the first frame's size times scale."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UserError(f"{path}: frame 0 is {image.dtype} {image.shape}; expected uint8 (height, width, 3)")
    height, width = image.shape[0] * scale, image.shape[1] * scale
    if height % 2 or width % 2:
        raise UserError(f"{path}: {width}x{height} pixels; H.264 needs even sizes, use {width & ~1}x{height & ~1}")
    options = {"crf": str(CRF), "preset": "medium", "mbtree": "0"}  # with mbtree the bytes varied with what memory held
    video = container.add_stream("libx264", rate=rate, options=options)
    video.width, video.height, video.pix_fmt = width, height, "yuv420p"
    context = video.codec_context
    context.thread_count = 1  # the bytes must not depend on the number of cores
    context.color_range, context.colorspace = 1, 6  # limited range, BT.601: tagged, so that no player has to guess
    context.color_primaries = context.color_trc = 6
    return video


def add_audio(container, waveform: np.ndarray, sr_hz: int):
    """An AAC stream, mono or stereo; FFmpeg resamples inside where AAC does not know the rate."""
    if waveform.ndim not in (1, 2) or (waveform.ndim == 2 and waveform.shape[1] != 2):
        raise UserError(f"the sound has shape {waveform.shape}; expected (samples,) or (samples, 2)")
    rate = sr_hz if sr_hz in AAC_RATES else 48000
    audio = container.add_stream("aac", rate=rate, layout="mono" if waveform.ndim == 1 else "stereo")
    audio.bit_rate = min(192_000, 4 * rate * waveform.ndim)
    return audio


def sound_frame(waveform: np.ndarray, begin: int, end: int, sr_hz: int) -> av.AudioFrame:
    """Samples begin to end of the waveform, silence where it is over."""
    part = np.clip(waveform[begin:end], -1, 1).astype(np.float32)
    part = np.pad(part, [(0, end - begin - len(part))] + [(0, 0)] * (part.ndim - 1))  # (S,) or (S, 2)
    planes = np.ascontiguousarray(np.atleast_2d(part.T))  # (1, S) or (2, S)
    frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout="mono" if len(planes) == 1 else "stereo")
    frame.sample_rate, frame.pts, frame.time_base = sr_hz, begin, Fraction(1, sr_hz)
    return frame
