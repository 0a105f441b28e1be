"""A checkpoint's weights into a bundle: the same bytes where the dtype allows, converted one by one where not."""

import fcntl
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from himap_export.engines.weight_file import (
    StoredTensor,
    as_numbers,
    as_stored,
    check_finite,
    map_tensors,
    not_finite,
    write_safetensors,
)
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.spec import Dtype

_FLOATS = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
_LARGEST = {"fp16": 65504.0, "bf16": float.fromhex("0x1.fep127")}  # the last finite number; fp32 holds all of theirs
_FICLONE = 0x40049409  # linux/fs.h: share extents copy-on-write
_CHUNK, _PIECE = 1 << 24, 1 << 22  # bytes that are copied at once, and numbers that are converted


def store_weights(
    tensors: Iterable[StoredTensor], folder: Path, dtype: Dtype, hard_link: bool = False, allow_overflow: bool = False
) -> list[str]:
    """Writes the files that hold `tensors` (each tensor used by a graph) into `folder`; returns their names, sorted.

    A file whose used tensors all have `dtype` already is hard-linked on request, else reflinked, else copied whole,
    byte for byte; any other is rewritten with its used tensors in `dtype`, as `write_weights` does. OSError when the
    disk is full.
    """
    by_file: dict[Path, list[StoredTensor]] = {}
    for t in tensors:
        by_file.setdefault(t.file, []).append(t)
    folder.mkdir()
    targets = _targets(by_file)
    total = sum(file.stat().st_size for file in by_file)
    # On a terminal only, and only for what takes long.
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, leave=False, disable=None, delay=0.5) as bar:
        for file, used in by_file.items():
            unlike = [t for t in used if t.dtype != dtype]
            if unlike and hard_link:
                details = f"{unlike[0].name} is {unlike[0].dtype}, the bundle wants {dtype}"
                raise HimapError("cannot hard-link the weights", details, "leave `hard_link` out", Exit.USAGE)
            if unlike:
                write_weights(used, folder / targets[file], dtype=dtype, bar=bar, allow_overflow=allow_overflow)
            elif hard_link:
                _link(file, folder / targets[file])
            else:
                _clone(file, folder / targets[file], bar)
    return sorted(targets.values())


def _targets(files: Iterable[Path]) -> dict[Path, str]:
    """Returns the files' own names; where two checkpoints use the same one, the second's goes behind its folder's."""
    found: dict[Path, str] = {}
    for file in files:
        name = file.name
        while name in found.values():
            name = f"{file.parent.name}-{name}"
        found[file] = name
    return found


def write_weights(
    tensors: Sequence[StoredTensor],
    target: Path,
    dtype: Dtype,
    bar: "tqdm[None] | None" = None,
    allow_overflow: bool = False,
    constants: Collection[str] = (),
) -> None:
    """Writes a safetensors file of `tensors` in `dtype`, as they are those that are no floats or named among
    `constants`, a piece at a time.

    HimapError (usage) for a number that is too large for `dtype`; with `allow_overflow` it becomes the largest that is
    not. (failure) for one that is not finite. Neither is looked for where a tensor has `dtype` already.
    """
    kept = {t.name for t in tensors if t.dtype not in _FLOATS or t.dtype == dtype or t.name in constants}
    kinds = {t.name: t.dtype if t.name in kept else dtype for t in tensors}
    held = {t.name: (_FLOATS.get(kinds[t.name], t.dtype), t.shape) for t in tensors}

    def pieces() -> Iterator[npt.NDArray[Any]]:
        for t in tensors:
            if t.name in kept:
                for start in range(t.offset, t.offset + t.nbytes, _CHUNK):
                    size = min(_CHUNK, t.offset + t.nbytes - start)
                    yield np.asarray(np.memmap(t.file, np.uint8, "r", start, (size,)))
            else:
                stored = map_tensors([t])[t.name].reshape(-1)
                for start in range(0, stored.size, _PIECE):
                    yield _converted(t, stored[start : start + _PIECE], dtype, allow_overflow)
            if bar is not None:
                bar.update(t.nbytes)

    write_safetensors(target, held, pieces())


def _converted(tensor: StoredTensor, piece: npt.NDArray[Any], dtype: Dtype, allow_overflow: bool) -> npt.NDArray[Any]:
    """Returns the numbers `piece` [n] of `tensor`, in its own dtype, as `dtype`; HimapError as `write_weights`."""
    numbers = as_numbers(piece, tensor.dtype)
    made = as_stored(numbers, dtype)
    if not_finite(made, dtype) == 0:
        return made
    check_finite([tensor])
    return held_back(tensor.name, numbers, dtype, allow_overflow)


def held_back(name: str, numbers: npt.NDArray[Any], dtype: Dtype, allow_overflow: bool) -> npt.NDArray[Any]:
    """Returns `numbers` [n] of the tensor `name`, some of which are too large for `dtype`, the largest in their place;
    HimapError (usage) unless `allow_overflow`."""
    largest = _LARGEST[dtype]
    if not allow_overflow:
        worst = float(numbers[np.abs(numbers).argmax()])
        hint = "`allow_overflow` takes the largest number there is, or give another `dtype`"
        details = f"it holds {worst:g}, {dtype} ends at {largest:g}"
        raise HimapError(f"tensor {name} does not fit {dtype}", details, hint, Exit.USAGE)
    return as_stored(np.clip(numbers, -largest, largest), dtype)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)  # a hub snapshot's files are links themselves
    except OSError as problem:
        hint = "`out` must be on the checkpoint's file system, or leave `hard_link` out"
        raise HimapError(f"cannot hard-link {source}", problem.strerror or str(problem), hint) from None


def _clone(source: Path, target: Path, bar: "tqdm[None]") -> None:
    """Makes a reflink where the file system can, else a copy."""
    with source.open("rb") as src, target.open("wb") as dst:
        try:
            fcntl.ioctl(dst, _FICLONE, src.fileno())
            bar.update(source.stat().st_size)
        except OSError:
            while chunk := os.sendfile(dst.fileno(), src.fileno(), None, _CHUNK):  # stays in the kernel
                bar.update(chunk)
