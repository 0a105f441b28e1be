"""The vision graph: Hugging Face's tower and projector through the torch exporter, without their weights' storage."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
import torch
from onnxscript import OpBuilder
from onnxscript.rewriter import pattern

from himap_export.exporter.family import Family, VisionSpec
from himap_export.graphs.build import IR_VERSION, OPSET, StageGraph
from himap_export.graphs.decoder import Names
from himap_export.graphs.ports import GraphPorts, Place, Port, WeightSpec
from himap_export.graphs.spec import Dtype

Array = npt.NDArray[Any]
TORCH_DTYPE: Mapping[Dtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def vision_graph(
    name: str, family: Family[Any], spec: VisionSpec, *, hidden: int, dtype: Dtype, names: Names
) -> StageGraph:
    """Returns the graph from one picture's or film's `pixel_values` [tiles,3,H,W] to `image_features` and `deepstack_*`
    [1,V,D].

    Weights are inputs, to whose names `names` turns the module's. What the module computed from its configuration
    alone, its `constants` by the names of their buffers, is written into the graph."""
    module = family.module(spec, TORCH_DTYPE[dtype])
    pixels = Port(dtype, (spec.tiles, spec.channels, *spec.view), "pixel_values")
    places = Place("seen_features"), *(Place("seen_deepstack", layer) for layer in range(spec.deepstack))
    outputs = {place.name(): Port(dtype, (1, spec.tokens, hidden), *place) for place in places}
    empty = torch.empty(pixels.shape, dtype=TORCH_DTYPE[dtype], device="meta")
    with _quiet(), torch.inference_mode():
        program = torch.onnx.export(
            module, (empty,), dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
            input_names=[pixels.role], output_names=list(outputs),
        )  # fmt: skip
    assert program is not None
    model = program.model
    model.ir_version, model.producer_name, model.graph.name = IR_VERSION, "himap-export", name
    for output in model.graph.outputs:
        output.shape = ir.Shape([1, spec.tokens, hidden])
    weights = _free_weights(model.graph, names, getattr(module, "constants", {}), dtype)
    pattern.RewriteRuleSet([_BiasedLinearAsGemm.rule(), _LinearAsGemm.rule()]).apply_to_model(model)
    for node in model.graph:
        node.metadata_props.clear()
    return StageGraph(name, model, GraphPorts({pixels.role: pixels}, outputs), weights)


class _LinearAsGemm(pattern.RewriteRuleClassBase):  # type: ignore[misc]  # onnxscript is untyped here
    """MatMul(x, Transpose(W)) becomes one Gemm over the stored [out,in] weights, as in the decoder.

    Requires static shapes. Without it TensorRT, to which weights are inputs, transposes every one at every inference.
    """

    def pattern(self, op: OpBuilder, x: ir.Value, w: ir.Value) -> ir.Value:
        found: ir.Value = op.MatMul(x, op.Transpose(w, perm=[1, 0]))
        return found

    def rewrite(self, op: OpBuilder, x: ir.Value, w: ir.Value) -> ir.Value:
        return _gemm(op, x, w)


class _BiasedLinearAsGemm(pattern.RewriteRuleClassBase):  # type: ignore[misc]
    """The same with a bias, added behind the reshape: there TensorRT fuses it, as the Gemm's input it copies it."""

    def pattern(self, op: OpBuilder, x: ir.Value, w: ir.Value, b: ir.Value) -> ir.Value:
        found: ir.Value = op.Add(op.MatMul(x, op.Transpose(w, perm=[1, 0])), b)
        return found

    def rewrite(self, op: OpBuilder, x: ir.Value, w: ir.Value, b: ir.Value) -> ir.Value:
        made: ir.Value = op.Add(_gemm(op, x, w), b)
        return made


def _gemm(op: OpBuilder, x: ir.Value, w: ir.Value) -> ir.Value:
    """Returns x [..,in] times w [out,in] transposed: [..,out]."""
    assert x.shape is not None and w.shape is not None
    rows, out = (int(n) for n in x.shape.numpy()[:-1]), int(w.shape.numpy()[0])
    flat = op.Reshape(x, op.Constant(value_ints=[-1, int(w.shape.numpy()[1])]))
    made: ir.Value = op.Reshape(op.Gemm(flat, w, transB=1), op.Constant(value_ints=[*rows, out]))
    return made


def _free_weights(graph: ir.Graph, names: Names, constants: Mapping[str, Array], dtype: Dtype) -> dict[str, WeightSpec]:
    """Turns parameters, initializers without storage, into inputs; `constants` are filled in."""
    weights: dict[str, WeightSpec] = {}
    for name, value in list(graph.initializers.items()):
        assert value.shape is not None
        shape = tuple(int(n) for n in value.shape.numpy())
        if name in constants:
            assert value.dtype is not None and constants[name].shape == shape, name
            value.const_value = ir.tensor(constants[name].astype(value.dtype.numpy()), name=name)
            continue
        del graph.initializers[name]
        ref = names(name)
        value.name = ref.name
        value.const_value = None
        graph.inputs.append(value)
        weights[ref.name] = WeightSpec(dtype, shape, ref.rows)
    return weights


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns about what is not the user's business: torchvision absent, its own progress."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
