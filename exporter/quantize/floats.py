"""Round to nearest in floats of 8 and 4 bits, and the static scale of what a linear layer reads.

    fp8     W = q * scale[out]                            scale: the output's largest weight is 448, E4M3's largest
    nvfp4   W = q * block_scale[in/16,out] * scale        block scales are E4M3, too: the largest of a tensor is 448

A block of E2M1 (0, .5, 1, 1.5, 2, 3, 4, 6) is scaled so that its largest weight is 6, or 4: between these two, six to
four, E2M1 is at its coarsest, and the better is taken (arXiv 2512.02010).
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from himap_export.exporter.quantize.packing import pack_int4
from himap_export.exporter.quantize.rounding import Floats, Quantised, Weight
from himap_export.graphs.ports import Kind, LinearForm
from himap_export.graphs.quantization_fp import FP4_BLOCK

FLOATS: tuple[Kind, ...] = ("fp8", "nvfp4")
E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
_E4M3_MOST, _E2M1_MOST = np.float32(448), np.float32(6)
_LARGEST = (6.0, 4.0)  # what a block's largest weight becomes
_TILE = 1 << 20  # weights that are rounded at once


def quantise_floats(weight: Weight, form: LinearForm, largest: float) -> Quantised:
    """Returns `weight` rounded to `form`, fp8 or nvfp4, with fp32 scales;
    `largest`: |x| in the layer's input, which its static scale has to hold."""
    values, squares = (_fp8 if form.kind == "fp8" else _nvfp4)(weight)
    most = _E4M3_MOST if form.kind == "fp8" else _E4M3_MOST * _E2M1_MOST
    input_scale = _positive(np.asarray(largest, np.float32) / most)
    error = float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0
    return Quantised({**values, "input_scale": input_scale}, error)


def _fp8(weight: Weight) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.float64]]:
    out, wide = weight.shape
    q, scale = np.empty((wide, out), np.uint8), np.empty(out, np.float32)

    def fill(at: slice, w: Floats) -> npt.NDArray[np.float64]:
        scale[at] = _positive(np.abs(w).max(axis=1) / _E4M3_MOST)
        found = (w / scale[at, None]).astype(E4M3)
        q[:, at] = found.view(np.uint8).T
        return np.array([_power(found.astype(np.float32) * scale[at, None] - w), _power(w)])

    squares = np.sum(_by_rows(weight, fill), axis=0)
    return {"fp8": q, "scale": scale}, squares


def _nvfp4(weight: Weight) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.float64]]:
    out, wide = weight.shape
    q, steps = np.empty((wide, out // 2), np.uint8), np.empty((wide // FP4_BLOCK, out), np.uint8)
    largest = np.max(_by_rows(weight, lambda _, w: np.abs(w).max()))
    scale = _positive(np.asarray(largest, np.float32) / (_E4M3_MOST * _E2M1_MOST))

    def fill(at: slice, w: Floats) -> npt.NDArray[np.float64]:
        codes, step, error = _best(w.reshape(len(w), -1, FP4_BLOCK), scale)
        q[:, at.start // 2 : at.stop // 2] = pack_int4(np.ascontiguousarray(codes.reshape(len(w), wide).T))
        steps[:, at] = step.T
        return np.array([error, _power(w)])

    squares = np.sum(_by_rows(weight, fill), axis=0)
    return {"fp4": q, "block_scale": steps, "scale": scale}, squares


def _best(blocks: Floats, scale: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.uint8], float]:
    """Returns blocks [n,m,16] as codes of E2M1, their scales [n,m] as codes of E4M3, and the squared error."""
    largest, best = np.abs(blocks).max(axis=-1), np.full(blocks.shape[:2], np.inf, np.float32)
    codes, steps = np.zeros(blocks.shape, np.int8), np.zeros(blocks.shape[:2], np.uint8)
    for aim in _LARGEST:
        stored = np.minimum(largest / aim / scale, _E4M3_MOST).astype(E4M3)
        step = (stored.astype(np.float32) * scale)[..., None]
        ratio = np.divide(blocks, step, out=np.zeros_like(blocks), where=step > 0)
        q = ratio.clip(-_E2M1_MOST, _E2M1_MOST).astype(E2M1)
        error = np.square(q.astype(np.float32) * step - blocks).sum(axis=-1)
        better = error < best
        best = np.where(better, error, best)
        steps = np.where(better, stored.view(np.uint8), steps)
        codes = np.where(better[..., None], q.view(np.int8), codes)
    return codes, steps, float(best.sum(dtype=np.float64))


def _by_rows(weight: Weight, act: Callable[[slice, Floats], Any]) -> list[Any]:
    """Returns what `act` makes of an even number of outputs at a time, and their places."""
    out, wide = weight.shape
    count = max(2, _TILE // wide // 2 * 2)
    places = [slice(start, min(start + count, out)) for start in range(0, out, count)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # NumPy lets other threads run
        return list(pool.map(lambda at: act(at, np.asarray(weight[at, slice(None)], np.float32)), places))


def _positive(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Returns scales, 1 for zeros: TensorRT divides by them."""
    return np.where(scale > 0, scale, np.float32(1)).astype(np.float32)


def _power(values: Floats) -> float:
    return float(np.square(values, dtype=np.float64).sum())
