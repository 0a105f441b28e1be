"""Products with quantised weights, as OpenVINO's CPU plugin computes them without multiplying the weights out.

It keeps integers compressed in one pattern only: a constant [out,..] whose rows are outputs, converted to fp32, times a
constant of scales, times fp32 activations. So a bundle holds its integers [in,out] a second time, turned round, in a
file that is mapped: turned when it is opened, they would fill memory. 16-bit activations are converted: to and fro is
exact.

In fp32 its kernels do not use AMX. Prefill in 16 bits therefore takes the weights in its own dtype, multiplied out when
the graph is read, unless they are too many for the machine's memory: `packed` says so.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from himap_export.engines.arrays import memory_bytes
from himap_export.engines.bundle import Bundle
from himap_export.engines.extras import required
from himap_export.engines.manifest import Manifest
from himap_export.engines.weight_file import (
    as_held,
    as_numbers,
    map_tensors,
    read_header,
    turn_int4,
    write_safetensors,
)
from himap_export.graphs.errors import HimapError
from himap_export.graphs.ports import Kind, TensorSpec

TURNED = "openvino.safetensors"  # in a bundle
_KINDS: Mapping[Kind, str] = {"int8": "i8", "int4": "i4"}  # OpenVINO's names
PACKED = tuple(_KINDS.values())
_FEW = 16  # rows up to which the compressed product is the faster one: reading the weights is all that it costs


@dataclass(frozen=True)
class Dequantized:
    """A weight as the bundle's file of turned weights holds it: integers `q`, int8 [out,in] or bytes [out,in/2] of two
    int4, and `scale` [out,in/B] fp32, [out,1] if all inputs share one. `kind`: OpenVINO's name of the integers."""

    q: npt.NDArray[Any]
    scale: npt.NDArray[np.float32]
    kind: str

    @property
    def shape(self) -> tuple[int, int]:
        out, held = self.q.shape
        return out, 2 * held if self.kind == "i4" else held

    @property
    def blocks(self) -> list[int]:
        """The shape [out,in/B,B] of the integers, [out,in] if all inputs share a scale."""
        (out, wide), count = self.shape, self.scale.shape[1]
        return [out, count, wide // count] if count > 1 else [out, wide]

    @property
    def numbers(self) -> npt.NDArray[np.int8]:
        """The integers, each in a byte of its own, [out,in]."""
        if self.kind == "i8":
            return self.q.view(np.int8)
        return (np.stack([self.q << 4, self.q], axis=-1).view(np.int8) >> 4).reshape(self.shape)


def write_turned(bundle: Bundle, file: Path) -> None:
    """Writes the quantised weights of `bundle` with outputs as rows, and their scales as fp32, a tensor at a time."""
    stored = bundle.tensors
    weights = {name: stored[f"{name}.{form.numbers}"] for name, form in bundle.manifest.quantised().items()}
    scales = {name: stored[f"{name}.scale"] for name in weights}
    held: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, q in weights.items():
        wide, columns = q.shape
        share = 2 if q.dtype == "U8" else 1
        blocks = scales[name].shape[0] if len(scales[name].shape) == 2 else 1
        held[q.name] = q.dtype, (columns * share, wide // share)
        held[f"{name}.scale"] = "F32", (columns * share, blocks)

    def arrays() -> Iterator[npt.NDArray[Any]]:
        for name, q in weights.items():
            raw = np.memmap(q.file, np.uint8, "r", q.offset, q.shape)
            yield raw.T if q.dtype == "I8" else turn_int4(raw)
            scale = map_tensors([scales[name]])[name + ".scale"]
            yield np.atleast_2d(as_numbers(scale, scales[name].dtype)).T.astype(np.float32)

    write_safetensors(file, held, arrays())


def read_turned(file: Path, manifest: Manifest) -> dict[str, Dequantized]:
    """Returns the quantised weights of `manifest` in a file of `write_turned`, mapped, by the names of their integers
    in graphs. HimapError if one is missing, or of another type or shape."""
    stored, wanted, found = read_header(file), manifest.wanted(), dict[str, Dequantized]()
    for name, form in manifest.quantised().items():
        q, scale = stored.get(f"{name}.{form.numbers}"), stored.get(f"{name}.scale")
        wide, out = wanted[f"{name}.{form.numbers}"].shape
        held = as_held(TensorSpec(form.numbers, (out, wide))), ("fp32", (out, wide // form.block if form.block else 1))
        if q is None or scale is None or ((q.dtype, q.shape), (scale.dtype, scale.shape)) != held:
            raise HimapError(f"{file} does not hold {name} as it should", hint="export the bundle again")
        mapped = np.memmap(file, np.uint8, "c", q.offset, q.shape)
        found[q.name] = Dequantized(mapped, map_tensors([scale])[scale.name].view(np.float32), _KINDS[form.kind])
    return found


def dequantized(node: Any, stored: Mapping[str, Dequantized], found: dict[str, Dequantized]) -> Any:
    """Returns what stands for a DequantizeLinear until a product takes its weight from `found`, by the name of the
    node: NaN, as nothing else may. `stored`: the weights by the names of their integers."""
    op, (q, scale) = required("openvino.opset15"), (node.get_input(i).get_node() for i in range(2))
    if node.get_input_size() != 2 or (weight := stored.get(q.get_friendly_name())) is None:
        raise HimapError("DequantizeLinear reads something else than stored integers and scales, as our graphs do")
    if weight.shape != tuple(q.get_output_shape(0))[::-1]:
        raise HimapError(f"{q.get_friendly_name()} is {list(weight.shape)}, not what its graph reads")
    nan = op.convert(op.constant(np.float32(np.nan)), scale.get_output_element_type(0))
    whole = op.broadcast(nan, list(q.get_output_shape(0)))
    found[whole.get_name()] = weight
    return whole


def product(x: Any, weight: Dequantized, packed: bool) -> Any:
    """Returns x [M,in] times `weight`, transposed, [M,out], in the dtype of x."""
    op, ov, kind, shape = required("openvino.opset15"), required("openvino"), x.get_element_type(), weight.shape
    if kind.size == 2 and x.get_partial_shape()[0].get_length() > _FEW and not packed:
        return op.matmul(x, _multiplied_out(weight, kind), False, True)
    q = ov.op.Constant(ov.Tensor(weight.q, weight.blocks, getattr(ov.Type, weight.kind)), shared_memory=True)
    grouped = len(weight.blocks) == 3
    steps = ov.op.Constant(ov.Tensor(weight.scale[..., None] if grouped else weight.scale, True), shared_memory=True)
    value = op.multiply(op.convert(q, "f32"), steps)
    value = op.reshape(value, list(shape), False) if grouped else value
    if kind.size == 4:
        return op.matmul(x, value, False, True)
    return op.convert(op.matmul(op.convert(x, "f32"), value, False, True), kind)


def _multiplied_out(weight: Dequantized, kind: Any) -> Any:
    """Returns the weight as a constant [out,in] in a 16-bit dtype."""
    ov = required("openvino")
    target = ov.Tensor(kind, list(weight.shape))
    stored = target.data.view(ml_dtypes.bfloat16 if kind.to_string() == "bf16" else np.float16)
    out, blocks = weight.scale.shape
    numbers = weight.numbers.reshape(out, blocks, -1)
    np.multiply(numbers, weight.scale[..., None], out=stored.reshape(numbers.shape), casting="unsafe")
    return ov.op.Constant(target, shared_memory=True)


def is_large(bundle: Bundle) -> bool:
    """Tells whether the quantised weights of a bundle, multiplied out to 16 bits, take more than a quarter of this
    machine's memory."""
    parts = {n: s for n, s in bundle.manifest.wanted().items() if s.constant and s.dtype in ("int4", "int8")}
    return 2 * sum(prod(spec.shape) for spec in parts.values()) > memory_bytes() // 4


def count_packed(model: Any) -> int:
    """Returns how many weights a model, read and not yet compiled, holds as integers: all that `product` left so."""
    nodes = (node for node in model.get_ops() if node.get_type_name() == "Constant")
    return sum(node.get_output_element_type(0).to_string() in PACKED for node in nodes)
