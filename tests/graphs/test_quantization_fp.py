"""Linear layers in fp8 and nvfp4: their graphs, as onnx's reference runs them, against the formats in NumPy."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from himap_export.graphs.build import Frame
from himap_export.graphs.ports import LinearForm, Place, WeightRef
from himap_export.graphs.quantization import linear, parts
from himap_export.graphs.spec import Dtype

ROWS, IN, OUT = 5, 32, 12
E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
Arrays = dict[str, npt.NDArray[Any]]


def product(form: LinearForm, dtype: Dtype, x: npt.NDArray[Any], weights: Arrays) -> npt.NDArray[np.float32]:
    """What the graph of one linear layer makes of x [ROWS,IN]: [ROWS,OUT]."""
    f = Frame("linear", dtype)
    y = linear(f, f.input(Place("hidden", cut=1), (ROWS, IN)), WeightRef("w", form=form), OUT)
    assert y.shape is not None and list(y.shape) == [ROWS, OUT]
    f.output(Place("last_hidden"), y, (ROWS, OUT))
    graph = f.finish()
    assert {f"w.{p.suffix}" for p in parts(form, (OUT, IN), dtype)} == set(graph.weights) == {f"w.{n}" for n in weights}
    for value in [v for v in graph.model.graph.inputs if v.name in graph.weights]:
        assert value.name is not None
        value.const_value = ir.tensor(weights[value.name.removeprefix("w.")], name=value.name)
        graph.model.graph.inputs.remove(value)
        graph.model.graph.register_initializer(value)
    model = ir.to_proto(graph.model)
    onnx.checker.check_model(model, full_check=True)
    found = ReferenceEvaluator(model).run(None, {"hidden_k1": x})[0]
    return np.asarray(found, np.float32)


def random(dtype: Dtype) -> tuple[npt.NDArray[Any], np.random.Generator]:
    rng = np.random.default_rng(0)
    kind: type[Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    x = (rng.standard_normal((ROWS, IN)) * 2).astype(kind)
    x[1, :16] = 0
    x[2, 3] = 40  # more than the static scale holds
    return x, rng


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_fp8_rounds_activations_on_a_static_scale(dtype: Dtype) -> None:
    x, rng = random(dtype)
    q, scale, input_scale = rng.standard_normal((IN, OUT)) * 100, rng.uniform(1e-4, 1e-3, OUT), np.float32(8 / 448)
    weights: Arrays = {"fp8": q.astype(E4M3), "scale": scale.astype(np.float32), "input_scale": np.array(input_scale)}
    rounded = (x.astype(np.float32) / input_scale).clip(-448, 448).astype(E4M3).astype(np.float64) * input_scale
    expected = rounded @ (weights["fp8"].astype(np.float64) * weights["scale"])
    actual = product(LinearForm("fp8"), dtype, x, weights)
    np.testing.assert_allclose(actual, expected, rtol=1e-2 if dtype == "bf16" else 2e-3, atol=2e-3)
    assert np.abs(rounded - x.astype(np.float64)).max() == pytest.approx(32)  # 40 became 8


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_nvfp4_rounds_activations_in_blocks(dtype: Dtype) -> None:
    x, rng = random(dtype)
    q, steps = rng.standard_normal((IN, OUT)) * 3, rng.uniform(1, 400, (IN // 16, OUT))
    scale, input_scale = np.float32(1e-4), np.float32(8 / (6 * 448))
    weights: Arrays = {
        "fp4": q.astype(E2M1), "block_scale": steps.astype(E4M3), "scale": np.array(scale),
        "input_scale": np.array(input_scale),
    }  # fmt: skip
    blocks = x.astype(np.float32).reshape(ROWS, -1, 16)
    own = np.minimum(np.abs(blocks).max(-1) / 6 / input_scale, 448).astype(E4M3).astype(np.float32) * input_scale
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(own[..., None] > 0, blocks / own[..., None], 0).clip(-6, 6).astype(E2M1).astype(np.float64)
    rounded = (codes * own[..., None]).reshape(ROWS, IN)
    w = weights["fp4"].astype(np.float64) * np.repeat(weights["block_scale"].astype(np.float64), 16, axis=0) * scale
    actual = product(LinearForm("nvfp4", 16), dtype, x, weights)
    np.testing.assert_allclose(actual, rounded @ w, rtol=3e-2 if dtype == "bf16" else 5e-3, atol=5e-3)
    assert not rounded[1, :16].any() and rounded[2, 3] == pytest.approx(8, rel=1e-6)


def test_scales_are_fp32_whatever_the_models_dtype() -> None:
    """TensorRT multiplies by fp8's scales what is left of the product, and in fp16 that would overflow."""
    for form in (LinearForm("fp8"), LinearForm("nvfp4", 16)):
        by_name = {part.suffix: part.dtype for part in parts(form, (OUT, IN), "fp16")}
        assert by_name["scale"] == by_name["input_scale"] == "fp32"
