"""A stored matrix of a quantised weight: floats, small numbers, or several small numbers in a 32-bit word."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from himap_export.engines.weight_file import StoredTensor
from himap_export.graphs.errors import Exit, HimapError

_MAPPED: Mapping[str, Any] = {
    "fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "I8": np.int8, "int32": np.uint32, "int64": np.int64,
}  # fmt: skip
FLOATS = ("fp16", "bf16", "fp32")
WORD = 32  # bits


@dataclass(frozen=True)
class Grid:
    """A matrix [n,out], n inputs of a linear layer or blocks of them, as a checkpoint holds it.

    `flipped`: it is stored as [out,n]. `bits`: of a number in a 32-bit word, 0 if a number is an element of its own;
    the numbers of a word follow one another along the axis `along` of [n,out], number j in slot `order[j]`.
    """

    tensor: StoredTensor
    flipped: bool = False
    bits: int = 0
    along: int = 0
    order: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """[n,out], with the numbers that fill up the last word."""
        found = list(self.tensor.shape[::-1] if self.flipped else self.tensor.shape)
        if self.bits:
            found[self.along] *= WORD // self.bits
        return found[0], found[1]

    def below_zero(self) -> bool:
        """Tells whether one of its numbers is below zero; reads all."""
        return bool((mapped(self.tensor) < 0).any())

    def read(self, rows: slice, outputs: slice) -> npt.NDArray[Any]:
        """Returns the numbers [rows,outputs], whose slices have a start and a stop: uint8 of packed ones."""
        stored = mapped(self.tensor)
        stored = stored.T if self.flipped else stored
        if not self.bits:
            return stored[rows, outputs]
        share = WORD // self.bits
        spans, packed = [rows, outputs], (rows, outputs)[self.along]
        spans[self.along] = slice(packed.start // share, -(-packed.stop // share))
        numbers = _unpacked(stored[tuple(spans)], self.bits, self.along, self.order or tuple(range(share)))
        skip = packed.start % share
        spans = [slice(None), slice(None)]
        spans[self.along] = slice(skip, skip + packed.stop - packed.start)
        return numbers[tuple(spans)]


def _unpacked(words: npt.NDArray[np.uint32], bits: int, along: int, order: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Returns the numbers of words [n,m], as many times more along axis `along` as `order` has slots."""
    shape = list(words.shape)
    shape.insert(along + 1, len(order))
    numbers = np.empty(shape, np.uint8)
    for j, slot in enumerate(order):
        place = (slice(None),) * (along + 1) + (j,)
        numbers[place] = words >> np.uint32(bits * slot) & np.uint32(2**bits - 1)
    shape = list(words.shape)
    shape[along] *= len(order)
    return numbers.reshape(shape)


def mapped(tensor: StoredTensor) -> npt.NDArray[Any]:
    """Returns the numbers of a stored tensor, read when they are used, and no longer held when the array is dropped."""
    kind = _MAPPED[tensor.dtype]
    if not tensor.nbytes:  # nothing can be mapped
        return np.empty(tensor.shape, kind)
    return np.asarray(np.memmap(tensor.file, np.uint8, "r", tensor.offset, (tensor.nbytes,)).view(kind)).reshape(
        tensor.shape
    )


def require_type(tensor: StoredTensor, *types: str) -> StoredTensor:
    """Returns `tensor`, which is stored as one of `types`; HimapError (usage) otherwise."""
    if tensor.dtype not in types:
        details = f"it is stored as {tensor.dtype}, not as {' or '.join(types)}"
        raise misfit(tensor, details)
    return tensor


def require_shape(grid: Grid, shape: tuple[int, int], spare: int = 0) -> None:
    """Raises HimapError (usage) unless `grid` has the `shape` [n,out], and at most `spare` outputs more that fill up
    the last word."""
    (rows, outputs), (n, out) = grid.shape, shape
    if rows != n or not 0 <= outputs - out <= spare:
        raise misfit(
            grid.tensor, f"it is {list(grid.tensor.shape)}, for {shape[1]} outputs and {shape[0]} rows of them"
        )


def misfit(tensor: StoredTensor, details: str, hint: str = "is config.json this checkpoint's?") -> HimapError:
    """Returns the error of a tensor that is not what its configuration or its neighbours say."""
    return HimapError(f"tensor {tensor.name[:200]} does not fit", details, hint, Exit.USAGE)
