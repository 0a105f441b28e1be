"""The quantised weights of a bundle, written into one file a tensor at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy.typing as npt
from tqdm import tqdm

from himap_export.engines.manifest import QuantisedWeight
from himap_export.engines.weight_file import StoredTensor, as_held, map_tensors, write_safetensors
from himap_export.exporter.quantize.awq import Floats, Folded
from himap_export.exporter.quantize.rounding import quantise
from himap_export.graphs.errors import HimapError
from himap_export.graphs.ports import LinearForm, TensorSpec
from himap_export.graphs.quantization import parts
from himap_export.graphs.spec import Dtype


@dataclass(frozen=True)
class Linear:
    """A weight [out,in] that is to be quantised: what graphs call it, where it is stored, its form, and what is
    divided and multiplied into it before (`Folding.factors`)."""

    name: str
    stored: StoredTensor
    form: LinearForm
    factors: tuple[Floats | None, Floats | None] = (None, None)

    @property
    def shape(self) -> tuple[int, int]:
        out, wide = self.stored.shape
        return out, wide


def write_quantised(linears: Sequence[Linear], target: Path, dtype: Dtype) -> dict[str, QuantisedWeight]:
    """Writes the parts of `linears` into a safetensors file, scales in `dtype`; returns what became of each weight.

    In memory are one tensor's integers and a few tiles of its floats. HimapError (usage) for a scale that does not fit.
    """
    held = {
        f"{linear.name}.{part.suffix}": as_held(TensorSpec(part.dtype, part.shape))
        for linear in linears
        for part in parts(linear.form, linear.shape, dtype)
    }
    records: dict[str, QuantisedWeight] = {}

    def arrays() -> Iterator[npt.NDArray[Any]]:
        total = sum(prod(linear.shape) for linear in linears)
        with tqdm(total=total, desc="quantise", unit_scale=True, leave=False, disable=None, delay=0.5) as bar:
            for linear in linears:
                try:
                    found = quantise(Folded(numbers(linear.stored), *linear.factors), linear.form, dtype)
                except HimapError as problem:
                    raise HimapError(f"{linear.name}: {problem.summary}", problem.details, problem.hint) from None
                records[linear.name] = QuantisedWeight(linear.form.kind, linear.form.block, error=round(found.error, 6))
                yield from (found.parts[part.suffix] for part in parts(linear.form, linear.shape, dtype))
                bar.update(prod(linear.shape))

    write_safetensors(target, held, arrays())
    return records


def numbers(stored: StoredTensor) -> npt.NDArray[Any]:
    """Returns a mapped tensor as numbers of its own type: nothing is read before its use."""
    mapped = map_tensors([stored])[stored.name]
    return mapped.view(ml_dtypes.bfloat16) if stored.dtype == "bf16" else mapped
