"""Beats: closed forms, independent brute force, and clicks whose times are known."""

import numpy as np
import pytest

import beats
import toy_music

MUSIC = np.arange(0.3, 6, 0.5)


def random_train(rng, n):
    return np.sort(rng.uniform(0, 6, n))


def click_track(bpm, first_s, dur_s, sr_hz=16000):
    rng = np.random.default_rng(0)
    wave = rng.normal(0, 0.01, round(dur_s * sr_hz)).astype(np.float32)
    times = np.arange(first_s, dur_s - 0.06, 60 / bpm)
    for time in times:
        i, n = round(time * sr_hz), np.arange(800)
        wave[i : i + 800] += np.sin(2 * np.pi * 1000 * n / sr_hz) * np.exp(-n / 200)
    return wave, times


# ------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("score", [beats.bas_motion, beats.bas_music])
def test_perfect_alignment_scores_one_and_half_a_beat_off_scores_its_closed_form(score):
    assert score(MUSIC, MUSIC) == 1.0
    assert score(MUSIC + 0.03, MUSIC, 0.05) == pytest.approx(np.exp(-0.18))
    assert score(MUSIC + 0.25, MUSIC, 0.1) == pytest.approx(np.exp(-3.125))


@pytest.mark.parametrize("score", [beats.bas_motion, beats.bas_music])
def test_alignment_falls_steadily_as_the_motion_slides_to_half_a_beat(score):
    values = [score(MUSIC + shift, MUSIC, 0.1) for shift in np.linspace(0, 0.25, 20)]
    assert (np.diff(values) < 0).all()


def test_alignment_scores_equal_a_brute_force_over_all_pairs():
    rng = np.random.default_rng(1)
    for _ in range(50):
        motion, music = random_train(rng, rng.integers(1, 15)), random_train(rng, rng.integers(1, 15))
        sigma = rng.uniform(0.02, 0.2)
        per_motion = [max(np.exp(-((t - b) ** 2) / 2 / sigma**2) for b in music) for t in motion]
        per_music = [max(np.exp(-((t - b) ** 2) / 2 / sigma**2) for t in motion) for b in music]
        assert beats.bas_motion(motion, music, sigma) == pytest.approx(np.mean(per_motion))
        assert beats.bas_music(motion, music, sigma) == pytest.approx(np.mean(per_music))


def test_rare_motion_lowers_only_the_music_score_and_busy_motion_only_the_motion_score():
    busy = np.sort(np.concatenate([MUSIC, MUSIC + 0.25]))
    assert beats.bas_motion(MUSIC[::2], MUSIC) == 1.0 and beats.bas_music(MUSIC[::2], MUSIC) < 0.51
    assert beats.bas_music(busy, MUSIC) == 1.0 and beats.bas_motion(busy, MUSIC) < 0.51


def test_sigma_is_three_frames_at_sixty_fps():
    assert beats.SIGMA_S == 3 / 60
    assert beats.bas_motion(MUSIC + 3 / 60, MUSIC) == pytest.approx(np.exp(-0.5))


def test_no_beats_on_either_side_score_zero():
    none = np.array([])
    for motion, music in ((none, MUSIC), (MUSIC, none), (none, none)):
        assert beats.bas_motion(motion, music) == beats.bas_music(motion, music) == 0.0
        assert beats.precision_recall_f1(motion, music) == (0.0, 0.0, 0.0)


def most_pairs(motion, music, tol_s):
    """Largest one-to-one matching, by trying every choice for the first motion beat."""
    if len(motion) == 0:
        return 0
    best = most_pairs(motion[1:], music, tol_s)
    for j, b in enumerate(music):
        if abs(motion[0] - b) <= tol_s:
            best = max(best, 1 + most_pairs(motion[1:], np.delete(music, j), tol_s))
    return best


def test_precision_and_recall_equal_the_best_one_to_one_matching():
    rng = np.random.default_rng(2)
    for _ in range(40):
        motion, music = random_train(rng, rng.integers(1, 7)) / 4, random_train(rng, rng.integers(1, 7)) / 4
        hits = most_pairs(motion, music, 0.2)
        p, r, f = beats.precision_recall_f1(motion, music, 0.2)
        assert (p, r) == pytest.approx((hits / len(motion), hits / len(music)))
        assert f == pytest.approx(2 * p * r / (p + r) if hits else 0.0)


def test_two_motion_beats_near_one_music_beat_count_once():
    assert beats.precision_recall_f1([0.99, 1.01], [1.0], 0.05) == pytest.approx((0.5, 1.0, 2 / 3))


# ------------------------------------------------------------------------------------------------- phase locking


def test_phase_is_the_share_of_the_beat_that_has_passed_also_beyond_the_ends():
    music = np.array([1.0, 1.5, 2.5])
    times = np.array([0.75, 1.0, 1.25, 1.75, 2.5, 3.25])
    assert beats.beat_phase(times, music) == pytest.approx([0.5, 0, 0.5, 0.25, 0, 0.75])
    with pytest.raises(ValueError, match="at least two"):
        beats.beat_phase(times, music[:1])


def test_phasor_is_one_on_the_beat_minus_one_half_way_and_i_at_a_quarter():
    for share, expected in ((0, 1), (0.5, -1), (0.25, 1j)):
        assert beats.phasor(MUSIC + 0.5 * share, MUSIC) == pytest.approx(expected)
    assert beats.phasor(np.array([]), MUSIC) == 0


def test_phase_locking_is_one_for_a_fixed_lag_and_falls_with_the_number_of_clips_by_chance():
    rng = np.random.default_rng(3)
    locked, chance = [], []
    for _ in range(200):
        bpm, first, t = rng.uniform(80, 140), rng.uniform(0, 0.5), np.arange(73) / 30
        music = np.arange(first, 2.4, 60 / bpm)
        lag = 0.2 * 60 / bpm
        height = -np.cos(2 * np.pi * (t - first - lag) * bpm / 60)
        locked.append(beats.phase_locking(height, 30, music))
        chance.append(beats.phase_locking(height, 30, music + rng.uniform(0, 60 / bpm)))
    assert beats.plv(locked) > 0.995 and np.angle(np.mean(locked)) / 2 / np.pi == pytest.approx(0.2, abs=0.01)
    assert np.mean(np.abs(chance)) > 0.98  # each clip alone looks locked ...
    assert beats.plv(chance) < 0.15  # ... but not all to the same phase


# ------------------------------------------------------------------------------------------------- motion beats


def test_turning_points_are_found_between_the_frames():
    t = np.arange(90) / 30
    curve = -np.cos(2 * np.pi * 1.7 * (t - 0.2137))
    lows, highs = 0.2137 + np.arange(5) / 1.7, 0.2137 + (np.arange(5) + 0.5) / 1.7
    assert beats.motion_beats(curve, 30, "min") == pytest.approx(lows, abs=0.002)
    assert beats.motion_beats(curve, 30, "max") == pytest.approx(highs[highs < 2.9], abs=0.002)
    with pytest.raises(ValueError, match="'min' or 'max'"):
        beats.motion_beats(curve, 30, "low")


def test_a_ripple_below_the_prominence_is_no_beat_and_above_it_is_one():
    t = np.arange(60) / 30
    curve = np.abs(t - 1) + 0.25 * np.exp(-(((t - 0.5) / 0.1) ** 2))
    assert len(beats.motion_beats(curve, 30, prominence=0.2)) == 1
    assert len(beats.motion_beats(curve, 30, prominence=0.01)) == 2


def test_still_and_steadily_rising_curves_have_no_beats():
    assert len(beats.motion_beats(np.full(73, 5.0), 30)) == 0
    assert len(beats.motion_beats(np.arange(73.0), 30)) == 0


def test_motion_beats_equal_scipy_peaks_with_the_same_prominence():
    from scipy.signal import find_peaks

    rng = np.random.default_rng(4)
    for _ in range(20):
        curve = np.cumsum(rng.normal(size=120))
        smooth = beats.smooth(curve, 30)
        expected = find_peaks(-smooth, prominence=0.1 * np.ptp(smooth))[0]
        assert np.round(beats.motion_beats(curve, 30) * 30).astype(int).tolist() == expected.tolist()


def test_smoothing_keeps_a_straight_line_and_shrinks_a_wave_by_the_gaussian_law():
    assert beats.smooth(np.arange(40.0), 30) == pytest.approx(np.arange(40.0))
    wave = np.cos(2 * np.pi * 3 * np.arange(120) / 30)
    law = np.exp(-0.5 * (2 * np.pi * 3 / 30) ** 2)
    assert beats.smooth(wave, 30)[10:-10] == pytest.approx(law * wave[10:-10], abs=0.01)


def test_speed_is_in_units_a_second_averaged_over_joints():
    t = np.arange(30) / 30
    points = np.stack([np.stack([3 * t, 4 * t], 1), np.zeros((30, 2))], axis=1)  # 5 a second and 0
    assert beats.speed(points, 30) == pytest.approx(2.5)


def test_motion_energy_is_least_where_the_picture_stands_still():
    t = np.arange(60) / 30
    frames = np.zeros((60, 32, 64, 3), np.uint8)
    for frame, x in zip(frames, 32 - 20 * np.cos(2 * np.pi * t)):  # turns at 0.5, 1.0 and 1.5 s
        distance = np.abs(np.arange(64) - x)
        frame[8:24] = (255 * np.clip(6 - distance, 0, 1))[None, :, None]
    energy = beats.motion_energy(frames)
    assert energy.shape == (60,)
    assert beats.motion_beats(energy, 30) == pytest.approx([0.5, 1.0, 1.5], abs=0.01)
    assert beats.motion_energy(frames[:1].repeat(5, axis=0)) == pytest.approx(0)


@pytest.mark.parametrize("bpm", [61.0, 87.3, 120.0, 178.0])
def test_motion_tempo_of_a_short_clip_is_exact_whatever_its_phase_and_drift(bpm):
    t = np.arange(73) / 30
    for phase in (0, 1, 2):
        curve = 3 * np.sin(2 * np.pi * t * bpm / 60 + phase) + 2 * t + 7
        assert beats.tempo_of_motion(curve, 30) == pytest.approx(bpm, abs=0.1)
    assert np.isnan(beats.tempo_of_motion(7 + 2 * t, 30))


# --------------------------------------------------------------------------------------------------- music beats


@pytest.mark.parametrize("prior", [None, 96.0])
def test_beats_of_a_click_track_are_found_within_thirty_milliseconds(prior):
    wave, times = click_track(96, 0.4, 8)
    tempo, found = beats.music_beats(wave, 16000, prior)
    assert tempo == pytest.approx(96, rel=0.02)
    inner = times[1:-1]
    offsets = found[np.abs(np.subtract.outer(inner, found)).argmin(axis=1)] - inner
    assert np.abs(offsets).max() < 0.03 and abs(np.median(offsets)) < 0.01
    assert abs(len(found) - len(times)) <= 1


def test_a_click_track_cut_anywhere_has_every_click_and_no_beat_between():
    rng = np.random.default_rng(1)
    for k in range(40):
        bpm, dur_s = rng.uniform(75, 140), rng.uniform(2.4, 5)
        first_s = rng.uniform(0, 60 / bpm)
        wave, clicks = click_track(bpm, first_s, dur_s)
        _, found = beats.music_beats(wave, 16000, bpm if k % 2 else None)
        on = np.arange(first_s - 60 / bpm, dur_s + 60 / bpm, 60 / bpm)  # where clicks would be beyond the cuts
        off = found[np.abs(np.subtract.outer(found, on)).min(axis=1) > 0.05]
        missed = clicks[np.abs(np.subtract.outer(clicks, found)).min(axis=1) > 0.05]
        assert not ((off > 0.1) & (off < dur_s - 0.12)).any(), (k, off, on)  # within 0.1 s of a cut nothing sounds
        assert (missed < 0.05).all() and (found < dur_s).all(), (k, missed)


def test_short_house_tracks_have_exactly_their_own_beats():
    rng = np.random.default_rng(0)
    for name in [f"mHO{k}" for k in range(6)] + ["mWA2", "mWA5", "mPO3", "mJB0"]:
        genre, bpm, seed = toy_music.track(name)
        start_s = rng.uniform(0, 40)
        wave, true = toy_music.play(genre, bpm, seed, start_s, 73 / 30), toy_music.beats_in(bpm, start_s, 73 / 30)
        _, found = beats.music_beats(wave, 16000, bpm)
        inner = true[(true > 0.1) & (true < 2.3)]
        assert np.abs(np.subtract.outer(inner, found)).min(axis=1).max() < 0.05, name
        assert len(true) - 1 <= len(found) <= len(true) + 1, name


def test_the_tempo_in_a_tracks_name_settles_what_a_short_clip_leaves_open():
    rng, right = np.random.default_rng(0), {True: 0, False: 0}
    for name in toy_music.TRACKS:
        genre, bpm, seed = toy_music.track(name)
        wave = toy_music.play(genre, bpm, seed, rng.uniform(0, 40), 73 / 30)
        for told in right:
            right[told] += abs(beats.music_beats(wave, 16000, bpm if told else None)[0] / bpm - 1) < 0.04
    assert right[True] == 60 and 40 <= right[False] < 55


def test_the_prior_decides_between_a_tempo_and_its_double():
    wave = click_track(80, 0.2, 8)[0] + 0.6 * click_track(80, 0.2 + 0.375, 8)[0]
    assert beats.music_beats(wave, 16000, 80)[0] == pytest.approx(80, rel=0.03)
    assert beats.music_beats(wave, 16000, 160)[0] == pytest.approx(160, rel=0.03)


def test_silence_has_no_beats():
    tempo, found = beats.music_beats(np.zeros(32000, np.float32), 16000)
    assert tempo == 0 and len(found) == 0


# ------------------------------------------------------------------------------------------- chance and certainty


def alignment(motion, music):
    return beats.bas_motion(motion, music, 0.1)


def test_circular_shift_null_of_regular_beats_is_the_mean_over_all_lags():
    music = np.arange(0, 6.1, 0.5)
    lag = np.linspace(0, 0.5, 2001)
    expected = np.exp(-(np.minimum(lag, 0.5 - lag) ** 2) / 2 / 0.1**2).mean()
    assert beats.circular_shift_null(alignment, music[:-1], music, 6.0, n=599) == pytest.approx(expected, abs=0.002)


def test_circular_shifts_wrap_inside_the_clip_stay_sorted_and_leave_out_the_unshifted():
    seen = []
    beats.circular_shift_null(lambda motion, music: seen.append(motion) or 0.0, np.array([0.1, 1.9]), MUSIC, 2.0, n=3)
    assert np.array(seen) == pytest.approx(np.array([[0.4, 0.6], [0.9, 1.1], [1.4, 1.6]]))


def test_bootstrap_interval_has_the_width_of_the_standard_error_and_is_repeatable():
    values = np.random.default_rng(5).normal(3, 1, 400)
    low, high = beats.bootstrap_interval(values)
    assert (low, high) == pytest.approx((values.mean() - 1.96 / 20, values.mean() + 1.96 / 20), abs=0.02)
    assert (low, high) == beats.bootstrap_interval(values) != beats.bootstrap_interval(values, seed=1)


def test_bootstrap_of_phasors_is_about_the_length_of_their_mean():
    phasors = np.exp(1j * np.random.default_rng(6).normal(1, 0.5, 200))
    low, high = beats.bootstrap_interval(phasors)
    assert low < beats.plv(phasors) < high and high - low < 0.12
