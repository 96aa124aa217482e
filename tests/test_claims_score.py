"""The arithmetic of the claims, on made-up curves and numbers."""

import numpy as np
import pytest

import claims_score as score
from claims_score import Row


def bouncing(bpm: float, late_s: float = 0.0, num_frames: int = 73) -> np.ndarray:
    """A body that is lowest `late_s` after each beat at 0, 60 / bpm, ... seconds."""
    return -np.cos(2 * np.pi * (np.arange(num_frames) / 30 - late_s) * bpm / 60)


BPMS = [82.0, 97.0, 111.0, 128.0, 90.0, 120.0, 104.0, 133.0, 87.0, 115.0]
MUSIC = [np.arange(-1, 8) * 60 / bpm for bpm in BPMS]


def test_dances_on_the_beat_score_one_and_against_other_music_at_chance():
    rows = score.dance_rows("x", [bouncing(bpm) for bpm in BPMS], MUSIC, BPMS)
    bas, plv, tempo = rows
    assert [row.measure for row in rows] == ["BAS", "PLV", "tempo error"]
    assert bas.value > 0.99 and plv.value > 0.99 and tempo.value < 0.01
    assert bas.chance < 0.8 and plv.chance < 0.8 and tempo.chance > 0.05
    assert all(row.interval[0] <= row.value <= row.interval[1] for row in rows)


def test_half_a_beat_late_is_off_the_beat_but_in_step():
    late = [bouncing(bpm, 30 / bpm) for bpm in BPMS]
    bas, plv = score.dance_rows("x", late, MUSIC)
    assert bas.value < 0.2 and plv.value > 0.99


def test_a_span_looks_at_its_own_seconds_only():
    half = [np.concatenate([bouncing(bpm)[:36], bouncing(bpm, 30 / bpm)[36:]]) for bpm in BPMS]
    first, second = (score.dance_rows("x", half, MUSIC, span_s=span)[0].value for span in ((0, 1.0), (1.4, 2.5)))
    assert first > 0.9 > 0.3 > second


def test_a_ratio_resamples_pairs_and_says_undefined_where_nothing_is_below():
    row = score.ratio_row("x", "y", [2, 4, 6, 8], [1, 2, 3, 4])
    assert row.value == 2 and row.interval == (2.0, 2.0)
    nothing = score.kept_row("x", "y", [False, False], [True, False])
    assert "undefined" in score.line(nothing)
    assert score.kept_row("x", "y", [True, True, False, True], [True, True, False, False]).value == pytest.approx(2 / 3)


def test_an_interval_over_seeds_is_students():
    row = score.seeds_row("x", "y", [1.0, 2.0, 3.0])
    assert row.value == 2 and row.interval == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert score.seeds_row("x", "y", [1.0]).interval is None


def test_the_spread_of_one_dance_is_zero_and_of_two_their_difference():
    one = np.zeros((3, 2, 4, 4))
    assert score.spread(one) == 0
    assert score.spread(np.stack([np.zeros((2, 4, 4)), np.ones((2, 4, 4))])) == 1


def test_a_table_line_shows_value_interval_chance_and_ceiling_and_nothing_for_none():
    assert score.line(Row("a", "b", 0.5, (0.4, 0.6), 0.1, 1.0)) == "| a | b | 0.500 | 0.400 ... 0.600 | 0.100 | 1.000 |"
    assert score.line(Row("a", "b", 0.5)) == "| a | b | 0.500 |  |  |  |"
    assert score.HEADER.splitlines()[0].count("|") == 7


def test_the_median_ignores_a_curve_that_does_not_move():
    low, high = score.median_interval([1.0, 1.1, np.nan, 0.9, 1.0])
    assert 0.9 <= low <= 1.0 <= high <= 1.1


def test_a_small_number_is_not_printed_as_zero():
    assert [score.number(value) for value in (0.9621, 0.0, 0.0031203, -4.06e-5)] == [
        "0.962",
        "0.000",
        "0.0031",
        "-4.1e-05",
    ]
