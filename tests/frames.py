"""Graphs of a part: inputs and outputs under any name, where a bundle's graphs have ports with roles."""

import onnx_ir as ir

from himap_export.graphs.build import Frame


def give(f: Frame, name: str, shape: tuple[int, ...], dtype: ir.DataType | None = None) -> ir.Value:
    """An input of the graph, of the frame's dtype if none is named."""
    return f.builder.input(name, dtype or f.dtype, shape)


def give_integers(f: Frame, name: str, *shape: int) -> ir.Value:
    return give(f, name, shape, ir.DataType.INT64)


def take(f: Frame, name: str, value: ir.Value, shape: tuple[int, ...], dtype: ir.DataType | None = None) -> None:
    """Declares `value` as an output of the graph."""
    value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype or f.dtype)
    f.builder.add_output(value, name)
