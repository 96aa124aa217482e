"""safetensors files in and out: read the header, stream tensor by tensor, load a module strictly, write whole.

Concept   a checkpoint is a JSON header (names, types, shapes, byte ranges) followed by raw bytes. The header alone says
          how large the network is, so there are no model configuration files here: "the checkpoint is the config".
          Reading goes through a read-only SHARED mapping of the file, one tensor at a time, straight into the wanted
          type on the wanted device: the peak in host memory is one tensor above the model. (The safetensors package's
          reader maps privately, and a private mapping of a 40 GB file counts against the memory limit of the machine.)
          Nothing is ever unpickled, and the header is checked against the file's size before memory is taken.
Paper     none: plumbing.
"""

import json
import math
import mmap
import os
import struct
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from config import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER = 100_000_000  # bytes; the format's own limit


class Weights:
    """The tensors of one safetensors file, or of a folder of shards, by name.

    shapes    {name: shape}          dtypes  {name: torch.dtype}
    metadata  {key: text}, the header's free-text entries (of all shards together)
    path      the file or folder it was opened from
    """

    def __init__(self, path: Path, files: Sequence[Path]):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.metadata: dict[str, str] = {}
        self._place: dict[str, tuple[mmap.mmap, int]] = {}  # name -> (mapping, first byte)
        for file in files:
            with open(file, "rb") as handle:
                size = os.fstat(handle.fileno()).st_size
                header, start = read_header(handle, size, file)
                # an empty file cannot be mapped, and a file whose header names no tensors need not be
                mapping = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            self.metadata.update(header.pop("__metadata__", {}))
            for name, info in header.items():
                if name in self.shapes:
                    raise UserError(f"{path}: tensor {name} is in more than one shard; download the folder again")
                self.shapes[name] = tuple(info["shape"])
                self.dtypes[name] = DTYPES[info["dtype"]]
                self._place[name] = (mapping, start + info["data_offsets"][0])

    def read(self, name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """The tensor `name` in memory of its own, on `device`, as `dtype` (default: as stored)."""
        shape, stored = self.shapes[name], self.dtypes[name]
        mapping, first = self._place[name]
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=dtype or stored, device=device)
        with warnings.catch_warnings():  # the mapping is read-only and stays so: we copy
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            view = torch.frombuffer(mapping, dtype=stored, count=math.prod(shape), offset=first)
        return view.reshape(shape).to(device=device, dtype=dtype or stored, copy=True)


def read_header(handle, size: int, path: Path) -> tuple[dict, int]:
    """Parse and check the header of a safetensors file: (header, offset of the first data byte).

    raises UserError if the file is truncated, not safetensors, or its header contradicts itself or the file's size
    """

    def bad(why: str) -> UserError:
        return UserError(f"{path}: not a usable safetensors file ({why}); download or make it again")

    def once(pairs):
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise bad("a name stands twice in the header")
        return dict(pairs)

    first = handle.read(8)
    if len(first) < 8:
        raise bad(f"only {size} bytes long")
    (length,) = struct.unpack("<Q", first)
    if length > min(MAX_HEADER, size - 8):
        raise bad(f"its header claims {length} bytes of a file of {size}")
    try:
        header = json.loads(handle.read(length).decode("utf-8"), object_pairs_hook=once)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise bad("its header is not JSON") from error
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise bad("its __metadata__ is not text")
    ranges = []
    for name, info in header.items():
        if name == "__metadata__":
            continue
        try:
            shape, (begin, end), bits = info["shape"], info["data_offsets"], DTYPES[info["dtype"]].itemsize
            whole = all(type(n) is int and n >= 0 for n in [*shape, begin, end])
        except (TypeError, KeyError, ValueError) as error:
            raise bad(f"the entry of {name[:80]} is malformed or of an unknown type") from error
        if not whole or end - begin != math.prod(shape) * bits or end > size - 8 - length:
            raise bad(f"{name[:80]} does not fit its bytes: the file is truncated or its header wrong")
        ranges.append((begin, end))
    ranges.sort()
    if any(second[0] < first[1] for first, second in zip(ranges, ranges[1:])):
        raise bad("two tensors share bytes")
    return header, 8 + length


def open_weights(path: str | Path) -> Weights:
    """Open a .safetensors file, or a folder with one of them or with shards and their `*.index.json`."""
    path = Path(path)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = _files_of_folder(path)
    else:
        raise UserError(f"{path}: no such weights file or folder")
    try:
        return Weights(path, files)
    except OSError as error:
        raise UserError(f"{path}: cannot read the weights: {error.strerror}") from error


def _files_of_folder(folder: Path) -> list[Path]:
    index = sorted(folder.glob("*.safetensors.index.json"))
    if not index:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) == 1:
            return files
        found = "none" if not files else f"{len(files)} without an index json"
        raise UserError(f"{folder}: expected one .safetensors file, or shards with an index json; found {found}")
    if len(index) > 1:
        raise UserError(f"{folder}: expected one index json; found {', '.join(f.name for f in index)}")
    try:
        names = set(json.loads(index[0].read_text())["weight_map"].values())
        files = [folder / name for name in sorted(names)]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index[0]}: not a readable index of shards; download it again") from error
    if any(Path(name).name != name for name in names):
        raise UserError(f"{index[0]}: names shards outside its own folder; download it again")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder}: shards missing: {', '.join(missing)}; download them too")
    return files


@torch.no_grad()
def load(
    module: nn.Module,
    weights: Weights,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    sources: dict[str, tuple[list[str], Callable[..., Tensor]]] | None = None,
    ignore: Sequence[str] = (),
    keep_float32: Sequence[str] = (),
) -> nn.Module:
    """Fill a module that was built on the meta device from `weights`, strictly, one tensor at a time.

    sources       {our name: ([names in the file], fn)}: our tensor = fn(*tensors of the file). A name that is not in
                  `sources` is read under its own name.
    ignore        names in the file that may stay unread
    keep_float32  endings of our names that stay float32 whatever `dtype` is
    device        "meta" checks names and shapes from the header alone and allocates nothing
    returns       the module, in eval mode, without gradients
    raises        UserError that lists the missing, unexpected and mis-shaped names
    """
    sources = sources or {}
    wanted = dict(module.state_dict())
    plan = {name: sources.get(name, ([name], _same)) for name in wanted}
    used = {source for names, _ in plan.values() for source in names}
    missing = sorted(used - set(weights.shapes))
    unexpected = sorted(set(weights.shapes) - used - set(ignore))
    misshaped = []
    for name, (names, fn) in plan.items():
        if any(source not in weights.shapes for source in names):
            continue
        shape = _shape_of(fn, [weights.shapes[source] for source in names])
        if shape != tuple(wanted[name].shape):
            misshaped.append(f"{name} {shape or 'unreadable'} instead of {tuple(wanted[name].shape)}")
    if missing or unexpected or misshaped:
        parts = [("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)]
        told = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in parts if names)
        raise UserError(f"{weights.path}: does not hold a {type(module).__name__} checkpoint ({told})")
    if torch.device(device).type != "meta":
        for name, (names, fn) in plan.items():
            kind = torch.float32 if name.endswith(tuple(keep_float32)) else dtype
            # converted on the device, so that the host never holds a second copy
            tensor = fn(*(weights.read(source, device) for source in names)).to(kind)
            owner, _, leaf = name.rpartition(".")
            _put(module.get_submodule(owner), leaf, tensor)
    return module.eval().requires_grad_(False)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _shape_of(fn: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of fn(tensors of these shapes), computed without memory; None where they do not go together."""
    try:
        return tuple(fn(*(torch.empty(shape, device="meta") for shape in shapes)).shape)
    except RuntimeError:
        return None


def _put(owner: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _some(names: list[str], most: int = 8) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def save(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all: to a temporary name beside it, then renamed."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".tmp")
        os.close(handle)
    except OSError as error:
        raise UserError(f"{path}: cannot write there: {error.strerror}") from error
    try:
        ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        save_file(ready, temporary, metadata=metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
