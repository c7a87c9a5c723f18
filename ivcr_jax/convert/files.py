"""Published weight files, of PyTorch and of Hugging Face, as NumPy arrays that are read when asked for.

A file is checked once, when it is opened; after that only what is asked for is read. Nothing in a file is executed.
Files lie on a local disk: they are mapped.
"""

import dataclasses
import importlib
import json
import math
import pathlib
import re
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

# Pages of a mapping count as memory of the process until it is closed: it is, after so many bytes.
REOPEN = 256 << 20


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of a weight file: shape, NumPy dtype (bfloat16 as ml_dtypes.bfloat16), the file that holds it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: pathlib.Path


class Weights:
    """The tensors of one file, or of the shards of one model, by key. Made by `open_weights`.

    Attributes: `name`, the path, for messages; `entries`, what can be read, by key; `skipped`, what else the files hold
    and never give (an epoch, an optimizer's state): the name of its type, by key.
    """

    def __init__(self, name: str, files: Iterable[pathlib.Path]):
        self.name = name
        self.entries: dict[str, Entry] = {}
        self.skipped: dict[str, str] = {}
        self._mapped: dict[pathlib.Path, dict[str, Any]] = {}
        self._resident = 0
        for file in files:
            _check(file)
            tensors, skipped = _map(file)
            self.skipped |= skipped
            for key, tensor in tensors.items():
                if other := self.entries.get(key):
                    raise ValueError(f"{file}: {key} is in {other.file.name}, too; expected it in one shard")
                array = _numpy(tensor, ..., f"{file}: {key}")
                self.entries[key] = Entry(array.shape, array.dtype, file)
        if not self.entries:
            found = ", ".join(list(self.skipped)[:5]) or "nothing"
            raise ValueError(f"{name}: no tensors in it (found: {found}); expected a state dict, bare or under 'model'")

    def read(self, key: str, rows: slice | None = None) -> np.ndarray:
        """Reads a tensor, or some rows of it: a copy, dtype[*shape] or dtype[rows, *shape[1:]].

        Beside it, no more than REOPEN bytes (or one row, where it is larger) of the file are in memory.
        Raises KeyError for an absent key; ValueError where `rows` has a step or the tensor has no axis.
        """
        if key not in self.entries:
            raise KeyError(f"{self.name}: no tensor {key}")
        entry = self.entries[key]
        if rows is not None and (not entry.shape or rows.step not in (None, 1)):
            raise ValueError(f"{self.name}: {rows} of {key}, shape {entry.shape}; expected a range of its first axis")
        if not entry.shape:
            return np.array(self._part(key, ..., entry.dtype.itemsize))
        start, stop, _ = (rows or slice(None)).indices(entry.shape[0])
        shape, row_bytes = (max(stop - start, 0), *entry.shape[1:]), math.prod(entry.shape[1:]) * entry.dtype.itemsize
        out = empty(shape, entry.dtype)
        step = max(1, REOPEN // max(1, row_bytes))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            out[first - start : last - start] = self._part(key, slice(first, last), (last - first) * row_bytes)
        return out

    def _part(self, key: str, where: Any, size: int) -> np.ndarray:
        """A view, of `size` bytes, into a mapped file. Keep none of it: it would hold the mapping open."""
        if self._resident + size > REOPEN:
            self._mapped, self._resident = {}, 0
        self._resident += size
        if (file := self.entries[key].file) not in self._mapped:
            self._mapped[file] = _map(file)[0]
        return _numpy(self._mapped[file][key], where, f"{file}: {key}")


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """dtype[*shape] without values, aligned to 64 bytes: JAX takes such memory without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:size].view(dtype).reshape(shape)


def open_weights(path: str | pathlib.Path) -> Weights:
    """Opens a file of torch.save (.pth, .pt, .bin), a .safetensors file, or the folder of a Hugging Face model.

    A file of torch.save holds a state dict, bare or under "model". Of a folder the first is taken of model.safetensors,
    its shards with an index, pytorch_model.bin, its shards.

    Raises ValueError where something is absent, cut off, changed, not what its name says, or asks for more than
    tensors; ImportError where torch or safetensors is not installed.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        return Weights(str(path), [path])
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (path / stem).exists():
            return Weights(str(path), [path / stem])
        if (index := path / f"{stem}.index.json").exists():
            return _open_shards(index)
    found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
    raise ValueError(f"{path}: no weights in it (found: {found}); expected model.safetensors or pytorch_model.bin")


def _open_shards(index: pathlib.Path) -> Weights:
    """The weights an index tells of, which must be exactly those in the shards."""
    _check_head(index)
    try:
        places = dict(json.loads(index.read_bytes())["weight_map"])
        shards = [index.parent / shard for shard in sorted(set(places.values()))]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: not an index ({error!r}); expected JSON with the shard of each key") from error
    if absent := [shard.name for shard in shards if not shard.exists()]:
        raise ValueError(f"{index}: {_some(absent)} not there; expected the {len(shards)} shards it names")
    weights = Weights(str(index.parent), shards)
    found = {key: entry.file.name for key, entry in weights.entries.items()}
    if wrong := [key for key in places if key not in weights.skipped and found.get(key) != places[key]]:
        raise ValueError(f"{index}: {_some(wrong)} not in the shard it names, {places[wrong[0]]}")
    if extra := [key for key in found if key not in places]:
        raise ValueError(f"{index}: {_some(extra)} not named, but in {found[extra[0]]}; expected every key of a shard")
    return weights


def _check_head(path: pathlib.Path) -> bytes:
    """The first bytes of a file that is there, not empty and not a pointer."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected weights")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path}: empty (0 bytes); expected weights")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a pointer of git-lfs, not the weights; `git lfs pull` fetches them")
    return head


def _check(path: pathlib.Path) -> None:
    """Refuses a file that is not whole. A file of torch.save is read once for that.

    torch.save gives each part of its zip file a CRC-32 sum, unless `torch.serialization.set_crc32_options(False)` was
    called: then all are 0, which the sums of a whole file never are. Mapped, torch.load looks at none. A .safetensors
    file has no sums; its header and size are checked where it is mapped.
    """
    head = _check_head(path)
    if path.suffix == ".safetensors":
        return
    if path.suffix not in (".pth", ".pt", ".bin"):
        raise ValueError(f"{path}: unknown kind of file; expected .safetensors, .pth, .pt, .bin or a folder")
    if head.startswith(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46"):  # a pickle that begins with torch's magic number
        again = "torch.save(torch.load(old, weights_only=True), new)"
        raise ValueError(f"{path}: the format of torch before 1.6; expected a zip file: {again} makes one")
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if packed := [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]:
                raise zipfile.BadZipFile(f"{_some(packed)} compressed")
            for part in parts if any(part.CRC for part in parts) else ():
                with archive.open(part) as file:
                    while file.read(1 << 20):
                        pass
    except Exception as error:  # of a dozen kinds
        raise ValueError(f"{path}: cut off or changed ({error}); expected a whole zip file of torch.save") from error


def _map(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Maps a file. Returns by key what gives a torch.Tensor when indexed, and the type's name of what is no tensor."""
    torch = _import("torch")
    if path.suffix == ".safetensors":
        safetensors = _import("safetensors")
        try:
            mapped = safetensors.safe_open(path, framework="pt")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: cut off or changed ({error}); expected a whole .safetensors file") from error
        return {key: mapped.get_slice(key) for key in mapped.keys()}, {}  # noqa: SIM118
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        found = f"it asks for {asked[1]}, which was not run" if asked else str(error).partition("\n")[0]
        raise ValueError(f"{path}: torch.load refuses it ({found}); expected tensors and plain values") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}; expected a state dict, bare or under 'model'")
    state = loaded["model"] if isinstance(loaded.get("model"), Mapping) else loaded
    tensors = {str(key): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    others = ((str(key), value) for key, value in (*loaded.items(), *state.items()) if value is not state)
    return tensors, {key: type(value).__name__ for key, value in others if key not in tensors}


def _numpy(tensor: Any, where: Any, name: str) -> np.ndarray:
    """A part of a tensor, without a copy. Raises ValueError for a sparse, quantized, data-less or 8-bit float one."""
    try:
        tensor = tensor[where].detach()
        if str(tensor.dtype) == "torch.bfloat16":  # which NumPy does not know
            return tensor.view(_import("torch").int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:
        found = str(error).partition("\n")[0]
        raise ValueError(f"{name}: a tensor NumPy cannot hold ({found}); expected a dense one with its data") from error


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"reading weights needs {name}, which pip install 'ivcr_jax[convert]' brings") from error


def _some(names: list[str]) -> str:
    """The first of some names, how many more there are, and the verb."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
