"""A checkpoint's weights into a bundle: the same bytes where the dtype allows, converted one by one where not."""

import fcntl
import json
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from himap_export.engines.backends import as_numbers, as_stored
from himap_export.engines.weight_file import StoredTensor, map_tensors
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.spec import Dtype

_FLOATS = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
_FICLONE = 0x40049409  # linux/fs.h: share extents copy-on-write
_CHUNK = 1 << 24


def store_weights(tensors: Iterable[StoredTensor], folder: Path, dtype: Dtype, hard_link: bool = False) -> list[str]:
    """Writes the files that hold `tensors` (each tensor used by a graph) into `folder`; returns their names, sorted.

    A file whose used tensors all have `dtype` already is hard-linked on request, else reflinked, else copied whole,
    byte for byte; any other is rewritten with its used tensors in `dtype`. OSError when the disk is full.
    """
    by_file: dict[Path, list[StoredTensor]] = {}
    for t in tensors:
        by_file.setdefault(t.file, []).append(t)
    folder.mkdir()
    targets = _targets(by_file)
    with _bar(sum(file.stat().st_size for file in by_file), "weights") as bar:
        for file, used in by_file.items():
            unlike = [t for t in used if t.dtype != dtype]
            if unlike and hard_link:
                details = f"{unlike[0].name} is {unlike[0].dtype}, the bundle wants {dtype}"
                raise HimapError("cannot hard-link the weights", details, "leave --hard-link out", Exit.USAGE)
            if unlike:
                write_weights(used, folder / targets[file], dtype, bar)
            elif hard_link:
                _link(file, folder / targets[file])
            else:
                _clone(file, folder / targets[file], bar)
    return sorted(targets.values())


def _targets(files: Iterable[Path]) -> dict[Path, str]:
    """Their own names; where two checkpoints use the same one, the second's goes behind its folder's."""
    found: dict[Path, str] = {}
    for file in files:
        found[file] = f"{file.parent.name}-{file.name}" if file.name in found.values() else file.name
    return found


def write_weights(tensors: Sequence[StoredTensor], target: Path, dtype: Dtype, bar: "tqdm[None] | None" = None) -> None:
    """A safetensors file of `tensors` in `dtype`, one tensor in memory at a time."""
    width = 4 if dtype == "fp32" else 2
    header, end = {}, 0
    for t in tensors:
        size = width * int(np.prod(t.shape, dtype=np.int64))
        header[t.name] = {"dtype": _FLOATS[dtype], "shape": t.shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned, as safetensors itself does it
    with target.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for t in tensors:
            stored = map_tensors([t])[t.name]
            f.write(stored.data if t.dtype == dtype else as_stored(as_numbers(stored, t.dtype), dtype).data)
            if bar is not None:
                bar.update(t.nbytes)


def _bar(size: int, what: str) -> "tqdm[None]":
    """On a terminal only, and only for what takes long."""
    return tqdm(total=size, desc=what, unit="B", unit_scale=True, leave=False, disable=None, delay=0.5)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)  # a hub snapshot's files are links themselves
    except OSError as problem:
        hint = "--out must be on the checkpoint's file system, or leave --hard-link out"
        raise HimapError(f"cannot hard-link {source}", problem.strerror or str(problem), hint) from None


def _clone(source: Path, target: Path, bar: "tqdm[None]") -> None:
    """A reflink where the file system can, else a copy."""
    with source.open("rb") as src, target.open("wb") as dst:
        try:
            fcntl.ioctl(dst, _FICLONE, src.fileno())
            bar.update(source.stat().st_size)
        except OSError:
            while chunk := os.sendfile(dst.fileno(), src.fileno(), None, _CHUNK):  # stays in the kernel
                bar.update(chunk)
