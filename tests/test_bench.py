"""The measurements of speed: what is measured is all there; how fast it was is not a test's business."""

import json

import pytest
from tiny import FRAMES, SIZE, make_tiny_weights, write_video

import bench
from config import UserError


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
