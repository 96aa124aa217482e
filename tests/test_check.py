"""Full-size files of every published network, sparse: only their headers are real. And the table of a folder."""

import json
import random
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import tiny_adapters
from tiny import AUDIO_DIM, make_tiny_weights

import audio
import check
import config
import mochi_dit
import mochi_vae
import model
import t5
import tensors
from config import UserError
from mochi_dit import load_dit
from model import MusicInfuser, save_adapter

MANIFESTS = Path(__file__).parent / "manifests"
PARTS = {  # manifest: the loaders that take it
    "dit": [mochi_dit.load_dit],
    "diffusers_transformer": [mochi_dit.load_dit],
    "encoder": [mochi_vae.load_encoder],
    "decoder": [mochi_vae.load_decoder],
    "diffusers_vae": [mochi_vae.load_encoder, mochi_vae.load_decoder],
    "t5_v1_1_xxl_encoder": [t5.load_t5],
    "wav2vec2_base_960h": [lambda path, device: audio.load_wav2vec2(path, device=device)],
}


def published(name):
    """{tensor: (shape, dtype)} and the metadata of a published file; bfloat16 where its type is not known."""
    manifest = json.loads((MANIFESTS / f"{name}.json").read_text())
    tensors = {key: (shape, dtype or "bfloat16") for key, (shape, dtype) in manifest["tensors"].items()}
    return tensors, manifest.get("safetensors_metadata", {})


def write_sparse(path, named, metadata=None):
    """A safetensors file of the right size whose data is a hole."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, (shape, dtype) in named.items():
        dtype = getattr(torch, dtype)
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": tensors.NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def write_shards(folder, stem, named, count):
    """The same as `count` files and their index."""
    files = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    place = {name: files[i * count // len(named)] for i, name in enumerate(named)}
    for file in files:
        write_sparse(folder / file, {name: named[name] for name in named if place[name] == file})
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


@pytest.fixture
def full_dit(tmp_path):
    return write_sparse(tmp_path / "dit.safetensors", published("dit")[0])


@pytest.mark.parametrize("name", PARTS)
def test_every_published_file_is_accepted_from_its_header_alone(name, tmp_path):
    named, metadata = published(name)
    path = write_sparse(tmp_path / "x.safetensors", named, metadata)
    folder = write_shards(tmp_path / "folder", "model", named, 3)
    for load in PARTS[name]:
        for where in (path, folder):
            module = load(where, device="meta")
            assert all(p.is_meta for p in module.parameters())
    assert path.stat().st_blocks * 512 < 1_000_000 < path.stat().st_size  # sparse


@pytest.mark.parametrize("harm", ["dropped", "renamed", "mis-shaped"])
@pytest.mark.parametrize("name", PARTS)
def test_every_published_file_with_one_wrong_tensor_is_refused_by_name(name, harm, tmp_path):
    rng = random.Random(f"{name} {harm}")
    for load in PARTS[name]:
        named, metadata = published(name)
        half = {mochi_vae.load_encoder: "encoder.", mochi_vae.load_decoder: "decoder."}.get(load, "")
        half = half if name == "diffusers_vae" else ""
        victim = rng.choice([key for key in named if key.startswith(half) and "lm_head" not in key])
        shape, dtype = named.pop(victim)
        if harm == "renamed":
            named[victim + "s"] = shape, dtype
        if harm == "mis-shaped":
            named[victim] = [*shape[:-1], shape[-1] + 1], dtype
        path = write_sparse(tmp_path / "x.safetensors", named, metadata)
        with pytest.raises(UserError, match=re.escape(victim)):
            load(path, device="meta")


def test_the_published_adapter_fits_the_published_prior_in_both_layouts(full_dit, tmp_path):
    adapter = write_sparse(tmp_path / "musicinfuser.safetensors", *published("musicinfuser"))
    other = write_shards(tmp_path / "transformer", "diffusion_pytorch_model", published("diffusers_transformer")[0], 5)
    for prior in (full_dit, other):
        m = model.load_musicinfuser(prior, adapter, device="meta")
        assert m.layers == model.OFFICIAL_LAYERS and m.adapters.rank == m.adapters.alpha == 64
        assert sum(p.numel() for p in m.adapter_parameters()) == 719_493_120


@pytest.mark.parametrize("harm", ["dropped", "renamed", "mis-shaped"])
def test_the_published_adapter_with_one_wrong_tensor_is_refused_by_name(harm, full_dit, tmp_path):
    named, metadata = published("musicinfuser")
    victim = random.Random(harm).choice(list(named))
    shape, dtype = named.pop(victim)
    if harm == "renamed":
        named[victim + "s"] = shape, dtype
    if harm == "mis-shaped":
        named[victim] = [*shape[:-1], shape[-1] + 1], dtype
    adapter = write_sparse(tmp_path / "musicinfuser.safetensors", named, metadata)
    with pytest.raises(UserError, match=re.escape(victim)):
        model.load_musicinfuser(full_dit, adapter, device="meta")


def test_both_spellings_of_the_weight_norm_are_accepted(tmp_path):
    named, _ = published("wav2vec2_base_960h")
    conv = "wav2vec2.encoder.pos_conv_embed.conv."
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        named[f"{conv}parametrizations.weight.{new}"] = named.pop(conv + old)
    audio.load_wav2vec2(write_sparse(tmp_path / "x.safetensors", named), device="meta")


def test_a_prior_in_eight_bits_is_accepted_plain_and_scaled(tmp_path):
    named = {name: (shape, "float8_e4m3fn") for name, (shape, _) in published("dit")[0].items()}
    load_dit(write_sparse(tmp_path / "plain.safetensors", named), device="meta")
    linears = [name for name in named if name.endswith(("qkv_x.weight", "w1.weight", "w2.weight"))]
    scales = {name.removesuffix("weight") + "scale_weight": ([], "float32") for name in linears}
    marks = {"scaled_fp8": ([0], "float8_e4m3fn")}
    everything = {tensors.PREFIX + name: entry for name, entry in (named | scales | marks).items()}
    load_dit(write_sparse(tmp_path / "scaled.safetensors", everything), device="meta")
    lost = {name: entry for name, entry in everything.items() if name != tensors.PREFIX + linears[0]}
    with pytest.raises(UserError, match=re.escape(linears[0])):
        load_dit(write_sparse(tmp_path / "scaled.safetensors", lost), device="meta")


# ------------------------------------------------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder in our layout whose adapter is made for the transformer in it."""
    folder = make_tiny_weights(tmp_path_factory.mktemp("tiny"), depth=3)
    dit = load_dit(folder / "dit.safetensors")
    adapters = tiny_adapters(dit, layers=(0, 2), audio_dim=AUDIO_DIM)
    save_adapter(MusicInfuser(dit, adapters), folder / "musicinfuser.safetensors")
    return folder


def look(folder, monkeypatch, capsys):
    """python model.py --check folder -> (exit status, stdout, stderr)"""
    monkeypatch.setattr(sys, "argv", ["model.py", "--check", str(folder)])
    status = 0
    try:
        config.run(model.main)
    except SystemExit as stop:
        status = stop.code
    told = capsys.readouterr()
    return status, told.out, told.err


def test_a_whole_folder_is_listed_and_said_to_fit(tiny, monkeypatch, capsys):
    status, out, err = look(tiny, monkeypatch, capsys)
    assert status == 0, err
    for what in ("transformer", "adapter", "music encoder", "text encoder", "vocabulary", "decoder", "video encoder"):
        assert what in out
    assert "It all fits together" in out and "blocks 0, 2" in out and "hf download" not in out
    dit = next(line for line in out.splitlines() if line.startswith("video transformer"))
    count = sum(p.numel() for p in load_dit(tiny / "dit.safetensors", "meta").parameters())
    assert f"{count:,}" in dit and "genmo" in dit and "float32" in dit


@pytest.mark.parametrize(
    ("gone", "download"),
    [
        ("dit.safetensors", "hf download genmo/mochi-1-preview dit.safetensors --local-dir {}\n"),
        ("decoder.safetensors", "hf download genmo/mochi-1-preview decoder.safetensors --local-dir {}\n"),
        ("musicinfuser.safetensors", "hf download susunghong/MusicInfuser musicinfuser.safetensors --local-dir {}\n"),
        ("wav2vec2", "hf download facebook/wav2vec2-base-960h model.safetensors --local-dir {}/wav2vec2\n"),
        ("t5", "hf download genmo/mochi-1-preview tokenizer/spiece.model --local-dir {}\n"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_gets_it(gone, download, tiny, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(tiny, tmp_path / "w")
    shutil.rmtree(folder / gone) if (folder / gone).is_dir() else (folder / gone).unlink()
    status, out, err = look(folder, monkeypatch, capsys)
    assert status == 2 and err.count("\n") == 1 and "missing: " in err and download.format(folder) in out


def test_only_training_needs_the_video_encoder(tiny, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(tiny, tmp_path / "w")
    (folder / "encoder.safetensors").unlink()
    status, out, _ = look(folder, monkeypatch, capsys)
    assert status == 0 and "only training needs it" in out and "encoder.safetensors --local-dir" in out


def test_a_broken_file_and_networks_that_do_not_fit_each_other_are_told(tiny, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(tiny, tmp_path / "w")
    whole = (folder / "decoder.safetensors").read_bytes()
    (folder / "decoder.safetensors").write_bytes(whole[:-1])
    status, out, err = look(folder, monkeypatch, capsys)
    assert status == 2 and "decoder.safetensors" in out and "truncated" in out and "1 do not fit" in err
    (folder / "decoder.safetensors").write_bytes(whole)
    dit = load_dit(folder / "dit.safetensors")
    save_adapter(MusicInfuser(dit, tiny_adapters(dit, layers=(0,), audio_dim=9)), folder / "musicinfuser.safetensors")
    status, out, err = look(folder, monkeypatch, capsys)
    assert status == 2 and f"makes features of width {AUDIO_DIM}" in out and "1 do not fit" in err


def test_a_vocabulary_larger_than_the_embedding_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "w")
    t5.save_t5(t5.T5(vocab=100, width=16, depth=1, heads=2, kv=8, ffn=16), folder / "t5" / "model.safetensors")
    with pytest.raises(UserError, match="different ids, but .* knows 100"):
        check.check_networks(check.find_files(folder))


def test_a_transformer_with_other_latents_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "w")
    dit = mochi_dit.MochiDiT(depth=3, width=48, text_width=24, num_heads=2, text_dim=16, in_channels=8)
    tensors.save(folder / "dit.safetensors", dit.state_dict())
    with pytest.raises(UserError, match="latents of 8 channels"):
        check.check_networks(check.find_files(folder))


def test_hub_snapshots_as_they_come_are_one_usable_folder(tiny, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "mochi"
    write_shards(folder / "transformer", "diffusion_pytorch_model", published("diffusers_transformer")[0], 5)
    low = write_sparse(folder / "transformer" / "diffusion_pytorch_model.bf16-00001-of-00001.safetensors", {})
    index = {"weight_map": {"x": low.name}}
    (low.parent / "diffusion_pytorch_model.safetensors.index.bf16.json").write_text(json.dumps(index))
    write_sparse(folder / "vae" / "diffusion_pytorch_model.safetensors", published("diffusers_vae")[0])
    write_shards(folder / "text_encoder", "model", published("t5_v1_1_xxl_encoder")[0], 4)
    (folder / "tokenizer").mkdir()
    shutil.copy(tiny / "t5" / "spiece.model", folder / "tokenizer")
    write_sparse(folder / "wav2vec2" / "model.safetensors", published("wav2vec2_base_960h")[0])
    write_sparse(folder / "musicinfuser.safetensors", *published("musicinfuser"))
    status, out, err = look(folder, monkeypatch, capsys)
    assert status == 0, err
    assert out.count("diffusers") == 3 and "10,027,677,744" in out and "719,493,120" in out
    assert "362,526,595" in out and "97,222,016" in out and "fits together" in out


def test_a_folder_that_does_not_exist_costs_one_line_and_status_2():
    done = subprocess.run(
        [sys.executable, "model.py", "--check", "nowhere"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr == "error: nowhere: no such folder of weights\n"
