"""Rounding to nearest, against a plain NumPy statement, and int4 as ONNX packs it."""

import contextlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from safetensors.numpy import save_file

from himap_export.engines.weight_file import read_header
from himap_export.exporter.quantize.packing import pack_int4, unpack_int4
from himap_export.exporter.quantize.rounding import Quantised, quantise
from himap_export.exporter.quantize.weights import Linear, write_quantised
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import LinearForm
from himap_export.graphs.spec import Dtype

FORMS = [LinearForm("int4", 32), LinearForm("int4", 64), LinearForm("int8"), LinearForm("int8", 32)]


def dequantised(found: Quantised, form: LinearForm) -> NDArray[np.float32]:
    """[out,in], by the definition of the form."""
    q = unpack_int4(found.parts["int4"]) if form.kind == "int4" else found.parts["int8"]
    scale = np.atleast_2d(found.parts["scale"].astype(np.float32))
    return (q * np.repeat(scale, len(q) // len(scale), axis=0)).T.astype(np.float32)


def plain(weight: NDArray[np.float32], form: LinearForm) -> NDArray[np.float32]:
    """The scale that clips nothing, each number rounded to nearest: what a search must not do worse than."""
    out, wide = weight.shape
    blocks = weight.reshape(out, -1, form.block or wide)
    high = 7 if form.kind == "int4" else 127
    scale = np.abs(blocks).max(-1, keepdims=True) / high
    return (np.rint(blocks / np.where(scale == 0, 1, scale)) * scale).reshape(out, wide)


@given(st.integers(1, 2**15).map(lambda n: np.random.default_rng(n).integers(-8, 8, (3, 2 * (n % 9 + 1)), np.int8)))
def test_int4_is_packed_as_onnx_reads_it(q: NDArray[np.int8]) -> None:
    packed = pack_int4(q)
    tensor = onnx.TensorProto(data_type=TensorProto.INT4, dims=q.shape, raw_data=packed.tobytes())
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), q)
    np.testing.assert_array_equal(unpack_int4(packed), q)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_rounded_weights_are_no_worse_than_by_the_largest_and_the_error_is_what_is_told(
    form: LinearForm, dtype: Dtype
) -> None:
    weight = np.random.default_rng(0).standard_t(4, (20, 128)).astype(np.float32)
    found = quantise(weight, form, dtype)
    error = np.sqrt(np.square(dequantised_of(found, form, dtype) - weight).sum() / np.square(weight).sum())
    assert found.error == pytest.approx(error, rel=1e-4)
    most = np.sqrt(np.square(plain(weight, form) - weight).sum() / np.square(weight).sum())
    assert error <= most * (1.02 if dtype == "bf16" else 1.001)  # a scale of 8 bits errs, too
    if form.kind == "int4" and dtype == "fp32":
        assert error < 0.97 * most  # clipping the largest pays in 4 bits


def dequantised_of(found: Quantised, form: LinearForm, dtype: Dtype) -> NDArray[np.float32]:
    if dtype == "bf16":
        scale = found.parts["scale"].view(ml_dtypes.bfloat16)
        return dequantised(Quantised({**found.parts, "scale": scale}, 0.0), form)
    return dequantised(found, form)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_tiles_do_not_show(form: LinearForm, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(1).standard_normal((50, 128)).astype(np.float16)
    whole = quantise(weight, form, "fp16")
    monkeypatch.setattr("himap_export.exporter.quantize.rounding._TILE", 300)
    for name, array in quantise(weight, form, "fp16").parts.items():
        np.testing.assert_array_equal(array, whole.parts[name])


def test_blocks_of_zeros_stay_zeros() -> None:
    weight: NDArray[Any] = np.zeros((4, 64), np.float32)
    weight[:, 40] = 3
    found = quantise(weight, LinearForm("int4", 32), "fp32")
    np.testing.assert_allclose(dequantised(found, LinearForm("int4", 32)), weight, rtol=1e-6)
    assert quantise(np.zeros((4, 64), np.float32), LinearForm("int8"), "fp16").error == 0


def test_a_scale_beyond_the_dtype_is_refused() -> None:
    weight = np.full((2, 32), 1e7, np.float32)
    with pytest.raises(HimapError, match="does not fit fp16") as caught:
        quantise(weight, LinearForm("int4", 32), "fp16")
    assert caught.value.code == Exit.USAGE


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_numbers_beyond_the_dtype_are_refused_though_their_scales_are_not(form: LinearForm) -> None:
    """65504 is fp16's largest: 1e5 has a scale of fp16, and would be infinite times its number."""
    weight = np.zeros((4, 64), np.float32)
    weight[1, 2] = 1e5
    with pytest.raises(HimapError, match="does not fit fp16") as caught:
        quantise(weight, form, "fp16")
    assert caught.value.code == Exit.USAGE
    weight[1, 2] = 6e4
    found = quantise(weight, form, "fp16")
    assert dequantised(found, form).astype(np.float16)[1, 2] == pytest.approx(6e4, rel=1e-3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("largest", [1e-8, 1e7, 3e38])
def test_nothing_is_said_of_numbers_that_do_not_fit(largest: float) -> None:
    weight = np.zeros((2, 32), np.float32)
    weight[0, 3] = largest
    for form in (LinearForm("int4", 32), LinearForm("int8")):
        with contextlib.suppress(HimapError):
            quantise(weight, form, "fp16")


def test_the_refusal_names_the_weight_and_keeps_its_exit_code(tmp_path: Path) -> None:
    save_file({"a.weight": np.full((2, 32), 1e7, np.float32)}, tmp_path / "in")
    linear = Linear("a.weight", read_header(tmp_path / "in")["a.weight"], LinearForm("int4", 32))
    with pytest.raises(HimapError, match=r"a\.weight: .* does not fit fp16 .*another `dtype`") as caught:
        write_quantised([linear], tmp_path / "out", "fp16")
    assert caught.value.code == Exit.USAGE
