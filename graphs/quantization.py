"""Linear layers over quantised weights, in the one form that every backend reads compressed.

    y = x W,   W [in,out] = q * scale        DequantizeLinear, then Gemm without transB

q are signed integers, the checkpoint's [out,in] transposed; there are no zero points. A scale, in the model's dtype, is
shared by a block of inputs of one output, or by all of them. Where q are floats, activations are rounded, too:
`quantization_fp`. What else was tried is in docs/log.md: [out,in] is never fused by onnxruntime, zero points and
partial blocks are refused by TensorRT-RTX.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

import onnx_ir as ir

from himap_export.graphs.build import Frame, dim
from himap_export.graphs.ports import ElementType, Kind, LinearForm, WeightRef
from himap_export.graphs.quantization_fp import fp8, nvfp4
from himap_export.graphs.spec import DecoderSpec

BLOCKS = (32, 64, 128)


class Part(NamedTuple):
    """One stored tensor of a quantised weight: what is appended to the weight's name, its type and shape."""

    suffix: str
    dtype: ElementType
    shape: tuple[int, ...]


def parts(form: LinearForm, shape: tuple[int, int], dtype: ElementType) -> tuple[Part, ...]:
    """Returns what is stored of a weight of `shape` [out,in] in a model of `dtype`: its values, then its scales."""
    out, wide = shape
    if form.kind == "fp8":
        return Part("fp8", "fp8", (wide, out)), Part("scale", "fp32", (out,)), Part("input_scale", "fp32", ())
    if form.kind == "nvfp4":
        blocks = Part("block_scale", "fp8", (wide // form.block, out))
        return Part("fp4", "fp4", (wide, out)), blocks, Part("scale", "fp32", ()), Part("input_scale", "fp32", ())
    scale = (wide // form.block, out) if form.block else (out,)
    return Part(_STORED[form.kind], _STORED[form.kind], (wide, out)), Part("scale", dtype, scale)


def stored_bytes(form: LinearForm, shape: tuple[int, int], dtype: ElementType) -> int:
    """Returns what a weight of `shape` [out,in] takes in a model of `dtype`, in bytes."""
    return sum(_BITS[part.dtype] * prod(part.shape) for part in parts(form, shape, dtype)) // 8


def linear(f: Frame, x: ir.Value, ref: WeightRef, out: int) -> ir.Value:
    """Returns x [n,in] times the weight `ref` [out,in], transposed: [n,out]."""
    shape = out, dim(x, 1)
    if ref.form is None:
        return f.op.Gemm(x, f.weight(ref, *shape), transB=1)
    values = [f.part(ref, *part) for part in parts(ref.form, shape, f.own)]
    match ref.form.kind:
        case "fp8":
            return fp8(f, x, *values)
        case "nvfp4":
            return nvfp4(f, x, *values)
        case "int8-dynamic":
            return _dynamic(f, x, *values)
    along = {"axis": 0, "block_size": ref.form.block} if ref.form.block else {"axis": 1}
    return f.op.Gemm(x, f.op.DequantizeLinear(*values, **along))


def _dynamic(f: Frame, x: ir.Value, q: ir.Value, scale: ir.Value) -> ir.Value:
    """Rounds x to 8 bits by its own range, and multiplies integers: [n,out].

    ONNX takes one range over all of x. So padding takes part in it, and in a batch an answer would hang on the others.
    """
    rounded, step, zero = f.op.DynamicQuantizeLinear(x, _outputs=3)
    product = f.op.Cast(f.op.MatMulInteger(rounded, q, zero), to=f.dtype)
    return f.op.Mul(product, f.op.Mul(step, scale))


_BITS: Mapping[ElementType, int] = {
    "fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "fp8": 8, "int4": 4, "fp4": 4,
}  # fmt: skip
_STORED: Mapping[Kind, ElementType] = {"int8": "int8", "int8-dynamic": "int8", "int4": "int4"}


def linear_shapes(spec: DecoderSpec) -> dict[str, tuple[int, int]]:
    """Returns the weights [out,in] of a decoder's linear layers by role, the head's last."""
    return dict(_linear_shapes(spec))


def _linear_shapes(spec: DecoderSpec) -> Iterator[tuple[str, tuple[int, int]]]:
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    layer = {
        "self_attn.q_proj": (queries, spec.hidden), "self_attn.k_proj": (keys, spec.hidden),
        "self_attn.v_proj": (keys, spec.hidden), "self_attn.o_proj": (spec.hidden, queries),
        "mlp.gate_proj": (spec.ffn, spec.hidden), "mlp.up_proj": (spec.ffn, spec.hidden),
        "mlp.down_proj": (spec.hidden, spec.ffn),
    }  # fmt: skip
    for i in range(spec.layers):
        yield from ((f"layers.{i}.{name}.weight", shape) for name, shape in layer.items())
    yield "lm_head.weight", (spec.vocab, spec.hidden)
