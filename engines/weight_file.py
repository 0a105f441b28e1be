"""safetensors files as they lie on disk: where each tensor's bytes are, and the file mapped, never read as a whole."""

import json
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt

from himap_export.engines.documents import MEGABYTE, open_file, parse_json, typed
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import Rows, TensorSpec, WeightSpec

# safetensors' names of element types, and ours of those that a graph knows; the others keep theirs.
_OURS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "I64": "int64", "I32": "int32", "BOOL": "bool"}
_Type = Literal[
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
    "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64",
]  # fmt: skip
# What maps a tensor, by our name of its type. NumPy has no bf16: its numbers are held as 16-bit words.
NUMPY: Mapping[str, type[np.generic]] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}
# The longest header that is read. The format allows 100 MB; 16 MB describe a hundred thousand tensors.
_HEADER_LIMIT = 16 * MEGABYTE
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Entry(msgspec.Struct, frozen=True):
    """A tensor in a header; more dimensions than 64 no array has."""

    dtype: _Type
    shape: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=64)]
    data_offsets: tuple[_Count, _Count]


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
    """Returns the tensors of one safetensors file, which must fill it to the byte: no holes, no overlaps, no rest.

    HimapError if it is truncated or corrupt, or no plain file.
    """
    with open_file(file, "safetensors file", Exit.FAILURE) as f:
        size, start = os.fstat(f.fileno()).st_size, f.read(8)
        length, most = int.from_bytes(start, "little"), min(size - 8, _HEADER_LIMIT)
        text = f.read(length) if len(start) == 8 and length <= most else b""
    try:
        if not text:
            raise ValueError(f"its header should end within {max(most, 0)} bytes")
        header = typed(parse_json(text, "its header", Exit.FAILURE), dict[str, Any], "its header", Exit.FAILURE)
        if (metadata := header.pop("__metadata__", None)) is not None:
            typed(metadata, dict[str, str], "its __metadata__", Exit.FAILURE)
        return _placed(file, header, 8 + length, size)
    except (ValueError, HimapError) as problem:
        hint = "it is truncated or corrupt: fetch it again"
        raise HimapError(f"{file} is not a readable safetensors file", str(problem), hint) from None


def _placed(file: Path, header: Mapping[str, Any], data: int, size: int) -> dict[str, StoredTensor]:
    """Returns the tensors of `header`, whose first byte is the file's byte `data`; ValueError unless they fill it."""
    found, places = {}, []
    for name, values in header.items():
        entry = typed(values, _Entry, f"tensor {name[:100]}", Exit.FAILURE)
        begin, end = entry.data_offsets
        if 8 * (end - begin) != _bits(entry.dtype) * prod(entry.shape):
            raise ValueError(f"tensor {name[:100]} does not fill its bytes")
        kind = _OURS.get(entry.dtype, entry.dtype)
        found[name] = StoredTensor(name, file, kind, entry.shape, offset=data + begin, nbytes=end - begin)
        places.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(places):
        if begin != at:
            raise ValueError(f"tensor {name[:100]} should start at byte {at} of the data, it starts at {begin}")
        at = end
    if data + at != size:
        raise ValueError(f"its tensors should end at byte {data + at}, the file has {size}")
    return found


def _bits(dtype: str) -> int:
    found = re.search(r"\d+", dtype)  # F8_E4M3 is of 8 bits
    return int(found[0]) if found else 8  # BOOL


# What files hold of numbers that safetensors has no name for, or another: the type, and how many share an element.
_HELD = {
    "fp32": ("F32", 1), "fp16": ("F16", 1), "bf16": ("BF16", 1), "int8": ("I8", 1), "int4": ("U8", 2),
    "fp8": ("F8_E4M3", 1), "fp4": ("U8", 2),
}  # fmt: skip


def as_held(spec: TensorSpec) -> tuple[str, tuple[int, ...]]:
    """Returns safetensors' word for the type in which a file holds a weight, and the shape: two of 4 bits share a
    byte."""
    kind, share = _HELD[spec.dtype]
    return kind, (*spec.shape[:-1], spec.shape[-1] // share) if spec.shape else ()


def held_bytes(spec: TensorSpec) -> int:
    """Returns how many bytes a file holds of a weight."""
    kind, shape = as_held(spec)
    return _bits(kind) * prod(shape) // 8


def write_safetensors(
    target: Path, held: Mapping[str, tuple[str, tuple[int, ...]]], arrays: Iterable[npt.NDArray[Any]]
) -> None:
    """Writes a safetensors file of tensors `held`, each its type in safetensors' words and its shape; `arrays` give
    their content in order, in as many pieces as they like."""
    header, end = {}, 0
    for name, (kind, shape) in held.items():
        size = _bits(kind) * prod(shape) // 8
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned, as safetensors itself does it
    with target.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for array in arrays:
            f.write(np.ascontiguousarray(array).data)


def find_tensor(stored: Mapping[str, StoredTensor], name: str, rows: Rows | None = None) -> StoredTensor | None:
    """Returns the tensor `name` of `stored`, else as many `rows` of another as that one has, which lie in one piece.
    None if absent."""
    whole = stored.get(rows.tensor) if rows is not None else None
    if name in stored or rows is None or whole is None:
        return stored.get(name)
    if not whole.shape:  # it has no rows: a shape that does not fit
        return replace(whole, name=name)
    row = whole.nbytes // whole.shape[0] if whole.shape[0] else 0
    count = max(0, min(rows.stop, whole.shape[0]) - rows.start)  # of a tensor too short: a shape that does not fit
    shape, offset = (count, *whole.shape[1:]), whole.offset + rows.start * row
    return replace(whole, name=name, shape=shape, offset=offset, nbytes=count * row)


def find_tensors(stored: Mapping[str, StoredTensor], wanted: Mapping[str, WeightSpec]) -> dict[str, StoredTensor]:
    """Returns those of the weights `wanted` that `find_tensor` finds, in their order."""
    found = ((name, find_tensor(stored, name, spec.rows)) for name, spec in wanted.items())
    return {name: t for name, t in found if t is not None}


def map_tensors(tensors: Iterable[StoredTensor]) -> dict[str, npt.NDArray[np.generic]]:
    """Returns arrays over the files' pages (copy on write): nothing is read before its use, two users share it.

    HimapError (usage) for a tensor that is no weight.
    """
    files: dict[Path, np.memmap[Any, np.dtype[np.uint8]]] = {}
    arrays = {}
    for t in tensors:
        check_float(t)
        if t.file not in files:
            files[t.file] = np.memmap(t.file, np.uint8, "c")
        raw = files[t.file][t.offset : t.offset + t.nbytes]
        arrays[t.name] = np.ndarray(t.shape, NUMPY[t.dtype], buffer=raw.data)
    return arrays


def turn_int4(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Returns int4 [in,out], two outputs in a byte [in,out/2], as [out,in], two inputs in a byte [out,in/2]."""
    wide, half = packed.shape
    even, odd = packed[0::2], packed[1::2]
    turned = np.empty((half, 2, wide // 2), np.uint8)
    turned[:, 0] = ((even & 15) | (odd << 4)).T
    turned[:, 1] = ((even >> 4) | (odd & 0xF0)).T
    return turned.reshape(2 * half, wide // 2)


def as_stored(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Returns `values` in the form in which `NUMPY` holds `dtype`, rounded to nearest even: NaN stays NaN, and what is
    too large is infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "bf16":
            return np.ascontiguousarray(values, ml_dtypes.bfloat16).view(np.uint16)
        return np.ascontiguousarray(values, NUMPY[dtype])


def as_numbers(stored: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Returns the inverse of `as_stored`: bf16 words become fp32, everything else is itself."""
    return stored.view(ml_dtypes.bfloat16).astype(np.float32) if dtype == "bf16" else stored


# A float type as whole numbers: shifted left by one bit, its sign, it is not finite from the second number on.
_WORDS = {"fp16": (np.uint16, 0xF800), "bf16": (np.uint16, 0xFF00), "fp32": (np.uint32, 0xFF000000)}
_PIECE, _BLOCK = 16 << 20, 1 << 16  # bytes that are mapped at once, and numbers that stay in a core's cache


def not_finite(stored: npt.NDArray[Any], dtype: str) -> int:
    """Counts NaN and infinity among `stored` [n], in the form of `as_stored`; exact, and fast if there is none."""
    kind, infinity = _WORDS[dtype]
    words, found = stored.view(kind), 0
    for at in range(0, len(words), _BLOCK):
        block = words[at : at + _BLOCK]
        doubled = block + block
        if doubled.max() >= infinity:
            found += int(np.count_nonzero(doubled >= infinity))
    return found


def check_float(tensor: StoredTensor) -> None:
    """Raises HimapError (usage) unless `tensor` is of a type that a weight may have: fp16, bf16 or fp32."""
    if tensor.dtype not in _WORDS:
        details, hint = f"it is stored as {tensor.dtype}", f"expected {', '.join(_WORDS)}: is the checkpoint quantised?"
        raise HimapError(f"tensor {tensor.name} is no weight that a graph can use", details, hint, Exit.USAGE)


def check_finite(tensors: Iterable[StoredTensor]) -> None:
    """Raises HimapError if one of `tensors` holds NaN or infinity, or no floats. Reads them once, piece by piece."""
    pieces = []
    for t in tensors:
        check_float(t)
        pieces += [(t, at) for at in range(0, t.nbytes, _PIECE)]
    spoiled = Counter[str]()
    pool = ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0))))
    try:
        for (t, _), count in zip(pieces, pool.map(_not_finite_in, pieces), strict=True):
            spoiled[t.name] += count
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted command waits for the pieces under way, not for all
    if spoiled := +spoiled:
        name, count = next(iter(spoiled.items()))
        more = f", {len(spoiled) - 1} more tensors too" if len(spoiled) > 1 else ""
        values = "value is" if count == 1 else "values are"
        hint = "is the checkpoint damaged?"
        raise HimapError(f"tensor {name} is not finite", f"{count} {values} NaN or infinite{more}", hint)


def _not_finite_in(piece: tuple[StoredTensor, int]) -> int:
    """Counts in a mapping of its own each time: what has been read counts as this process's memory no longer."""
    t, at = piece
    size = min(_PIECE, t.nbytes - at)
    return not_finite(np.asarray(np.memmap(t.file, np.uint8, "r", t.offset + at, (size,))), t.dtype)
