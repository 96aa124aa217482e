"""The measurements of speed: what is measured is all there; how fast it was is not a test's business."""

import json
import time

import pytest
import torch
from tiny import FRAMES, SIZE, make_tiny_weights, write_video

import bench
import bench_cpu
import bench_curves
import bench_full
import bench_rows
from config import UserError
from mochi_dit import MochiDiT


def test_stages_of_the_encoding_are_measured_and_their_shares_add_up(tmp_path, monkeypatch, capsys):
    weights = make_tiny_weights(tmp_path / "weights")
    (tmp_path / "data").mkdir()
    for i in range(3):
        write_video(tmp_path / "data" / f"{i}.mp4", seed=i)
    command = f"bench.py data --data {tmp_path}/data --weights {weights} --frames {FRAMES} --clips 2 --device cpu"
    monkeypatch.setattr("sys.argv", [*command.split(), "--dtype", "float32", "--out", str(tmp_path / "out.json")])
    bench.main()
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["clips"] == 2 and told["clip"]["height"] == SIZE
    assert len(told["stages"]) == 6 and sum(s["share"] for s in told["stages"].values()) == pytest.approx(1)
    assert told["clips_per_s"] * sum(s["wall_s"] for s in told["stages"].values()) == pytest.approx(1)
    assert {"cpu", "torch", "threads"} <= set(told["hardware"]) and told["batches_per_s"] > 0
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["0.mp4", "1.mp4", "2.mp4"]


def test_only_known_measurements_are_taken(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.py", "everything"])
    with pytest.raises(UserError, match="expected what to measure: gpu or cpu or data"):
        bench.main()


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # diffusers asks for a float32 autocast
def test_each_peer_on_our_weights_gives_our_output(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    weights = make_tiny_weights(tmp_path / "weights")
    command = f"bench.py cpu --weights {weights} --sizes baby --frames 13 --pixels {SIZE} --rounds 3 --threads 1"
    monkeypatch.setattr("sys.argv", [*command.split(), "--no-memory", "--out", str(tmp_path / "out.json")])
    bench.main()
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert {name.removesuffix(", baby") for name in rows} == {*bench_cpu.PAIRS}
    for name, row in rows.items():
        assert "failed" not in row, row
        assert row["max_error"] < (0.2 if name.startswith("decode") else 1e-5), row  # diffusers' first frames differ
        assert row["rounds"] == 3 and row["ratio"]["median"] > 0 and row["ours_s"]["median"] > 0


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("row", ["pass", "cfg", "train"])
@pytest.mark.parametrize("told, compiled", [("none", (0, 0)), ("ours", (1, 0)), ("both", (1, 1))])
def test_bench_cpu_compiles_the_sides_it_is_told_to(tmp_path, monkeypatch, row, told, compiled):
    pytest.importorskip("diffusers")
    seen = []
    monkeypatch.setattr(bench_cpu, "compile_blocks", seen.append)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: seen.append(self))
    cfg = bench_cpu.CpuBench(weights=make_tiny_weights(tmp_path / "weights"), frames=7, pixels=SIZE, compile=told)
    pair = bench_cpu.PAIRS[row](bench_cpu.baby(cfg))
    ours = [module for module in seen if isinstance(module, MochiDiT)]
    assert (len(ours), len(seen) > len(ours)) == compiled
    assert bench_cpu.relative_error(pair.ours(), pair.theirs())["max_error"] < 1e-5


def test_full_size_rows_fail_one_by_one_and_the_file_is_whole(tmp_path, monkeypatch, capsys):
    command = f"bench.py gpu --device cpu --scale tiny --rows device,dit,train,load --out {tmp_path}/out.json"
    monkeypatch.setattr("sys.argv", command.split())
    broken = bench_full.FullSize.cfg_step
    monkeypatch.setattr(bench_full.FullSize, "cfg_step", lambda self, frames, *rest: broken(self, "x", *rest))
    bench.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    failed = [row["name"] for row in rows if "failed" in row]
    assert failed == [row["name"] for row in rows if row["name"].startswith("CFG step")] and len(failed) == 3
    assert "TypeError" in rows[[row["name"] for row in rows].index(failed[0])]["failed"]
    assert all(row["tflop_per_s"] > 0 for row in rows if row["name"].startswith(("pass", "training")))


def test_a_row_that_takes_too_long_is_stopped_and_later_ones_are_not_begun(tmp_path):
    rows = bench_rows.Rows(tmp_path / "rows.json", {}, budget_s=6)
    assert "not done after" in rows.row("slow", lambda: time.sleep(30) or {}, 1.1)["failed"]
    assert "not begun" in rows.row("late", lambda: {"fine": 1}, 1)["failed"]
    assert [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == ["slow", "late"]


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_cost_is_drawn_against_frames_and_pixels(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    weights = make_tiny_weights(tmp_path / "weights")
    monkeypatch.setattr(bench_curves, "FRAMES", (7, 13))
    monkeypatch.setattr(bench_curves, "PIXELS", (16, 32))
    monkeypatch.setattr(bench_curves, "ROUNDS", 2)
    monkeypatch.setattr(bench_curves, "peak_memory", lambda *_: 1.0)
    cfg = bench_cpu.CpuBench(weights=weights, frames=7, pixels=16, curves=tmp_path / "curves.png")
    told = bench_curves.draw_curves(cfg)["seconds"]
    assert [p["frames"] for p in told["pass against frames"]] == [7, 13]
    assert [p["pixels"] for p in told["decode against pixels"]] == [16, 32]
    assert all(p["ours"] > 0 and p["theirs"] > 0 for points in told.values() for p in points)
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
