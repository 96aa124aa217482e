"""The paper's evaluation: generate the grid of test videos, measure beats, ask the judge, make tables, ask people.

Concept   evaluate.py generate   10 tracks x 10 prompts from one set of weights              (grid.py)
          evaluate.py judge      a video LLM answers eleven questions about each video        (judge.py);
                                 --metrics vbench: two scores of the picture without it       (vbench.py)
          evaluate.py table      the paper's tables from judged folders                      (tables.py)
          evaluate.py ab         a page for a human A/B study, and its tally                 (ab.py)
          evaluate.py beats      do motion beats and music beats agree? arithmetic, no judge (here)
Paper     arXiv 2503.14505v2, Sec. 5.1, 5.2, Tables 1-7, 9 and 10, App. C, F, I, J.
Differs   beats are measured besides being judged. Body height from pixels (optical flow) is the default motion curve;
          AIST++ uses the speed of joints, of which `--motion energy` is the picture's counterpart.
"""

import json
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import ab
import beats
import judge
import media
import tables
from config import UserError, flag, from_cli, run, words
from questions import bpm_of

BEATS_HZ = 22_050
SCORES = ("bas_motion", "bas_music", "precision", "recall", "f1")
INK, SOUND, BEAT, MOTION = "#222222", "#8fa8c8", "#e4572e", "#2a7f62"

# ------------------------------------------------------------------------------------------------------------ beats


@dataclass(frozen=True)
class BeatsConfig:
    """Do the dancer's beats fall on the music's? Both published scores, phase, chance, and a picture of each video.

    The tempo to expect comes from the AIST track in a file's name (mBR0 is 80 beats a minute), else none."""

    videos: tuple[str, ...] = words(help="files with pictures and sound")
    sigma: float = flag(beats.SIGMA_S, help="seconds: width of the alignment scores and tolerance of precision, recall")
    motion: str = flag("height", help="height: beats are lowest points of the body; energy: least motion energy")
    seconds: float = flag(20.0, help="longest part of a video that is looked at")
    out: Path = flag(Path("out/beats"), help="folder for the pictures")
    json: Path | None = flag(None, help="also write every number there")

    def __post_init__(self):
        if self.motion not in ("height", "energy") or not self.sigma > 0 or not self.seconds > 0:
            raise UserError("expected --motion height or energy, and --sigma and --seconds above 0")
        if self.json and self.json.is_dir():
            raise UserError(f"--json {self.json}: is a folder; expected a file name")


def agreement(motion: np.ndarray, music: np.ndarray, dur_s: float, sigma_s: float) -> dict:
    """All scores of one clip; each of `chance` is the mean over circular shifts of the motion within the clip."""

    def scores(motion, music):
        alignment = beats.bas_motion(motion, music, sigma_s), beats.bas_music(motion, music, sigma_s)
        return dict(zip(SCORES, (*alignment, *beats.precision_recall_f1(motion, music, sigma_s))))

    found = scores(motion, music)
    chance = {
        key: beats.circular_shift_null(lambda *pair, key=key: scores(*pair)[key], motion, music, dur_s)
        for key in SCORES
    }
    phase = beats.phasor(motion, music) if len(music) > 1 else 0j
    return found | {"chance": chance, "phasor": [phase.real, phase.imag]}


def measure(path: Path, cfg: BeatsConfig) -> dict:
    """Everything about one video; draws its picture on the way."""
    wave = media.read_audio(path, BEATS_HZ, dur_s=cfg.seconds)
    frames = np.stack(list(islice(media.video_frames(path), round(30 * cfg.seconds))))
    if len(frames) < 15:
        raise UserError(f"{path}: {len(frames)} frames at 30 a second; expected at least half a second")
    prior, dur_s = bpm_of(path.stem), len(frames) / 30
    curve = beats.body_height(frames) if cfg.motion == "height" else beats.motion_energy(frames)
    motion = beats.motion_beats(curve, 30)
    bpm, music = beats.music_beats(wave, BEATS_HZ, prior)
    music = music[music < dur_s]
    picture = cfg.out / f"{path.stem}.png"
    draw(picture, path.stem, wave, curve, motion, music, dur_s, bpm)
    return {
        "bpm": bpm,
        "bpm_expected": prior,
        "motion_bpm": 60 / float(np.median(np.diff(motion))) if len(motion) > 2 else None,
        "motion_beats_s": motion.tolist(),
        "music_beats_s": music.tolist(),
        "picture": str(picture),
        **agreement(motion, music, dur_s, cfg.sigma),
    }


def draw(path: Path, name: str, wave, curve, motion, music, dur_s: float, bpm: float) -> None:
    """Waveform over motion curve, music beats as lines through both, motion beats as dots on the curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=120, layout="constrained")
    top, low = figure.subplots(2, 1, sharex=True)
    pieces = np.array_split(wave[: round(dur_s * BEATS_HZ)], 1500)
    ends = np.array([[p.min(), p.max()] for p in pieces if len(p)]).T
    top.fill_between(np.linspace(0, min(dur_s, len(wave) / BEATS_HZ), ends.shape[1]), *ends, color=SOUND, linewidth=0.4)
    low.plot(np.arange(len(curve)) / 30, curve, color=MOTION, linewidth=1.8)
    for axis in (top, low):
        for k, beat in enumerate(music):
            axis.axvline(beat, color=BEAT, linewidth=1.2, alpha=0.8, label="music beat" if k == 0 else None)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_yticks([])
    at = np.interp(motion, np.arange(len(curve)) / 30, curve)
    low.plot(motion, at, "o", color=INK, markersize=7, label="motion beat")
    counts = f"{len(music)} music beats, {len(motion)} motion beats"
    top.set(ylabel="music", title=f"{name}: {bpm:.1f} beats a minute, {counts}")
    low.set(ylabel="motion", xlabel="seconds", xlim=(0, dur_s))
    figure.legend(*low.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
    with media.new_file(path) as temporary:
        figure.savefig(temporary, format="png")


def summary(rows: dict[str, dict]) -> dict:
    """Means over the videos with bootstrap intervals, each beside its chance; phase locking over all of them."""
    out = {}
    for key in SCORES:
        values, chance = [row[key] for row in rows.values()], [row["chance"][key] for row in rows.values()]
        out[key] = {"mean": float(np.mean(values)), "interval": beats.bootstrap_interval(values),
                    "chance": float(np.mean(chance))}  # fmt: skip
        out[key]["above_chance"] = beats.bootstrap_interval(np.subtract(values, chance))
    phasors = np.array([complex(*row["phasor"]) for row in rows.values()])
    out["phase_locking"] = {"mean": beats.plv(phasors), "interval": beats.bootstrap_interval(phasors),
                            "chance": min(1.0, 0.9 / np.sqrt(len(phasors)))}  # fmt: skip
    return out


def measure_beats(cfg: BeatsConfig) -> None:
    """The command `beats`."""
    paths, rows, failed = [Path(video) for video in cfg.videos], {}, {}
    if not paths:
        raise UserError("beats: expected videos, e.g. evaluate.py beats out/ours/*.mp4")
    for path in tqdm(paths, "measuring", unit="video", disable=len(paths) < 3):
        try:
            rows[str(path)] = measure(path, cfg)
        except UserError as error:
            failed[str(path)] = str(error)
    if rows:
        total = summary(rows)
        print(f"{len(rows)} videos, sigma {cfg.sigma * 1000:.0f} ms, motion beats from {cfg.motion}; 95 % intervals")
        for key, value in total.items():
            low, high = value["interval"]
            print(f"{key:<14} {value['mean']:.3f} [{low:.3f}, {high:.3f}]   chance {value['chance']:.3f}")
        for side in ("music", "motion"):
            if none := sum(not row[f"{side}_beats_s"] for row in rows.values()):
                print(f"note       {none} of {len(rows)} videos have no {side} beat at all: they count as 0")
        print(f"wrote      {len(rows)} pictures in {cfg.out}")
        if cfg.json:
            data = {"sigma_s": cfg.sigma, "motion": cfg.motion, "summary": total, "videos": rows, "failed": failed}
            with media.new_file(cfg.json) as temporary:
                temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
            print(f"wrote      {cfg.json}")
    if failed:
        raise UserError(f"{len(failed)} of {len(paths)} videos failed: " + "; ".join(failed.values()))


# ------------------------------------------------------------------------------------------------------ the command


def main() -> None:
    usage = (
        "evaluate.py generate | judge | table RESULT... | ab | ab --tally FILE... | beats VIDEO..., each with --help"
    )
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__ + "\nusage: " + usage)
        return
    command, rest = sys.argv[1], sys.argv[2:]
    if command == "ab" and rest[:1] == ["--tally"]:
        command, rest = "ab --tally", rest[1:]
    sys.argv[:] = [f"evaluate.py {command}", *rest]  # what argparse shows and reads
    if command == "generate":
        import grid  # brings torch, which takes seconds to import and which no other command needs

        grid.generate(from_cli(grid.GenerateConfig))
    elif command == "judge":
        judge.main()
    elif command == "table":
        tables.main()
    elif command == "ab":
        ab.main()
    elif command == "ab --tally":
        ab.tally()
    elif command == "beats":
        measure_beats(from_cli(BeatsConfig))
    else:
        raise UserError(f"{command}: no such command; expected {usage}")


if __name__ == "__main__":
    run(main)
