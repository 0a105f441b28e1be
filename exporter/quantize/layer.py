"""The tensors of one quantised linear layer, found by name, held against each other, and put together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt

from himap_export.engines.weight_file import StoredTensor, check_finite
from himap_export.exporter.quantize.grid import Grid, mapped, misfit, require_type
from himap_export.exporter.quantize.ready_linear import BELOW_ZERO, Codes, ReadyLinear, form_of
from himap_export.graphs.errors import Exit, HimapError


@dataclass(frozen=True)
class Layer:
    """A linear layer called `name` in a checkpoint of `tensors`. Its methods raise HimapError: missing for a tensor
    that is not there, usage for one of another type or shape than the others have it, or config.json."""

    name: str
    tensors: Mapping[str, StoredTensor]

    def get(self, part: str) -> StoredTensor | None:
        """Returns its tensor `part`, if it has one."""
        return self.tensors.get(f"{self.name}.{part}")

    def absent(self, part: str) -> HimapError:
        """Returns the error of a tensor that is not there."""
        details, name = "other tensors of this layer are there", f"{self.name[:200]}.{part}"
        return HimapError(f"the checkpoint holds no tensor {name}", details, code=Exit.MISSING)

    def want(self, part: str, *types: str) -> StoredTensor:
        """Returns its tensor `part` of one of `types`: a matrix, or one number as such."""
        tensor = self.get(part)
        if tensor is None:
            raise self.absent(part)
        require_type(tensor, *types)
        if len(tensor.shape) < 2 and prod(tensor.shape) == 1:
            return replace(tensor, shape=(1, 1))
        if len(tensor.shape) != 2 or not prod(tensor.shape):
            raise misfit(tensor, f"its shape is {list(tensor.shape)}, a matrix is expected")
        return tensor

    def numbers(self, part: str, count: int) -> npt.NDArray[np.int64] | None:
        """Returns the `count` whole numbers of its tensor `part`, read; None if it has none."""
        tensor = self.get(part)
        if tensor is None:
            return None
        if require_type(tensor, "int32", "int64").shape != (count,):
            raise misfit(tensor, f"its shape is {list(tensor.shape)}, [{count}] is expected")
        found = mapped(tensor)
        return found.view(np.int32).astype(np.int64) if tensor.dtype == "int32" else np.array(found)

    def linear(
        self, codes: Codes, scales: Grid, shape: tuple[int, int], sizes: Sequence[int], order: str = "g_idx"
    ) -> ReadyLinear:
        """Returns the layer [out,in] of these tensors, in which as many inputs share a scale as one of `sizes` says
        (-1: all), those that the tensor `order` says, if there is one. Reads all but the codes."""
        out, wide = shape
        groups = scales.shape[0]
        group = next((g for g in (min(s, wide) if s > 0 else wide for s in sizes) if -(-wide // g) == groups), None)
        if group is None:
            told = " or ".join("all" if size < 1 else str(size) for size in sizes) or "none"
            raise misfit(scales.tensor, f"{groups} scales for {wide} inputs, config.json says that {told} share one")
        check_finite([scales.tensor])
        if codes.zeros is not None and codes.zeros_are_middle():
            codes = replace(codes, zeros=None)
        found = self._order(order, wide=wide, group=group, groups=groups)
        form, why = form_of(codes, shape, group=group, in_order=found is None)
        if form is not None and not form.block and scales.below_zero():
            form, why = None, BELOW_ZERO
        return ReadyLinear(
            name=f"{self.name}.weight", shape=shape, codes=codes, scales=scales, group=group, order=found,
            form=form, why=why, outputs=slice(0, out),
        )  # fmt: skip

    def _order(self, part: str, wide: int, group: int, groups: int) -> npt.NDArray[np.int64] | None:
        """Returns which scales each input has [in], if that is not one block behind the other."""
        found, tensor = self.numbers(part, wide), self.get(part)
        if found is None or tensor is None or (found == np.arange(wide) // group).all():
            return None
        if found.min() < 0 or found.max() >= groups:
            raise misfit(tensor, f"it names scales {found.min()} to {found.max()} of {groups}")
        return found
