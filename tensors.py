"""safetensors files in and out: read the header, stream tensor by tensor, load a module strictly, write whole.

Concept   a checkpoint is a JSON header (names, types, shapes, byte ranges) followed by raw bytes. The header alone says
          how large the network is, so there are no model configuration files here: "the checkpoint is the config".
          Reading goes through a read-only SHARED mapping of the file, one tensor at a time, straight into the wanted
          type on the wanted device: the peak in host memory is one tensor above the model. (The safetensors package's
          reader maps privately, and a private mapping of a 40 GB file counts against the memory limit of the machine.)
          Nothing is ever unpickled, and the header is checked against the file's size before memory is taken.
          Writing is ours too: the package's writer orders the header at random, and equal weights should be equal
          bytes.
Paper     none: plumbing.

Eight bits   e4m3 files come in two kinds. Plain: every weight merely rounded to float8 (Kijai/Mochi_preview_comfy).
          Scaled (ComfyUI's "fp8_scaled"): weight = `X.weight` * `X.scale_weight`, where `X.scale_input`, a hint for
          eight-bit products, and `scaled_fp8`, a mark, play no part; names may all start with PREFIX. `Weights`
          shows both as what they stand for: names and shapes of the float weights.
"""

import json
import math
import mmap
import os
import re
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the format's own limit
PREFIX = "model.diffusion_model."  # before every name of a diffusion model that ComfyUI saved


class Weights:
    """The tensors of one safetensors file, or of a folder of shards, by name.

    shapes    {name: shape}          dtypes  {name: torch.dtype}
    metadata  {key: text}, the header's free-text entries (of all shards together)
    path      the file or folder it was opened from
    files     the files it is made of
    """

    def __init__(self, path: Path, files: Sequence[Path]):
        self.path, self.files = path, files
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
        if self.shapes and all(name.startswith(PREFIX) for name in self.shapes):
            for table in (self.shapes, self.dtypes, self._place):
                for name in list(table):
                    table[name.removeprefix(PREFIX)] = table.pop(name)
        self._scale: dict[str, Tensor] = {}  # weight stored in eight bits -> what it is to be multiplied by
        for name in [name for name, dtype in self.dtypes.items() if dtype == torch.float8_e4m3fn]:
            base = name.removesuffix("weight")
            if math.prod(self.shapes.get(base + "scale_weight", (0,))) == 1:
                self._scale[name] = self.read(base + "scale_weight", dtype=torch.float32).reshape(())
                for done in (base + "scale_weight", base + "scale_input", "scaled_fp8"):
                    self.shapes.pop(done, None), self.dtypes.pop(done, None)

    def read(
        self,
        name: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The tensor `name` in memory of its own, on `device`, as `dtype` (default: as stored).

        rows   indices (n,) along the first dimension: only these are read, and memory is taken for them alone
        """
        shape, stored = self.shapes[name], self.dtypes[name]
        mapping, first = self._place[name]
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=dtype or stored, device=device)
        with warnings.catch_warnings():  # the mapping is read-only and stays so: we copy
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            view = torch.frombuffer(mapping, dtype=stored, count=math.prod(shape), offset=first).reshape(shape)
        view = view if rows is None else view[rows.cpu()]
        if name in self._scale:
            tensor = view.float().mul_(self._scale[name]).to(device, dtype or torch.float32)
        elif torch.device(device).type == "cuda":  # moved as stored and converted there: the bus carries fewer bytes
            tensor = view.to(device, copy=True).to(dtype or stored)
        else:  # converted on the way into its place: no second copy
            tensor = view.to(device=device, dtype=dtype or stored, copy=True)
        _let_go(mapping, first, math.prod(shape) * stored.itemsize)
        return tensor


def _let_go(mapping: mmap.mmap, first: int, size: int) -> None:
    """Tell the system that these bytes of the mapping were read: their pages stop counting as this process's memory.

    They stay in the system's cache of the file, and reading them again is right, only slower.
    """
    if hasattr(mapping, "madvise"):
        begin = first // mmap.PAGESIZE * mmap.PAGESIZE
        mapping.madvise(mmap.MADV_DONTNEED, begin, first + size - begin)


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
    """Open a .safetensors file, or a folder with one of them or with shards and their index json.

    A folder of the hub may hold a network twice, in full and as a variant with bf16 or fp16 in its file names: the full
    one is read.
    """
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


SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
VARIANT = re.compile(r"\.(bf16|fp16)\b")


def _files_of_folder(folder: Path) -> list[Path]:
    shards = [file for file in folder.glob("*.safetensors") if SHARD.search(file.name)]
    whole = [file for file in folder.glob("*.safetensors") if file not in shards]
    index = [*folder.glob("*.safetensors.index.json"), *folder.glob("*.safetensors.index.*.json")]
    members = {file: _shards_of(file) for file in sorted(index)}
    whole = [file for file in whole if not any(file in files for files in members.values())]
    copies = {**{file: [file] for file in sorted(whole)}, **members}
    chosen = [file for file in copies if not VARIANT.search(file.name)] or list(copies)
    if len(chosen) != 1:
        found = ", ".join(file.name for file in chosen) or (f"{len(shards)} shards without it" if shards else "none")
        raise UserError(f"{folder}: expected one .safetensors file, or shards with one index json; found {found}")
    missing = [file.name for file in copies[chosen[0]] if not file.is_file()]
    if missing:
        raise UserError(f"{folder}: shards missing: {', '.join(missing)}; download them too")
    return copies[chosen[0]]


def _shards_of(index: Path) -> list[Path]:
    """The files that an index json names."""
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
        files = [index.parent / name for name in sorted(names)]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: not a readable index of shards; download it again") from error
    if any(Path(name).name != name for name in names):
        raise UserError(f"{index}: names shards outside its own folder; download it again")
    return files


class NoInitialValues(TorchFunctionMode):
    """Inside `with`, torch.nn.init does nothing."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        skip = getattr(function, "__module__", None) == "torch.nn.init"
        return None if skip else function(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside `with`, modules are made of shapes: no memory and no initial values, which `load` is going to give them.

    More than torch.device("meta"): on that device nn.init.normal_ would import a compiler, 2 s for nothing.
    """
    with torch.device("meta"), NoInitialValues():
        yield


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

    sources       {our name: ([names in the file], fn)}: our tensor = fn(*tensors of the file), fn only moves or joins
                  rows. A name that is not in `sources` is read under its own name.
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
            told = name if names == [name] else f"{' + '.join(names)} for {name}"
            found = "of other shapes" if shape is None else f"{shape} instead of {tuple(wanted[name].shape)}"
            misshaped.append(f"{told} {found}")
    if missing or unexpected or misshaped:
        parts = [("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped)]
        told = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in parts if names)
        raise UserError(f"{weights.path}: does not hold a {type(module).__name__} checkpoint ({told})")
    if torch.device(device).type != "meta":
        for name, (names, fn) in plan.items():
            kind = torch.float32 if name.endswith(tuple(keep_float32)) else dtype
            tensor = fn(*(weights.read(source, device, kind) for source in names))
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
    """Write a safetensors file, whole or not at all: to a temporary name beside it, then renamed.

    The bytes depend on the content alone: widest types first (so that each tensor is aligned), then by name. Tensors
    that share memory are written each in full. On top of the tensors themselves, at most one of them is held.
    """
    path = Path(path)
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".tmp")
    except OSError as error:
        raise UserError(f"{path}: cannot write there: {error.strerror}") from error
    try:
        with open(handle, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                raw = tensors[name].detach().to("cpu").contiguous().flatten().view(torch.uint8)
                file.write(raw.numpy())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot write there: {error.strerror}") from error
        raise
