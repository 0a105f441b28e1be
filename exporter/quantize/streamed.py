"""Graphs of a part of a model, run over weights that stay in their checkpoint's files: one part in memory at a time."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from himap_export.engines.extras import required
from himap_export.engines.weight_file import StoredTensor, map_tensors
from himap_export.graphs.build import IR_DTYPE, StageGraph

Arrays = Mapping[str, npt.NDArray[Any]]


class StreamedGraph:
    """`graph`, of fp32, in onnxruntime: it computes `outputs` and nothing else, over the weights that `stored` names by
    their inputs. Each is mapped, and cast where it is used, so no fp32 copy outlives its layer.

    HimapError (missing) without onnxruntime.
    """

    def __init__(self, graph: StageGraph, stored: Mapping[str, StoredTensor], outputs: Sequence[ir.Value]) -> None:
        ort, model = required("onnxruntime"), graph.model
        _reduce(model, outputs)
        held = {str(v.name): stored[str(v.name)] for v in model.graph.inputs if v.name in graph.weights}
        _cast(model.graph, held)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = len(os.sched_getaffinity(0)), 3
        options.enable_cpu_mem_arena = False  # it would keep twice what the largest part needs
        content = ir.to_proto(model).SerializeToString()
        self._session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.inputs = tuple(str(v.name) for v in model.graph.inputs if v.name not in held)
        self._outputs = [str(v.name) for v in model.graph.outputs]
        self._value = ort.OrtValue.ortvalue_from_numpy
        arrays = map_tensors(held.values())
        self._weights = {
            name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(arrays[t.name], int(_type(t)))
            for name, t in held.items()
        }

    def __call__(self, feeds: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Returns the outputs by name; of `feeds`, what is no input is not read."""
        given = {name: self._value(np.ascontiguousarray(feeds[name])) for name in self.inputs}
        found = self._session.run_with_ort_values(self._outputs, given | self._weights)
        return {name: value.numpy() for name, value in zip(self._outputs, found, strict=True)}


def _type(stored: StoredTensor) -> ir.DataType:
    return {str(name): kind for name, kind in IR_DTYPE.items()}[stored.dtype]


def _reduce(model: ir.Model, outputs: Sequence[ir.Value]) -> None:
    """Leaves of the graph what computes `outputs`."""
    g = model.graph
    g.outputs[:] = outputs
    RemoveUnusedNodesPass()(model)
    for value in [v for v in g.inputs if not v.uses()]:
        g.inputs.remove(value)


def _cast(g: ir.Graph, stored: Mapping[str, StoredTensor]) -> None:
    """Gives weights that are not stored as fp32 their own type and a Cast. The Casts come first: onnxruntime visits
    inputs in the order of nodes from last to first, and so runs each right before its reader."""
    casts = list[ir.Node]()
    for value in g.inputs:
        kind = stored.get(str(value.name))
        if kind is None or kind.dtype == "fp32":
            continue
        readers = list(value.uses())
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
        value.type = ir.TensorType(_type(kind))
        for node, index in readers:
            node.replace_input_with(index, cast.outputs[0])
        casts.append(cast)
    if casts:
        g.insert_before(g[0], casts)
