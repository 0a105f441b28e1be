"""A quantised checkpoint's linear layers into a bundle: as they are where a form and all backends hold them, else
multiplied out."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.backends import lacks
from himap_export.engines.weight_file import as_held, as_numbers, as_stored, not_finite, write_safetensors
from himap_export.exporter.bind import WeightNames
from himap_export.exporter.quantize.packing import pack_int4
from himap_export.exporter.quantize.ready_linear import Floats, ReadyLinear
from himap_export.exporter.quantize.rounding import Quantised, products_fit
from himap_export.exporter.store import held_back
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import LinearForm, TensorSpec
from himap_export.graphs.quantization import linear_shapes
from himap_export.graphs.spec import DecoderSpec, Dtype


def take_over(
    ready: Mapping[str, ReadyLinear], names: WeightNames, decoder: DecoderSpec, backends: Sequence[str]
) -> dict[str, ReadyLinear]:
    """Returns the layers `ready` of a checkpoint by their roles in the `decoder`, each as the weight that graphs call
    by its name, without a form if one of `backends` does not compute on it, or the embedding reads it, too.

    HimapError (usage) if a layer has another shape than the decoder, or is none of its.
    """
    found, others, embedding = dict[str, ReadyLinear](), set(ready), _name(names, "embed_tokens.weight")
    for role, shape in linear_shapes(decoder).items():
        if (name := _name(names, role)) not in ready:
            continue
        ref = names(role)
        others.discard(name)
        linear = ready[name] if ref.rows is None else ready[name].part(ref.name, ref.rows.start, ref.rows.stop)
        if linear.shape != shape:
            details = f"it is {list(linear.shape)}, the model's configuration says {list(shape)}"
            raise HimapError(f"{name[:200]} does not fit", details, "is this the checkpoint of that model?", Exit.USAGE)
        if name == embedding:  # which looks up rows of floats
            linear = replace(linear, form=None, why="the embedding reads it, too")
        found[role] = _computed(linear, backends)
    if others:
        details = f"{min(others)[:200]}; only a decoder's linear layers are read quantised, all else in 16 or 32 bits"
        raise HimapError(f"{len(others)} quantised weights are none of the decoder's", details, code=Exit.USAGE)
    return found


def _name(names: WeightNames, role: str) -> str:
    """Returns the tensor that holds `role`; "" for none, which is told by those who look for all."""
    try:
        ref = names(role)
    except HimapError:
        return ""
    return ref.name if ref.rows is None else ref.rows.tensor


def _computed(linear: ReadyLinear, backends: Sequence[str]) -> ReadyLinear:
    if linear.form is None:
        return linear
    without = [f"{name} has no {lacking}" for name in backends if (lacking := lacks(name, linear.form))]
    if not without:
        return linear
    return replace(linear, form=None, why="; ".join(filter(None, (linear.why, without[0]))))


def taken_lines(linears: Iterable[ReadyLinear], dtype: Dtype) -> Iterator[str]:
    """Yields what becomes of a checkpoint's quantised weights: how many, in which form, and why if it is another."""
    for (form, why), count in Counter((linear.form, linear.why) for linear in linears).items():
        reason = f" ({why})" if why else ""
        yield f"{count} weights {f'as {_in_words(form)}' if form else f'multiplied out to {dtype}'}{reason}"


def _in_words(form: LinearForm) -> str:
    return form.kind + (f" in blocks of {form.block}" if form.block else "")


def taken(linear: ReadyLinear, dtype: Dtype) -> Quantised:
    """Returns the parts of a layer that has a form, its scales in `dtype`, of fp8 in fp32; `error`: what that took
    from them, 0 if it holds them. HimapError (usage) for a scale that does not fit `dtype`, or a number times it."""
    linear = replace(linear)  # what it keeps of its scales goes with it
    assert linear.form is not None
    values, scales = linear.values(), linear.block_scales()
    scales = np.where(scales == 0, np.float32(1), scales)  # TensorRT wants them above zero; their numbers are zeros
    if linear.form.kind == "fp8":
        found = {"fp8": values.view(np.uint8), "scale": scales[0]}
        return Quantised({**found, "input_scale": np.array(linear.input_scale, np.float32)}, 0.0)
    stored = as_stored(scales, dtype)
    held = as_numbers(stored, dtype).astype(np.float32)
    if (held == 0).any() or not products_fit(values, stored, dtype):
        hint = "export with another `dtype`"
        raise HimapError(f"a scale of {linear.name[:200]} does not fit {dtype}", hint=hint, code=Exit.USAGE)
    error = 0.0 if np.array_equal(held, scales) else _error(values, scales, held)
    numbers = {"int4": pack_int4(values)} if linear.form.kind == "int4" else {"int8": values}
    return Quantised({**numbers, "scale": stored if linear.form.block else stored[0]}, error)


def _error(values: npt.NDArray[Any], scales: Floats, held: Floats) -> float:
    """Returns the error of values [in,out] times `held`, relative to that times `scales`: root mean square."""
    block = len(values) // len(scales)
    squares = np.zeros(2)
    for i, (scale, found) in enumerate(zip(scales, held, strict=True)):
        share = np.square(values[i * block : (i + 1) * block].astype(np.float32)).sum(0, dtype=np.float64)
        squares += (share * np.square(found - scale)).sum(), (share * np.square(scale)).sum()
    return float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0


def write_multiplied(linears: Sequence[ReadyLinear], target: Path, dtype: Dtype, allow_overflow: bool = False) -> None:
    """Writes a safetensors file of the weights [out,in] of `linears` in `dtype`, some outputs in memory at a time.

    HimapError (usage) for a number that is too large for `dtype`; with `allow_overflow` it becomes the largest that is
    not.
    """
    held = {linear.name: as_held(TensorSpec(dtype, linear.shape)) for linear in linears}

    def pieces() -> Iterator[npt.NDArray[Any]]:
        for linear in linears:
            for piece in linear.multiplied():
                made = as_stored(piece.reshape(-1), dtype)
                fits = not_finite(made, dtype) == 0
                yield made if fits else held_back(linear.name, piece.reshape(-1), dtype, allow_overflow)

    write_safetensors(target, held, pieces())
