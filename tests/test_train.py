"""One step against the formula, what is trained, resuming, signals, refusals and the held-out measure of train.py."""

import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import AUDIO_DIM, FRAMES, make_tiny_weights, write_video
from torch import nn

import media
import tensors
import train
import train_log
import train_show
from config import UserError
from data import Batch, DanceClips
from data_encode import encode
from mochi_dit import load_dit
from model import OFFICIAL_LAYERS, Adapters, MusicInfuser, load_musicinfuser
from train import TrainConfig, choose_layers, held_out_losses, velocity_error
from train_log import read_log
from train_state import checkpoints

TRAIN = ("gBR_sBM_c01_d04_mBR1_ch01", "gPO_sFM_c10_d10_mPO2_ch03")
TEST = ("gLH_sBM_c01_d16_mLH4_ch02", "gKR_sBM_c01_d28_mKR2_ch02")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny weights, two AIST clips to train on, two with test music and a wild one, all encoded."""
    folder = tmp_path_factory.mktemp("world")
    make_tiny_weights(folder / "weights")
    (folder / "aist").mkdir()
    (folder / "wild").mkdir()
    for i, name in enumerate(TRAIN + TEST):
        write_video(folder / "aist" / f"{name}.mp4", seed=i)
    write_video(folder / "wild" / "beach.mp4", seed=9)
    (folder / "wild" / "beach.txt").write_text("a man dancing on a beach")
    encode(config(folder, folder / "none"))
    return folder


@pytest.fixture(scope="module")
def looked_at():
    return {}


@pytest.fixture(autouse=True)
def quick(monkeypatch, looked_at):
    """Plots take a second each, and so does looking through a folder: one test draws, and each folder is read once."""

    def encode_once(cfg):
        key = cfg.data, cfg.wild, cfg.weights
        if key not in looked_at:
            looked_at[key] = encode(cfg)
        return looked_at[key]

    monkeypatch.setattr(train, "draw_curves", lambda out: None)
    monkeypatch.setattr(train, "encode", encode_once)


def config(world, out, **changes):
    settings = {
        "data": world / "aist", "wild": world / "wild", "weights": world / "weights", "out": out, "frames": FRAMES,
        "steps": 6, "batch": 2, "lr": 1e-2, "warmup": 2, "lora_rank": 4, "save_every": 2, "eval_every": 100,
        "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    return TrainConfig(**(settings | changes))


def flags_of(cfg):
    values = dataclasses.asdict(cfg)
    return [f"--{k.replace('_', '-')}={v}" for k, v in values.items() if v is not None and type(v) is not bool]


def random_model(world, form="published"):
    """A model whose adapters all do something."""
    dit = load_dit(world / "weights" / "dit.safetensors")
    adapters = Adapters(dit, [0, 1], AUDIO_DIM, rank=4, alpha=8, form=form)
    torch.manual_seed(1)
    for p in adapters.parameters():
        nn.init.normal_(p, std=0.2)
    return MusicInfuser(dit, adapters)


def random_batch(n=2, seed=3):
    g = torch.Generator().manual_seed(seed)
    mask = torch.tensor([[True, True, True], [True, False, False]] * n)[:n]
    audio = torch.randn(n, 12, AUDIO_DIM, generator=g)
    z = torch.randn(n, 12, 2, 2, 2, generator=g)
    eps = torch.randn(n, 12, 2, 2, 2, generator=g)
    batch = Batch(z, torch.randn(n, 3, 16, generator=g), mask, audio, [""] * n)
    return batch, torch.rand(n, generator=g), eps


def explicit_velocity(world, adapters, z_s, sigma, text, mask, audio):
    """The model written out: LoRA as a sum of matrices, ZICA by Eq. (6) head by head, on the bare prior."""
    dit = load_dit(world / "weights" / "dit.safetensors")
    p = dict(adapters.named_parameters())
    first, second = "audio_projection.projection.0.", "audio_projection.projection.2."
    tokens = audio[:, [0, audio.shape[1] // 2]]  # floor(i A / T), T = 2
    a = F.silu(tokens @ p[first + "weight"].T + p[first + "bias"]) @ p[second + "weight"].T + p[second + "bias"]
    x, y, c, rope, attend, grid = dit.embed(z_s, sigma, text, mask)
    for i, block in enumerate(dit.blocks):
        weights = {}
        for name in ("qkv_x", "qkv_y", "proj_x", "proj_y"):
            A, B = (p.get(f"blocks.{i}.attn.{name}.lora_{k}") for k in "AB")
            if A is not None:
                weights[f"attn.{name}.weight"] = getattr(block.attn, name).weight + (8 / 4) * B @ A
        x, y = torch.func.functional_call(block, weights, (x, y, c, rope, attend))
        W = {n: p[f"audio_cross_attn_blocks.{i}.to_{n}.weight"] for n in ("q", "k", "v", "out")}
        b = {n: p[f"audio_cross_attn_blocks.{i}.to_{n}.bias"] for n in ("q", "k", "v", "out")}
        q, k, v = ((t @ W[n].T + b[n]).chunk(8, -1) for t, n in ((x, "q"), (a, "k"), (a, "v")))
        heads = [(qh @ kh.mT / math.sqrt(qh.shape[-1])).softmax(-1) @ vh for qh, kh, vh in zip(q, k, v)]
        x = x + torch.cat(heads, -1) @ W["out"].T + b["out"]
    return dit.unembed(x, c, grid)


def test_loss_and_gradients_equal_the_formula_written_out(world):
    model = random_model(world)
    batch, sigma, eps = random_batch()
    loss = velocity_error(model, batch, batch.audio, sigma, eps, "float32").mean()
    gradients = torch.autograd.grad(loss, model.adapter_parameters())
    s = sigma[:, None, None, None, None]
    z_s = batch.z - s * batch.z + s * eps
    velocity = explicit_velocity(world, model.adapters, z_s, sigma, batch.text, batch.text_mask, batch.audio)
    expected = ((velocity - batch.z + eps) ** 2).sum() / batch.z.numel()
    expected_gradients = torch.autograd.grad(expected, model.adapter_parameters())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    largest = max(g.abs().max().item() for g in expected_gradients)
    for ours, theirs in zip(gradients, expected_gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * largest)


def test_first_step_is_one_adamw_update_on_the_draw_of_seed_and_step(world, tmp_path):
    cfg = config(world, tmp_path, steps=1, save_every=1, zero_init=False, seed=4, eval_clips=0)
    train.train(cfg)
    encoded = encode(cfg)
    g = torch.Generator().manual_seed(4 * 1_000_003)
    batch = DanceClips(encoded.clips, encoded.prompts).batch(2, g)
    sigma = 1 - (1 - torch.rand(2, generator=g)) ** (1 / 3)  # Beta(1, 3)
    eps = torch.randn(batch.z.shape, generator=g)
    dit = load_dit(world / "weights" / "dit.safetensors")
    model = MusicInfuser(dit, Adapters(dit, [0, 1], AUDIO_DIM, 4, 4, zero_init=False, seed=4))
    loss = velocity_error(model, batch, batch.audio, sigma, eps, "float32").mean()
    assert json.loads((tmp_path / "log.jsonl").read_text())["loss"] == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    after = load_file(tmp_path / "musicinfuser.safetensors")
    for name, p in model.adapters.named_parameters():
        expected = p - 0.005 * p.grad / (p.grad.abs() + 1e-8)  # lr / warm-up; the first update of Adam is the sign
        certain = (p.grad.abs() > 1e-6) | (p.grad == 0)
        torch.testing.assert_close(after[name][certain], expected[certain], rtol=0, atol=1e-6)


def test_only_the_adapters_get_gradients(world):
    model = random_model(world)
    batch, sigma, eps = random_batch()
    velocity_error(model, batch, batch.audio, sigma, eps, "float32").mean().backward()
    ours = {id(p) for p in model.adapter_parameters()}
    assert ours and all(p.grad is not None for p in model.adapter_parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters() if id(p) not in ours)


def same_run(one, other):
    a, b = (load_file(checkpoints(out)[-1]) for out in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (one / "log.jsonl").read_text() == (other / "log.jsonl").read_text()


def test_without_lora_only_batches_with_music_have_a_gradient_and_the_run_goes_on_after_the_others(world, tmp_path):
    cfg = config(world, tmp_path / "out", lora_rank=0, music_dropout=0.5)
    train.train(cfg)
    encoded = encode(cfg)
    clips = DanceClips(encoded.clips, encoded.prompts, music_dropout=0.5)
    rngs = [torch.Generator().manual_seed(step) for step in range(cfg.steps)]
    heard = [clips.batch(cfg.batch, rng).audio is not None for rng in rngs]
    assert {True, False} == set(heard)
    assert [line["grad_norm"] > 0 for line in read_log(cfg.out / "log.jsonl") if "loss" in line] == heard


def test_run_stopped_by_a_signal_and_resumed_equals_an_uninterrupted_one(world, tmp_path, monkeypatch):
    changes = {"music_dropout": 0.5, "eval_every": 2, "seed": 2}
    whole = config(world, tmp_path / "whole", **changes)
    train.train(whole)
    cut = config(world, tmp_path / "cut", **changes)
    real = train.Log.write

    def write_and_stop(log, **line):
        real(log, **line)
        if line["step"] == 2 and "loss" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train.Log, "write", write_and_stop)
        with pytest.raises(SystemExit) as stopped:
            train.train(cut)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert checkpoints(cut.out)[-1].name == "step-0000003.safetensors"
    train.train(dataclasses.replace(cut, resume=True))
    same_run(whole.out, cut.out)


def test_a_run_killed_between_checkpoints_repeats_the_lost_steps(world, tmp_path, monkeypatch):
    whole, cut = config(world, tmp_path / "whole", steps=5), config(world, tmp_path / "cut", steps=5)
    train.train(whole)
    real = train.Log.write

    def write_and_die(log, **line):
        real(log, **line)
        if line["step"] == 3:
            log.file.write('{"step": 4, "lo')  # cut off in the middle of a line
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(train.Log, "write", write_and_die)
        with pytest.raises(MemoryError):
            train.train(cut)
    train.train(dataclasses.replace(cut, resume=True))
    same_run(whole.out, cut.out)


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(world, tmp_path, capsys):
    whole, cut = config(world, tmp_path / "whole"), config(world, tmp_path / "cut")
    train.train(whole)
    shutil.copytree(whole.out, cut.out)
    older, last = checkpoints(cut.out)
    assert (older.name, last.name) == ("step-0000004.safetensors", "step-0000006.safetensors")  # two are kept
    last.write_bytes(last.read_bytes()[:-7])
    train.train(dataclasses.replace(cut, resume=True))
    same_run(whole.out, cut.out)
    older.write_bytes(b"")
    last.write_bytes(b"")
    with pytest.raises(UserError, match="no readable checkpoint"):
        train.train(dataclasses.replace(cut, resume=True))


def test_resuming_with_other_settings_is_refused_and_names_them(world, tmp_path):
    cfg = config(world, tmp_path / "out", steps=2)
    train.train(cfg)
    with pytest.raises(UserError, match=r"lr 0.01 -> 0.02; lora_rank 4 -> 8"):
        train.train(dataclasses.replace(cfg, resume=True, lr=0.02, lora_rank=8, out=cfg.out))
    with pytest.raises(UserError, match="clips [0-9a-f]+ -> "):
        train.train(dataclasses.replace(cfg, resume=True, wild=None))
    with pytest.raises(UserError, match="--resume"):
        train.train(cfg)
    with pytest.raises(UserError, match="no readable checkpoint"):
        train.train(dataclasses.replace(cfg, resume=True, out=tmp_path / "other"))


def test_over_fitting_one_clip_brings_its_loss_down(world, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(world / "wild" / "beach.mp4", tmp_path / "data")
    one = {"data": tmp_path / "data", "wild": None}
    cfg = config(world, tmp_path / "out", **one, steps=40, lr=1e-2, lora_rank=16, beta0=1.0, save_every=40)
    encoded = encode(cfg)
    clips = DanceClips(encoded.clips, encoded.prompts)
    batch = clips.batch(8, torch.Generator().manual_seed(0))
    losses = []
    for model in (train.build(cfg, clips.audio_dim), train.train(cfg)):
        with torch.no_grad():
            error = velocity_error(
                model, batch, batch.audio, torch.linspace(0.1, 0.9, 8), random_batch(8)[2], "float32"
            )
        losses.append(error.mean().item())
    assert losses[1] < 0.95 * losses[0]  # the rest is the random prior, which stays as it is


def test_a_loss_that_is_not_finite_stops_and_names_step_and_clips(world, tmp_path):
    broken = shutil.copytree(world / "weights", tmp_path / "weights")
    w = tensors.open_weights(world / "weights" / "dit.safetensors")
    state = {name: w.read(name) for name in w.shapes}
    state["final_layer.linear.bias"] += math.nan
    tensors.save(broken / "dit.safetensors", state, w.metadata)
    with pytest.raises(UserError, match=r"the loss is nan and .* at step 0 with .*\.mp4@"):
        train.train(config(world, tmp_path / "out", weights=broken))
    assert not checkpoints(tmp_path / "out")


def test_a_gradient_that_is_not_finite_stops_before_it_spoils_the_weights(world, tmp_path, monkeypatch):
    whole, cut = config(world, tmp_path / "whole", steps=4), config(world, tmp_path / "cut", steps=4)
    train.train(whole)
    real, calls = train.velocity_error, []

    def steep(model, *rest):
        calls.append(1)
        slope = sum(p.sum() * 0 for p in model.adapter_parameters()).sqrt()  # 0, with a gradient that is nan
        return real(model, *rest) + (slope if len(calls) == 3 else 0)

    with monkeypatch.context() as patch:
        patch.setattr(train, "velocity_error", steep)
        with pytest.raises(UserError, match=r"the loss is \d.* and its gradient nan at step 2 with .*\.mp4@"):
            train.train(cut)
    assert [file.name for file in checkpoints(cut.out)] == ["step-0000002.safetensors"]
    train.train(dataclasses.replace(cut, resume=True))
    same_run(whole.out, cut.out)


@pytest.mark.parametrize("trouble", ["full", "gone"])
def test_a_save_that_fails_loses_nothing_that_was_saved(world, tmp_path, monkeypatch, trouble):
    whole, cut = config(world, tmp_path / "whole", steps=5), config(world, tmp_path / "cut", steps=5)
    train.train(whole)
    real, limits = train.Log.write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_and_fill(log, **line):
        real(log, **line)
        if line["step"] == 3 and trouble == "full":
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (4096, limits[1])
            )  # as on a full disk, half a file can be written
        if line["step"] == 3 and trouble == "gone":
            cut.out.rename(tmp_path / "aside")
            cut.out.write_text("a file where the folder was")

    with monkeypatch.context() as patch:
        patch.setattr(train.Log, "write", write_and_fill)
        try:
            with pytest.raises(UserError, match="step-0000004.safetensors: cannot write there"):
                train.train(cut)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if trouble == "gone":
        cut.out.unlink()
        (tmp_path / "aside").rename(cut.out)
    assert sorted(file.name for file in cut.out.iterdir()) == ["log.jsonl", "step-0000002.safetensors"]
    train.train(dataclasses.replace(cut, resume=True))
    same_run(whole.out, cut.out)


def test_an_output_folder_that_cannot_be_made_is_a_users_mistake(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give another by --out"):
        train.train(config(world, tmp_path / "file" / "out"))


def test_half_written_files_of_a_killed_run_are_swept_away(world, tmp_path):
    cfg = config(world, tmp_path, steps=1)
    (tmp_path / "step-0000001.safetensors.tmp12ab").write_text("half")
    train.train(cfg)
    assert not list(tmp_path.glob("*.tmp*"))


def test_a_run_killed_at_random_moments_equals_an_uninterrupted_one(world, tmp_path):
    flags = flags_of(config(world, tmp_path, steps=60, save_every=3))
    command = [sys.executable, "tests/killed.py", "3", "0", *flags]
    root = os.path.dirname(train.__file__)
    told = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True)
    assert told.returncode == 0 and "killed 3" in told.stdout, told.stdout + told.stderr
    same_run(tmp_path / "whole", tmp_path / "killed")


def look_at(world, out, monkeypatch, **changes):
    """Three steps of a training: what it draws, and the fresh adapters."""
    seen, real = {"fresh": None, "sigma": [], "eps": [], "clips": [], "text": [], "music": []}, train.velocity_error

    def spy(model, batch, audio, sigma, eps, dtype):
        seen["fresh"] = seen["fresh"] or {k: p.detach().clone() for k, p in model.adapters.named_parameters()}
        seen["sigma"].append(sigma)
        seen["eps"].append(eps)
        seen["clips"].append((batch.names, batch.z))
        seen["text"].append((batch.text, batch.text_mask))
        seen["music"].append(audio)
        return real(model, batch, audio, sigma, eps, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(train, "velocity_error", spy)
        train.train(config(world, out, steps=3, batch=6, save_every=100, eval_clips=0, **changes))
    for part, key in (("projector", "audio_projection"), ("zica", "audio_cross"), ("lora", "blocks")):
        seen[part] = {k: p for k, p in seen["fresh"].items() if k.startswith(key)}
    del seen["fresh"]
    return seen


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return look_at(world, tmp_path_factory.mktemp("plain"), patch)


def equal(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "uniform"}, {"sigma"}),
        ({"beta0": 5.0}, {"sigma"}),
        ({"half_life": 1.0}, {"sigma"}),
        ({"base_prompt": 1.0}, {"text"}),
        ({"caption_dropout": 1.0}, {"text"}),
        ({"music_dropout": 1.0}, {"music"}),
        ({"wild_ratio": 0.0}, {"clips", "text", "music"}),
        ({"wild_ratio": 0.9}, {"clips", "text", "music"}),
        ({"zero_init": False}, {"zica"}),
        ({"lora_rank": 8}, {"lora"}),
        ({"lora_rank": 0}, {"lora"}),
        ({"form": "aligned"}, {"zica"}),  # its fresh q and k look at their own time
        ({"form": "add"}, {"zica", "projector"}),
        ({"layers": "0"}, {"zica"}),
        ({"null_audio": "drop"}, set()),
        ({"recompute": 2}, set()),
    ],
    ids=str,
)
def test_each_ablation_changes_what_it_says_and_nothing_else(world, tmp_path, monkeypatch, plain, changes, expected):
    seen = look_at(world, tmp_path, monkeypatch, **changes)
    differ = {part for part in plain if not equal(seen[part], plain[part])}
    assert differ == expected


def test_the_share_of_wild_clips_is_the_wild_ratio(world):
    encoded = encode(config(world, world / "none"))
    for ratio in (0.0, 0.25, 1.0):
        clips = DanceClips(encoded.clips, encoded.prompts)
        train.mix(clips, ratio)
        names = clips.batch(400, torch.Generator().manual_seed(0)).names
        assert sum(name.startswith("beach") for name in names) / 400 == pytest.approx(ratio, abs=0.06 * (0 < ratio < 1))


def test_uniform_noise_levels_are_uniform_from_the_first_step_on(plain, world, tmp_path, monkeypatch):
    uniform = look_at(world, tmp_path, monkeypatch, schedule="uniform")
    for step, (sigma, beta_sigma) in enumerate(zip(uniform["sigma"], plain["sigma"])):
        u = 1 - (1 - beta_sigma) ** (1 + 2 * 2 ** (-step / 200))
        torch.testing.assert_close(sigma, u, rtol=1e-5, atol=1e-6)


def test_samples_on_the_way_are_videos_with_sound_and_leave_the_training_as_it_is(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train_show, "made_for", lambda dit: {"steps": 3, "cfg": 6.0})
    plain = config(world, tmp_path / "plain", steps=2, save_every=2)
    train.train(plain)
    shown = dataclasses.replace(plain, out=tmp_path / "shown", sample_every=1)
    train.train(shown)
    for step in (1, 2):
        video = shown.out / "samples" / f"step-{step:07d}.mp4"
        assert media.video_info(video).has_audio and len(media.read_video(video)) == FRAMES
    same_run(plain.out, shown.out)


def test_samples_without_a_decoder_are_refused_before_the_first_step(world, tmp_path):
    weights = shutil.copytree(world / "weights", tmp_path / "weights")
    cfg = config(world, tmp_path / "out", weights=weights, sample_every=1)
    train.encode(cfg)
    (weights / "decoder.safetensors").unlink()
    with pytest.raises(UserError, match="video decoder missing"):
        train.train(cfg)
    assert not cfg.out.exists()


def test_final_adapter_loads_for_sampling_with_its_settings(world, tmp_path):
    cfg = config(world, tmp_path, steps=2, layers="1", form="aligned", null_audio="drop")
    trained = train.train(cfg)
    loaded = load_musicinfuser(world / "weights" / "dit.safetensors", tmp_path / "musicinfuser.safetensors")
    assert loaded.layers == (1,) and loaded.adapters.form == "aligned" and loaded.adapters.null_audio == "drop"
    batch, sigma, _ = random_batch()
    with torch.no_grad():
        ours, theirs = (m(batch.z, sigma, *batch[1:4]) for m in (trained, loaded))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_held_out_loss_tells_a_hearing_adapter_from_a_deaf_one(world):
    cfg = config(world, world / "none")
    encoded = encode(cfg)
    batch = DanceClips(encoded.clips, encoded.prompts).held_out_batch(8)
    assert [name[:3] for name in batch.names] == ["gKR", "gLH"]  # the two with test music
    dit = load_dit(world / "weights" / "dit.safetensors")
    deaf = held_out_losses(MusicInfuser(dit, Adapters(dit, [0, 1], AUDIO_DIM)), batch, cfg)
    hears = random_model(world)
    losses = held_out_losses(hears, batch, cfg)
    assert deaf["right"] == deaf["shuffled"] == deaf["no"]
    assert len({losses["right"], losses["shuffled"], losses["no"]}) == 3
    assert losses == held_out_losses(hears, batch, cfg)  # always the same noise
    one_by_one = held_out_losses(hears, batch, dataclasses.replace(cfg, batch=1))
    assert one_by_one == pytest.approx(losses, rel=1e-5)


def test_curves_are_drawn_from_the_log(world, tmp_path, monkeypatch):
    monkeypatch.undo()
    lines = [{"step": 0, "loss": 1.0}, {"step": 1, "held_out": {"right": 1.0, "shuffled": 2.0, "no": 3.0}}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train_log.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_layers_are_the_papers_for_48_blocks_and_all_for_others():
    assert choose_layers(None, 48) == choose_layers("adaptability", 48) == list(OFFICIAL_LAYERS)
    assert choose_layers(None, 3) == choose_layers("all", 3) == [0, 1, 2]
    assert choose_layers("0,2", 48) == [0, 2]


def test_layers_by_strategy_are_a_third_of_the_blocks():
    assert choose_layers("first", 48) == list(range(16)) and choose_layers("last", 48) == list(range(32, 48))
    assert choose_layers("middle", 48) == list(range(16, 32)) and choose_layers("even", 48) == list(range(0, 48, 3))
    assert choose_layers("even", 6) == [0, 3] and choose_layers("last", 2) == [1]


def test_layers_are_read_from_a_file_as_a_list_or_under_their_name(tmp_path):
    for told in ([1, 4], {"layers": [1, 4], "scores": [0.5]}):
        (tmp_path / "picked.json").write_text(json.dumps(told))
        assert choose_layers(str(tmp_path / "picked.json"), 6) == [1, 4]


@pytest.mark.parametrize("told", ["{", '{"scores": [1]}', "3", "[" * 100_000])
def test_layer_files_that_hold_no_list_are_refused(tmp_path, told):
    (tmp_path / "picked.json").write_text(told)
    with pytest.raises(UserError, match="picked.json: expected adaptability.*JSON file that holds"):
        choose_layers(str(tmp_path / "picked.json"), 6)


def test_layers_nobody_knows_are_refused_and_adaptability_of_another_depth_asks_for_a_file():
    for text in ("odd", "1,x", "nowhere.json"):
        with pytest.raises(UserError, match=f"--layers {text}: expected adaptability"):
            choose_layers(text, 48)
    with pytest.raises(UserError, match="this prior has 6; give --layers FILE.json"):
        choose_layers("adaptability", 6)


@pytest.mark.parametrize(
    "changes",
    [{"steps": 0}, {"batch": 0}, {"save_every": 0}, {"eval_every": 0}, {"base_prompt": 1.5}, {"caption_dropout": -0.1},
     {"music_dropout": 2.0}, {"beta0": 0.5}, {"half_life": 0.0}, {"lr": 0.0}, {"lora_rank": -1}, {"warmup": -1},
     {"frames": 8}, {"width": 17}, {"schedule": "cosine"}, {"wild_ratio": -0.1}, {"recompute": -1},
     {"sample_every": -1}, {"data": None}],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(world, changes):
    (name,) = changes
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}"):
        config(world, world / "none", **changes)


def test_two_processes_make_the_same_training_as_one(world, tmp_path):
    one = config(world, tmp_path / "one", steps=2, batch=3)
    train.train(one)
    flags = flags_of(dataclasses.replace(one, out=tmp_path / "two"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, train.__file__, *flags]
    processes = [
        subprocess.Popen(command, env=shared | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE)
        for rank in "01"
    ]
    try:
        for process in processes:
            _, told = process.communicate(timeout=300)
            assert process.returncode == 0, told.decode()
    finally:
        for process in processes:
            process.kill()
    a, b = (load_file(tmp_path / name / "musicinfuser.safetensors") for name in ("one", "two"))
    for name in a:
        if not name.endswith("to_k.bias"):  # softmax ignores it: its gradient is rounding, which Adam blows up
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-4)
    one_log, two_log = (read_log(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    assert [line["loss"] for line in two_log if "loss" in line] == pytest.approx(
        [line["loss"] for line in one_log if "loss" in line], rel=1e-5
    )
