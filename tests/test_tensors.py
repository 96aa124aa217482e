import json
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tensors
from config import UserError


def write(path, header: dict | bytes, data: bytes = b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def linear(inputs=4, outputs=3, bias=True):
    with torch.device("meta"):
        return nn.Linear(inputs, outputs, bias=bias)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    state = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}
    save_file(state, tmp_path / "linear.safetensors", metadata={"made": "here"})
    return tmp_path / "linear.safetensors", state


@pytest.mark.parametrize("dtype", sorted(tensors.DTYPES))
def test_each_type_reads_as_the_safetensors_package_wrote_it(tmp_path, dtype):
    torch.manual_seed(0)
    tensor = (torch.randn(5, 3) * 3).to(tensors.DTYPES[dtype])
    save_file({"a": torch.zeros(7, dtype=torch.int8), "t": tensor}, tmp_path / "x.safetensors")
    read = tensors.open_weights(tmp_path / "x.safetensors").read("t")
    assert read.dtype == tensor.dtype and torch.equal(read.float(), tensor.float())


def test_a_saved_file_is_read_by_the_safetensors_package_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    state = {"a": torch.randn(3, 4).bfloat16(), "b": torch.randn(4, 3).T}
    tensors.save(tmp_path / "new" / "x.safetensors", state, {"k": "v"})
    again = load_file(tmp_path / "new" / "x.safetensors")
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert tensors.open_weights(tmp_path / "new" / "x.safetensors").metadata == {"k": "v"}


def test_what_is_read_is_memory_of_its_own(checkpoint):
    path, state = checkpoint
    before = path.read_bytes()
    tensors.open_weights(path).read("weight").zero_()
    assert path.read_bytes() == before


def test_a_module_receives_every_tensor_in_the_wanted_type(checkpoint):
    path, state = checkpoint
    module = tensors.load(linear(), tensors.open_weights(path), dtype=torch.bfloat16, keep_float32=("bias",))
    assert torch.equal(module.weight, state["weight"].bfloat16())
    assert module.bias.dtype == torch.float32 and torch.equal(module.bias, state["bias"])
    assert not module.training and not module.weight.requires_grad


def test_a_tensor_can_be_put_together_from_several(tmp_path):
    torch.manual_seed(0)
    parts = {"q": torch.randn(1, 4), "k": torch.randn(2, 4)}
    save_file(parts, tmp_path / "x.safetensors")
    sources = {"weight": (["q", "k"], lambda q, k: torch.cat([q, k]))}
    module = tensors.load(linear(bias=False), tensors.open_weights(tmp_path / "x.safetensors"), sources=sources)
    assert torch.equal(module.weight, torch.cat([parts["q"], parts["k"]]))


def test_the_meta_device_checks_names_but_leaves_the_module_empty(checkpoint):
    module = tensors.load(linear(), tensors.open_weights(checkpoint[0]), device="meta")
    assert module.weight.is_meta
    with pytest.raises(UserError, match="mis-shaped: weight"):
        tensors.load(linear(inputs=5), tensors.open_weights(checkpoint[0]), device="meta")


def test_a_checkpoint_that_does_not_fit_is_refused_with_all_names(tmp_path):
    save_file({"weight": torch.zeros(3, 5), "bais": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError) as error:
        tensors.load(linear(), tensors.open_weights(tmp_path / "x.safetensors"))
    text = str(error.value)
    assert "1 missing: bias" in text and "1 unexpected: bais" in text
    assert "1 mis-shaped: weight (3, 5) instead of (3, 4)" in text


def test_ignored_names_may_stay_unread(tmp_path):
    save_file({"weight": torch.zeros(3, 4), "head": torch.zeros(3)}, tmp_path / "x.safetensors")
    tensors.load(linear(bias=False), tensors.open_weights(tmp_path / "x.safetensors"), ignore=["head"])


def test_shards_are_read_through_their_index(tmp_path):
    save_file({"weight": torch.ones(3, 4)}, tmp_path / "m-1.safetensors")
    save_file({"bias": torch.zeros(3)}, tmp_path / "m-2.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "m-1.safetensors", "bias": "m-2.safetensors"}}))
    assert tensors.open_weights(tmp_path).shapes == {"weight": (3, 4), "bias": (3,)}
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(UserError, match="shards missing: m-2.safetensors"):
        tensors.open_weights(tmp_path)


def test_an_index_cannot_reach_outside_its_folder(tmp_path):
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="outside its own folder"):
        tensors.open_weights(tmp_path)


@pytest.mark.parametrize("name", ["nothing.safetensors", "empty_folder"])
def test_a_missing_file_or_an_empty_folder_is_refused(tmp_path, name):
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(UserError, match=name):
        tensors.open_weights(tmp_path / name)


GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
LIES = {
    "not json": b"{",
    "not an object": b"[]",
    "name twice": b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
    "past the end": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}},
    "huge shape": {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}},
    "negative": {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}},
    "boolean": {"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}},
    "wrong size": {"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 8]}},
    "unknown type": {"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "not a dict": {"a": 7},
    "offsets of three": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}},
    "overlap": {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [7, 8]},
    },
    "metadata not text": {"__metadata__": {"k": 1}, **GOOD},
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused_in_one_line(tmp_path, lie):
    path = write(tmp_path / "x.safetensors", LIES[lie], b"\0" * 8)
    with pytest.raises(UserError, match="x.safetensors: not a usable safetensors file"):
        tensors.open_weights(path)


def test_the_header_that_the_lies_start_from_is_accepted(tmp_path):
    assert tensors.open_weights(write(tmp_path / "x.safetensors", GOOD, b"\0" * 8)).shapes == {"a": (2,)}


def test_a_file_cut_anywhere_is_refused(checkpoint):
    path, _ = checkpoint
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            tensors.open_weights(path)


def test_random_damage_to_the_header_never_escapes_as_another_error(checkpoint):
    path, _ = checkpoint
    whole = path.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(end)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            weights = tensors.open_weights(path)
            for name in weights.shapes:
                weights.read(name)
        except UserError:
            refused += 1
    assert refused > 200


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors.save(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError):
        tensors.save(path, {"a": shared[:3], "b": shared[1:]})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        tensors.save(tmp_path / "file" / "x.safetensors", {"a": torch.ones(2)})
