"""From what was read of videos to rows of a table: a value, its interval, its level of chance, its ceiling.

Concept   every score is a mean over clips (for phase locking of phasors), so one bootstrap over the clips serves all.
          Chance is never taken for 0: alignment is scored again against the music of other clips.
Paper     arXiv 2503.14505v2, Sec. 5.1, 5.2; its judge is a video LLM, ours is arithmetic.

Scores    BAS     beat alignment as in AIST++, sigma 0.1 s: share of motion beats that fall on a beat
          PLV     phase locking over all clips: 1 = always at the same phase of the beat
          tempo   median error of the motion's tempo against the music's
"""

from dataclasses import dataclass

import numpy as np

import beats
import toy

FPS = 30
SIGMA_S = 0.1
SHIFTS = 8  # other tracks that each video is scored against for the level of chance
WHOLE = (-np.inf, np.inf)  # seconds: all of a clip
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t for 1, 2, ... degrees of freedom


@dataclass(frozen=True)
class Row:
    """One measured number; interval, chance and ceiling are None where there is no such thing."""

    what: str
    measure: str
    value: float
    interval: tuple[float, float] | None = None
    chance: float | None = None
    ceiling: float | None = None


def true_beats(clip: toy.Clip, num_frames: int) -> np.ndarray:
    """True beats of a clip in seconds, with one more on either side: the first or last motion beat may belong to it."""
    inside, period = toy.beat_times(clip, num_frames / FPS), 60 / clip.bpm
    return np.concatenate([[inside[0] - period], inside, [inside[-1] + period]])


def alignment(curves: list[np.ndarray], music: list[np.ndarray], span_s=WHOLE) -> dict:
    """Motion beats within `span_s` against the music's: bas (N,), phasor (N,), and the same with the music of others.

    curves (N of (F,)), music (N of beat times); other_bas is the mean, other_plv the mean of PLV, over SHIFTS shifts
    """
    found = [beats.motion_beats(curve, FPS) for curve in curves]
    motion = [times[(times >= span_s[0]) & (times < span_s[1])] for times in found]
    n = len(motion)
    shifts = range(1, min(SHIFTS, n - 1) + 1)
    others = [[beats.phasor(motion[i], music[(i + k) % n]) for i in range(n)] for k in shifts]
    return {
        "bas": np.array([beats.bas_motion(*pair, SIGMA_S) for pair in zip(motion, music)]),
        "phasor": np.array([beats.phasor(*pair) for pair in zip(motion, music)]),
        "other_bas": mean([beats.bas_motion(motion[i], music[(i + k) % n], SIGMA_S) for k in shifts for i in range(n)]),
        "other_plv": mean([beats.plv(row) for row in others]),
    }


def dance_rows(
    what: str, curves: list, music: list, bpms: list | None = None, ceiling: dict | None = None, span_s=WHOLE
) -> list[Row]:
    """Rows of BAS and PLV, and with `bpms` of the tempo error. ceiling: measure -> value."""
    a, ceiling = alignment(curves, music, span_s), ceiling or {}
    rows = [
        Row(what, "BAS", mean(a["bas"]), beats.bootstrap_interval(a["bas"]), a["other_bas"], ceiling.get("BAS")),
        Row(what, "PLV", beats.plv(a["phasor"]), beats.bootstrap_interval(a["phasor"]), a["other_plv"],
            ceiling.get("PLV")),
    ]  # fmt: skip
    if bpms is not None:
        n, tempo = len(bpms), np.array([beats.tempo_of_motion(curve, FPS) for curve in curves])
        shifts = range(1, min(SHIFTS, n - 1) + 1)
        error = np.abs(tempo / bpms - 1)
        chance = mean([np.nanmedian(np.abs(tempo / np.roll(bpms, k) - 1)) for k in shifts])
        rows.append(
            Row(what, "tempo error", float(np.nanmedian(error)), median_interval(error), chance,
                ceiling.get("tempo error"))
        )  # fmt: skip
    return rows


def values_of(rows: list[Row]) -> dict[str, float]:
    """measure -> value: what serves others as ceiling."""
    return {row.measure: row.value for row in rows}


def share_row(what: str, measure: str, right: list[bool], chance=None, ceiling=None) -> Row:
    """A share of clips with its interval."""
    right = np.asarray(right, float)
    return Row(what, measure, mean(right), beats.bootstrap_interval(right), chance, ceiling)


def kept_row(what: str, measure: str, before: list[bool], after: list[bool]) -> Row:
    """How often an attribute is right after adaptation, relative to before: mean(after) / mean(before), by pairs."""
    return ratio_row(what, measure, np.asarray(after, float), np.asarray(before, float))


def ratio_row(what: str, measure: str, above, below, chance=None, ceiling=None) -> Row:
    """mean(above) / mean(below), with an interval from resampling the pairs; nan if nothing is below."""
    above, below = np.asarray(above, float), np.asarray(below, float)
    picks = np.random.default_rng(0).integers(len(above), size=(2000, len(above)))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = above[picks].mean(1) / below[picks].mean(1)
        value = float(above.mean() / below.mean())
    usable = ratios[np.isfinite(ratios)]
    interval = tuple(np.quantile(usable, [0.025, 0.975]).tolist()) if len(usable) else None
    return Row(what, measure, value, interval, chance, ceiling)


def median_interval(values, n: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the median of `values` that are numbers, from n resamples."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    picks = np.random.default_rng(seed).integers(len(values), size=(n, len(values)))
    low, high = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975])
    return float(low), float(high)


def seeds_row(what: str, measure: str, values: list[float], chance=None, ceiling=None) -> Row:
    """Mean over seeds; the interval is Student's, None for one seed."""
    values, interval = np.asarray(values, float), None
    if 1 < len(values) <= len(T_95) + 1:
        half = T_95[len(values) - 2] * values.std(ddof=1) / np.sqrt(len(values))
        interval = (float(values.mean() - half), float(values.mean() + half))
    return Row(what, measure, mean(values), interval, chance, ceiling)


def spread(silhouettes: np.ndarray) -> float:
    """Mean over the pairs of a set (N, F', h, w) of the mean absolute difference of two silhouettes."""
    n = len(silhouettes)
    return mean([np.abs(silhouettes[i] - silhouettes[j]).mean() for i in range(n) for j in range(i)])


def mean(values) -> float:
    return float(np.mean(values))


# ------------------------------------------------------------------------------------------------------- the table

HEADER = "| what | measure | value | 95 % interval | chance | ceiling |\n|---|---|---|---|---|---|"


def line(row: Row) -> str:
    """One line of the markdown table."""
    interval = "" if row.interval is None else f"{number(row.interval[0])} ... {number(row.interval[1])}"
    cells = [row.what, row.measure, number(row.value), interval, number(row.chance), number(row.ceiling)]
    return f"| {' | '.join(cells)} |"


def number(value: float | None) -> str:
    """Three decimals, two digits where they would be zeros; nothing for None, a word for what could not be computed."""
    if value is None:
        return ""
    if not np.isfinite(value):
        return "undefined"
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.3f}"
