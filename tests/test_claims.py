"""The command end to end on tiny networks, what it asks for, and that it goes on where it stopped."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import AUDIO_DIM, make_tiny_weights, write_video

import claims
import claims_look
import claims_music
import claims_studio
import claims_table
import media
import toy
import train
from claims_score import FPS, Row, true_beats
from claims_studio import FRAMES, ClaimsConfig, Studio, music_of, prompt_of, solo_clips
from config import UserError
from mochi_dit import load_dit
from model import Adapters, MusicInfuser, save_adapter

TINY = ["--clips", "4", "--batch", "3", "--steps", "1", "--examples", "20", "--jobs", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Tiny networks with a fresh adapter of each form."""
    folder = make_tiny_weights(tmp_path_factory.mktemp("weights"))
    for name, form in (("musicinfuser", "aligned"), ("published", "published"), ("add", "add")):
        dit = load_dit(folder / "dit.safetensors")
        adapters = Adapters(dit, (0, 1), AUDIO_DIM, rank=2, alpha=2, form=form)
        save_adapter(MusicInfuser(dit, adapters), folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def studio(weights):
    return Studio(ClaimsConfig(weights=weights, clips=4, batch=3, steps=1, examples=20, jobs=1, device="cpu"))


def run_claims(monkeypatch, weights, out, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["claims.py", *args, "--weights", str(weights), "--out", str(out), *TINY])
    claims.main()


# ------------------------------------------------------------------------------------------------------ what is asked


def test_every_clip_is_a_solo_in_the_white_studio_to_a_track_of_its_own():
    clips = solo_clips(ClaimsConfig(clips=16))
    assert len({(clip.genre, clip.bpm, clip.music_seed) for clip in clips}) == len(clips)
    assert all(clip.camera == 1 and len(clip.figures) == 1 and clip.setting == toy.WHITE_STUDIO for clip in clips)
    assert {clip.figures[0] for clip in clips} == {"male dancer", "female dancer"}
    assert not any(map(toy.held_back, clips)) and solo_clips(ClaimsConfig(clips=16)) == clips


def test_prompts_name_dancers_clothes_genre_place_and_view():
    clip = replace(solo_clips(ClaimsConfig())[0], genre="HO", shirt="orange", trousers="blue")
    assert prompt_of(replace(clip, figures=("male dancer",))) == (
        "a professional male dancer wearing an orange shirt and blue trousers dancing House "
        "in a studio with a white backdrop, captured from a front view"
    )
    three = replace(clip, figures=("rabbit", "male dancer", "rabbit"), camera=5, setting="on a beach")
    assert prompt_of(three) == (
        "a rabbit, a male dancer and a rabbit wearing orange shirts and blue trousers dancing House "
        "on a beach, captured from a back view"
    )


def test_the_beats_scored_against_reach_one_beat_beyond_the_clip():
    for clip in solo_clips(ClaimsConfig(clips=8)):
        music = true_beats(clip, FRAMES)
        assert np.allclose(np.diff(music), 60 / clip.bpm)
        assert music[0] < 0 <= music[1] and music[-2] < FRAMES / FPS <= music[-1] + 1e-9


def test_music_played_faster_is_that_of_a_clip_with_more_beats_a_minute():
    clip = solo_clips(ClaimsConfig(), bpm=(100, 115))[0]
    (usual,), (fast,) = music_of([clip]), music_of([clip], speed=1.25)
    assert 100 <= clip.bpm <= 115 and len(usual) == len(fast)
    at = np.arange(0, len(fast) * 4 // 5, 7)
    assert np.corrcoef(fast[at], np.interp(at * 1.25, np.arange(len(usual)), usual))[0, 1] > 0.8


def test_the_noise_of_a_clip_does_not_depend_on_the_batch(studio):
    clips = solo_clips(studio.cfg)
    prompts, waves = [prompt_of(clip) for clip in clips], music_of(clips, 7)
    (dancer,) = claims_studio.find_dancers(studio.cfg)
    four = studio.dance(dancer, prompts, waves, 7)
    last = studio.dance(dancer, prompts[3:], waves[3:], 7, seeds=[3])
    assert len(four) == 4 and four[0].shape == (7, 16, 16, 3)
    assert np.abs(four[3].astype(int) - last[0]).max() <= 1


def test_adapters_are_called_by_their_form_and_two_of_a_form_by_their_file(weights, tmp_path):
    names = "musicinfuser.safetensors, published.safetensors,add.safetensors"
    labels = [d.label for d in claims_studio.find_dancers(ClaimsConfig(weights=weights, adapters=names))]
    assert labels == ["time-aligned ZICA", "published ZICA", "feature addition"]
    other = tmp_path / "other.safetensors"
    other.write_bytes((weights / "add.safetensors").read_bytes())
    twice = claims_studio.find_dancers(ClaimsConfig(weights=weights, adapters=f"add.safetensors,{other}"))
    assert len({d.label for d in twice}) == 2 and all(d.label.startswith("feature addition (") for d in twice)
    with pytest.raises(UserError, match="no such adapter"):
        claims_studio.find_dancers(ClaimsConfig(weights=weights, adapters="none.safetensors"))


# ------------------------------------------------------------------------------------------------------ each claim


@pytest.mark.parametrize("claim", [c for c in claims.CLAIMS if c not in claims.NEED_DATA])
def test_every_claim_gives_rows_of_finite_numbers_beside_their_intervals(studio, claim, monkeypatch):
    monkeypatch.setattr(claims_music, "LONGER", (25,))
    rows = claims.CLAIMS[claim](studio, claims_studio.find_dancers(studio.cfg))
    assert rows and all(isinstance(row, Row) for row in rows)
    assert len({(row.what, row.measure) for row in rows}) == len(rows)
    assert all(row.interval is None or row.interval[0] <= row.interval[1] for row in rows)
    assert {"time-aligned ZICA"} <= {part for row in rows for part in row.what.split(", ")}


def test_a_sampler_that_draws_the_true_clips_keeps_every_prompt_and_the_beat(studio, monkeypatch):
    true, asked = Studio(replace(studio.cfg, clips=6)), {}
    true.size = 64

    def remember(clip):
        asked[prompt := prompt_of(clip) + str(clip)] = clip
        return prompt

    for module in (claims_look, claims_music):
        monkeypatch.setattr(module, "prompt_of", remember)
    monkeypatch.setattr(true, "dance", lambda dancer, prompts, *_: true.true([asked[p] for p in prompts]))
    monkeypatch.setattr(true, "rebuild", lambda videos: videos)
    dancers = claims_studio.find_dancers(true.cfg)
    listens = claims_music.listens(true, dancers)
    assert all(row.value > 0.95 > row.chance for row in listens if row.measure in ("BAS", "PLV"))
    rows = claims_look.attribute_rows(true, dancers, solo_clips(true.cfg), ("shirt", "trousers", "setting"), "", True)
    assert all(row.value > 0.95 for row in rows) and len(rows) == 3 * 3 + 4
    speed = [row for row in claims_music.speed(true, dancers) if row.measure.startswith("tempo")]
    assert [round(row.ceiling, 2) for row in speed] == [0.75, 1.0, 1.25]
    assert all(abs(row.value - 1) < 0.02 for row in speed)  # the true clips do not hear the change


def test_recordings_are_cut_into_sections_with_their_beats(studio, tmp_path, monkeypatch):
    clip = replace(solo_clips(studio.cfg)[0], genre="HO", bpm=120.0, start_s=0.0)
    sound = toy.music(clip, 0.0, 24.0)
    media.write_mp4(tmp_path / "song.mp4", [np.zeros((16, 16, 3), np.uint8)] * 720, 30, sound, 16000)
    media.write_mp4(tmp_path / "short.mp4", [np.zeros((16, 16, 3), np.uint8)] * 90, 30, sound[:48000], 16000)
    heard = Studio(replace(studio.cfg, music=tmp_path))
    sections, tracks = claims_music.recorded(heard)
    assert tracks == 1 and len(sections) > 1
    for wave, times in sections:
        assert len(wave) == len(music_of([clip])[0]) and np.abs(np.diff(times) - 0.5).max() < 0.06
        assert times[0] < 0 and times[-1] > 2.4
    with pytest.raises(UserError, match="no recording"):
        (tmp_path / "empty").mkdir()
        claims_music.recorded(Studio(replace(studio.cfg, music=tmp_path / "empty")))


# ------------------------------------------------------------------------------------------------------ the command


def test_a_finished_claim_is_not_measured_again_and_a_changed_one_is(monkeypatch, weights, tmp_path, capsys):
    calls = []

    def fake(studio, dancers):
        """Something that is measured."""
        calls.append(studio.cfg.clips)
        return [Row("x", "y", 0.5, (0.4, 0.6), 0.1, 1.0)]

    monkeypatch.setitem(claims.CLAIMS, "listens", fake)
    run_claims(monkeypatch, weights, tmp_path, "listens")
    run_claims(monkeypatch, weights, tmp_path, "listens")
    assert calls == [4]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seed", "1"])
    claims.main()
    assert calls == [4, 4]
    result = json.loads((tmp_path / "listens.json").read_text())
    assert result["rows"][0]["value"] == 0.5 and "--seed 1" in result["command"] and "listens" in result["command"]
    table = (tmp_path / "claims.md").read_text()
    assert "| x | y | 0.500 | 0.400 ... 0.600 | 0.100 | 1.000 |" in table and "Something that is measured." in table
    assert table in capsys.readouterr().out


def test_a_claim_that_fails_is_recorded_and_the_others_are_measured(monkeypatch, weights, tmp_path):
    def broken(studio, dancers):
        """Never works."""
        raise RuntimeError("no luck")

    def fine(studio, dancers):
        """Works."""
        return [Row("x", "y", 1.0)]

    monkeypatch.setitem(claims.CLAIMS, "listens", broken)
    monkeypatch.setitem(claims.CLAIMS, "speed", fine)
    for _ in range(2):  # a failed one is tried again
        with pytest.raises(SystemExit) as stop:
            run_claims(monkeypatch, weights, tmp_path, "listens", "speed")
        assert stop.value.code == 1
    assert "no luck" in json.loads((tmp_path / "listens.json").read_text())["failed"]
    assert json.loads((tmp_path / "speed.json").read_text())["failed"] is None
    assert "Incomplete: RuntimeError: no luck" in (tmp_path / "claims.md").read_text()


def test_mistakes_are_refused_before_anything_is_measured(monkeypatch, weights, tmp_path):
    with pytest.raises(UserError, match="listen: no such claim"):
        run_claims(monkeypatch, weights, tmp_path / "out", "listen")
    with pytest.raises(UserError, match="--data"):
        run_claims(monkeypatch, weights, tmp_path / "out", "table1")
    with pytest.raises(UserError, match="layer_select.py"):
        run_claims(monkeypatch, weights, tmp_path / "out", "layers", "--data", str(tmp_path))
    with pytest.raises(UserError, match="nowhere.json: expected"):
        run_claims(monkeypatch, weights, tmp_path / "out", "listens", "--layers", "nowhere.json")
    for wrong in ({"clips": 3}, {"jobs": 0}, {"dtype": "float16"}, {"seeds": 0}):
        with pytest.raises(UserError, match="expected"):
            ClaimsConfig(**wrong)
    assert not (tmp_path / "out").exists()


def test_the_command_beside_a_claim_has_the_flags_that_matter_to_it_and_no_others():
    cfg = ClaimsConfig(clips=32, steps=12, music=Path("songs"), data=Path("aist"), seeds=2, out=Path("there"), jobs=1)
    shared = "python claims.py {} --clips 32 --steps 12"
    assert claims.command_of(cfg, "longer") == shared.format("longer")
    assert claims.command_of(cfg, "unheard") == shared.format("unheard") + " --music songs"
    assert claims.command_of(cfg, "table1") == shared.format("table1") + " --data aist --seeds 2"


# ------------------------------------------------------------------------------------------------------ the tables


@pytest.fixture(scope="module")
def tables(weights, tmp_path_factory):
    """A studio with a little data to train on, and two variants."""
    folder = tmp_path_factory.mktemp("data")
    for i, name in enumerate(("gBR_sBM_c01_d04_mBR1_ch01", "gPO_sFM_c01_d10_mPO2_ch03", "gLH_sBM_c01_d16_mLH4_ch02")):
        write_video(folder / f"{name}.mp4", dur_s=2.6, seed=i)
    cfg = ClaimsConfig(
        weights=weights, data=folder, clips=4, batch=4, steps=1, jobs=1, device="cpu", dtype="float32", seeds=2,
        train_steps=2, train_batch=2, out=folder / "out",
    )  # fmt: skip
    return Studio(cfg)


def test_each_training_is_done_once_and_rows_are_means_over_seeds(tables, monkeypatch):
    monkeypatch.setattr(claims_table, "ProcessPoolExecutor", Here)
    depth = claims_table.depth_of(tables.cfg)
    same = {"layers": ",".join(map(str, range(depth)))}  # in other words
    changes = {"ours: time-aligned": {}, "all by number": same, "feature addition": {"form": "add"}}
    rows = claims_table.rows_of(tables, changes)
    assert {(row.what, row.measure) for row in rows} == {(w, m) for w in changes for m in claims_table.MEASURES}
    files = sorted(tables.cfg.out.rglob("scores-*.json"))
    assert len(files) == 4
    added = {claims_table.config_of(tables.cfg, {"form": "add"}, seed).out for seed in range(2)}
    told = [json.loads(file.read_text()) for file in files if file.parent in added]
    assert len(told) == 2
    (row,) = [row for row in rows if (row.what, row.measure) == ("feature addition", "PLV")]
    assert row.value == pytest.approx(np.mean([scores["PLV"] for scores in told])) and row.interval is not None
    monkeypatch.setattr(claims_table, "train", None)  # would fail if called
    assert claims_table.rows_of(tables, changes) == rows


def test_a_training_that_fails_is_named_and_the_other_rows_stay(tables, monkeypatch):
    monkeypatch.setattr(claims_table, "ProcessPoolExecutor", Here)
    with pytest.raises(claims_table.Incomplete, match="broken: UserError") as caught:
        claims_table.rows_of(tables, {"ours: time-aligned": {}, "broken": {"layers": "99"}})
    assert {row.what for row in caught.value.rows} == {"ours: time-aligned"}


def test_every_variant_of_the_tables_is_a_training_that_train_accepts_and_differs_from_ours(tables):
    runs = {
        name: claims_table.config_of(tables.cfg, change, 0)
        for name, change in (claims_table.TABLE_1 | claims_table.TABLE_4).items()
    }
    ours = runs.pop("ours: time-aligned")
    for name, run in runs.items():
        differ = {f for f in vars(run) if getattr(run, f) != getattr(ours, f)} - {"out"}
        assert len(differ) == (0 if name == "all layers" else 1), name
        assert (run.out == ours.out) == (name == "all layers"), name  # which the recipe is without --layers
    assert isinstance(ours, train.TrainConfig)


def test_a_training_belongs_to_the_layers_in_the_file_not_to_its_name(tables, tmp_path):
    cfg = replace(tables.cfg, layers=tmp_path / "layers.json")
    runs = []
    for layers in ([0, 1], [1, 2], [0, 1]):
        cfg.layers.write_text(json.dumps({"layers": layers}))
        runs.append(claims_table.config_of(cfg, {}, 0))
    assert [run.layers for run in runs] == ["0,1", "1,2", "0,1"]
    assert runs[0].out != runs[1].out and runs[0] == runs[2]


class Here:
    """Stands in for ProcessPoolExecutor: does the work at once, here."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, what, *args):
        from concurrent.futures import Future

        future = Future()
        try:
            future.set_result(what(*args))
        except Exception as error:
            future.set_exception(error)
        return future
