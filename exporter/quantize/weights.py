"""The quantised weights of a bundle, written into one file a tensor at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy.typing as npt
from tqdm import tqdm

from himap_export.engines.manifest import QuantisedWeight
from himap_export.engines.weight_file import StoredTensor, as_held, write_safetensors
from himap_export.exporter.quantize.awq import Floats, Folded
from himap_export.exporter.quantize.floats import FLOATS, quantise_floats
from himap_export.exporter.quantize.grid import mapped
from himap_export.exporter.quantize.ready_linear import ReadyLinear
from himap_export.exporter.quantize.rounding import Quantised, quantise
from himap_export.exporter.quantize.taking import taken
from himap_export.graphs.errors import HimapError
from himap_export.graphs.ports import LinearForm, TensorSpec
from himap_export.graphs.quantization import parts
from himap_export.graphs.spec import Dtype


@dataclass(frozen=True)
class Linear:
    """A weight [out,in] that is to be quantised: what graphs call it, where it is stored, its form, and what is
    divided and multiplied into it before (`Folding.factors`). `largest`: |x| in the layer's input, for forms that round
    it, too."""

    name: str
    stored: StoredTensor
    form: LinearForm
    factors: tuple[Floats | None, Floats | None] = (None, None)
    largest: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        out, wide = self.stored.shape
        return out, wide


def write_quantised(linears: Sequence[Linear | ReadyLinear], target: Path, dtype: Dtype) -> dict[str, QuantisedWeight]:
    """Writes the parts of `linears`, which all have a form, into a safetensors file, scales in `dtype`; returns what
    became of each weight.

    In memory are one tensor's integers and a few tiles of its floats. HimapError (usage) for a scale that does not fit.
    """
    forms = {linear.name: linear.form for linear in linears if linear.form is not None}
    held = {
        f"{linear.name}.{part.suffix}": as_held(TensorSpec(part.dtype, part.shape))
        for linear in linears
        for part in parts(forms[linear.name], linear.shape, dtype)
    }
    records: dict[str, QuantisedWeight] = {}

    def arrays() -> Iterator[npt.NDArray[Any]]:
        total = sum(prod(linear.shape) for linear in linears)
        with tqdm(total=total, desc="quantise", unit_scale=True, leave=False, disable=None, delay=0.5) as bar:
            for linear in linears:
                found, form = _quantised(linear, dtype), forms[linear.name]
                records[linear.name] = QuantisedWeight(form.kind, form.block, error=round(found.error, 6))
                yield from (found.parts[part.suffix] for part in parts(form, linear.shape, dtype))
                del found  # before the next one is made
                bar.update(prod(linear.shape))

    write_safetensors(target, held, arrays())
    return records


def _quantised(linear: Linear | ReadyLinear, dtype: Dtype) -> Quantised:
    if isinstance(linear, ReadyLinear):
        return taken(linear, dtype)
    weight = Folded(mapped(linear.stored), *linear.factors)
    try:
        if linear.form.kind in FLOATS:
            return quantise_floats(weight, linear.form, linear.largest)
        return quantise(weight, linear.form, dtype)
    except HimapError as problem:
        raise HimapError(f"{linear.name}: {problem.summary}", problem.details, problem.hint, problem.code) from None
