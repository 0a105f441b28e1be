"""A checkpoint's weights into a bundle: the same bytes where the dtype allows, converted one by one where not."""

import fcntl
import json
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from himap_export.engines.backends import as_numbers, as_stored
from himap_export.engines.weight_file import StoredTensor, map_tensors
from himap_export.graphs.spec import Dtype

_FLOATS = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
_FICLONE = 0x40049409  # linux/fs.h: share extents copy-on-write


def store_weights(tensors: Iterable[StoredTensor], folder: Path, dtype: Dtype) -> list[str]:
    """Writes the files that hold `tensors` (each tensor used by a graph) into `folder`; returns their names, sorted.

    A file whose used tensors all have `dtype` already is reflinked or copied whole, byte for byte; any other is
    rewritten with its used tensors in `dtype`. OSError when the disk is full.
    """
    by_file: dict[Path, list[StoredTensor]] = {}
    for t in tensors:
        by_file.setdefault(t.file, []).append(t)
    folder.mkdir()
    for file, used in by_file.items():
        if all(t.dtype == dtype for t in used):
            clone(file, folder / file.name)
        else:
            _convert(used, folder / file.name, dtype)
    return sorted(file.name for file in by_file)


def clone(source: Path, target: Path) -> None:
    """A reflink where the file system can, else a copy."""
    with source.open("rb") as src, target.open("wb") as dst:
        try:
            fcntl.ioctl(dst, _FICLONE, src.fileno())
        except OSError:
            shutil.copyfileobj(src, dst, 1 << 24)


def _convert(tensors: list[StoredTensor], target: Path, dtype: Dtype) -> None:
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
            f.write(as_stored(as_numbers(stored, t.dtype), dtype).tobytes())
