"""The commands generate, beats and table: tiny weights, toy clips whose beats are known, invented scores."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from test_model import tiny_adapters, trained
from tiny import AUDIO_DIM, FRAMES, SIZE, make_tiny_weights, write_video

import beats
import evaluate
import grid
import media
import mochi_vae
import tables
import tensors
import toy
from config import UserError
from data_names import TEST_TRACKS
from judge import sign_flip_p
from mochi_dit import load_dit
from model import MusicInfuser, save_adapter
from questions import DANCE, QUESTIONS, VIDEO, find_clips


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    evaluate.main()


# ------------------------------------------------------------------------------------------------------ the grid


def test_the_grid_is_the_ten_test_tracks_times_the_ten_prompts_of_table_9():
    videos = grid.grid()
    assert len(videos) == 100 == len({v["name"] for v in videos})
    assert {v["track"] for v in videos} == TEST_TRACKS and len({v["prompt"] for v in videos}) == 10
    assert all(v["prompt"].endswith(", captured from a front view") for v in videos)
    assert videos[8]["prompt"] == (
        "a male dancer wearing a chef's uniform dancing in a busy restaurant kitchen with flames from the grill behind "
        "him, captured from a front view"
    )


def test_the_parts_of_a_divided_grid_cover_it_once():
    names = [v["name"] for v in grid.grid()]
    for n in (1, 3, 8):
        divisions = [grid.GenerateConfig(music=None, out=None, part=f"{i}/{n}").division() for i in range(1, n + 1)]
        parts = [name for first, stride in divisions for name in names[first::stride]]
        assert sorted(parts) == sorted(names)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "-1/2", "1/", "1/2/3"])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(UserError, match="expected i/n"):
        grid.GenerateConfig(music=None, out=None, part=part)


@pytest.mark.parametrize("frames, words", [(74, "use 73 or 79"), (0, "use 1 or 7")])
def test_a_wrong_frame_count_names_the_valid_ones(frames, words):
    with pytest.raises(UserError, match=words):
        grid.GenerateConfig(music=None, out=None, frames=frames)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Tiny weights with a trained adapter, and music: one file by its track's name, one AIST video."""
    folder = tmp_path_factory.mktemp("grid")
    weights = make_tiny_weights(folder / "weights")
    dit = load_dit(weights / "dit.safetensors")
    adapters = tiny_adapters(dit, layers=(0, 1), audio_dim=AUDIO_DIM)
    save_adapter(trained(MusicInfuser(dit, adapters)), weights / "musicinfuser.safetensors")
    write_video(folder / "music" / "mBR0.mp4", seed=1)
    write_video(folder / "music" / "gPO_sBM_c01_d10_mPO1_ch01.mp4", seed=5)
    return folder


@pytest.fixture
def generate(shared, monkeypatch, tmp_path):
    """Generate a grid of two tracks and two prompts: generate(*flags) -> the folder of videos."""
    monkeypatch.setattr(grid, "TEST_TRACKS", frozenset(("mBR0", "mPO1")))
    monkeypatch.setattr(grid, "PROMPTS", ("a dancer", "a studio"))
    monkeypatch.setattr(grid, "WATCHABLE", 16)

    def start(*flags, out=tmp_path / "ours"):
        flags = [*flags, "--weights", shared / "weights", "--music", shared / "music", "--out", out]
        run(monkeypatch, "generate", *flags, "--frames", FRAMES, "--steps", 2, "--device", "cpu")
        return out

    return start


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.mp4"))}


def test_a_grid_in_parts_equals_one_in_one_go_and_each_video_is_its_own(generate, tmp_path):
    whole = content(generate())
    for part in ("2/2", "1/2"):
        divided = generate("--part", part, out=tmp_path / "divided")
    assert list(whole) == ["mBR0_p00.mp4", "mBR0_p01.mp4", "mPO1_p00.mp4", "mPO1_p01.mp4"]
    assert content(divided) == whole and len(set(whole.values())) == 4
    info = media.video_info(divided / "mBR0_p00.mp4")
    assert (info.width, info.height, info.has_audio) == (SIZE, SIZE, True)
    assert info.dur_s == pytest.approx(FRAMES / 30, abs=0.01)
    assert [clip.prompt for clip in find_clips(divided)] == ["a dancer", "a studio"] * 2


def test_an_interrupted_grid_goes_on_with_its_latents_and_videos(generate, monkeypatch):
    sampled, decoded = [], []
    sample, write = grid.sample, media.write_mp4

    def counted(*given, **named):
        sampled.append(1)
        if len(sampled) == 3:
            raise KeyboardInterrupt
        return sample(*given, **named)

    def breaking(path, *given):
        decoded.append(path.name)
        if len(decoded) == 2:
            raise KeyboardInterrupt
        return write(path, *given)

    monkeypatch.setattr(grid, "sample", counted)
    monkeypatch.setattr(media, "write_mp4", breaking)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            generate()
    assert len(sampled) == 5  # two were kept; the third was asked for again
    folder = generate()
    assert len(sampled) == 5 and len(content(folder)) == 4 and len(decoded) == 5
    assert not list((folder / "latents").glob("*.safetensors"))
    generate()
    assert len(sampled) == 5 and len(decoded) == 5


def test_other_settings_do_not_mix_with_the_videos_of_a_folder(generate):
    generate()
    with pytest.raises(UserError, match="made with other settings"):
        generate("--seed", 1)


def test_every_network_is_read_once_for_the_whole_grid(generate, monkeypatch):
    read = []
    for module, name in ((grid, "encode_text"), (grid, "load_musicinfuser"), (mochi_vae, "load_decoder")):
        load = getattr(module, name)

        def counted(*given, load=load, name=name, **named):
            if "meta" not in given:  # which reads the header only
                read.append(name)
            return load(*given, **named)

        monkeypatch.setattr(module, name, counted)
    generate()
    assert read == ["encode_text", "load_musicinfuser", "load_decoder"]


@pytest.fixture
def latents_of(generate, monkeypatch, tmp_path):
    """latents_of(name, *flags) -> {file name: z_dit} of a grid that is stopped before it decodes."""

    def start(name, *flags):
        def stopping(*given):
            raise KeyboardInterrupt

        monkeypatch.setattr(mochi_vae.Decoder, "stream", stopping)
        with pytest.raises(KeyboardInterrupt):
            generate(*flags, out=tmp_path / name)
        files = sorted((tmp_path / name / "latents").glob("*.safetensors"))
        return {file.name: tensors.open_weights(file).read("z_dit") for file in files}

    return start


def test_a_batch_makes_each_videos_own_latents(latents_of):
    alone, together = latents_of("alone"), latents_of("together", "--batch", 3)
    assert list(alone) == list(together) and len(alone) == 4
    for name in alone:
        assert torch.allclose(alone[name], together[name], atol=1e-5)
        others = [z for other, z in alone.items() if other != name]
        assert all((alone[name] - z).abs().max() > 0.01 for z in others)


def test_processes_of_torchrun_divide_the_grid_among_them(generate, monkeypatch, tmp_path):
    whole, made = content(generate()), []
    for rank in range(3):
        monkeypatch.setattr(grid, "join_others", lambda name, rank=rank: (rank, 3, torch.device("cpu")))
        made.append(len(content(generate(out=tmp_path / "shared"))))
    assert made == [2, 3, 4] and content(tmp_path / "shared") == whole


def test_other_weights_under_the_same_name_do_not_mix_with_the_videos_of_a_folder(generate, shared, monkeypatch):
    generate()
    monkeypatch.setattr(grid, "fingerprint_weights", lambda path: "other")
    with pytest.raises(UserError, match="made with other settings"):
        generate()


def test_a_video_that_fails_is_named_left_out_and_the_others_are_made(generate, monkeypatch, tmp_path):
    sample, count = grid.sample, []
    monkeypatch.setattr(
        grid, "sample", lambda *a, **k: sample(*a, **k) * (float("nan") if count.append(1) or len(count) == 2 else 1)
    )
    with pytest.raises(UserError, match="1 videos failed: mBR0_p01"):
        generate()
    assert list(content(tmp_path / "ours")) == ["mBR0_p00.mp4", "mPO1_p00.mp4", "mPO1_p01.mp4"]


def test_music_and_prompt_and_seed_each_change_the_video(generate, tmp_path, shared):
    ours = content(generate())
    deaf = content(generate("--adapter", "none", out=tmp_path / "deaf"))
    other = content(generate("--seed", 1, out=tmp_path / "other"))
    assert all(ours[name] != deaf[name] != other[name] for name in ours)


def test_a_missing_track_is_named(shared):
    assert grid.find_track(shared / "music", "mBR0").name == "mBR0.mp4"
    assert grid.find_track(shared / "music", "mPO1").name == "gPO_sBM_c01_d10_mPO1_ch01.mp4"
    with pytest.raises(UserError, match="no mJB5.mp3"):
        grid.find_track(shared / "music", "mJB5")


# --------------------------------------------------------------------------------------------------------- beats


@pytest.fixture(scope="module")
def danced():
    """Twelve true clips of four seconds, all genres and views: (clip, motion beats from pixels, true beats)."""
    out = []
    for k in range(12):
        clip = toy.sample_clip(np.random.default_rng([8, k]))
        motion = beats.motion_beats(beats.body_height(toy.render(clip, 121, 96)), 30)
        out.append((clip, motion, toy.beat_times(clip, 121 / 30)))
    return out


def test_motion_beats_of_true_clips_are_their_beats(danced):
    assert np.mean([beats.precision_recall_f1(motion, true)[2] for _, motion, true in danced]) >= 0.95


@pytest.mark.parametrize("score", ["bas_motion", "bas_music", "f1"])
def test_alignment_falls_as_the_sound_is_shifted_by_up_to_half_a_beat(danced, score):
    means = []
    for share in np.linspace(0, 0.5, 6):
        rows = [
            evaluate.agreement(motion, toy.beat_times(shifted(clip, share), 121 / 30), 121 / 30, 0.1)
            for clip, motion, _ in danced
        ]
        means.append(np.mean([row[score] for row in rows]))
    assert (np.diff(means) <= (0 if score == "f1" else -0.01)).all() and means[0] > 0.85 and means[-1] < 0.1


def shifted(clip, share):
    """The clip with its music moved by a share of a beat."""
    return dataclasses.replace(clip, start_s=clip.start_s + share * 60 / clip.bpm)


def test_body_height_follows_a_textured_square_that_bobs():
    rng, t = np.random.default_rng(0), np.arange(60) / 30
    texture = np.kron(rng.uniform(60, 255, (6, 6)), np.ones((4, 4)))
    texture = (texture + np.roll(texture, 1, 0) + np.roll(texture, 1, 1) + np.roll(texture, (1, 1), (0, 1))) / 4
    height = 3 * np.cos(2 * np.pi * 1.5 * t)
    rows = np.arange(64)
    frames = np.zeros((60, 64, 64, 3), np.uint8)
    for frame, h in zip(frames, height):
        moved = np.stack([np.interp(rows + h - 20, np.arange(24), column, 0, 0) for column in texture.T], axis=1)
        frame[:, 20:44] = moved[:, :, None].round()
    found = beats.body_height(frames)
    assert np.corrcoef(found, height)[0, 1] > 0.99 and found.std() == pytest.approx(height.std(), rel=0.35)


def test_a_picture_that_stands_still_has_no_height_and_no_beats():
    frames = np.full((20, 16, 16, 3), 90, np.uint8)
    assert (beats.body_height(frames) == 0).all()
    assert len(beats.motion_beats(beats.body_height(frames), 30)) == 0


def test_chance_lies_below_alignment_for_a_dance_on_the_beat_and_at_it_for_one_that_is_not():
    music = np.arange(0.2, 8, 0.5)
    on = evaluate.agreement(music, music, 8.0, 0.05)
    assert on["bas_motion"] == 1 and on["f1"] == 1 and on["chance"]["f1"] < 0.5 and on["phasor"][0] == pytest.approx(1)
    rng = np.random.default_rng(0)
    rows = {str(k): evaluate.agreement(np.sort(rng.uniform(0, 8, 16)), music, 8.0, 0.05) for k in range(60)}
    total = evaluate.summary(rows)
    for key in evaluate.SCORES:
        low, high = total[key]["above_chance"]
        assert low < 0.02 and high > -0.02
    assert total["phase_locking"]["mean"] < 0.3


def test_videos_without_any_beat_are_counted_aloud(monkeypatch, tmp_path, capsys):
    still = tmp_path / "still.mp4"
    media.write_mp4(still, np.zeros((30, 16, 16, 3), np.uint8), 30, np.zeros(16000, np.float32), 16000)
    run(monkeypatch, "beats", still, "--out", tmp_path)
    out = capsys.readouterr().out
    assert "1 of 1 videos have no music beat" in out and "1 of 1 videos have no motion beat" in out


def test_beats_writes_a_picture_a_video_and_every_number(monkeypatch, tmp_path, capsys):
    clip = toy.sample_clip(np.random.default_rng(1), track_name="mWA2")
    video = tmp_path / "gWA_sBM_c01_d04_mWA2_ch01.mp4"
    media.write_mp4(video, toy.render(clip, 90, 96), 30, toy.music(clip, 0.0, 3.0), 16000)
    mute = write_video(tmp_path / "mute.mp4", sound=False)
    with pytest.raises(UserError, match="1 of 2 videos failed.*no sound"):
        run(monkeypatch, "beats", video, mute, "--out", tmp_path / "png", "--json", tmp_path / "b.json")
    data = json.loads((tmp_path / "b.json").read_text())
    row = data["videos"][str(video)]
    assert row["bpm_expected"] == 100 and row["bpm"] == pytest.approx(100, rel=0.03)
    assert row["motion_bpm"] == pytest.approx(100, rel=0.03)
    assert set(evaluate.SCORES) < set(row) and list(data["failed"]) == [str(tmp_path / "mute.mp4")]
    assert (tmp_path / "png" / f"{video.stem}.png").read_bytes()[:4] == b"\x89PNG"
    assert "chance" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("number", "12346")
def test_the_averages_of_the_papers_tables_follow_from_their_columns_as_ours_do(number):
    checked = 0
    for row in tables.PUBLISHED["tables"][number].values():
        for average in row.keys() & tables.AVERAGES.keys():
            scores = {"v": {question: row[question] for question in tables.AVERAGES[average]}}
            assert tables.cell(scores, average)["mean"] == pytest.approx(
                row[average], abs=0.01
            )  # columns and average are rounded
            checked += 1
    assert checked == {"1": 30, "2": 4, "3": 4, "4": 5, "6": 18}[number]


def scores(n, base, rng, questions=QUESTIONS):
    return {f"mBR0_p{k:02d}": {q: float(np.clip(base + rng.normal(), 0, 10)) for q in questions} for k in range(n)}


def write_result(folder, scores, **more):
    folder.mkdir()
    result = {"judge": "m", "expected": 12, "gaps": {}, "asked": 99, "missing": 1, "scores": scores, "verdict": "hears"}
    (folder / "judge.json").write_text(json.dumps(result | more))
    return folder


def test_a_missing_answer_and_a_missing_video_leave_the_mean_of_the_others():
    one, other = dict.fromkeys(QUESTIONS, 8.0), dict.fromkeys(QUESTIONS, 6.0)
    assert tables.cell({"a": one, "b": other | {"imaging_quality": None}}, "imaging_quality")["mean"] == 8
    cell = tables.cell({"a": one, "b": other | {"imaging_quality": None}}, "video")
    assert cell["mean"] == pytest.approx((8 + 7 + 7) / 3) and cell["videos"] == 2
    assert tables.cell({"a": {"imaging_quality": None}}, "imaging_quality") is None
    assert tables.cell({"a": one | {"style_capture": None}}, "prompt") is None and tables.cell({}, "dance") is None


def test_the_interval_of_a_mean_is_that_of_the_bootstrap_over_videos():
    rng = np.random.default_rng(3)
    given = scores(80, 5, rng)
    x = np.array([[row[q] for q in DANCE] for row in given.values()]).mean(axis=1)
    low, high = tables.cell(given, "dance")["interval"]
    assert (low, high) == pytest.approx(beats.bootstrap_interval(x), abs=0.02)
    assert high - low == pytest.approx(2 * 1.96 * x.std() / np.sqrt(80), rel=0.15)


def test_configurations_are_compared_on_the_videos_and_questions_that_both_have():
    rng = np.random.default_rng(4)
    a, b = scores(12, 5, rng), scores(12, 6, rng)
    b["mBR0_p00"]["style_alignment"] = None
    del a["mBR0_p01"]
    found = tables.paired(a, b, "dance")
    d = [np.mean([b[n][q] - a[n][q] for q in DANCE if b[n][q] is not None]) for n in a]
    assert found["videos"] == 11 and found["difference"] == pytest.approx(np.mean(d))
    assert found["p"] == sign_flip_p(d, two_sided=True)


def test_table_puts_the_papers_numbers_beside_ours_counts_gaps_and_draws(monkeypatch, tmp_path, capsys):
    rng = np.random.default_rng(5)
    ours = write_result(tmp_path / "ours", scores(12, 8, rng))
    fewer = {name: row for name, row in scores(12, 6, rng).items() if name not in ("mBR0_p03", "mBR0_p04")}
    other = write_result(tmp_path / "all_layers", fewer, gaps={"mBR0_p03": "no such file", "mBR0_p04": "broken"})
    run(monkeypatch, "table", ours, other / "judge.json", "--out", tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    for number in range(1, 7):
        assert f"## Table {number}" in text
    first = text[text.index("## Table 1") : text.index("## Table 2")]
    assert "| *paper: MusicInfuser* | 8.95 | 9.54 | 10.00 |" in first and "| *paper: All layers* | 8.37 |" in first
    assert "| 12 of 12 |" in first and "| 10 of 12 |" in first
    assert "| all_layers | 2 | 1 of 99 |" in text
    second = text[text.index("## Table 2") : text.index("## Table 3")]
    assert "*paper: Ground truth*" in second and "8.01" in second
    data = json.loads((tmp_path / "out" / "table.json").read_text())
    cell = data["cells"]["all_layers"]["style_alignment"]
    assert cell["videos"] == 10
    assert cell["mean"] == pytest.approx(np.mean([row["style_alignment"] for row in fewer.values()]))
    assert all(test["videos"] == 10 and test["difference"] < 0 for test in data["tests"])
    assert len(data["tests"]) == 4 and data["tests"][0]["p_corrected"] < 0.05
    assert (tmp_path / "out" / "table.png").read_bytes()[:4] == b"\x89PNG"


def test_videos_without_a_prompt_leave_table_4_open_and_vbench_is_added(monkeypatch, tmp_path):
    folder = write_result(tmp_path / "ground_truth", scores(6, 8, np.random.default_rng(6), [*DANCE, *VIDEO]))
    vbench = {"judge": "MUSIQ", "expected": 6, "gaps": {}, "scores": {"mBR0_p00": {"vbench_imaging": 0.71}}}
    (folder / "vbench.json").write_text(json.dumps(vbench))
    run(monkeypatch, "table", folder, "--out", tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| **ground_truth** | - | - | - | - | 6 of 12 |" in text
    assert "| **ground_truth** | 0.7100 [0.7100, 0.7100] | - | 1 |" in text


@pytest.mark.parametrize("text", ["[]", "{", '{"scores": 3}', '{"scores": {"a": {"dance": 11}}}',
                                  '{"scores": {"a": {"dance": "x"}}}', '{"scores": {}}'])  # fmt: skip
def test_a_file_that_is_no_result_is_named(monkeypatch, tmp_path, text):
    (tmp_path / "judge.json").write_text(text)
    with pytest.raises(UserError, match="judge.json"):
        run(monkeypatch, "table", tmp_path)


def test_mistakes_at_the_keyboard_are_named(monkeypatch, tmp_path):
    for argv, words in (
        (["dance"], "no such command"),
        (["table"], "expected the folders"),
        (["table", tmp_path / "nowhere"], "cannot be read"),
        (["beats"], "expected videos"),
        (["beats", "x.mp4", "--motion", "knees"], "height or energy"),
        (["beats", "x.mp4", "--json", tmp_path], "expected a file name"),
        (["generate", "--music", tmp_path / "nowhere", "--out", tmp_path], "no such folder"),
        (["ab", "--tally"], "expected the files"),
    ):
        with pytest.raises(UserError, match=words):
            run(monkeypatch, *argv)


def test_latents_hold_the_shape_that_the_decoder_reads(latents_of):
    z = latents_of("ours")["mBR0_p00.safetensors"]
    assert z.shape == (1, 12, (FRAMES - 1) // 6 + 1, SIZE // 8, SIZE // 8)
