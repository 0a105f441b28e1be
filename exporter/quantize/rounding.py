"""Round to nearest, with symmetric scales that are searched for: of each block the one that errs least.

A block's largest weight says which scale holds all of it. A smaller one clips that weight and rounds the others finer;
in 4 bits that is often better (docs/log.md). Both are tried, and a few between.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from himap_export.engines.weight_file import as_numbers, as_stored, not_finite
from himap_export.exporter.quantize.packing import pack_int4, unpack_int4
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import LinearForm
from himap_export.graphs.spec import Dtype

Floats = npt.NDArray[np.float32]
BITS = {"int8": 8, "int8-dynamic": 8, "int4": 4}
_SHARES = {4: (1.0, 0.95, 0.9, 0.85, 0.8), 8: (1.0,)}  # of the scale that clips nothing, by bits
_TILE = 1 << 16  # numbers that stay in a core's cache


@dataclass(frozen=True)
class Quantised:
    """A weight's stored parts by suffix, as `graphs.quantization.parts` lists them, each as its file holds it; `error`:
    of the dequantised weight, root mean square, relative to the weight's."""

    parts: dict[str, npt.NDArray[Any]]
    error: float


class Weight(Protocol):
    """A weight [out,in] in numbers of any float type, read tile by tile."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, at: tuple[slice, slice], /) -> npt.NDArray[Any]: ...


def quantise(weight: Weight, form: LinearForm, dtype: Dtype) -> Quantised:
    """Returns `weight` rounded to `form`, with scales of `dtype`.

    HimapError (usage) if a scale, or a number times it, does not fit `dtype`: fp16 ends at 65504.
    """
    out, wide = weight.shape
    rows, bits = form.block or wide, BITS[form.kind]
    columns = max(2, _TILE // rows // 2 * 2)
    q, scale = np.empty((wide, out), np.int8), np.empty((wide // rows, out), as_stored(np.zeros(1), dtype).dtype)
    squares = np.zeros(2)  # of the errors, of the weights

    def fill(tile: tuple[slice, slice]) -> npt.NDArray[np.float64]:
        inputs, outputs = tile
        w = np.ascontiguousarray(weight[outputs, inputs].T, np.float32)
        block = inputs.start // rows
        q[inputs, outputs], scale[block, outputs], error = _rounded(w, bits, dtype)
        return np.array([error, np.square(w, dtype=np.float64).sum()])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # NumPy lets other threads run
        for found in pool.map(fill, _tiles(wide, out, rows, columns)):
            squares += found
    if not products_fit(q, scale, dtype):
        raise HimapError(f"a scale does not fit {dtype}", hint="export with another `dtype`", code=Exit.USAGE)
    values: npt.NDArray[Any] = pack_int4(q) if form.kind == "int4" else q
    parts = {form.kind.partition("-")[0]: values, "scale": scale if form.block else scale[0]}
    return Quantised(parts, float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0)


def products_fit(q: npt.NDArray[np.int8], scale: npt.NDArray[Any], dtype: Dtype) -> bool:
    """Tells whether integers q [in,out] times their scales [in/block,out], as stored in `dtype`, are numbers of it."""
    blocks = q.reshape(len(scale), -1, q.shape[1])
    largest = np.maximum(blocks.max(axis=1).astype(np.float64), -blocks.min(axis=1).astype(np.float64))
    with np.errstate(invalid="ignore"):  # zero times an infinite scale
        products = as_stored(largest * as_numbers(scale, dtype), dtype)
    return not_finite(products.reshape(-1), dtype) == 0


def dequantise(found: Quantised, form: LinearForm, dtype: Dtype) -> Floats:
    """Returns the weight [out,in] that the parts stand for, fp32."""
    values, scale = found.parts.values()
    q = unpack_int4(values) if form.kind == "int4" else values
    step = np.atleast_2d(as_numbers(scale, dtype).astype(np.float32))
    weight: Floats = (q.reshape(len(step), -1, q.shape[1]) * step[:, None]).reshape(q.shape).T
    return weight


def _tiles(wide: int, out: int, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for i, o in product(range(0, wide, rows), range(0, out, columns)):
        yield slice(i, i + rows), slice(o, min(o + columns, out))


def _rounded(w: Floats, bits: int, dtype: Dtype) -> tuple[npt.NDArray[np.int8], npt.NDArray[Any], float]:
    """Returns one block w [rows,columns] as integers, its scales [columns] as stored, and its squared error."""
    high = 2 ** (bits - 1) - 1
    largest = np.abs(w).max(axis=0)
    best, q = np.full(w.shape[1], np.inf, np.float32), np.zeros(w.shape, np.int8)
    scale = as_stored(np.ones(w.shape[1], np.float32), dtype)  # of zeros, as TensorRT wants scales above zero
    # Of a block of zeros, or of numbers too small or too large for a scale, which the caller refuses.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for share in _SHARES[bits]:
            stored = as_stored(largest * np.float32(share / high), dtype)
            step = as_numbers(stored, dtype).astype(np.float32)
            found = np.where(step > 0, np.rint(w / step), 0).clip(-high - 1, high)
            error = np.square(found * step - w).sum(axis=0)
            better = (error < best) | (share == 1)  # the first one stays where it is infinite, to be refused
            best = np.where(better, error, best)
            scale = np.where(better & (step > 0), stored, scale)
            q = np.where(better, found.astype(np.int8), q)
    return q, scale, float(best.sum(dtype=np.float64))
