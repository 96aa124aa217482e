"""The predicted memory of a training step against what autograd keeps; parameters of the published checkpoints."""

import dataclasses

import pytest
import torch
from test_check import published, write_sparse
from tiny import make_tiny_weights

import budget
from config import UserError
from data import Batch
from mochi_dit import MochiDiT
from model import OFFICIAL_LAYERS, Adapters, MusicInfuser
from train import TrainConfig, dry_run, velocity_error

WIDTH, DEPTH, AUDIO_DIM = 96, 4, 24
FLOAT32 = torch.float32, torch.float32


def small():
    torch.manual_seed(0)
    dit = MochiDiT(DEPTH, WIDTH, 48, 4, 16)
    return MusicInfuser(dit, Adapters(dit, [1, 2], AUDIO_DIM, 8, 8))


def predict(batch=2, recompute=0, dtypes=FLOAT32):
    with torch.device("meta"):
        meta = small()
    return budget.predict(meta, batch, (3, 8, 8), recompute, *dtypes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_predicted_activations_are_what_autograd_keeps(dtype):
    model, L = small(), budget.TEXT_TOKENS
    z = torch.randn(2, 12, 3, 8, 8)
    mask = torch.ones(2, L, dtype=torch.bool)
    batch = Batch(z, torch.randn(2, L, 16), mask, torch.randn(2, 12, AUDIO_DIM), [])
    kept = budget.Kept(model)
    with kept:
        velocity_error(model, batch, batch.audio, torch.rand(2), torch.randn_like(z), dtype)
    predicted = predict(dtypes=(torch.float32, getattr(torch, dtype)))["activations"]
    assert predicted == pytest.approx(kept.count(), rel=0.03)


def test_weights_gradients_and_optimiser_are_counted_to_the_byte():
    model, parts = small(), predict()
    trained = 4 * sum(p.numel() for p in model.adapter_parameters())
    assert parts["adapters"] == parts["gradients"] == trained and parts["optimiser"] == 2 * trained
    assert parts["frozen weights"] == 4 * sum(p.numel() for p in model.dit.parameters()) - lora_bytes(model)
    halved = predict(dtypes=(torch.bfloat16, torch.bfloat16))["frozen weights"]
    assert parts["frozen weights"] / 2 < halved < parts["frozen weights"] / 1.9  # positions and gains stay float32


def lora_bytes(model):
    return 4 * sum(p.numel() for p in model.adapters.blocks.parameters())  # reached through the prior too


def test_each_recomputed_block_saves_memory_and_each_clip_costs_some():
    sizes = [predict(recompute=n)["activations"] for n in (0, 1, 2, DEPTH)]
    assert all(a > b for a, b in zip(sizes, sizes[1:]))
    assert predict(batch=4)["activations"] > 1.9 * predict(batch=2)["activations"]


def test_dry_run_needs_no_videos_and_leaves_nothing_behind(tmp_path, capsys):
    make_tiny_weights(tmp_path / "weights")
    cfg = TrainConfig(weights=tmp_path / "weights", out=tmp_path / "out", dry_run=True, lora_rank=4, frames=7)
    dry_run(cfg)
    told = capsys.readouterr().out
    assert "in 2 of 2 blocks" in told and "7 frames of 16x16, 0 of 2 blocks recomputed" in told
    assert not cfg.out.exists()
    with pytest.raises(UserError, match="--data"):
        dataclasses.replace(cfg, dry_run=False)


def test_dry_run_of_the_published_prior_counts_the_published_parameters(tmp_path, capsys):
    write_sparse(tmp_path / "dit.safetensors", published("dit")[0])
    dry_run(TrainConfig(weights=tmp_path, dry_run=True, device="cuda", dtype="bfloat16"))
    told = capsys.readouterr().out
    assert "719,493,120" in told and f"in {len(OFFICIAL_LAYERS)} of 48 blocks" in told
    assert "10,027,677,744" in told and "48 of 48 blocks recomputed" in told
    total = float(told.split("in all")[1].split()[0])
    assert 30 < total < 48  # GiB
