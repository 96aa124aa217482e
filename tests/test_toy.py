"""The toy world: its beats, poses, pictures, sounds, words and files."""

import dataclasses
import json
import resource
import sys

import numpy as np
import pytest

import config
import data_names
import media
import toy
import toy_draw
import toy_music
import toy_read
from toy_dance import BOUNCE, JOINTS, MOVES, SNAP, Clip, joints


def clip_of(**changes) -> Clip:
    """A plain solo clip, varied."""
    plain = Clip("MH", 104.0, "FM", ("male dancer",), 1, "red", "blue", toy.WHITE_STUDIO, 1000, 5, 3.21)
    return dataclasses.replace(plain, **changes)


def clips(count: int, wild: bool, seed: int = 0) -> list[Clip]:
    rng = np.random.default_rng(seed)
    return [toy.sample_clip(rng, wild) for _ in range(count)]


def lows(curve: np.ndarray, fps: float = 30) -> np.ndarray:
    """Times of the local minima that are at least a quarter of the curve's range deep."""
    signal = pytest.importorskip("scipy.signal")
    low, high = np.percentile(curve, (5, 95))
    at, _ = signal.find_peaks(-curve, prominence=0.25 * (high - low))
    a, b, c = curve[at - 1], curve[at], curve[at + 1]
    return (at + 0.5 * (a - c) / (a - 2 * b + c)) / fps


# ------------------------------------------------------------------------------------------------------ beats and poses


@pytest.mark.parametrize("genre", data_names.GENRES)
def test_head_and_pelvis_are_lowest_exactly_on_the_beat(genre):
    for situation, seed in (("BM", 1), ("FM", 2), ("GR", 3), ("BM", 4)):
        figures = ("female dancer", "male dancer") if situation == "GR" else ("female dancer",)
        clip = clip_of(genre=genre, situation=situation, dance_seed=seed, figures=figures)
        fine = np.arange(0, 4, 1 / 500)
        beats = toy.beat_times(clip, 4.0)
        for joint in ("head", "pelvis"):
            height = joints(clip, fine)[:, 0, JOINTS.index(joint), 1]
            inner = beats[(beats > 0.1) & (beats < 3.9)]
            found = lows(height, 500)
            assert len(found) == len(inner)
            assert np.abs(found - inner).max() < 0.02


def test_beat_k_is_at_k_beats_minus_the_start():
    clip = clip_of(bpm=90.0, start_s=10.0)  # a beat every 2/3 s; beat 15 is the first from 10 s on
    np.testing.assert_allclose(toy.beat_times(clip, 2.0), [0, 2 / 3, 4 / 3], atol=1e-9)


def test_pose_depends_on_beat_phase_only():
    slow, fast = clip_of(bpm=80.0, start_s=1.5), clip_of(bpm=120.0, start_s=1.0)  # both start at beat 2
    times = np.linspace(0, 3, 50)
    np.testing.assert_allclose(joints(slow, times), joints(fast, times * 80 / 120), atol=1e-9)


def test_bones_keep_their_length():
    pose = joints(clip_of(genre="HO"), np.linspace(0, 8, 200))
    for side in ("left", "right"):
        for a, b, length in (("shoulder", "elbow", 0.18), ("elbow", "wrist", 0.18), ("hip", "knee", 0.238)):
            bone = pose[:, 0, JOINTS.index(f"{side} {a}")] - pose[:, 0, JOINTS.index(f"{side} {b}")]
            np.testing.assert_allclose(np.linalg.norm(bone, axis=-1), length, atol=1e-6)


def test_the_hands_are_never_both_above_the_head_on_the_beat():
    for clip in clips(60, False):
        pose = joints(clip, toy.beat_times(clip, 8.0))[..., 1]
        hands = pose[..., [JOINTS.index("left wrist"), JOINTS.index("right wrist")]]
        assert (hands.min(-1) < pose[..., JOINTS.index("head")] + 0.09).all()


def test_basic_dance_repeats_every_four_beats_and_advanced_dance_does_not():
    beats = np.linspace(0.1, 3.9, 40)
    for situation, same in (("BM", True), ("FM", False)):
        clip = clip_of(situation=situation, start_s=0.0, bpm=60.0)
        assert np.allclose(joints(clip, beats), joints(clip, beats + 4), atol=1e-6) == same


def test_every_genre_has_moves_of_its_own():
    assert set(MOVES) == set(BOUNCE) == set(SNAP) == set(toy_music.STYLES) == set(data_names.GENRES)
    moves = [move for vocabulary in MOVES.values() for move in vocabulary]
    assert len(set(moves)) == len(moves) == 40
    assert all(len(set(map(len, move.rstrip("/").split()))) == 1 for move in moves)


def test_group_dancers_stand_side_by_side_in_every_view():
    for camera in (1, 3, 5):
        clip = clip_of(situation="GR", figures=("male dancer",) * 3, camera=camera)
        points, _ = toy.project(clip, joints(clip, np.zeros(1)), np.zeros(1), 64)
        assert (np.diff(points[0, :, JOINTS.index("pelvis"), 0]) > 15).all()


# --------------------------------------------------------------------------------------------------------------- sound


def test_music_is_loudest_right_after_each_beat():
    clip = clip_of(genre="HO", bpm=100.0, start_s=0.3)
    sound = toy.music(clip, 0.0, 8.0)
    assert sound.shape == (128000,) and sound.dtype == np.float32 and np.abs(sound).max() <= 1
    low = np.abs(np.convolve(sound, np.ones(60) / 60, "same"))  # the kick
    phase = (np.arange(len(low)) / 16000 + 0.3) * 100 / 60 % 1
    assert low[phase < 0.15].mean() > 2 * low[(phase > 0.6) & (phase < 0.9)].mean()


def test_music_from_a_later_start_is_the_same_music():
    clip = clip_of(start_s=0.0)
    later = dataclasses.replace(clip, start_s=1.0)
    np.testing.assert_allclose(toy.music(clip, 1.5, 1.0), toy.music(later, 0.5, 1.0), atol=1e-4)


def test_ten_genres_and_two_seeds_sound_different():
    sounds = [toy.play(genre, 100, seed, 0, 2.4) for genre in data_names.GENRES for seed in (1, 2)]
    alike = np.abs(np.corrcoef(sounds)) - np.eye(20)
    assert alike.max() < 0.98


def test_any_sampling_rate_plays_the_same_music():
    low, high = (toy.play("PO", 100, 1, 0, 2.0, sr_hz) for sr_hz in (16000, 48000))
    assert len(high) == 3 * len(low)
    assert np.corrcoef(low, high.reshape(-1, 3).mean(1))[0, 1] > 0.9


def test_tracks_follow_the_tempo_rule_of_aist():
    assert toy.track("mBR0") == ("BR", 80.0, 0)
    assert toy.track("mHO5") == ("HO", 135.0, 5)
    assert all(toy.track(name)[1] == data_names.AistName("BM", 1, "BR", (4,), name).bpm for name in toy.TRACKS)
    assert len(set(toy.TRACKS)) == 60 and data_names.TEST_TRACKS < set(toy.TRACKS)
    with pytest.raises(ValueError, match="mXX0"):
        toy.track("mXX0")


def test_genre_says_nothing_about_tempo():
    tempos = [c.bpm for c in clips(400, True) if c.genre == "HO"]
    assert min(tempos) < 90 and max(tempos) > 125


# ------------------------------------------------------------------------------------------------------------- pictures


def test_same_clip_gives_same_bytes():
    for clip in clips(2, True):
        np.testing.assert_array_equal(toy.render(clip, 5), toy.render(dataclasses.replace(clip), 5))


def test_frames_are_a_function_of_time_alone():
    clip = clip_of(camera=10, setting="on a beach")
    dense, sparse = toy.render(clip, 9, fps=30)[::3], toy.render(clip, 3, fps=10)
    np.testing.assert_allclose(dense.astype(int), sparse.astype(int), atol=1)


@pytest.mark.parametrize("setting", toy.SETTINGS)
def test_dancer_changes_every_place_and_stays_in_the_picture(setting):
    picture = toy.render(clip_of(setting=setting), 2, size=48)
    assert picture.shape == (2, 48, 48, 3) and picture.dtype == np.uint8
    other = toy.render(clip_of(setting=setting, shirt="green", trousers="yellow"), 2, size=48)
    changed = (picture != other).any(-1)
    assert changed[:, 8:44].sum() > 300  # shirt and trousers
    assert not changed[:, :3].any() and not changed[:, :, :3].any()


def test_male_and_female_dancers_and_front_and_back_look_different():
    views = [toy.render(clip_of(figures=(f,), camera=c), 1) for f in toy.FIGURES for c in (1, 5)]
    for i, a in enumerate(views):
        for b in views[:i]:
            assert (np.abs(a.astype(int) - b).max(-1) > 40).sum() > 25


def test_moving_camera_moves_the_backdrop_and_a_still_one_does_not():
    for camera, moves in ((1, False), (10, True)):
        frames = toy.render(clip_of(camera=camera, setting="in a subway station"), 31)
        assert (frames[0, 40:50, :6] != frames[30, 40:50, :6]).any() == moves


def test_clothes_skin_and_backdrop_stand_out_from_each_other():
    for clip in clips(100, False) + clips(100, True):
        assert clip.shirt != clip.trousers
        assert clip.shirt in toy.visible_colours(clip.setting)
    assert "white" not in toy.visible_colours(toy.WHITE_STUDIO)


def test_unknown_setting_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="on the moon.*on a beach"):
        toy.render(clip_of(setting="on the moon"), 1)


# ------------------------------------------------------------------------------------------------------------ measuring


def test_beats_read_from_pixels_match_the_true_beats():
    hits = found = true = 0
    for clip in [c for c in clips(16, False, seed=3) if len(c.figures) == 1]:
        read, beats = lows(toy_read.body_curve(toy.render(clip))), toy.beat_times(clip, 73 / 30)
        read = read[(read > 0.1) & (read < 2.3)]
        found += len(read)
        true += ((beats > 0.1) & (beats < 2.3)).sum()
        hits += (np.abs(read[:, None] - beats).min(1) < 0.05).sum()
    assert 2 * hits / (found + true) > 0.95


def test_body_curve_follows_the_true_head():
    for clip in (clip_of(), clip_of(camera=5, genre="WA"), clip_of(setting="on a beach", figures=("female dancer",))):
        curve, head = toy_read.body_curve(toy.render(clip)), toy.true_heights(clip)["head"]
        assert np.corrcoef(curve, head)[0, 1] > 0.9


def test_colours_read_from_pixels_are_the_clothes():
    for clip in clips(8, False, seed=5) + clips(8, True, seed=6):
        if len(clip.figures) == 1:
            assert toy_read.read_colours(toy.render(clip, 25)) == (clip.shirt, clip.trousers)


def test_measuring_an_empty_picture_gives_finite_numbers():
    empty = np.full((13, 64, 64, 3), 200, np.uint8)
    assert np.isfinite(toy_read.body_curve(empty)).all()
    assert len(toy_read.read_colours(empty)) == 2


# ------------------------------------------------------------------------------------------------------------- captions


def test_aist_prompts_are_the_four_templates_of_the_name():
    rng, clip = np.random.default_rng(0), clip_of(situation="GR", figures=("female dancer", "male dancer"))
    name = data_names.parse_aist("gMH_sGR_c01_d01_d04_mMH3_ch01")
    assert {toy.aist_prompt(clip, rng) for _ in range(40)} == set(name.prompts())


def test_captions_are_true_and_never_tell_the_tempo():
    rng = np.random.default_rng(1)
    for clip in clips(40, True) + clips(40, False):
        for caption in (toy.wild_caption(clip, rng), toy.prior_caption(clip, rng)):
            assert not any(letter.isdigit() for letter in caption)
            said = [name for name in toy_draw.COLOURS if f" {name} shirt" in caption]
            assert said in ([], [clip.shirt])
            assert [s for s in toy.SETTINGS if s in caption] in ([], [clip.setting])
            assert "rabbit" not in caption or "rabbit" in clip.figures


def test_clothes_are_in_most_captions_also_in_the_white_studio():
    rng = np.random.default_rng(2)
    for wild in (False, True):
        share = np.mean(["wearing" in toy.prior_caption(clip, rng) for clip in clips(300, wild)])
        assert share > 0.5


# -------------------------------------------------------------------------------------------------------------- command


def run_toy(monkeypatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["toy.py", *args])
    toy.main()


def test_command_writes_aist_files_with_sound_and_the_truth(tmp_path, monkeypatch, capsys):
    out = tmp_path / "aist"
    run_toy(monkeypatch, "--out", str(out), "--clips", "2", "--seconds", "1.2")
    truth = json.loads((out / "truth.json").read_text())
    assert {path.name for path in out.iterdir()} == {*truth, "truth.json"}
    for name, facts in truth.items():
        clip = facts["clip"]
        parsed = data_names.parse_aist(name.removesuffix(".mp4"))
        assert (parsed.genre, parsed.situation, parsed.camera, parsed.bpm) == (
            clip["genre"], clip["situation"], clip["camera"], clip["bpm"])  # fmt: skip
        assert [f"{'fe' * (d in data_names.FEMALE)}male dancer" for d in parsed.dancers] == clip["figures"]
        assert media.read_video(out / name).shape == (36, 96, 96, 3)
        heard = media.read_audio(out / name, 16000)
        played = toy.music(Clip(**clip), 0.0, 1.2)
        assert np.corrcoef(heard[: len(played)], played[: len(heard)])[0, 1] > 0.9
        assert len(facts["head_px"]) == 36
        np.testing.assert_allclose(facts["beats_s"], toy.beat_times(Clip(**clip), 1.2), atol=1e-6)
    assert str(out) in capsys.readouterr().out


def test_wild_half_has_a_caption_beside_each_clip(tmp_path, monkeypatch):
    run_toy(monkeypatch, "--out", str(tmp_path / "wild"), "--clips", "2", "--seconds", "1", "--wild")
    names = sorted(path.name for path in (tmp_path / "wild").iterdir())
    assert names == ["truth.json", "wild_000000.mp4", "wild_000000.txt", "wild_000001.mp4", "wild_000001.txt"]
    assert "dancing" in (tmp_path / "wild/wild_000000.txt").read_text()


def test_all_sixty_tracks_come_equally_often_and_no_name_twice(tmp_path):
    drawn = list(toy.dataset(toy.ToyConfig(tmp_path, clips=180)))
    names = [name for name, _, _ in drawn]
    assert len(set(names)) == 180
    tracks = [data_names.parse_aist(name.removesuffix(".mp4")).music for name in names]
    assert all(tracks.count(track) == 3 for track in toy.TRACKS)


@pytest.mark.parametrize("wild", [False, True])
def test_no_data_set_shows_or_names_a_subject_that_is_held_back(tmp_path, wild):
    drawn = list(toy.dataset(toy.ToyConfig(tmp_path, clips=300, wild=wild)))
    for name, clip, rng in drawn:
        assert "rabbit" not in clip.figures and toy.HELD_BACK.get(clip.shirt) != clip.trousers
        said = toy.wild_caption(clip, rng) + name
        assert "rabbit" not in said
        assert not [a for a, b in toy.HELD_BACK.items() if f"{a} shirt" in said and f"{b} trousers" in said]
    visible = set(toy.visible_colours(toy.WHITE_STUDIO)) if not wild else set(toy_draw.COLOURS)
    assert {clip.shirt for _, clip, _ in drawn} == {clip.trousers for _, clip, _ in drawn} == visible


def test_the_world_of_the_prior_has_every_subject_that_is_held_back():
    world = clips(400, False) + clips(400, True)
    assert any("rabbit" in clip.figures for clip in world)
    assert {clip.shirt for clip in world if toy.HELD_BACK.get(clip.shirt) == clip.trousers} == set(toy.HELD_BACK)


def test_command_refuses_a_folder_that_is_not_empty(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(config.UserError, match="not an empty folder"):
        run_toy(monkeypatch, "--out", str(tmp_path), "--clips", "1")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_failed_run_leaves_nothing_behind(tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # writing more fails as on a full disk
    try:
        with pytest.raises(config.UserError, match="cannot be written"):
            run_toy(monkeypatch, "--out", str(tmp_path / "aist"), "--clips", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_nonsense_sizes_are_refused():
    for wrong in ({"clips": 0}, {"seconds": 0.1}, {"size": 63}, {"size": 2}, {"seed": -1}):
        with pytest.raises(config.UserError, match="expected"):
            toy.ToyConfig(out="x", **wrong)
