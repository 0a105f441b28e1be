"""safetensors files as they lie on disk: where each tensor's bytes are, and the file mapped, never read as a whole."""

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.graphs.errors import HimapError

# safetensors' names of element types, ours, and their sizes. bf16 has no NumPy type: it is mapped as raw 16-bit words.
TYPES: Mapping[str, tuple[str, int]] = {
    "F32": ("fp32", 4),
    "F16": ("fp16", 2),
    "BF16": ("bf16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F64": ("fp64", 8),
}
NUMPY: Mapping[str, type[np.generic]] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}
_HEADER_LIMIT = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file; `offset` and `nbytes` in bytes from the start of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, checked against its length; HimapError if it is truncated or corrupt."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            start = f.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else _HEADER_LIMIT + 1
            header = json.loads(f.read(length)) if length <= min(size, _HEADER_LIMIT) else None
        if not isinstance(header, dict):
            raise ValueError(f"its header should end within {size} bytes")
        header.pop("__metadata__", None)
        return {name: _entry(name, file, entry, 8 + length, size) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as problem:
        hint = "it is truncated or corrupt: fetch it again"
        raise HimapError(f"{file} is not a readable safetensors file", str(problem), hint) from None


_ROWS = re.compile(r"(?P<name>.+)\[(?P<start>\d+):(?P<stop>\d+)\]")


def base_name(name: str) -> str:
    """The stored tensor that "NAME[a:b]" takes rows of; any other name is its own."""
    found = _ROWS.fullmatch(name)
    return found["name"] if found else name


def find_tensor(stored: Mapping[str, StoredTensor], name: str) -> StoredTensor | None:
    """The tensor `name` of `stored`; "NAME[a:b]" is rows a to b of NAME, which lie in one piece. None if absent."""
    if name in stored:
        return stored[name]
    found = _ROWS.fullmatch(name)
    whole = stored.get(found["name"]) if found else None
    if found is None or whole is None or not whole.shape:
        return None
    start, stop = int(found["start"]), int(found["stop"])
    row = whole.nbytes // whole.shape[0] if whole.shape[0] else 0
    rows = max(0, min(stop, whole.shape[0]) - start)  # a tensor that is too short shows as a shape that does not fit
    return StoredTensor(name, whole.file, whole.dtype, (rows, *whole.shape[1:]), whole.offset + start * row, rows * row)


def find_tensors(stored: Mapping[str, StoredTensor], names: Iterable[str]) -> dict[str, StoredTensor]:
    """Those of `names` that `find_tensor` finds, in their order."""
    found = ((name, find_tensor(stored, name)) for name in dict.fromkeys(names))
    return {name: t for name, t in found if t is not None}


def _entry(name: str, file: Path, entry: dict[str, object], data: int, size: int) -> StoredTensor:
    dtype, width = TYPES[str(entry["dtype"])]
    shape = tuple(int(n) for n in entry["shape"])  # type: ignore[attr-defined]
    begin, end = (int(n) for n in entry["data_offsets"])  # type: ignore[attr-defined]
    if end - begin != width * prod(shape) or not 0 <= begin <= end:
        raise ValueError(f"tensor {name} does not fill its bytes")
    if data + end > size:
        raise ValueError(f"tensor {name} should end at byte {data + end}, the file has {size}")
    return StoredTensor(name, file, dtype, shape, data + begin, end - begin)


def map_tensors(tensors: Iterable[StoredTensor]) -> dict[str, npt.NDArray[np.generic]]:
    """Arrays over the files' pages (copy on write): nothing is read before its use, two users share it."""
    files: dict[Path, np.memmap[Any, np.dtype[np.uint8]]] = {}
    arrays = {}
    for t in tensors:
        if t.file not in files:
            files[t.file] = np.memmap(t.file, np.uint8, "c")
        raw = files[t.file][t.offset : t.offset + t.nbytes]
        arrays[t.name] = np.ndarray(t.shape, NUMPY[t.dtype], buffer=raw.data)
    return arrays
