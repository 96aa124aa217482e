import json
import math
import random
import resource
import struct
import tracemalloc
import weakref
from pathlib import Path

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


def state_of_every_type():
    torch.manual_seed(0)
    state = {name: (torch.randn(5, 3) * 3).to(dtype) for name, dtype in tensors.DTYPES.items()}
    return state | {
        "turned": torch.randn(4, 3).T,
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 2),
        "é": state["F32"],
    }


def test_a_saved_file_is_read_by_the_safetensors_package_bit_for_bit(tmp_path):
    state = state_of_every_type()
    tensors.save(tmp_path / "new" / "x.safetensors", state, {"k": "v"})
    again = load_file(tmp_path / "new" / "x.safetensors")
    assert again.keys() == state.keys()
    assert all(
        again[name].dtype == t.dtype and torch.equal(again[name].float(), t.float()) for name, t in state.items()
    )
    assert tensors.open_weights(tmp_path / "new" / "x.safetensors").metadata == {"k": "v"}


def test_equal_content_gives_equal_bytes_and_each_tensor_is_aligned(tmp_path):
    state = state_of_every_type()
    tensors.save(tmp_path / "a.safetensors", state, {"k": "v", "j": "w"})
    backwards = {name: state[name] for name in reversed(state)}
    tensors.save(tmp_path / "b.safetensors", backwards, {"j": "w", "k": "v"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    raw = (tmp_path / "a.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert all(header[name]["data_offsets"][0] % t.element_size() == 0 for name, t in state.items())


def test_data_begins_at_a_multiple_of_eight_bytes_whatever_the_header(tmp_path):
    for n in range(8):
        tensors.save(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {"k": "v" * n})
        assert struct.unpack("<Q", (tmp_path / "x.safetensors").read_bytes()[:8])[0] % 8 == 0


def test_saving_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    held = []
    contiguous = torch.Tensor.contiguous

    def watch(tensor):
        copy = contiguous(tensor)
        held.append(weakref.ref(copy))
        assert sum(ref() is not None for ref in held) <= 2  # the last one goes while the next one comes
        return copy

    monkeypatch.setattr(torch.Tensor, "contiguous", watch)
    tensors.save(tmp_path / "x.safetensors", {str(i): torch.ones(1).expand(50) for i in range(9)})
    assert len(held) == 9


def test_chosen_rows_are_those_of_the_whole_tensor_and_memory_of_their_own(tmp_path):
    state = {name: t for name, t in state_of_every_type().items() if t.ndim == 2 and len(t) == 5}
    tensors.save(tmp_path / "x.safetensors", state)
    w = tensors.open_weights(tmp_path / "x.safetensors")
    for name, tensor in state.items():
        rows = w.read(name, rows=torch.tensor([4, 0, 4]))
        assert torch.equal(rows.float(), tensor.float()[[4, 0, 4]])
        assert rows.untyped_storage().nbytes() == 9 * tensor.element_size()
    with pytest.raises(IndexError):
        w.read("F32", rows=torch.tensor([5]))


def test_a_tensor_that_was_read_can_be_read_again(checkpoint):
    path, state = checkpoint
    w = tensors.open_weights(path)
    assert all(torch.equal(w.read(name), state[name]) for name in ("weight", "bias", "weight"))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the kernel does not tell resident pages here")
def test_pages_of_the_file_stop_counting_once_they_are_read(tmp_path):
    def resident():  # bytes of this file that count as memory of this process
        parts = Path("/proc/self/smaps").read_text().split("x.safetensors\n")[1:]
        return sum(int(part.split("Rss:")[1].split()[0]) for part in parts) * 1024

    tensors.save(tmp_path / "x.safetensors", {str(i): torch.ones(2**20) for i in range(4)})
    w = tensors.open_weights(tmp_path / "x.safetensors")
    for i in range(4):
        assert w.read(str(i)).sum() == 2**20
        assert resident() < 2**20


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


def scaled(prefix=""):
    """A Linear in ComfyUI's scaled eight bits, and what it stands for."""
    torch.manual_seed(0)
    weight, scale = (torch.randn(3, 4) * 100).to(torch.float8_e4m3fn), torch.tensor(0.037)
    state = {"weight": weight, "scale_weight": scale, "scale_input": torch.tensor(2.0), "bias": torch.randn(3)}
    state = {"layer." + name: tensor for name, tensor in state.items()}
    state["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    return {prefix + name: t for name, t in state.items()}, weight.float() * scale, state["layer.bias"]


@pytest.mark.parametrize("prefix", ["", tensors.PREFIX])
def test_scaled_eight_bit_weights_are_read_as_the_weights_they_stand_for(tmp_path, prefix):
    state, weight, bias = scaled(prefix)
    save_file(state, tmp_path / "x.safetensors")
    w = tensors.open_weights(tmp_path / "x.safetensors")
    assert w.shapes == {"layer.weight": (3, 4), "layer.bias": (3,)} and w.dtypes.keys() == w.shapes.keys()
    module = nn.ModuleDict({"layer": linear()})
    assert torch.equal(tensors.load(module, w)["layer"].weight, weight)
    assert torch.equal(tensors.load(module, w)["layer"].bias, bias)
    assert torch.equal(w.read("layer.weight", dtype=torch.bfloat16), weight.bfloat16())
    assert torch.equal(w.read("layer.weight", rows=torch.tensor([1])), weight[1:2])


def test_plain_eight_bit_weights_are_read_as_they_are(tmp_path):
    state, _, _ = scaled()
    save_file({"weight": state["layer.weight"], "bias": state["layer.bias"]}, tmp_path / "x.safetensors")
    module = tensors.load(linear(), tensors.open_weights(tmp_path / "x.safetensors"), dtype=torch.bfloat16)
    assert torch.equal(module.weight, state["layer.weight"].bfloat16())


@pytest.mark.parametrize("change", [{"layer.scale_weight": torch.ones(3)}, {"layer.weight": torch.ones(3, 4)}])
def test_a_scale_that_is_not_one_number_for_eight_bits_is_refused_by_name(tmp_path, change):
    save_file(scaled()[0] | change, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="unexpected: .*layer.scale_weight"):
        tensors.load(nn.ModuleDict({"layer": linear()}), tensors.open_weights(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    "variant", ["m.bf16.safetensors.index.json", "m.safetensors.index.bf16.json", "m.fp16.safetensors"]
)
def test_of_a_network_in_two_precisions_the_full_one_is_read_and_a_single_one_whatever_it_is(tmp_path, variant):
    low = "m.bf16-00001-of-00001.safetensors" if "index" in variant else variant
    save_file({"weight": torch.zeros(1)}, tmp_path / low)
    if "index" in variant:
        (tmp_path / variant).write_text(json.dumps({"weight_map": {"weight": low}}))
    assert tensors.open_weights(tmp_path).read("weight") == 0
    save_file({"weight": torch.ones(1)}, tmp_path / "m.safetensors")
    assert tensors.open_weights(tmp_path).read("weight") == 1
    save_file({"weight": torch.ones(1)}, tmp_path / "n.safetensors")
    with pytest.raises(UserError, match="found m.safetensors, n.safetensors"):
        tensors.open_weights(tmp_path)


def test_shards_without_their_index_are_refused(tmp_path):
    for i in (1, 2):
        save_file({f"w{i}": torch.zeros(1)}, tmp_path / f"m-0000{i}-of-00002.safetensors")
    with pytest.raises(UserError, match="found 2 shards without it"):
        tensors.open_weights(tmp_path)


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
    "name twice": b"{%s,%s}" % ((b'"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}',) * 2),
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


def lying(rng):
    """A header that claims more than its 64 bytes of data hold, in one of the ways a header can: as JSON text."""
    entry = {"dtype": rng.choice(["F32", "BF16", "U8", "I64"]), "shape": [2, 2], "data_offsets": [0, 16]}
    size = tensors.DTYPES[entry["dtype"]].itemsize
    good = {"dtype": "U8", "shape": [8], "data_offsets": [48, 56]}
    kind = rng.choice(["offsets", "huge", "twice", "overlap", "backwards"])
    if kind == "offsets":  # a right size at a wrong place
        begin = rng.choice([65, 10**6, 2**40, 2**63]) + rng.randrange(100)
        entry["data_offsets"] = [begin, begin + 4 * size]
    if kind == "huge":
        entry["shape"] = [rng.choice([2**20, 2**40, 2**70]) for _ in range(rng.randint(1, 4))]
        entry["data_offsets"] = [0, rng.choice([64, math.prod(entry["shape"]) * size, 2**64 - 1])]
    if kind == "overlap":
        entry |= {"dtype": "U8", "shape": [9], "data_offsets": [40 + rng.randrange(8), 0]}
        entry["data_offsets"][1] = entry["data_offsets"][0] + 9
    if kind == "backwards":
        end = rng.randrange(8)
        entry |= {"shape": [end - 16], "data_offsets": [16, end]}
    name = '"good"' if kind == "twice" else '"bad"'
    entries = [f'"good":{json.dumps(good)}', f"{name}:{json.dumps(entry)}"]
    rng.shuffle(entries)
    return "{" + ",".join(entries) + "}"


def test_two_hundred_lying_headers_are_refused_before_memory_is_taken(tmp_path):
    rng = random.Random(1)
    tracemalloc.start()
    for _ in range(250):
        path = write(tmp_path / "x.safetensors", lying(rng).encode(), b"\0" * 64)
        with pytest.raises(UserError, match="not a usable safetensors file"):
            tensors.open_weights(path)
    for length in (2**63, 2**62, 2**40, 10**8, 10**6, 65):  # of the header itself
        path.write_bytes(struct.pack("<Q", length) + b"{" * 64)
        with pytest.raises(UserError, match="claims"):
            tensors.open_weights(path)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 10_000_000


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors.save(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(NotImplementedError):  # a tensor without content
        tensors.save(path, {"a": torch.ones(2), "b": torch.ones(2, device="meta")})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_full_disk_is_a_user_error_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors.save(path, {"a": torch.ones(2)})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # writing more fails as on a full disk
    try:
        with pytest.raises(UserError, match="x.safetensors: cannot write there"):
            tensors.save(path, {"a": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        tensors.save(tmp_path / "file" / "x.safetensors", {"a": torch.ones(2)})
