"""Checkpoints that come quantised otherwise than can be read, or than they say: one line each."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ready_checkpoints import (
    Tensors,
    awq_tensors,
    compressed_tensors,
    gptq_tensors,
    rounded,
)
from ready_layers import (
    AWQ,
    GPTQ,
    INT4,
    INT8,
    LAYER,
    activations,
    check,
    drawn,
    float8,
    opened,
    packed,
    plain,
    read,
    ready_made,
    refused,
    write,
)

from himap_export.graphs.errors import Exit, HimapError


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "quantised by bitsandbytes: awq, gptq and compressed-tensors can be read",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quantised by fp8"),
        ({"quant_method": "x" * 2000}, "Expected str of length <= 1000"),
        ({"bits": 4}, "missing required field quant_method"),
        ([], "Expected object, got array"),
        (7, "Expected object, got int"),
        (AWQ | {"version": "gemv"}, "whose version is gemv: gemm can be read"),
        (AWQ | {"version": "marlin"}, "whose version is marlin"),
        (AWQ | {"bits": 3}, "whose bits is 3: 4 can be read"),
        (AWQ | {"bits": "4"}, "Expected int, got str"),
        (AWQ | {"group_size": -2}, "Expected int >= -1"),
        (AWQ | {"group_size": 1e30}, "Expected int"),
        (GPTQ | {"bits": 2}, "whose bits is 2: 4, 8 can be read"),
        (GPTQ | {"checkpoint_format": "marlin"}, "whose checkpoint_format is marlin: gptq, gptq_v2"),
        (GPTQ | {"is_marlin_format": True}, "whose is_marlin_format is True"),
        ({"quant_method": "gptq", "group_size": 32}, "missing required field bits"),
        (packed(num_bits=3), "whose num_bits is 3: 4, 8"),
        (packed(strategy="block", block_structure=[128, 128]), "whose strategy is block"),
        (packed(strategy="tensor_group"), "whose strategy is tensor_group"),
        (packed(type="float", num_bits=4), "whose num_bits is 4: 8 can be read"),
        (packed() | {"format": "nvfp4-pack-quantized"}, "whose format is nvfp4-pack-quantized"),
        (packed() | {"format": "marlin-24"}, "whose format is marlin-24"),
        (packed() | {"quantization_status": "calibration"}, "status is calibration: compressed, frozen can be read"),
        (packed() | {"quantization_status": "decompressed"}, "whose quantization_status is decompressed"),
        (packed() | {"kv_cache_scheme": {"num_bits": 8}}, "whose kv_cache_scheme is one: none can be read"),
        (packed() | {"transform_config": {"config_groups": {"a": {}}}}, "whose transform_config is one"),
        (packed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format is sparse-24"),
        (packed() | {"config_groups": {}}, "length >= 1"),
        (packed() | {"config_groups": {"W4A16": ["Linear"]}}, "Expected object, got array"),
    ],
)
def test_a_configuration_that_is_not_read(tmp_path: Path, said: Any, words: str) -> None:
    write(tmp_path, awq_tensors(rounded(drawn(), 32)))
    with pytest.raises(HimapError, match=words) as caught:
        ready_made(tmp_path, {"quantization_config": said})
    assert caught.value.code == Exit.USAGE and len(str(caught.value)) < 1500 and "\n" not in str(caught.value)


def test_a_frozen_checkpoint_is_read_if_it_is_compressed(tmp_path: Path) -> None:
    """So many published ones say. What was calibrated and never compressed holds floats."""
    r = rounded(drawn(), 32)
    said = packed() | {"quantization_status": "frozen"}
    check(opened(tmp_path, compressed_tensors(r), said), r, INT4)
    dense = {"weight": torch.from_numpy(drawn()), "weight_scale": torch.ones(48, 4)}
    refused(tmp_path, dense, said, rf"{LAYER}\.weight does not fit: it is stored as fp32, not as I8 or F8_E4M3")


Spoil = Callable[[Tensors], Any]


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return lambda parts: parts.update({name: change(parts[name]).contiguous()})


def set_first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.reshape(-1)[0] = value
        return tensor

    return change


ALL: Mapping[str, tuple[Callable[[], Tensors], Mapping[str, Any]]] = {
    "awq": (lambda: awq_tensors(rounded(drawn(), 32)), AWQ),
    "gptq": (lambda: gptq_tensors(rounded(drawn(), 32)), GPTQ),
    "compressed": (lambda: compressed_tensors(rounded(drawn(), 32)), packed()),
}
NAMES = {
    "awq": ("qweight", "qzeros", "scales"), "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "compressed": ("weight_packed", "weight_scale", "weight_shape"),
}  # fmt: skip
EACH = [(layout, name) for layout, names in NAMES.items() for name in names]


@pytest.mark.parametrize(("layout", "name"), EACH)
def test_a_tensor_that_is_not_there(tmp_path: Path, layout: str, name: str) -> None:
    parts, said = ALL[layout][0](), ALL[layout][1]
    del parts[name]
    if name == "g_idx":  # then all is in order
        assert opened(tmp_path, parts, said).form == INT4
    elif name == "weight_packed":  # one number an element then
        refused(tmp_path, parts, said, rf"holds no tensor {LAYER}\.weight\b", Exit.MISSING)
    else:
        refused(tmp_path, parts, said, rf"holds no tensor {LAYER}\.{name}", Exit.MISSING)


WRONG: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cut": lambda t: t[:-1],
    "cut across": lambda t: t[:, :-1] if t.ndim == 2 else t[:1],
    "doubled": lambda t: torch.cat([t, t]),
    "flat": lambda t: t.reshape(-1)[:-1] if t.ndim == 2 else t[None],
    "deep": lambda t: t[None, None],
    "empty": lambda t: t[:0],
    "one": lambda t: t.reshape(-1)[0],
    "bytes": lambda t: t.view(torch.uint8),
    "int64s": lambda t: t.to(torch.int64) if t.dtype != torch.int64 else t.to(torch.int16),
    "float64s": lambda t: t.to(torch.float64),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize(("layout", "name"), EACH)
def test_a_tensor_of_another_shape_or_type(tmp_path: Path, layout: str, name: str, kind: str) -> None:
    parts, said = ALL[layout][0](), ALL[layout][1]
    before = parts[name]
    changed(name, WRONG[kind])(parts)
    if (name, kind) == ("g_idx", "int64s"):  # whole numbers all the same
        assert opened(tmp_path, parts, said).form == INT4
    else:
        assert parts[name].shape != before.shape or parts[name].dtype != before.dtype
        refused(tmp_path, parts, said, rf"tensor {LAYER}\.\w+ does not fit")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", ALL)
def test_a_scale_that_is_not_finite(tmp_path: Path, layout: str, value: float) -> None:
    parts, said = ALL[layout][0](), ALL[layout][1]
    name = "weight_scale" if layout == "compressed" else "scales"
    changed(name, set_first(value))(parts)
    refused(tmp_path, parts, said, rf"tensor {LAYER}\.{name} is not finite: 1 value", Exit.FAILURE)


@pytest.mark.parametrize("layout", ALL)
def test_a_scale_of_zero(tmp_path: Path, layout: str) -> None:
    """It is one where the weight is zero too: a block of nothing."""
    said = ALL[layout][1]
    r = rounded(drawn(), 32)
    r.scales[0, 5] = 0
    make = {"awq": awq_tensors, "gptq": gptq_tensors, "compressed": compressed_tensors}[layout]
    refused(tmp_path, make(r), said, "is no scale of the weight: some are zero where the weight is not", Exit.FAILURE)
    with pytest.raises(HimapError, match="is no scale"):
        read(tmp_path, said).values()
    r.codes[r.groups == 0, 5] = 8
    check(opened(tmp_path, make(r), said), r, INT4)


def test_a_scale_that_is_finite_alone(tmp_path: Path) -> None:
    parts = compressed_tensors(rounded(drawn(), 32, scales=torch.float32), scales=torch.float32)
    changed("weight_scale", set_first(3e38))(parts)
    refused(tmp_path, parts, packed(), "is no scale of the weight: .* too large even for fp32", Exit.FAILURE)


def test_float_numbers_that_are_none(tmp_path: Path) -> None:
    codes, _ = float8(drawn(), np.float32([0.01]))
    parts = {"weight": codes.view(torch.uint8).clone(), "weight_scale": torch.tensor([0.01])}
    parts["weight"][3, 4] = 0x7F
    parts["weight"] = parts["weight"].view(torch.float8_e4m3fn)
    said = plain("float-quantized", {"type": "float", "strategy": "tensor"}, activations())
    refused(tmp_path, parts, said, rf"tensor {LAYER}\.weight is not finite", Exit.FAILURE)


def test_a_format_of_gptq_that_is_not_the_tensors(tmp_path: Path) -> None:
    """Zero points one too large or too small would be a model that babbles."""
    r = rounded(drawn(), 32)
    said = GPTQ | {"checkpoint_format": "gptq_v2"}
    refused(tmp_path, gptq_tensors(r), said, "zero point is 7, that of symmetric weights is 8 .*format gptq?")
    refused(tmp_path, gptq_tensors(r, version=2), GPTQ, "zero point is 9, .* is 8 .*format gptq_v2?")


def test_a_zero_point_of_two_meanings(tmp_path: Path) -> None:
    r = rounded(drawn(), 32, symmetric=False)
    r.zeros[1, 7] = 16
    said = GPTQ | {"sym": False}
    refused(tmp_path, gptq_tensors(r), said, "no certain meaning: a zero point is stored as 15: some readers")
    r.zeros[1, 7] = 0
    check(opened(tmp_path, gptq_tensors(r, version=2), said | {"checkpoint_format": "gptq_v2"}), r, INT8, "zero points")


@pytest.mark.parametrize("value", [-1, 4, 2**31 - 1])
def test_an_order_that_names_no_scale(tmp_path: Path, value: int) -> None:
    parts = gptq_tensors(rounded(drawn(), 32))
    changed("g_idx", set_first(value))(parts)
    refused(tmp_path, parts, GPTQ, r"g_idx does not fit: it names scales .* of 4")


@pytest.mark.parametrize("layout", ALL)
@pytest.mark.parametrize("size", [16, 64, -1, 2**24])
def test_blocks_that_config_json_does_not_know(tmp_path: Path, layout: str, size: int) -> None:
    said = packed(group_size=size) if layout == "compressed" else ALL[layout][1] | {"group_size": size}
    refused(tmp_path, ALL[layout][0](), said, r"4 scales for 128 inputs, config\.json says that .* share one")


@pytest.mark.parametrize("shape", [(48, 127), (48, 0), (-48, 128), (2**40, 2**40), (48, -128), (47, 128)])
def test_a_shape_that_is_not_the_tensors(tmp_path: Path, shape: tuple[int, int]) -> None:
    parts = compressed_tensors(rounded(drawn(), 32)) | {"weight_shape": torch.tensor(shape)}
    if shape == (48, 127):  # fits the words, not the scales' blocks: nothing of it is divided by 32
        linear = opened(tmp_path, parts, packed())
        assert linear.shape == shape and linear.form is None
    else:
        refused(tmp_path, parts, packed(), "weight_shape says")


def test_a_weight_that_is_there_twice(tmp_path: Path) -> None:
    write(tmp_path, awq_tensors(rounded(drawn(), 32)), **{f"{LAYER}.weight": torch.ones(48, 128)})
    with pytest.raises(HimapError, match=r"q_proj\.weight does not fit: .* holds it quantised, too") as caught:
        read(tmp_path, AWQ)
    assert caught.value.code == Exit.USAGE
