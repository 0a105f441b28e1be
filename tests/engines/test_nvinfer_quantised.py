"""Engines of TensorRT-RTX over quantised weights: each linear layer one kernel that reads them as they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
from msgspec.structs import replace
from unsealed import LAYERS, SPEC, staged, unsealed

from himap_export.engines.backends import tensorrt_rtx
from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import QuantisedWeight, Quantization
from himap_export.engines.nvinfer import weight_only
from himap_export.engines.nvinfer.edition import RTX, log_of
from himap_export.engines.nvinfer.kernels import UNSEEN, multiplied_out
from himap_export.engines.nvinfer.weight_only import fusible
from himap_export.exporter.quantize.floats import FLOATS, quantise_floats
from himap_export.exporter.quantize.rounding import quantise
from himap_export.graphs.errors import HimapError
from himap_export.graphs.ports import LinearForm, WeightRef, WeightSpec
from himap_export.graphs.quantization import linear_shapes
from himap_export.graphs.spec import Dtype
from himap_export.graphs.stages import StagedModel

FORMS = {
    "int4": LinearForm("int4", 32),
    "int8": LinearForm("int8"),
    "fp8": LinearForm("fp8"),
    "nvfp4": LinearForm("nvfp4", 16),
}
TARGETS = {"int4": (80, 86, 89, 120, 121), "int8": (80, 86, 89, 120, 121), "fp8": (89, 120, 121), "nvfp4": (120, 121)}
NUMBERS: Mapping[Dtype, type[Any]] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
SHAPES = linear_shapes(SPEC)


def quantised(folder: Path, form: LinearForm, dtype: Dtype, zeros: bool = False) -> Bundle:
    """A work folder whose linear layers, the head's among them, are all of `form`; with `zeros`, some outputs' weights
    are all zero."""

    def names(role: str) -> WeightRef:
        return WeightRef(f"model.{role}", form=form if role in SHAPES else None)

    plain = staged(dtype)
    model = StagedModel(plain.spec, plain.plan, plain.budget, dtype, names)
    graphs, random = model.graphs(), np.random.default_rng(0)
    weights: dict[str, npt.NDArray[Any]] = {}
    for name, spec in {name: spec for g in graphs for name, spec in g.weights.items()}.items():
        if not spec.constant:
            weights[name] = (random.standard_normal(spec.shape, np.float32) / 10).astype(NUMBERS[dtype])
    for role, shape in SHAPES.items():
        w = random.standard_normal(shape, np.float32) / 10
        w[: 2 * zeros] = 0
        found = quantise_floats(w, form, 5.0) if form.kind in FLOATS else quantise(w, form, dtype)
        weights |= {f"model.{role}.{suffix}": part for suffix, part in found.parts.items()}
    bundle = unsealed(folder, model, graphs, "embedded", weights)
    record = QuantisedWeight(form.kind, form.block, error=0.1)
    quantization = Quantization("round to nearest", {f"model.{role}": record for role in SHAPES})
    return Bundle(folder, replace(bundle.manifest, quantization=quantization))


def count(kernels: tuple[str, ...], *words: str) -> int:
    """Counts the kernels whose name or operators hold all `words`."""
    return sum(int(k.partition("x ")[0]) for k in kernels if all(word in k for word in words))


# How many kernels the seven linear layers of a decoder layer, and the head, become: int4 joins q, k, v and gate, up.
PRODUCTS: Mapping[str, tuple[str, int, int]] = {
    "int4": ("DequantizeLinear, Gemm", 4, 1),  # of one row, as they are tiny, fused with norms and sums, too
    "int8": ("CastMulCastFc (DequantizeLinear, Gemm)", 7, 1),
    "fp8": ("gemm (DequantizeLinear, Gemm)", 7, 1),
    "nvfp4": ("gemm (DequantizeLinear, Gemm", 7, 1),
}


@pytest.mark.parametrize("dtype", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", FORMS)
def test_every_stage_multiplies_quantised_weights_as_they_are(kind: str, dtype: Dtype, tmp_path: Path) -> None:
    bundle = quantised(tmp_path / "work", FORMS[kind], dtype)
    words, layer, head = PRODUCTS[kind]
    for name, layers in LAYERS.items():
        record = tensorrt_rtx.build(bundle, name)
        assert record.targets == TARGETS[kind]
        products = layers * layer + head * (name in ("k2", "decode"))
        assert count(record.kernels, words) == products, (name, record.kernels)
        assert not count(record.kernels, "(DequantizeLinear)"), record.kernels
        assert count(record.kernels, "_mha_", "(Attention)") == layers, record.kernels
        if kind == "nvfp4":  # TensorRT's own operator, and not what the function beside it says
            assert count(record.kernels, "Dyna", "TRT_FP4DynamicQuantize") == (
                4 * layers + head * (name in ("k2", "decode"))
            )


def test_what_is_multiplied_out_first_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TensorRT does it with int8 weights that multiply one input, unless it is kept from it."""
    bundle = quantised(tmp_path / "work", FORMS["int8"], "bf16")
    monkeypatch.setattr(weight_only, "fusible", lambda model: None)
    with pytest.raises(HimapError, match="multiplies quantised weights of k1 out") as caught:
        tensorrt_rtx.build(bundle, "k1")
    assert "in CastMulCast" in caught.value.details
    assert not bundle.path("tensorrt-rtx/k1.engine").exists()


def test_a_build_that_does_not_say_what_it_runs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, log = quantised(tmp_path / "work", FORMS["int4"], "fp16"), log_of(RTX)
    monkeypatch.setattr(type(log), "layers", property(lambda self: "", lambda self, value: None), raising=False)
    with pytest.raises(HimapError, match="does not show that it multiplies quantised weights of k2 as they are"):
        tensorrt_rtx.build(bundle, "k2")
    assert not bundle.path("tensorrt-rtx/k2.engine").exists()


def test_numbers_that_kernels_read_are_counted() -> None:
    log = """Layers:
Name: __myl_CastMulCast_myl0_1, LayerType: kgen, Inputs: [], Constants: [ { Name: a, Dimensions: [64,96], \
Datatype: Int8, Format: x }, { Name: s, Dimensions: [96], Datatype: Half }], \
Outputs: [ { Name: o, Dimensions: [64,96], Datatype: Half }], Metadata: [ONNX Layer: d]
Name: g_myl0_2, LayerType: gemm, Inputs: [], Constants: [], Outputs: [], Metadata: [ONNX Layer: g]
Name: __myl_CastMulFc_myl0_3, LayerType: runtime_fusion, Inputs: [], Constants: [ { Name: b, Dimensions: [64,32], \
Datatype: Int8 }], Outputs: [], Metadata: [ONNX Layer: e]
"""
    held = [WeightSpec("int8", (64, 32), constant=True), WeightSpec("fp16", (32,), constant=True)]
    assert multiplied_out(log, held) == ()  # all that is held is read by the product
    assert multiplied_out(log, [*held, WeightSpec("int8", (64, 96), constant=True)]) == ("CastMulCast",)
    assert multiplied_out(log, [WeightSpec("int4", (2, 2), constant=True)]) == (UNSEEN,)
    assert multiplied_out("", held) == (UNSEEN,)  # a log that tells nothing proves nothing
    assert multiplied_out(log.replace("Constants: [", "["), held) == (UNSEEN,)
    assert multiplied_out("", held[1:]) == ()  # scales alone: nothing is quantised
    assert multiplied_out(log, [WeightSpec("int8", (64, 96))]) == ()  # an input: no part of a quantised weight


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_outputs_of_nothing_but_zeros_are_built(kind: str, tmp_path: Path) -> None:
    """Of scales that are zero TensorRT takes none."""
    bundle = quantised(tmp_path / "work", FORMS[kind], "fp16", zeros=True)
    assert tensorrt_rtx.build(bundle, "k2").kernels


def test_an_edited_graph_computes_what_it_did(tmp_path: Path) -> None:
    """Over one row, which is doubled, and over inputs with several readers, which become several."""
    bundle = quantised(tmp_path / "work", FORMS["int8"], "fp32")
    for name in ("decode", "prefix"):
        path, random = bundle.path(f"{name}.onnx"), np.random.default_rng(1)
        model = ir.load(path)
        feeds = {
            port: np.full(spec.shape, 39 if port == "position_ids" else 1)
            if spec.dtype == "int64"
            else random.standard_normal(spec.shape, np.float32)
            for port, spec in bundle.manifest.graphs[name].inputs.items()
        }
        before = session(path).run(None, feeds)
        fusible(model)
        edited = path.with_name("edited.onnx")
        ir.save(model, edited)
        nodes = [node.op_type for node in model.graph]
        assert (nodes.count("Expand") == nodes.count("Slice") == 29) if name == "decode" else nodes.count("Min") == 1
        after = session(edited).run(None, feeds)
        for a, b in zip(before, after, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
