"""The figures of the README: what the dancer does to its music, drawn from fresh samples by one command.

Concept   every video is sampled here and now, from prompts, tracks and noise that --seed fixes; nothing is picked by
          hand. Below the frames runs the height of the body as it is read from the pixels, over it the beats.
Paper     arXiv 2503.14505v2: Fig. 1 (frames over music), Fig. 7 (speed), Fig. 8 (diversity), Table 1 as a chart.

Files     filmstrip, shuffled, speed, forms (with --published), diversity .webp; dance.webp moves; claims.webp (with
          --claims). WebP, because a browser shows it and six of them take less than two PNGs.
"""

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

import drawing
import media
import toy
import toy_read
from claims_score import FPS, Row
from claims_studio import FRAMES, ClaimsConfig, Dancer, Studio, find_dancers, music_of, prompt_of, solo_clips
from config import UserError, flag, from_cli, run

COUNT = 10  # frames in a row of a figure
QUALITY = 82  # of WebP
SOUND_HZ = 16_000
SHOWN = {  # claim -> the measures of its rows that the chart shows
    "listens": ("BAS", "PLV"), "unheard": ("BAS", "PLV"), "unseen": ("BAS", "PLV", "shirt", "trousers", "figure"),
    "groups": ("BAS", "PLV", "dancers"), "table1": ("BAS", "PLV"), "table4": ("BAS", "PLV"),
    "prompt": ("shirt", "trousers", "setting", "dancers", "view", "figure"),
}  # fmt: skip


@dataclass(frozen=True)
class FiguresConfig:
    """Draw the README's figures: samples over their music, and the measured claims as a chart."""

    weights: Path = flag(Path("weights/baby"), help="folder of the weights")
    adapter: str = flag("musicinfuser.safetensors", help="the adapter that dances, in --weights or a path")
    published: str | None = flag(None, help="an adapter of the published form, to be drawn beside it")
    claims: Path | None = flag(None, help="folder that claims.py wrote, for the chart")
    out: Path = flag(Path("docs"), help="folder for the figures")
    seed: int = flag(0, help="of the tracks, prompts and noise")
    steps: int | None = flag(None, help="sampling steps (default: what the weights were made for)")
    cfg: float | None = flag(None, help="guidance scale (default: what the weights were made for)")
    device: str | None = flag(None, help="cpu, cuda, cuda:N or mps (default: cuda if there is one)")
    dtype: str | None = flag(None, help="float32 or bfloat16 (default: bfloat16 on cuda, float32 on cpu)")


class Strip(NamedTuple):
    """One row of a figure: a video, and the beats of what it is set against."""

    label: str
    frames: np.ndarray  # (F, H, W, 3) uint8
    beats_s: np.ndarray


# ------------------------------------------------------------------------------------------------------- drawing


def save(figure, path: Path) -> None:
    """Write a matplotlib figure as WebP."""
    with media.new_file(path) as temporary:
        figure.savefig(temporary, format="webp", pil_kwargs={"quality": QUALITY, "method": 6})
    print(f"wrote {path}")


def as_webp(draw, path: Path) -> None:
    """Let `draw(png)` write a PNG, and keep it as WebP."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / "figure.png")
        with Image.open(Path(folder) / "figure.png") as image, media.new_file(path) as temporary:
            image.convert("RGB").save(temporary, "webp", quality=QUALITY, method=6)
    print(f"wrote {path}")


def strips(path: Path, rows: list[Strip], title: str) -> None:
    """Rows of frames at their true time, each over the height of its body with the beats as lines."""
    from matplotlib.figure import Figure

    wide, margin, dpi = 12.0, 0.15, 110
    cell = wide / COUNT
    frames_high, curve_high, label_high, gap = 0.96 * cell, 0.7, 0.28, 0.22
    high = 0.5 + len(rows) * (frames_high + curve_high + label_high + gap) + 0.3
    figure, y = Figure(figsize=(wide + 2 * margin, high), dpi=dpi, facecolor="white"), high - 0.32
    figure.text(margin / (wide + 2 * margin), y / high, title, fontsize=12, color=drawing.INK)

    def axis(height: float):
        return figure.add_axes(
            (margin / (wide + 2 * margin), y / high, wide / (wide + 2 * margin), height / high), frameon=False
        )

    for number, row in enumerate(rows):
        dur_s = len(row.frames) / FPS
        y -= label_high
        figure.text(margin / (wide + 2 * margin), (y + 0.03) / high, row.label, fontsize=10.5, color=drawing.INK)
        y -= frames_high
        pictures = axis(frames_high)
        drawing.draw_row(pictures, row.frames, (np.arange(COUNT) + 0.5) * dur_s / COUNT, FPS, dur_s / COUNT)
        pictures.set_axis_off()
        y -= curve_high
        below = axis(curve_high)
        curve = toy_read.body_curve(row.frames)
        below.plot(np.arange(len(curve)) / FPS, curve, color=drawing.MOTION, linewidth=1.8)
        inside = row.beats_s[(row.beats_s >= 0) & (row.beats_s < dur_s)]
        for beat in inside:
            below.axvline(beat, color=drawing.BEAT, linewidth=1.3)
        below.set(xlim=(0, dur_s), yticks=[])
        below.margins(y=0.15)
        below.tick_params(labelbottom=number == len(rows) - 1, labelsize=9, color=drawing.INK, labelcolor=drawing.INK)
        y -= gap
    save(figure, path)


def moving(path: Path, videos: list[np.ndarray], beats: list[np.ndarray], scale: int) -> None:
    """An animated WebP of videos side by side; under each a bar that lights up on the beats of its music."""
    from PIL import Image

    side, pictures = scale * videos[0].shape[2], []
    for i in range(len(videos[0])):
        columns = []
        for frames, times in zip(videos, beats):
            picture = np.asarray(Image.fromarray(frames[i]).resize((side, side), Image.Resampling.BICUBIC))
            glow = np.exp(-(i / FPS - times[times <= i / FPS + 1e-9].max(initial=-9.0)) / 0.12)  # 1 on the beat
            bar = np.full((3 * scale, side, 3), 255.0)
            bar[:, scale:-scale] = glow * np.array([228, 87, 46]) + (1 - glow) * 224
            columns.append(np.concatenate([picture, bar.astype(np.uint8)]))
        pictures.append(Image.fromarray(np.concatenate(columns, 1)))
    with media.new_file(path) as temporary:
        pictures[0].save(
            temporary, "webp", save_all=True, append_images=pictures[1:], duration=round(1000 / FPS), loop=0,
            quality=60, method=6,
        )  # fmt: skip
    print(f"wrote {path}")


def chart(path: Path, folder: Path) -> None:
    """The shares and alignments that claims.py measured: value with its interval, chance and ceiling."""
    from matplotlib.figure import Figure

    found = []
    for claim, measures in SHOWN.items():
        file = folder / f"{claim}.json"
        if file.exists():
            rows = [Row(**row) for row in json.loads(file.read_text())["rows"]]
            found += [(claim, [row for row in rows if row.measure in measures and row.chance is not None])]
    found = [(claim, rows) for claim, rows in found if rows]
    if not found:
        raise UserError(f"{folder}: none of {', '.join(f'{claim}.json' for claim in SHOWN)}; run claims.py first")
    count = sum(len(rows) + 1.4 for _, rows in found)
    figure = Figure(figsize=(10, 0.2 * count + 0.9), dpi=110, facecolor="white")
    axis, at, ticks = figure.add_axes((0.46, 0.55 / (0.2 * count + 0.9), 0.52, 1 - 0.9 / (0.2 * count + 0.9))), 0.0, []
    for claim, rows in found:
        ticks.append((at, f"{claim}", True))
        at += 1
        for row in rows:
            ticks.append((at, f"{row.what}: {row.measure}", False))
            if row.interval is not None:
                axis.plot(row.interval, (at, at), color=drawing.MOTION, linewidth=3, alpha=0.45, solid_capstyle="butt")
            axis.plot(row.value, at, "o", color=drawing.MOTION, markersize=5)
            axis.plot(row.chance, at, "|", color=drawing.BEAT, markersize=10, markeredgewidth=2)
            if row.ceiling is not None:
                axis.plot(row.ceiling, at, "|", color=drawing.INK, markersize=10, markeredgewidth=2)
            at += 1
        at += 0.4
    axis.set(xlim=(-0.02, 1.02), ylim=(at, -0.8))
    axis.set_yticks([t for t, _, _ in ticks], [name for _, name, _ in ticks], fontsize=8)
    for label, (_, _, heading) in zip(axis.get_yticklabels(), ticks):
        label.set_fontweight("bold" if heading else "normal")
    axis.tick_params(length=0, colors=drawing.INK)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.set_xlabel("dot: measured, bar: 95 % interval, red: chance, black: ceiling", fontsize=9, color=drawing.INK)
    save(figure, path)


# ------------------------------------------------------------------------------------------------------ the command


def dancer_of(cfg: FiguresConfig, name: str) -> Dancer:
    return find_dancers(ClaimsConfig(weights=cfg.weights, adapters=name))[0]


def sampled(cfg: FiguresConfig, studio: Studio) -> None:
    """All figures that show samples."""
    dancer, clips = dancer_of(cfg, cfg.adapter), solo_clips(studio.cfg, 4, bpm=(100, 115))
    clip, other = clips[0], replace(clips[1], bpm=clips[0].bpm * 1.17)  # another tempo, so that it cannot fit by chance
    asked, wave = prompt_of(clip), music_of([clip])

    def beats(clip: toy.Clip) -> np.ndarray:
        return toy.beat_times(clip, FRAMES / FPS)

    (own,) = studio.dance(dancer, [asked], wave)
    as_webp(
        lambda png: drawing.filmstrip(
            png, own, wave[0], SOUND_HZ, FPS, beats(clip), toy_read.body_curve(own), title=f"{asked} ({dancer.label})"
        ),
        cfg.out / "filmstrip.webp",
    )
    (danced,) = studio.dance(dancer, [asked], music_of([other]))
    strips(
        cfg.out / "shuffled.webp",
        [
            Strip(f"its own music, {clip.bpm:.0f} beats a minute, and its beats", own, beats(clip)),
            Strip("the same video against the beats of other music", own, beats(other)),
            Strip(f"the same noise danced to that other music, {other.bpm:.0f} beats a minute", danced, beats(other)),
        ],
        "One prompt, one noise, two pieces of music (green: height of the body, red: beats)",
    )
    rows = []
    for factor in (0.75, 1.0, 1.25):
        faster = replace(clip, bpm=clip.bpm * factor, start_s=clip.start_s / factor)
        (video,) = studio.dance(dancer, [asked], music_of([clip], speed=factor))
        rows.append(Strip(f"music x{factor:g}: {faster.bpm:.0f} beats a minute", video, beats(faster)))
    strips(cfg.out / "speed.webp", rows, "Speed of the music (Fig. 7)")
    if cfg.published:
        other_form = dancer_of(cfg, cfg.published)
        if other_form.label == dancer.label:
            raise UserError(f"--published {cfg.published}: is of the form of --adapter, {dancer.label}")
        (video,) = studio.dance(other_form, [asked], wave)
        rows = [Strip(dancer.label, own, beats(clip)), Strip(other_form.label, video, beats(clip))]
        strips(cfg.out / "forms.webp", rows, "Two forms of the adapter, the same music, prompt and noise")
    videos = studio.dance(dancer, [asked] * 4, wave * 4, seeds=range(10, 14))
    names = [f"seed {number}: {asked}" if number == 10 else f"seed {number}" for number in range(10, 14)]
    as_webp(lambda png: drawing.sheet(png, list(zip(videos, names))), cfg.out / "diversity.webp")
    places = [toy.WHITE_STUDIO, "on a beach", "in a city street at night"]
    cast = [replace(c, setting=place) for c, place in zip(clips, places)]
    cast = [
        replace(c, shirt=a, trousers=b)
        for c, (a, b) in zip(cast, (("red", "blue"), ("purple", "white"), ("orange", "green")))
    ]
    videos = studio.dance(dancer, [prompt_of(c) for c in cast], music_of(cast), seeds=range(20, 23))
    moving(cfg.out / "dance.webp", videos, [beats(c) for c in cast], max(1, 240 // studio.size))


def main() -> None:
    cfg = from_cli(FiguresConfig)
    studio = Studio(
        ClaimsConfig(
            weights=cfg.weights, seed=cfg.seed, steps=cfg.steps, cfg=cfg.cfg, device=cfg.device, dtype=cfg.dtype,
            adapters=cfg.adapter, batch=4, jobs=1,
        )
    )  # fmt: skip
    try:
        cfg.out.mkdir(parents=True, exist_ok=True)
        if cfg.claims:
            chart(cfg.out / "claims.webp", cfg.claims)
        sampled(cfg, studio)
    except OSError as error:
        raise UserError(f"{cfg.out} cannot be written: {error.strerror or error}") from error


if __name__ == "__main__":
    run(main)
