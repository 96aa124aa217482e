"""Pictures of clips: filmstrips above their sound, beats and motion; sheets of several clips.

Paper     arXiv 2503.14505v2, the filmstrips of Fig. 1, 6 and 7.
"""

import textwrap

import numpy as np

from media import new_file

INK, SOUND, BEAT, MOTION = "#222222", "#8fa8c8", "#e4572e", "#2a7f62"
STRIP_W, MARGIN, DPI = 13.0, 0.75, 160  # inches, inches, dots an inch


def filmstrip(path, frames, waveform, sr_hz: int, fps: float = 30.0, beats_s=(), motion=None, title: str = "") -> None:
    """Draw a clip as a PNG: frames at their true time, under them the sound with its beats and a curve of motion.

    frames    (F, H, W, 3) uint8        waveform  float (S,) or (S, 2) at sr_hz        beats_s  seconds
    motion    (F,) any unit, one value a frame, or None
    """
    from matplotlib.figure import Figure

    frames, dur_s = np.asarray(frames), len(frames) / fps
    count = min(12, len(frames))
    cell = STRIP_W / count  # inches
    heights = [0.96 * cell * frames.shape[1] / frames.shape[2], 0.95] + ([0.75] if motion is not None else [])
    lines = textwrap.wrap(title, 115)
    gap, top, bottom = 0.12, 0.15 + 0.3 * len(lines), 0.5
    size = (STRIP_W + 2 * MARGIN, sum(heights) + gap * (len(heights) - 1) + top + bottom)
    figure, y, axes = Figure(figsize=size, dpi=DPI, facecolor="white"), size[1] - top, []
    for height in heights:
        y -= height
        axes.append(figure.add_axes((MARGIN / size[0], y / size[1], STRIP_W / size[0], height / size[1])))
        axes[-1].set(xlim=(0, dur_s), yticks=[])
        axes[-1].spines[:].set_visible(False)
        axes[-1].tick_params(bottom=False, labelbottom=False)
        y -= gap
    for i, line in enumerate(lines):
        figure.text(MARGIN / size[0], 1 - (0.3 + 0.27 * i) / size[1], line, fontsize=13, color=INK, va="baseline")

    draw_row(axes[0], frames, np.linspace(0, dur_s, count, endpoint=False) + dur_s / count / 2, fps, dur_s / count)

    draw_sound(axes[1], waveform, sr_hz, dur_s)
    axes[1].set_ylabel("music", color=INK, fontsize=11)

    if motion is not None:
        axes[2].plot(np.arange(len(motion)) / fps, motion, color=MOTION, linewidth=1.8)
        axes[2].margins(y=0.12)
        axes[2].set_ylabel("motion", color=INK, fontsize=11)
    for beat in beats_s:  # one line from the sound's top through everything below it
        top = (sum(heights[1:]) + gap * (len(heights) - 2)) / heights[-1]
        axes[-1].axvline(beat, ymax=top, clip_on=False, color=BEAT, linewidth=1.3)
        axes[-1].plot(beat, top, "v", transform=axes[-1].get_xaxis_transform(), clip_on=False, color=BEAT, markersize=7)
    axes[-1].tick_params(bottom=True, labelbottom=True, labelsize=10, color=INK, labelcolor=INK)
    axes[-1].set_xlabel("seconds", color=INK, fontsize=11)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_row(axis, frames, times, fps: float, width: float) -> None:
    """Draw the frames on screen at `times` (s), each centred on its own time and 96 % of `width` (s) wide."""
    for time in times:
        image = frames[min(int(time * fps), len(frames) - 1)]
        extent = (time - 0.48 * width, time + 0.48 * width, 0, 1)
        axis.imshow(image, extent=extent, aspect="auto", interpolation="bicubic")
    axis.set(xlim=(times[0] - width / 2, times[-1] + width / 2), ylim=(0, 1))


def draw_sound(axis, waveform, sr_hz: int, dur_s: float) -> None:
    """Draw the envelope of the first channel of a waveform (S,) or (S, 2), as high as the axis."""
    wave = np.asarray(waveform, np.float32).reshape(len(waveform), -1)[: round(dur_s * sr_hz), 0]
    bins = np.array_split(wave, min(1200, len(wave)))
    low, high = np.array([[piece.min(), piece.max()] for piece in bins]).T
    axis.fill_between(np.linspace(0, len(wave) / sr_hz, len(bins)), low, high, color=SOUND, linewidth=0.4)
    loudest = max(float(np.abs(wave).max()), 1e-3) * 1.1
    axis.set_ylim(-loudest, loudest)


def sheet(path, clips) -> None:
    """Draw several clips one above the other as a PNG: clips is a list of (frames (F, H, W, 3) uint8, caption)."""
    from matplotlib.figure import Figure

    label = 0.32
    count = min(12, *(len(frames) for frames, _ in clips))
    heights = [0.96 * STRIP_W / count * frames.shape[1] / frames.shape[2] for frames, _ in clips]
    size = (STRIP_W + 2 * 0.2, sum(heights) + len(clips) * label + 0.2)
    figure, y = Figure(figsize=size, dpi=DPI, facecolor="white"), size[1]
    for (frames, caption), height in zip(clips, heights):
        y -= label + height
        figure.text(0.24 / size[0], (y + height + 0.09) / size[1], caption, fontsize=11, color=INK, va="baseline")
        axis = figure.add_axes((0.2 / size[0], y / size[1], STRIP_W / size[0], height / size[1]))
        draw_row(axis, frames, (np.arange(count) + 0.5) * len(frames) / count, 1.0, len(frames) / count)
        axis.set_axis_off()
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png")
