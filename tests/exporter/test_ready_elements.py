"""Checkpoints that come quantised, one number an element: fp8, and integers in int8."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from ready_checkpoints import Tensors, compressed_tensors, rounded
from ready_layers import (
    INT4,
    INT8,
    activations,
    check,
    drawn,
    float8,
    held,
    multiplied,
    opened,
    packed,
    plain,
    refused,
)

from himap_export.exporter.quantize.taking import taken
from himap_export.graphs.errors import Exit
from himap_export.graphs.ports import LinearForm


@pytest.mark.parametrize("each", ["channel", "tensor"])
def test_fp8_whose_activations_are_scaled_as_they_come_is_multiplied_out(tmp_path: Path, each: str) -> None:
    weight = drawn()
    scale = np.abs(weight).max(1, keepdims=True) / 448 if each == "channel" else np.float32([0.01])
    codes, wanted = float8(weight, scale.astype(np.float16).astype(np.float32))
    parts = {"weight": codes, "weight_scale": torch.from_numpy(scale).half()}
    said = plain("float-quantized", {"type": "float", "strategy": each}, activations())
    linear = opened(tmp_path, parts, said)
    assert linear.form is None and "without a stored scale of activations" in linear.why
    np.testing.assert_array_equal(multiplied(linear), wanted)


def test_fp8_with_a_scale_of_its_activations(tmp_path: Path) -> None:
    codes, wanted = float8(drawn(), np.float32([0.01171875]))
    parts = {"weight": codes, "weight_scale": torch.tensor([0.01171875]), "input_scale": torch.tensor([0.25])}
    inputs = activations(strategy="tensor", dynamic=False)
    linear = opened(tmp_path, parts, plain("float-quantized", {"type": "float", "strategy": "tensor"}, inputs))
    assert (linear.form, linear.why, linear.input_scale) == (LinearForm("fp8"), "", 0.25)
    assert linear.values().dtype == ml_dtypes.float8_e4m3fn
    np.testing.assert_array_equal(held(linear), wanted)
    np.testing.assert_array_equal(multiplied(linear), wanted)
    stored = taken(linear, "fp16")
    assert (stored.parts["input_scale"], stored.error) == (0.25, 0) and stored.parts["scale"].dtype == np.float32
    np.testing.assert_array_equal(stored.parts["fp8"].view(ml_dtypes.float8_e4m3fn), linear.values())
    np.testing.assert_array_equal(stored.parts["scale"], np.full(48, 0.01171875))
    for scale, words, code in ((np.nan, "not finite", Exit.FAILURE), (0.0, "of activations is 0", Exit.USAGE)):
        parts["input_scale"] = torch.tensor(scale)
        said = plain("float-quantized", {"type": "float", "strategy": "tensor"}, inputs)
        refused(tmp_path, parts, said, words, code)


def test_8_bit_integers_an_element_each(tmp_path: Path) -> None:
    r = rounded(drawn(), -1, 8)
    parts = {"weight": torch.from_numpy((r.codes.T - 128).astype(np.int8))}
    parts["weight_scale"] = torch.from_numpy(r.scales.T.copy()).half()
    said = plain("int-quantized", {}, activations(type="int"))
    check(opened(tmp_path, parts, said), r, LinearForm("int8"), "activations stay in the model's dtype")
    parts["weight_zero_point"] = torch.full((48, 1), 3, dtype=torch.int8)
    check(opened(tmp_path, parts, said), replace(r, zeros=r.zeros + 3), None, "zero points of 8 bits")
    parts["weight_zero_point"] = torch.zeros((48, 1), dtype=torch.int8)
    check(opened(tmp_path, parts, said), r, LinearForm("int8"), "activations stay in the model's dtype")


@pytest.mark.parametrize("strategy", ["group", None])
def test_4_bit_integers_an_element_each(tmp_path: Path, strategy: str | None) -> None:
    """As compressed-tensors' int-quantized stores them: in int8. It infers groups where no strategy is told."""
    r = rounded(drawn(), 32)
    parts = {"weight": torch.from_numpy((r.codes.T - 8).astype(np.int8))}
    parts["weight_scale"] = torch.from_numpy(r.scales.T.copy()).half()
    said = plain("int-quantized", {"num_bits": 4, "strategy": strategy, "group_size": 32}, None)
    check(opened(tmp_path, parts, said), r, INT8)
    check(opened(tmp_path, compressed_tensors(r), packed(strategy=strategy)), r, INT4)


def fp8_parts(scale: Any, **more: torch.Tensor) -> tuple[Tensors, Any]:
    """One layer in fp8, its activations' scale stored, and what it stands for."""
    codes, wanted = float8(drawn(), scale if scale.size == 1 else scale.repeat(128 // scale.shape[1], axis=1))
    parts = {"weight": codes, "weight_scale": torch.from_numpy(scale.copy()), "input_scale": torch.tensor([0.25])}
    return parts | more, wanted


SCALE = np.full((48, 1), 0.01171875, np.float32)


@pytest.mark.parametrize(
    ("scale", "more", "why"),
    [
        (SCALE, {"weight_zero_point": torch.ones(48, 1, dtype=torch.int8)}, "zero points of fp8"),
        (SCALE, {"weight_zero_point": torch.ones(48, 1).to(torch.float8_e4m3fn)}, "zero points of fp8"),
        (SCALE, {"weight_zero_point": torch.zeros(48, 1).to(torch.float8_e4m3fn)}, ""),
        (SCALE, {"input_scale": torch.full((1, 2), 0.25)}, "2 scales of activations"),
        (SCALE.repeat(4, axis=1), {}, "32 of 128 inputs share a scale"),
        (-SCALE, {}, "scales below zero"),
    ],
)
def test_fp8_that_our_form_does_not_hold(tmp_path: Path, scale: Any, more: dict[str, torch.Tensor], why: str) -> None:
    parts, wanted = fp8_parts(scale, **more)
    strategy = {"strategy": "group", "group_size": 32} if scale.shape[1] > 1 else {}
    inputs = activations(strategy="tensor", dynamic=False)
    linear = opened(tmp_path, parts, plain("float-quantized", {"type": "float", **strategy}, inputs))
    assert (linear.form, linear.why) == (None if why else LinearForm("fp8"), why)
    zero = parts["weight_zero_point"].float().numpy() if "weight_zero_point" in parts else 0
    np.testing.assert_array_equal(multiplied(linear), wanted - zero * (scale if scale.shape[1] == 1 else 0))
