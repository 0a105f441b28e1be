"""Products with quantised weights, as OpenVINO's CPU plugin computes them without multiplying the weights out.

It keeps integers compressed in one pattern only: a constant [out,..] whose rows are outputs, converted to fp32, times a
constant of scales, times fp32 activations. So integers [in,out] are turned round while they are read, and 16-bit
activations are converted: to and fro is exact.

In fp32 its kernels do not use AMX. Prefill in 16 bits therefore takes the weights in its own dtype, multiplied out when
the graph is read, unless they are too many for the machine's memory: `packed` says so.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from himap_export.engines.extras import required
from himap_export.graphs.errors import HimapError

_FEW = 16  # rows up to which the compressed product is the faster one: reading the weights is all that it costs


@dataclass(frozen=True)
class Dequantized:
    """A weight of integers `q` [in,out] and their scales [in/B,out] or [out], constants both."""

    q: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, int]:
        wide, out = self.q.get_output_shape(0)
        return wide, out

    @property
    def rows(self) -> list[int]:
        """The shape [out,in/B,B] of the integers by output, [out,in] if all inputs share a scale."""
        (wide, out), blocks = self.shape, self.scale.get_output_shape(0)[:-1]
        return [out, blocks[0], wide // blocks[0]] if blocks else [out, wide]


def dequantized(node: Any, found: dict[str, Dequantized]) -> Any:
    """Returns what stands for a DequantizeLinear until a product takes it from `found`, by the name of the node: NaN,
    as nothing else may."""
    op, (q, scale) = required("openvino.opset15"), (node.get_input(i).get_node() for i in range(2))
    if node.get_input_size() != 2 or {q.get_type_name(), scale.get_type_name()} != {"Constant"}:
        raise HimapError("DequantizeLinear reads something else than stored integers and scales, as our graphs do")
    nan = op.convert(op.constant(np.float32(np.nan)), scale.get_output_element_type(0))
    whole = op.broadcast(nan, q.get_output_shape(0))
    found[whole.get_name()] = Dequantized(q, scale)
    return whole


def product(x: Any, weight: Dequantized, packed: bool) -> Any:
    """Returns x [M,in] times `weight`, [M,out], in the dtype of x."""
    op, kind, (wide, out) = required("openvino.opset15"), x.get_element_type(), weight.shape
    if kind.size == 2 and x.get_partial_shape()[0].get_length() > _FEW and not packed:
        return op.matmul(x, _multiplied_out(weight), False, True)
    steps = op.constant(_scales(weight)[..., None])
    value = op.multiply(op.convert(_turned(weight), "f32"), steps)
    value = op.reshape(value, [out, wide], False) if len(weight.rows) == 3 else value
    if kind.size == 4:
        return op.matmul(x, value, False, True)
    return op.convert(op.matmul(op.convert(x, "f32"), value, False, True), kind)


def _turned(weight: Dequantized) -> Any:
    """Returns the integers as a constant whose rows are outputs."""
    ov, (wide, out), kind = required("openvino"), weight.shape, weight.q.get_element_type()
    turned = ov.Tensor(kind, weight.rows)
    if kind.bitwidth == 8:
        turned.data.reshape(out, wide)[...] = weight.q.data.reshape(wide, out).T
        return ov.op.Constant(turned, shared_memory=True)
    # Two in a byte: of each pair of inputs and pair of outputs, the inputs change places with the outputs.
    even, odd = weight.q.data.view(np.uint8).reshape(wide // 2, 2, out // 2).swapaxes(0, 1)
    target = turned.data.view(np.uint8).reshape(out // 2, 2, wide // 2)
    target[:, 0] = ((even & 15) | (odd << 4)).T
    target[:, 1] = ((even >> 4) | (odd & 0xF0)).T
    return ov.op.Constant(turned, shared_memory=True)


def _scales(weight: Dequantized) -> npt.NDArray[np.float32]:
    """Returns the scales as fp32 [out,in/B], [out] if all inputs share one."""
    data, kind = weight.scale.data, weight.scale.get_output_element_type(0).to_string()
    numbers = data.view(ml_dtypes.bfloat16) if kind == "bf16" else data
    return np.ascontiguousarray(numbers.T, np.float32)


def _multiplied_out(weight: Dequantized) -> Any:
    """Returns the weight as a constant [out,in] in the dtype of its scales."""
    ov, kind = required("openvino"), weight.scale.get_output_element_type(0)
    turned, (wide, out) = _turned(weight).data, weight.shape
    if weight.q.get_element_type().bitwidth == 4:
        packed = turned.view(np.uint8)
        turned = np.stack([packed << 4, packed], axis=-1).view(np.int8) >> 4
    target = ov.Tensor(kind, [out, wide])
    stored = target.data.view(ml_dtypes.bfloat16 if kind.to_string() == "bf16" else np.float16)
    np.multiply(
        turned.reshape(weight.rows), _scales(weight)[..., None], out=stored.reshape(weight.rows), casting="unsafe"
    )
    return ov.op.Constant(target, shared_memory=True)
