"""int8 weights on TensorRT: what keeps their dequantisation inside the matrix product.

TensorRT fuses it, but for two cases (docs/log.md): a product of one row, and products of one input, which it joins
once their weights are multiplied out. So one row becomes two equal ones, and each product reads an input of its own.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # only builds need it
    import onnx_ir as ir


def fusible(model: "ir.Model") -> None:
    """Edits the products of int8 weights in `model`, if it has any; the numbers that are computed stay the same."""
    from himap_export.graphs.build import dim

    readers: dict[ir.Value, int] = {}
    for gemm in list(_products(model.graph)):
        x = gemm.inputs[0]
        assert x is not None
        place = readers[x] = readers.get(x, -1) + 1
        own = _own(model.graph, gemm, x, place)
        gemm.replace_input_with(0, own)
        if dim(x, 0) == 1:
            _double(model.graph, gemm, own, dim(x, 1))


def _products(graph: "ir.Graph") -> Iterator["ir.Node"]:
    import onnx_ir as ir

    for node in graph:
        weight = node.inputs[1].producer() if node.op_type == "Gemm" and node.inputs[1] is not None else None
        if weight is not None and weight.op_type == "DequantizeLinear":
            stored = weight.inputs[0]
            if stored is not None and stored.dtype == ir.DataType.INT8:
                yield node


def _own(graph: "ir.Graph", gemm: "ir.Node", x: "ir.Value", place: int) -> "ir.Value":
    """Returns x, or for those behind the first what is equal to it: the larger of it and minus infinity, the smaller of
    it and infinity. No input has more than three readers."""
    if place == 0:
        return x
    assert x.dtype is not None and place < 3, gemm.name
    name, limit = ("Max", -np.inf) if place == 1 else ("Min", np.inf)
    bound = _constant(graph, gemm, "limit", np.array(limit, x.dtype.numpy()))
    return _insert(graph, gemm, name, [x, bound], before=True)


def _double(graph: "ir.Graph", gemm: "ir.Node", x: "ir.Value", wide: int) -> None:
    """Multiplies two equal rows [2,in], and returns one of the products to whoever reads it."""
    rows = _constant(graph, gemm, "rows", np.array([2, wide], np.int64))
    gemm.replace_input_with(0, _insert(graph, gemm, "Expand", [x, rows], before=True))
    y = gemm.outputs[0]
    readers = list(y.uses())
    places = [_constant(graph, gemm, name, np.array([at], np.int64)) for name, at in (("from", 0), ("to", 1))]
    axis = _constant(graph, gemm, "axis", np.array([0], np.int64))
    first = _insert(graph, gemm, "Slice", [y, *places, axis], before=False)
    first.shape, y.shape = y.shape, None
    for node, index in readers:
        node.replace_input_with(index, first)


def _insert(graph: "ir.Graph", gemm: "ir.Node", kind: str, inputs: list["ir.Value"], before: bool) -> "ir.Value":
    import onnx_ir as ir

    node = ir.node(kind, inputs, name=f"{gemm.name}_{kind}")
    node.outputs[0].name, node.outputs[0].type = f"{gemm.name}.{kind}", inputs[0].type
    (graph.insert_before if before else graph.insert_after)(gemm, node)
    return node.outputs[0]


def _constant(graph: "ir.Graph", gemm: "ir.Node", name: str, values: npt.NDArray[Any]) -> "ir.Value":
    import onnx_ir as ir

    value = ir.Value(name=f"{gemm.name}.{name}", const_value=ir.tensor(values, name=f"{gemm.name}.{name}"))
    graph.register_initializer(value)
    return value
