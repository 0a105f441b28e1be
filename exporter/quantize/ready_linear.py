"""One linear layer of a quantised checkpoint: its numbers as a form of ours has them, or multiplied out.

    weight[o,i] = (code[i,o] - zero[g,o]) * scale[g,o],   g the group of input i

Our forms have no zero points, and blocks of 32, 64 or 128 inputs that lie one behind the other. The difference of two
4-bit codes is a number of 8 bits. Larger groups are blocks whose scales repeat.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from himap_export.exporter.quantize.grid import Grid, misfit
from himap_export.graphs.errors import HimapError
from himap_export.graphs.ports import LinearForm

Floats = npt.NDArray[np.float32]
_BLOCKS = (128, 64, 32)
_PIECE = 1 << 22  # numbers that are unpacked at once
BELOW_ZERO = "scales below zero"  # TensorRT takes them of blocks alone
NO_ACTIVATIONS = "fp8 without a stored scale of activations"
_DAMAGED = "is the checkpoint damaged?"


@dataclass(frozen=True)
class Codes:
    """The numbers of a layer: `grid` [in,out]. For zero stand `zeros` [groups,out], each stored less `missing`, or the
    `middle` of the range: 8, 128, and 0 of signed and float codes."""

    grid: Grid
    middle: int = 0
    zeros: Grid | None = None
    missing: int = 0

    @property
    def is_float(self) -> bool:
        return self.grid.tensor.dtype == "F8_E4M3"

    def zeros_are_middle(self) -> bool:
        """Tells whether all `zeros` are the `middle`."""
        assert self.zeros is not None
        groups, out = self.zeros.shape
        stored = self.zeros.read(slice(0, groups), slice(0, out))
        return bool((stored == self.middle - self.missing).all())


@dataclass(frozen=True)
class ReadyLinear:
    """A quantised linear layer's weight, unread. `name` and `shape` [out,in] are those of the unquantised weight.

    `scales` are [groups,out], or [1,1]; a group has `group` inputs, one behind the other, or those of input i are in
    row `order[i]`. `form`: ours that holds it without loss, None if it must be multiplied out; `why`: in which respect
    it is another than the checkpoint's, "" if it is not. `outputs`: which of the stored ones are this weight's.
    `input_scale`: of the activations, if it is stored.
    """

    name: str
    shape: tuple[int, int]
    codes: Codes
    scales: Grid
    group: int
    order: npt.NDArray[np.int64] | None
    form: LinearForm | None
    why: str
    outputs: slice
    input_scale: float | None = None

    @property
    def nbytes(self) -> int:
        """What is stored of its numbers and scales, in bytes."""
        return (self.codes.grid.tensor.nbytes + self.scales.tensor.nbytes) * self.shape[0] // self.codes.grid.shape[1]

    def part(self, name: str, start: int, stop: int) -> "ReadyLinear":
        """Returns the outputs `start` to `stop` of this weight as the weight `name`; HimapError (usage) if there are
        not so many."""
        if not 0 <= start < stop <= self.shape[0]:
            raise misfit(self.codes.grid.tensor, f"it has {self.shape[0]} outputs, {start} to {stop} are wanted")
        outputs = slice(self.outputs.start + start, self.outputs.start + stop)
        return replace(self, name=name, shape=(stop - start, self.shape[1]), outputs=outputs)

    def values(self) -> npt.NDArray[Any]:
        """Returns the numbers [in,out] of its `form`: float8_e4m3fn of fp8, else int8. HimapError if one that is not
        zero has a scale that is, or one is NaN."""
        assert self.form is not None, self.name
        out, wide = self.shape
        found = np.empty((wide, out), ml_dtypes.float8_e4m3fn if self.codes.is_float else np.int8)
        for rows in _pieces(wide, out):
            codes = self.codes.grid.read(rows, self.outputs)
            found[rows] = (codes - self._zeros(rows, np.uint8)).view(np.int8) if self.codes.grid.bits else codes
            self._check(found[rows], rows)
        return found

    def block_scales(self) -> Floats:
        """Returns the scales of its `form`, as they are: [in/block,out], or [1,out] if all inputs share one."""
        assert self.form is not None, self.name
        starts = np.arange(0, self.shape[1], self.form.block or self.shape[1])
        return np.asarray(self._scales[starts // self.group])

    def multiplied(self) -> Iterator[Floats]:
        """Yields the weight [out,in] in fp32, some outputs at a time. HimapError as `values`."""
        for rows in _pieces(*self.shape):
            yield self.part(self.name, rows.start, rows.stop)._multiplied()

    def _multiplied(self) -> Floats:
        every = slice(0, self.shape[1])
        found = self.codes.grid.read(every, self.outputs).astype(np.float32) - self._zeros(every, np.float32)
        self._check(found, every)
        with np.errstate(over="ignore"):
            found *= self._scales[self._groups]
        if not np.isfinite(found).all():
            details = "times the weight's numbers some are too large even for fp32"
            raise HimapError(f"tensor {self.scales.tensor.name[:200]} is no scale of the weight", details, _DAMAGED)
        return np.ascontiguousarray(found.T)

    @cached_property
    def _groups(self) -> npt.NDArray[np.int64]:
        """The row of `scales` of each input, [in]."""
        return np.arange(self.shape[1]) // self.group if self.order is None else self.order

    @cached_property
    def _scales(self) -> Floats:
        """[groups,out]"""
        groups, shared = self.scales.shape[0], self.scales.shape[1] == 1
        found = self.scales.read(slice(0, groups), slice(0, 1) if shared else self.outputs).astype(np.float32)
        return np.broadcast_to(found, (groups, self.shape[0]))

    def _zeros(self, rows: slice, kind: Any) -> Any:
        """Returns what stands for zero among the codes of the inputs `rows`: one number, or [rows,out]."""
        if self.codes.zeros is None:
            return kind(self.codes.middle)
        shared = self.codes.zeros.shape[1] == 1
        every = slice(0, self.codes.zeros.shape[0])
        stored = self.codes.zeros.read(every, slice(0, 1) if shared else self.outputs)
        return (stored.astype(kind) + kind(self.codes.missing))[self._groups[rows]]

    def _check(self, numbers: npt.NDArray[Any], rows: slice) -> None:
        if self.codes.is_float and not np.isfinite(numbers.astype(np.float32)).all():
            name = self.codes.grid.tensor.name
            raise HimapError(f"tensor {name[:200]} is not finite", "some of its numbers are NaN", _DAMAGED)
        if not self._scales.all() and (numbers.astype(bool) & (self._scales == 0)[self._groups[rows]]).any():
            details = "some are zero where the weight is not"
            raise HimapError(f"tensor {self.scales.tensor.name[:200]} is no scale of the weight", details, _DAMAGED)


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    """Yields slices of `rows` with about so many numbers each as are worked on at once."""
    step = max(1, _PIECE // columns)
    yield from (slice(at, min(at + step, rows)) for at in range(0, rows, step))


def form_of(codes: Codes, shape: tuple[int, int], group: int, in_order: bool) -> tuple[LinearForm | None, str]:
    """Returns the form that holds a layer [out,in] without loss, and in which respect it is another than the
    checkpoint's; None, and the reason, if there is no such form."""
    (out, wide), bits, why = shape, codes.grid.bits or 8, ""
    if not in_order:
        return None, "scales in order of activation"
    if codes.is_float:
        if codes.zeros is not None:
            return None, "zero points of fp8"
        return None, NO_ACTIVATIONS if group == wide else f"{group} of {wide} inputs share a scale"
    if codes.zeros is not None:
        if bits == 8:
            return None, "zero points of 8 bits"
        bits, why = 8, "zero points taken off, which makes 4 bits 8"
    if bits == 8 and group == wide:
        return LinearForm("int8"), why
    block = next((b for b in _BLOCKS if wide % b == 0 and group % b == 0), 0)
    if not block:
        return None, f"{group} of {wide} inputs share a scale"
    if bits == 4 and out % 2:
        return None, f"{out} outputs in bytes of two"
    return LinearForm("int4" if bits == 4 else "int8", block), why
