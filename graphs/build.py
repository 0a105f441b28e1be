"""The frame every graph is built in: opset, ports declared by their places, weights as named placeholders."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import GraphBuilder

from himap_export.graphs.ports import ElementType, GraphPorts, Place, Port, WeightRef, WeightSpec
from himap_export.graphs.spec import Dtype

OPSET, IR_VERSION, DOMAIN = 24, 12, "himap"
IR_DTYPE: dict[ElementType, ir.DataType] = {
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "fp32": ir.DataType.FLOAT,
    "int64": ir.DataType.INT64,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "fp4": ir.DataType.FLOAT4E2M1,
}


@dataclass(frozen=True)
class StageGraph:
    """An ONNX model, its ports by name, and its other inputs, the `weights` by name."""

    name: str
    model: ir.Model
    ports: GraphPorts
    weights: Mapping[str, WeightSpec]


def dim(value: ir.Value, axis: int) -> int:
    """Returns a static dimension of `value`, as given or as the builder inferred it."""
    assert value.shape is not None, f"{value.name} has no inferred shape"
    size = value.shape[axis]
    assert isinstance(size, int), f"axis {axis} of {value.name} is not static"
    return size


class Frame:
    """Collects one graph. `op` builds nodes; `weight` declares a weight once, however often it is read."""

    def __init__(self, name: str, dtype: Dtype) -> None:
        self.name, self.dtype, self.own = name, IR_DTYPE[dtype], dtype
        self.graph = ir.Graph([], [], nodes=[], name=name, opset_imports={"": OPSET, DOMAIN: 1})
        self.builder = GraphBuilder(self.graph)
        self.op = self.builder.op
        self._inputs: dict[str, Port] = {}
        self._outputs: dict[str, Port] = {}
        self._weights: dict[str, ir.Value] = {}
        self._specs: dict[str, WeightSpec] = {}

    def input(self, place: Place, shape: tuple[int, ...], dtype: ElementType | None = None) -> ir.Value:
        """Returns the graph's input of that place, declared when it is first asked for."""
        name = place.name()
        if name in self._inputs:
            return next(value for value in self.graph.inputs if value.name == name)
        self._inputs[name] = port = Port(dtype or self.own, shape, *place)
        return self.builder.input(name, IR_DTYPE[port.dtype], shape)

    def integers(self, place: Place, *shape: int) -> ir.Value:
        return self.input(place, shape, "int64")

    def output(
        self,
        place: Place,
        value: ir.Value,
        shape: tuple[int, ...],
        dtype: ElementType | None = None,
        updates: ir.Value | None = None,
    ) -> None:
        """Declares `value` as an output, which shares the memory of the input that it `updates`; an input that passes
        through unchanged gets an Identity of its own."""
        if value.is_graph_input() or value in self.graph.outputs:
            value = self.op.Identity(value)
        name = place.name(updates is not None)
        self._outputs[name] = port = Port(dtype or self.own, shape, *place, updates.name if updates else None)
        value.shape, value.type = ir.Shape(shape), ir.TensorType(IR_DTYPE[port.dtype])
        self.builder.add_output(value, name)

    def weight(self, ref: WeightRef, *shape: int) -> ir.Value:
        """Returns the weight's input, declared when it is first asked for."""
        return self._declare(ref.name, WeightSpec(self.own, shape, ref.rows))

    def part(self, ref: WeightRef, suffix: str, dtype: ElementType, shape: tuple[int, ...]) -> ir.Value:
        """Returns a part of a quantised weight, declared when it is first asked for."""
        return self._declare(f"{ref.name}.{suffix}", WeightSpec(dtype, shape, constant=True))

    def _declare(self, name: str, spec: WeightSpec) -> ir.Value:
        if name not in self._weights:
            self._specs[name] = spec
            kind = ir.TensorType(IR_DTYPE[spec.dtype])
            self._weights[name] = ir.Value(name=name, shape=ir.Shape(spec.shape), type=kind)
        return self._weights[name]

    def finish(self) -> StageGraph:
        """Returns the model, its weights behind its other inputs."""
        self.graph.inputs.extend(self._weights.values())
        for node in self.graph:
            node.metadata_props.clear()  # the builder's scope notes: half the size of the file
        functions = self.builder.functions.values()
        model = ir.Model(self.graph, ir_version=IR_VERSION, producer_name="himap-export", functions=functions)
        return StageGraph(self.name, model, GraphPorts(self._inputs, self._outputs), self._specs)
