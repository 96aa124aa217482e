"""What will the model see? A few clips of a folder on one PNG, before hours are spent on encoding or training.

Concept   the clips pass through the very function the encoder reads them with; frames, sound, the beats found in it
          and one of the prompts are drawn one above the other.
Paper     none: a look at the data of arXiv 2503.14505v2, Sec. 5.1.
"""

import textwrap
from pathlib import Path

import numpy as np

import audio
import beats
import drawing
import media
from config import UserError
from data_clips import FPS, Cut, DataConfig, cut_videos, frame_size, read_clip

CLIPS = 6
ACROSS = 12  # frames of a clip
LABEL, WAVE, GAP = 0.65, 0.6, 0.1  # inches


def draw_clips(cfg: DataConfig) -> Path:
    """Draw up to CLIPS clips, AIST and in the wild in turn, each kind from first to last; returns the PNG's path.

    raises   UserError if no video can be used
    """
    from matplotlib.figure import Figure

    size = cfg.frames, *frame_size(cfg)
    paths, cuts, skipped = cut_videos(cfg, size)
    rows = []
    for cut in spread(cuts):
        try:
            rows.append((cut, *read_clip(cut.source, cut.start, *size)))
        except UserError as error:
            skipped.append((cut.source.path, str(error)))
    for path, why in skipped[:CLIPS]:
        print(f"left out: {path.name.encode(errors='replace').decode()}: {why}")
    if not rows:
        raise UserError(f"{cfg.data}: none of its {len(paths)} videos can be used; the first reason: {skipped[0][1]}")
    picture_h = 0.96 * drawing.STRIP_W / ACROSS * size[1] / size[2]
    each = LABEL + picture_h + WAVE + GAP
    width, height = drawing.STRIP_W + 2 * drawing.MARGIN, len(rows) * each + GAP
    figure, y, dur_s = Figure(figsize=(width, height), dpi=drawing.DPI / 2, facecolor="white"), height, cfg.frames / FPS
    for cut, video, sound in rows:
        y -= LABEL
        figure.text(
            drawing.MARGIN / width, (y + 0.07) / height, label(cut), fontsize=10, color=drawing.INK, va="bottom"
        )
        pictures, wave = add_strip(figure, y, picture_h), add_strip(figure, y - picture_h, WAVE)
        frames = ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy()  # (F, H, W, 3)
        times = (np.arange(ACROSS) + 0.5) * dur_s / ACROSS
        drawing.draw_row(pictures, frames, times, FPS, dur_s / ACROSS)
        drawing.draw_sound(wave, sound.numpy(), audio.SR_HZ, dur_s)
        bpm = cut.source.aist.bpm if cut.source.aist else None
        for beat in beats.music_beats(sound.numpy(), audio.SR_HZ, bpm)[1]:
            wave.axvline(beat, color=drawing.BEAT, linewidth=1.3)
        for axis in (pictures, wave):
            axis.set_xlim(0, dur_s)
            axis.set_axis_off()
        y -= picture_h + WAVE + GAP
    out = (cfg.cache or cfg.data / ".encoded") / "look.png"
    with media.new_file(out) as temporary:
        figure.savefig(temporary, format="png")
    return out


def add_strip(figure, top: float, inches: float):
    """An axis as wide as the strip, its top so many inches above the figure's bottom."""
    width, height = figure.get_size_inches()
    return figure.add_axes((drawing.MARGIN / width, (top - inches) / height, drawing.STRIP_W / width, inches / height))


def spread(cuts: list[Cut]) -> list[Cut]:
    """At most CLIPS of the clips: both kinds alike where both are there, evenly over each kind."""
    kinds = [k for k in ([c for c in cuts if c.source.aist], [c for c in cuts if not c.source.aist]) if k]
    chosen = []
    for kind in kinds:
        count = min(len(kind), CLIPS // len(kinds))
        chosen += [kind[i * len(kind) // count] for i in range(count)]
    return chosen


def label(cut: Cut) -> str:
    """File, second, tempo and the first prompt, in at most three lines."""
    tempo = f", {cut.source.aist.bpm} bpm by its name" if cut.source.aist else ""
    title = f"{cut.source.path.name.encode(errors='replace').decode()} from {cut.start / FPS:.2f} s{tempo}"
    prompt = textwrap.shorten(cut.source.prompts()[0], 300, placeholder=" ...")
    return "\n".join([title, *textwrap.wrap(prompt, 165)]).replace("$", r"\$")
