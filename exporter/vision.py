"""The vision graph: Hugging Face's tower and projector through the torch exporter, without their weights' storage."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import OpBuilder
from onnxscript.rewriter import pattern

from himap_export.exporter import llava
from himap_export.graphs.build import IR_VERSION, OPSET, StageGraph
from himap_export.graphs.decoder import Names
from himap_export.graphs.plan import TokenBudget
from himap_export.graphs.spec import DecoderSpec, Dtype

TORCH_DTYPE: Mapping[Dtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def vision_graph(
    config: Mapping[str, Any], decoder: DecoderSpec, budget: TokenBudget, dtype: Dtype, names: Names
) -> StageGraph:
    """`pixel_values` [B,3,H,W] to `image_features` [B,V0,D]; weights are inputs, named by `names` of the module's."""
    spec = llava.vision_spec(config)
    module = llava.vision_module(config, TORCH_DTYPE[dtype])
    shape = (budget.batch, spec.channels, spec.image_size, spec.image_size)
    pixels = torch.empty(shape, dtype=TORCH_DTYPE[dtype], device="meta")
    with _quiet(), torch.inference_mode():
        program = torch.onnx.export(
            module, (pixels,), dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
            input_names=["pixel_values"], output_names=["image_features"],
        )  # fmt: skip
    assert program is not None
    model = program.model
    model.ir_version, model.producer_name, model.graph.name = IR_VERSION, "himap-export", "vision"
    model.graph.outputs[0].shape = ir.Shape([budget.batch, spec.tokens, decoder.hidden])
    weights = _free_weights(model.graph, names)
    pattern.RewriteRuleSet([_LinearAsGemm.rule()]).apply_to_model(model)
    for node in model.graph:
        node.metadata_props.clear()
    return StageGraph("vision", model, weights)


class _LinearAsGemm(pattern.RewriteRuleClassBase):  # type: ignore[misc]  # onnxscript is untyped here
    """MatMul(x, Transpose(W)) + b becomes one Gemm over the stored [out,in] weights, as in the decoder, and an Add.

    Requires static shapes. Without it TensorRT, to which weights are inputs, transposes every one at every inference;
    and it copies a bias that is an input of the Gemm, where it fuses one that is added behind the reshape.
    """

    def pattern(self, op: OpBuilder, x: ir.Value, w: ir.Value, b: ir.Value) -> ir.Value:
        found: ir.Value = op.Add(op.MatMul(x, op.Transpose(w, perm=[1, 0])), b)
        return found

    def rewrite(self, op: OpBuilder, x: ir.Value, w: ir.Value, b: ir.Value) -> ir.Value:
        assert x.shape is not None and w.shape is not None
        rows, out = (int(n) for n in x.shape.numpy()[:-1]), int(w.shape.numpy()[0])
        flat = op.Reshape(x, op.Constant(value_ints=[-1, int(w.shape.numpy()[1])]))
        made: ir.Value = op.Add(op.Reshape(op.Gemm(flat, w, transB=1), op.Constant(value_ints=[*rows, out])), b)
        return made


def _free_weights(graph: ir.Graph, names: Names) -> dict[str, tuple[int, ...]]:
    """Turns parameters, initializers without storage, into inputs; `position_ids` counts patches and is filled in."""
    weights: dict[str, tuple[int, ...]] = {}
    for name, value in list(graph.initializers.items()):
        assert value.shape is not None
        shape = tuple(int(n) for n in value.shape.numpy())
        if name.endswith("position_ids"):
            value.const_value = ir.tensor(np.arange(shape[-1], dtype=np.int64).reshape(shape), name=name)
            continue
        del graph.initializers[name]
        value.const_value, value.name = None, names(name)
        graph.inputs.append(value)
        weights[value.name] = shape
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
