from dataclasses import replace

import numpy as np
import pytest

import claims
import toy
from config import UserError


@pytest.fixture(scope="module")
def clips():
    return claims.unseen_clips(claims.ClaimsConfig(clips=16))


@pytest.fixture(scope="module")
def videos(clips):
    return np.stack([toy.render(clip, claims.FRAMES) for clip in clips])


def test_true_clips_are_on_the_beat_of_their_own_music_and_of_no_other(clips, videos):
    scores = claims.score(videos, clips)
    assert scores["bas"] > 0.95 and scores["plv"] > 0.95 and scores["tempo_error"] < 0.02 and scores["colours"] == 1
    assert scores["bas_other_music"] < 0.6 and scores["plv_other_music"] < 0.5
    assert scores["bas_interval"][0] <= scores["bas"] <= scores["bas_interval"][1]


def test_videos_of_other_clips_score_at_the_level_of_chance(clips, videos):
    scores = claims.score(np.roll(videos, 8, axis=0), clips)
    assert scores["bas"] < 0.65 and scores["plv"] < 0.6 and scores["tempo_error"] > 0.05 and scores["colours"] < 0.5


def test_a_dance_half_a_beat_late_keeps_its_tempo_but_misses_the_beat(clips):
    late = [replace(clip, start_s=clip.start_s - 30 / clip.bpm) for clip in clips]
    scores = claims.score(np.stack([toy.render(clip, claims.FRAMES) for clip in late]), clips)
    assert scores["bas"] < 0.15 and scores["plv"] > 0.95 and scores["tempo_error"] < 0.02


def test_every_clip_is_a_solo_in_the_white_studio_to_a_track_of_its_own(clips):
    assert len({(clip.genre, clip.bpm, clip.music_seed) for clip in clips}) == len(clips)
    assert all(clip.camera == 1 and len(clip.figures) == 1 and clip.setting == toy.WHITE_STUDIO for clip in clips)
    assert {clip.figures[0] for clip in clips} == {"male dancer", "female dancer"}
    assert claims.unseen_clips(claims.ClaimsConfig(clips=16)) == clips


def test_prompts_name_dancer_clothes_genre_and_place(clips):
    clip = replace(clips[0], genre="HO", figures=("male dancer",), shirt="orange", trousers="blue")
    assert claims.caption(clip) == (
        "a professional male dancer wearing an orange shirt and blue trousers dancing House "
        "in a studio with a white backdrop, captured from a front view"
    )


def test_the_beats_scored_against_reach_one_beat_beyond_the_clip(clips):
    for clip in clips:
        music = claims.around(clip)
        assert np.allclose(np.diff(music), 60 / clip.bpm)
        assert music[0] < 0 <= music[1] and music[-2] < claims.FRAMES / claims.FPS <= music[-1] + 1e-9


def test_a_table_row_shows_values_intervals_and_chance():
    scores = {
        "bas": 0.9, "bas_interval": (0.85, 0.95), "bas_other_music": 0.45, "plv": 0.8, "plv_interval": (0.7, 0.9),
        "plv_other_music": 0.1, "tempo_error": 0.012, "colours": 0.97,
    }  # fmt: skip
    told = "| x | 0.900 [0.850, 0.950] | 0.450 | 0.800 [0.700, 0.900] | 0.100 | 1.2% | 97% |"
    assert claims.row("x", scores) == told and claims.HEADER.count("|") == 16


def test_too_few_clips_to_shuffle_are_refused():
    with pytest.raises(UserError, match="--clips 15"):
        claims.ClaimsConfig(clips=15)
