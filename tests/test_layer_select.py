"""Which blocks each strategy of layer_select.py takes, and the command that measures their adaptability."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import SIZE, make_tiny_weights

import config
import layer_score
import layer_select
import toy
import vbench
from config import UserError
from layer_score import colour_fidelity, limb_fidelity, prompt_of, scenes, toy_fidelity
from layer_select import STRATEGIES, halves, most_adaptable, select_layers, spearman
from toy_draw import render
from toy_read import figure_share
from train import choose_layers


def test_a_third_of_48_blocks_by_every_strategy():
    assert select_layers("even", 48, 16) == list(range(0, 48, 3))
    assert select_layers("first", 48, 16) == list(range(16))
    assert select_layers("middle", 48, 16) == list(range(16, 32))
    assert select_layers("last", 48, 16) == list(range(32, 48))
    assert select_layers("all", 48, 16) == list(range(48))


@pytest.mark.parametrize("strategy", ["even", "first", "middle", "last"])
@pytest.mark.parametrize(("depth", "count"), [(1, 1), (7, 3), (6, 2), (5, 5)])
def test_layers_are_ascending_and_as_many_as_wanted(strategy, depth, count):
    layers = select_layers(strategy, depth, count)
    assert len(layers) == count and layers == sorted(set(layers)) and 0 <= layers[0] and layers[-1] < depth


def test_even_layers_lie_equally_far_apart_and_middle_ones_in_the_middle():
    even = select_layers("even", 10, 4)
    assert max(b - a for a, b in zip(even, even[1:])) - min(b - a for a, b in zip(even, even[1:])) <= 1
    assert select_layers("middle", 7, 3) == [2, 3, 4] and select_layers("middle", 6, 3) == [1, 2, 3]


@pytest.mark.parametrize("wrong", [("odd", 6, 2), ("even", 6, 0), ("first", 6, 7), ("all", 6, 7)])
def test_unknown_strategies_and_impossible_counts_are_refused(wrong):
    with pytest.raises(UserError, match=f"of 6 layers by '{wrong[0]}'"):
        select_layers(*wrong)


def test_strategies_are_all_known():
    assert {s: len(select_layers(s, 9, 3)) for s in STRATEGIES} == {
        "all": 9,
        "even": 3,
        "first": 3,
        "middle": 3,
        "last": 3,
    }


def test_most_adaptable_layers_are_those_with_the_highest_scores_in_ascending_order():
    assert most_adaptable([3.0, 9.0, 1.0, 7.0, 8.0], 3) == [1, 3, 4]
    assert most_adaptable([5.0, 5.0, 5.0], 2) == [0, 1]


def test_rank_correlation_looks_at_order_only():
    assert spearman(np.array([1, 2, 3.0]), np.array([10, 500, 501.0])) == pytest.approx(1)
    assert spearman(np.array([1, 2, 3.0]), np.array([3, 2, 1.0])) == pytest.approx(-1)
    assert spearman(np.array([1, 2, 3, 4.0]), np.array([1, 2, 4, 3.0])) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)


def test_halves_agree_when_the_layers_differ_and_not_when_only_the_prompts_do():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(12, 40))
    assert halves(noise + 5 * np.arange(12)[:, None]) > 0.99
    assert abs(halves(noise + rng.normal(size=(1, 40)))) < 0.5


# ---------------------------------------------------------------------------------------------------------- scorers


@pytest.fixture(scope="module")
def dance():
    """A scene and a true video of it, 96 pixels wide."""
    scene = scenes(3)[1]
    return scene, render(scene, 40, 96)


def seen(frames):
    return figure_share(frames[:: layer_score.EVERY]) > 0.5


def test_true_clips_score_higher_than_the_same_blurred_noisy_or_doubled(dance):
    scene, true = dance
    best = toy_fidelity(true, scene)
    assert 80 < best <= 100
    wide = np.pad(true.astype(float), ((0, 0), (2, 2), (2, 2), (0, 0)), "edge")
    blurred = np.mean([wide[:, i : i + 96, j : j + 96] for i in range(5) for j in range(5)], axis=0).astype(np.uint8)
    noisy = (true + np.random.default_rng(0).normal(0, 12, true.shape)).clip(0, 255).astype(np.uint8)
    other = render(replace(scene, dance_seed=scene.dance_seed + 1, start_s=scene.start_s + 0.33), 40, 96)
    doubled = ((true.astype(float) + other) / 2).astype(np.uint8)
    for worse in (blurred, noisy, doubled):
        assert toy_fidelity(worse, scene) < best - 8
    assert toy_fidelity(np.repeat(true[:, :, :1], 96, axis=2), scene) == 0.0, "a backdrop without a dancer"


def test_lost_arms_lower_the_fidelity_of_limbs_but_not_of_colours(dance):
    scene, true = dance
    armless = true.copy()
    armless[:, :, :30], armless[:, :, 66:] = true[:, :, :1], true[:, :, -1:]
    assert limb_fidelity(seen(armless), scene) < limb_fidelity(seen(true), scene) - 0.05
    few = slice(None, None, layer_score.EVERY)
    assert abs(colour_fidelity(armless[few], seen(armless)) - colour_fidelity(true[few], seen(true))) < 0.03


def test_clothes_of_other_colours_than_the_prompts_cost_nothing(dance):
    """The scorer is one of imaging quality: whether the prompt was followed is measured elsewhere."""
    scene, true = dance
    colours = [name for name in toy.visible_colours(scene.setting) if name not in (scene.shirt, scene.trousers)]
    changed = render(replace(scene, shirt=colours[0], trousers=colours[1]), 40, 96)
    assert abs(toy_fidelity(changed, scene) - toy_fidelity(true, scene)) < 8


def test_scenes_are_seen_from_the_front_in_studios_with_all_genres_and_the_same_for_a_seed():
    some = scenes(20, seed=3)
    assert some == scenes(40, seed=3)[:20] and some != scenes(20, seed=4)
    assert {(clip.genre, clip.figures) for clip in some} == {
        (genre, (figure,)) for genre in toy.GENRES for figure in toy.FIGURES[:2]
    }
    assert all(clip.camera == 1 and "studio" in clip.setting and clip.shirt != clip.trousers for clip in some)
    clip = replace(some[0], genre="HO", setting=toy.WHITE_STUDIO, shirt="orange", trousers="blue")
    assert prompt_of(clip) == (
        "a professional female dancer wearing an orange shirt and blue trousers dancing House in a studio with a white "
        "backdrop, captured from a front view"
    )


def test_musiq_is_the_imaging_quality_of_vbench_and_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyiqa", None)  # as if it were not installed
    with pytest.raises(UserError, match="pip install pyiqa"):
        layer_score.make_scorer("musiq", tmp_path, torch.device("cpu"))
    loaded = []
    monkeypatch.setattr(
        vbench, "load_imaging", lambda *where: loaded.append(where) or (lambda x: x.mean((1, 2, 3)) / 255)
    )
    score = layer_score.make_scorer("musiq", tmp_path, torch.device("cpu"))
    assert loaded == [(tmp_path, torch.device("cpu"))]
    frames = np.zeros((7, 16, 16, 3), np.uint8)
    frames[[0, 3, 6]] = np.array([51, 102, 0], np.uint8)[:, None, None, None]
    assert score(frames, None) == pytest.approx(20), "of every third frame"


# ---------------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_tiny_weights(tmp_path_factory.mktemp("tiny"), depth=3)


@pytest.fixture
def start(weights, tmp_path, monkeypatch, capsys):
    """Run the command with scores that name what was scored: start(*flags) -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def start(*flags):
        flags = ("--weights", weights, "--frames", 7, "--steps", 2, "--prompts", 4, "--device", "cpu", *flags)
        monkeypatch.setattr(sys, "argv", ["layer_select.py", *map(str, flags)])
        status = 0
        try:
            config.run(layer_select.main)
        except SystemExit as stop:
            status = stop.code
        told = capsys.readouterr()
        return status, told.out, told.err

    return start


def told(path="runs/layers/layers.json"):
    with open(path) as file:
        return json.load(file)


def test_command_ranks_every_layer_and_training_takes_its_file(start, tmp_path, monkeypatch):
    given = []

    def rate(frames, scene):
        given.append((frames.shape, scene))
        return float(frames.mean())

    monkeypatch.setattr(layer_select, "make_scorer", lambda name, folder, device: rate)
    status, out, err = start("--top", 2, "--batch", 3)
    assert status == 0, err
    results = told()
    assert [len(row) for row in results["scores"].values()] == [4] * 4 and list(results["scores"]) == ["none", *"012"]
    assert [shape for shape, _ in given] == [(7, SIZE, SIZE, 3)] * 16
    assert [scene for _, scene in given] == scenes(4) * 4, "every layer gets the same prompts"
    assert len({row[0] for row in results["scores"].values()}) == 4, "each layer guides differently"
    means = [np.mean(results["scores"][str(layer)]) for layer in range(3)]
    assert results["adaptability"] == pytest.approx(means)
    assert results["layers"] == sorted(np.argsort(means)[-2:].tolist())
    assert choose_layers("runs/layers/layers.json", 3) == results["layers"]
    assert -1 <= results["rank_correlation_of_halves"] <= 1 and "rank correlation between halves" in out
    assert (tmp_path / "runs/layers/layers.png").read_bytes()[:4] == b"\x89PNG"
    # more prompts and another choice build on what is there
    given.clear()
    assert start("--prompts", 6, "--top", 1)[0] == 0 and len(given) == 2 * 4
    assert len(told()["layers"]) == 1 and told()["scores"]["1"][:4] == results["scores"]["1"]


def test_killed_run_goes_on_where_it_was_and_ends_with_the_same_scores(start, monkeypatch):
    count = 0

    def rate(frames, scene):
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return float(frames.mean())

    monkeypatch.setattr(layer_select, "make_scorer", lambda name, folder, device: rate)
    assert start("--batch", 2)[0] == 130
    assert [len(row) for row in told()["scores"].values()] == [4, 2, 0, 0] and "layers" not in told()
    assert start("--batch", 4)[0] == 0 and count == 8 + 16 - 6
    assert start("--batch", 4, "--out", "whole")[0] == 0
    for name, row in told("whole/layers.json")["scores"].items():
        assert told()["scores"][name] == pytest.approx(row, abs=0.5)  # another batch: equal to rounding of the pixels


def test_toy_scorer_runs_on_a_real_video(start):
    status, out, err = start("--prompts", 2)
    assert status == 0, err
    assert all(0 <= score <= 100 for row in told()["scores"].values() for score in row)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--frames", 8), "use 7 or 13"),
        (("--prompts", 1), "--prompts 1: expected at least 2"),
        (("--top", 4), "--top 4: the prior has 3 blocks"),
        (("--top", 0), "at least 1"),
        (("--scorer", "eyes"), "toy or musiq"),
        (("--skip-scale", 0), "other than 0"),
        (("--dtype", "float16"), "float32 or bfloat16"),
        (("--weights", "nowhere"), "no such folder"),
        (("--out", "old"), "measured with other settings"),
        (("--out", "broken"), "not what this command writes"),
    ],
)
def test_mistakes_cost_one_line_and_status_2_and_measure_nothing(start, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(layer_select, "measure", lambda *_: pytest.fail("measured"))
    for name, text in (("old", '{"settings": {}, "scores": {"none": [], "0": [], "1": [], "2": []}}'), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "layers.json").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = start(*flags)
    assert status == 2 and err.count("\n") == 1 and message in err and out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_scores_of_other_weights_are_not_added_to(start, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_select, "make_scorer", lambda name, folder, device: lambda frames, scene: 1.0)
    monkeypatch.setattr(layer_select, "draw", lambda *_: None)
    assert start()[0] == 0 and start()[0] == 0
    other = make_tiny_weights(tmp_path / "other", seed=1, depth=3)
    status, _, err = start("--weights", other)
    assert status == 2 and "measured with other settings" in err
