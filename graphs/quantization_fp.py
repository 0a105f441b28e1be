"""Linear layers over weights and activations in floats of 8 and 4 bits, which tensor cores multiply as they are.

Activations are rounded, too, by scales from calibration. The scales are fp32 whatever the model's dtype: TensorRT
multiplies by them only what the matrix product leaves, and in fp16 that overflows (docs/log.md).
"""

from functools import cache

import onnx
import onnx_ir as ir

from himap_export.graphs.build import Frame, dim

FP4_BLOCK = 16  # inputs that share a scale, as tensor cores have it
_FLOAT, _FP8 = ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN
_TRT = "trt"

# TensorRT's own operator, in the words of the standard: TensorRT takes its own, whatever the function says.
_DYNAMIC_QUANTIZE = """
<domain: "trt", opset_import: ["" : 24]>
TRT_FP4DynamicQuantize <axis, block_size, scale_type> (x, scale) => (q, block_scale)
{
  shape = Shape (x)
  last = Constant <value_ints = [-1]> ()
  size = Constant <value_int: int = @block_size> ()
  size1 = Reshape (size, last)
  keep = Constant <value_ints = [0, -1]> ()
  blocked = Concat <axis = 0> (keep, size1)
  wide = Cast <to = 1> (x)
  block = Reshape (wide, blocked)
  magnitude = Abs (block)
  largest = ReduceMax <keepdims = 1> (magnitude, last)
  six = Constant <value = float {6.0}> ()
  step = Div (largest, six)
  share = Div (step, scale)
  rounded = Cast <to = 17> (share)
  block_scale = Squeeze (rounded, last)

  held = Cast <to = 1> (rounded)
  divisor = Mul (held, scale)
  zero = Constant <value = float {0.0}> ()
  one = Constant <value = float {1.0}> ()
  empty = Equal (divisor, zero)
  safe = Where (empty, one, divisor)
  ratio = Div (block, safe)
  flat = Reshape (ratio, shape)
  q = Cast <to = 23> (flat)
}
"""


@cache
def _dynamic_quantize() -> onnx.FunctionProto:
    return onnx.parser.parse_function(_DYNAMIC_QUANTIZE)


def fp8(f: Frame, x: ir.Value, q: ir.Value, scale: ir.Value, input_scale: ir.Value) -> ir.Value:
    """Returns x [n,in] W in the model's dtype, [n,out], x rounded to E4M3 times `input_scale` [] fp32.

    W = q * scale: E4M3 [in,out], fp32 [out].
    """
    rounded = f.op.QuantizeLinear(f.op.Cast(x, to=_FLOAT), input_scale, output_dtype=_FP8)
    product = f.op.Gemm(f.op.DequantizeLinear(rounded, input_scale), f.op.DequantizeLinear(q, scale, axis=1))
    return f.op.Cast(product, to=f.dtype)


def nvfp4(
    f: Frame, x: ir.Value, q: ir.Value, block_scale: ir.Value, scale: ir.Value, input_scale: ir.Value
) -> ir.Value:
    """Returns x [n,in] W in the model's dtype, [n,out], x rounded to E2M1 in blocks of 16.

    W = q * block_scale * scale: E2M1 [in,out], E4M3 [in/16,out], fp32 []. A block of x has a scale of its own, E4M3
    times `input_scale` [] fp32.
    """
    f.graph.opset_imports[_TRT] = 1
    function = ir.from_proto(_dynamic_quantize())
    values, steps = f.op.call(function, x, input_scale, axis=-1, block_size=FP4_BLOCK, scale_type=_FP8)
    rows, wide = dim(x, 0), dim(x, 1)
    values.shape, values.type = ir.Shape([rows, wide]), ir.TensorType(ir.DataType.FLOAT4E2M1)
    steps.shape, steps.type = ir.Shape([rows, wide // FP4_BLOCK]), ir.TensorType(_FP8)
    w = _blockwise(f, q, block_scale, scale, axis=0)
    return f.op.Gemm(_blockwise(f, values, steps, input_scale, axis=-1), w)


def _blockwise(f: Frame, q: ir.Value, block_scale: ir.Value, scale: ir.Value, axis: int) -> ir.Value:
    """Returns E2M1 numbers times their two scales, in the model's dtype."""
    steps = f.op.DequantizeLinear(block_scale, scale)
    return f.op.Cast(f.op.DequantizeLinear(q, steps, axis=axis, block_size=FP4_BLOCK), to=f.dtype)
