"""Checkpoints that come quantised: each layout against plain NumPy, and what is refused."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ready_checkpoints import (
    Floats,
    Rounded,
    Tensors,
    awq_tensors,
    compressed_tensors,
    compressed_tensors_helpers,
    gptq_tensors,
    rounded,
)
from safetensors.torch import save_file

from himap_export.engines.checkpoint_files import SINGLE, stored_tensors
from himap_export.engines.weight_file import as_numbers, as_stored, map_tensors, read_header
from himap_export.exporter.quantize.packing import unpack_int4
from himap_export.exporter.quantize.ready import ready_made
from himap_export.exporter.quantize.ready_linear import ReadyLinear
from himap_export.exporter.quantize.taking import taken, write_multiplied
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import LinearForm
from himap_export.graphs.spec import Dtype

LAYER = "model.layers.0.self_attn.q_proj"
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "desc_act": False,
    "checkpoint_format": "gptq",
}


def packed(**weights: object) -> dict[str, Any]:
    """compressed-tensors' configuration of one group, W4A16 in blocks of 32 if nothing else is said."""
    said = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
    group = {"targets": ["Linear"], "weights": said | weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "quantization_status": "compressed", "kv_cache_scheme": None,
    }  # fmt: skip


def drawn(out: int = 48, wide: int = 128, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((out, wide)).astype(np.float32)


def write(folder: Path, parts: Tensors, layer: str = LAYER, **more: torch.Tensor) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {f"{layer}.{part}": tensor.contiguous() for part, tensor in parts.items()} | more
    save_file(tensors, folder / SINGLE)


def read(folder: Path, said: Mapping[str, Any]) -> ReadyLinear:
    found = ready_made({"quantization_config": dict(said)}, stored_tensors([folder]))
    assert list(found) == [f"{LAYER}.weight"]
    return found[f"{LAYER}.weight"]


def opened(folder: Path, parts: Tensors, said: Mapping[str, Any]) -> ReadyLinear:
    write(folder, parts)
    return read(folder, said)


def held(linear: ReadyLinear) -> Floats:
    """The weight [out,in] that our form stands for."""
    values, scales = linear.values(), linear.block_scales()
    assert linear.form is not None and values.shape == linear.shape[::-1]
    block = linear.form.block or linear.shape[1]
    assert scales.shape == (linear.shape[1] // block, linear.shape[0]) and scales.dtype == np.float32
    if linear.form.kind == "int4":
        assert values.min() >= -8 and values.max() <= 7
    return np.asarray((values.astype(np.float32) * scales.repeat(block, axis=0)).T)


def multiplied(linear: ReadyLinear) -> Floats:
    found = np.concatenate(list(linear.multiplied()))
    assert found.dtype == np.float32 and found.shape == linear.shape and found.flags.c_contiguous
    return found


def check(linear: ReadyLinear, r: Rounded, form: LinearForm | None, why: str = "") -> None:
    """The weight is `r`'s to the last bit, in our `form` and multiplied out."""
    assert (linear.name, linear.shape) == (f"{LAYER}.weight", r.weight.shape)
    assert linear.form == form and (why in linear.why if why else not linear.why), linear.why
    np.testing.assert_array_equal(multiplied(linear), r.weight)
    if form is not None:
        np.testing.assert_array_equal(held(linear), r.weight)


def refused(folder: Path, parts: Tensors, said: Mapping[str, Any], words: str, code: Exit = Exit.USAGE) -> None:
    with pytest.raises(HimapError, match=words) as caught:
        linear = opened(folder, parts, said)
        list(linear.multiplied())
    assert caught.value.code == code and len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


# --- each layout, what it holds, and the form that takes it over ---

INT4, INT8 = LinearForm("int4", 32), LinearForm("int8", 32)
GROUPS = [(32, 32), (64, 64), (128, 128), (-1, 128)]  # a group, and our largest block in it


@pytest.mark.parametrize(("group", "block"), GROUPS)
def test_awq_has_zero_points_and_becomes_8_bits(tmp_path: Path, group: int, block: int) -> None:
    r = rounded(drawn() + 0.3, group, symmetric=False)
    assert len(np.unique(r.zeros)) > 2
    form = LinearForm("int8", 0 if group in (-1, 128) else block)
    check(opened(tmp_path, awq_tensors(r), AWQ | {"group_size": group}), r, form, "zero points")


@pytest.mark.parametrize(("group", "block"), GROUPS)
def test_awq_whose_zero_points_are_all_the_middle(tmp_path: Path, group: int, block: int) -> None:
    r = rounded(drawn(), group)
    check(opened(tmp_path, awq_tensors(r), AWQ | {"group_size": group}), r, LinearForm("int4", block))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("group", "block"), GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(tmp_path: Path, version: int, group: int, block: int, bits: int) -> None:
    r = rounded(drawn(), group, bits)
    said = GPTQ | {"bits": bits, "group_size": group, "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version]}
    form = LinearForm("int8" if bits == 8 else "int4", 0 if bits == 8 and group in (-1, 128) else block)
    check(opened(tmp_path, gptq_tensors(r, bits, version), said), r, form)


def test_gptq_of_old_says_neither_its_format_nor_an_order(tmp_path: Path) -> None:
    r = rounded(drawn(), 32)
    parts = gptq_tensors(r)
    del parts["g_idx"]
    said = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    check(opened(tmp_path, parts, said), r, INT4)


@pytest.mark.parametrize("version", [1, 2])
def test_gptq_with_zero_points(tmp_path: Path, version: int) -> None:
    r = rounded(drawn() + 0.3, 32, symmetric=False)
    said = GPTQ | {"sym": False, "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version]}
    check(opened(tmp_path, gptq_tensors(r, version=version), said), r, INT8, "zero points")
    eight = rounded(drawn() + 0.3, 32, 8, symmetric=False)
    (tmp_path / SINGLE).unlink()
    parts = gptq_tensors(eight, 8, version)
    check(opened(tmp_path, parts, said | {"bits": 8}), eight, None, "zero points of 8 bits")


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_in_order_of_activation(tmp_path: Path, symmetric: bool) -> None:
    r = rounded(drawn(), 32, symmetric=symmetric)
    shuffled = replace(r, groups=np.random.default_rng(1).permutation(r.groups))
    said = GPTQ | {"desc_act": True, "sym": symmetric}
    check(opened(tmp_path, gptq_tensors(shuffled), said), shuffled, None, "scales in order of activation")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group", "block"), GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32])
def test_compressed_tensors(
    tmp_path: Path, symmetric: bool, group: int, block: int, bits: int, scales: torch.dtype
) -> None:
    r = rounded(drawn() + 0.2, group, bits, symmetric, scales)
    strategy = {"strategy": "channel", "group_size": None} if group == -1 else {"group_size": group}
    said = packed(num_bits=bits, symmetric=symmetric, **strategy)
    whole = 0 if group in (-1, 128) else block
    form = LinearForm("int4", block) if bits == 4 and symmetric else LinearForm("int8", whole)
    why = "" if symmetric else "zero points"
    if bits == 8 and not symmetric:
        form = None  # type: ignore[assignment]
    check(opened(tmp_path, compressed_tensors(r, bits, symmetric, scales), said), r, form, why)


@pytest.mark.parametrize(("out", "wide"), [(5, 64), (48, 41), (7, 3), (1, 33)])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_of_odd_sizes(tmp_path: Path, out: int, wide: int, bits: int) -> None:
    """What fills up the last word is nobody's."""
    r = rounded(drawn(out, wide), -1, bits, symmetric=False)
    said = packed(num_bits=bits, symmetric=False, strategy="channel", group_size=None)
    linear = opened(tmp_path, compressed_tensors(r, bits, symmetric=False), said)
    check(linear, r, LinearForm("int8") if bits == 4 else None, "zero points")
    unpacked = compressed_tensors_helpers().unpack_from_int32
    parts = compressed_tensors(r, bits, symmetric=False)
    theirs = unpacked(parts["weight_packed"], bits, torch.Size([out, wide])).numpy().astype(int)
    zero = unpacked(parts["weight_zero_point"], bits, torch.Size([out, 1]), packed_dim=0).numpy().astype(int)
    np.testing.assert_array_equal(r.weight, (theirs - zero) * parts["weight_scale"].float().numpy())


def test_four_bits_share_bytes_by_two_outputs(tmp_path: Path) -> None:
    r = rounded(drawn(5, 64), 32)
    check(opened(tmp_path, compressed_tensors(r), packed()), r, None, "5 outputs in bytes of two")


@pytest.mark.parametrize(
    ("group", "wide", "block"),
    [(96, 192, 32), (64, 96, 32), (256, 512, 128), (-1, 96, 32), (16, 64, 0), (-1, 40, 0), (48, 96, 0)],
)
def test_blocks_of_ours_lie_inside_groups(tmp_path: Path, group: int, wide: int, block: int) -> None:
    """Scales repeat where a group is larger, also where the last one is cut short; smaller groups have no form."""
    r = rounded(drawn(wide=wide), group)
    linear = opened(tmp_path, gptq_tensors(r), GPTQ | {"group_size": group})
    size = wide if group == -1 else group
    check(
        linear,
        r,
        LinearForm("int4", block) if block else None,
        "" if block else f"{size} of {wide} inputs share a scale",
    )


def test_large_weights_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("himap_export.exporter.quantize.ready_linear._PIECE", 333)
    for n, (parts, said) in enumerate([(awq_tensors, AWQ), (gptq_tensors, GPTQ | {"sym": False})]):
        r = rounded(drawn() + 0.1, 32, symmetric=False)
        check(opened(tmp_path / str(n), parts(r), said), r, INT8, "zero points")
    r = rounded(drawn() + 0.1, 32, symmetric=False)
    linear = opened(tmp_path / "c", compressed_tensors(r, symmetric=False), packed(symmetric=False))
    check(linear, r, INT8, "zero points")
    assert len(list(linear.multiplied())) == 24


@pytest.mark.parametrize("start", [0, 16, 19])
def test_outputs_of_a_fused_layer(tmp_path: Path, start: int) -> None:
    r = rounded(drawn() + 0.1, 32, symmetric=False)
    wanted = r.weight[start : start + 14]
    makers: list[tuple[Tensors, Mapping[str, Any]]] = [
        (awq_tensors(r), AWQ), (gptq_tensors(r), GPTQ | {"sym": False}),
        (compressed_tensors(r, symmetric=False), packed(symmetric=False)),
    ]  # fmt: skip
    for n, (parts, said) in enumerate(makers):
        whole = opened(tmp_path / str(n), parts, said)
        part = whole.part("a", start, start + 14)
        assert (part.name, part.shape) == ("a", (14, 128))
        np.testing.assert_array_equal(held(part), wanted)
        np.testing.assert_array_equal(multiplied(part.part("b", 3, 9)), wanted[3:9])
        with pytest.raises(HimapError, match="it has 48 outputs, 40 to 49 are wanted"):
            whole.part("a", 40, 49)


# --- one number an element ---


def activations(**more: object) -> dict[str, Any]:
    said = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    return said | more


def plain(format: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> dict[str, Any]:
    said = packed(**{"num_bits": 8, "strategy": "channel", "group_size": None, **weights}) | {"format": format}
    said["config_groups"]["group_0"]["input_activations"] = inputs
    return said


def float8(weight: Floats, scale: NDArray[Any]) -> tuple[torch.Tensor, Floats]:
    """Numbers as compressed-tensors stores them, and what they stand for."""
    codes = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
    stands = codes.astype(np.float32) * scale
    return torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn), stands


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


# --- as a bundle stores it ---


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_parts_in_the_models_dtype(tmp_path: Path, bits: int, symmetric: bool, dtype: Dtype) -> None:
    """fp16 scales stay as they are but in bf16, which has fewer digits: what that takes is told."""
    r = rounded(drawn() + 0.1, 32, bits, symmetric)
    said = packed(num_bits=bits, symmetric=symmetric)
    found = taken(opened(tmp_path, compressed_tensors(r, bits, symmetric), said), dtype)
    kind = "int4" if bits == 4 and symmetric else "int8"
    values = unpack_int4(found.parts["int4"]) if kind == "int4" else found.parts["int8"]
    scales = as_numbers(found.parts["scale"], dtype).astype(np.float32)
    assert set(found.parts) == {kind, "scale"} and scales.shape == (4, 48)
    held = (values * scales.repeat(32, axis=0)).T
    error = np.sqrt(np.square(held - r.weight, dtype=np.float64).sum() / np.square(r.weight, dtype=np.float64).sum())
    assert found.error == pytest.approx(error, rel=1e-4)
    assert 1e-4 < error < 4e-3 if dtype == "bf16" else error == 0


@pytest.mark.parametrize("factor", [1e-7, 1e6, 1e7])
def test_a_scale_that_the_dtype_has_not(tmp_path: Path, factor: float) -> None:
    """Too small to be told from zero, too large for its numbers, and too large."""
    parts = compressed_tensors(rounded(drawn(), 32, scales=torch.float32), scales=torch.float32)
    parts["weight_scale"][5, 2] *= factor
    linear = opened(tmp_path, parts, packed())
    assert taken(linear, "fp32").error == 0
    with pytest.raises(HimapError, match=rf"a scale of {LAYER}\.weight does not fit fp16 .*another `dtype`") as caught:
        taken(linear, "fp16")
    assert caught.value.code == Exit.USAGE


@pytest.mark.parametrize("allow", [False, True])
def test_multiplied_out_in_the_models_dtype(tmp_path: Path, allow: bool) -> None:
    r = rounded(drawn(), 16)
    said = GPTQ | {"group_size": 16}
    linear = opened(tmp_path, gptq_tensors(r), said)
    write_multiplied([linear, replace(linear, name="b")], tmp_path / "out", "bf16")
    found = map_tensors(read_header(tmp_path / "out").values())
    assert set(found) == {f"{LAYER}.weight", "b"}
    np.testing.assert_array_equal(found["b"], as_stored(r.weight, "bf16"))
    r.scales[3, 7] = 60000
    linear = opened(tmp_path, gptq_tensors(r), said)
    if allow:
        write_multiplied([linear], tmp_path / "out", "fp16", allow_overflow=True)
        found = map_tensors(read_header(tmp_path / "out").values())
        np.testing.assert_array_equal(found[f"{LAYER}.weight"], as_stored(r.weight.clip(-65504, 65504), "fp16"))
    else:
        with pytest.raises(HimapError, match=rf"tensor {LAYER}\.weight does not fit fp16: it holds .*ends at 65504"):
            write_multiplied([linear], tmp_path / "out", "fp16")


# --- checkpoints of several layers ---


def test_a_mixed_checkpoint(tmp_path: Path) -> None:
    """Each layer has its own form, and one that is not quantised is none of these."""
    four, eight = rounded(drawn(), 32), rounded(drawn(16, 64, seed=1), -1, 8)
    tensors = {f"a.{part}": t for part, t in compressed_tensors(four).items()}
    tensors |= {f"b.{part}": t for part, t in compressed_tensors(eight, 8).items()}
    tensors |= {"c.weight": torch.ones(4, 4), "a.bias": torch.ones(48)}
    save_file(tensors, tmp_path / SINGLE)
    said = packed()
    other = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    said["config_groups"]["group_1"] = {"targets": ["re:.*b"], "weights": other}
    found = ready_made({"text_config": {"quantization_config": said}}, stored_tensors([tmp_path]))
    assert {name: linear.form for name, linear in found.items()} == {"a.weight": INT4, "b.weight": LinearForm("int8")}
    np.testing.assert_array_equal(held(found["b.weight"]), eight.weight)
    del said["config_groups"]["group_1"]
    with pytest.raises(HimapError, match=r"b\.weight_scale does not fit: 1 scales for 64 inputs, .* none share one"):
        ready_made({"quantization_config": said}, stored_tensors([tmp_path]))


def test_gptq_with_layers_of_other_bits(tmp_path: Path) -> None:
    r = rounded(drawn(), 64, 8)
    said = GPTQ | {"dynamic": {r"+:.*q_proj": {"bits": 8, "group_size": 64}}}
    check(opened(tmp_path, gptq_tensors(r, 8), said), r, LinearForm("int8", 64))
    refused(tmp_path, gptq_tensors(r, 8), GPTQ, r"it has 8 bits for each of 48 outputs, config\.json says 4")


def test_an_unquantised_checkpoint(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / SINGLE)
    assert ready_made({}, stored_tensors([tmp_path])) == {}
    assert ready_made({"quantization_config": None, "text_config": {}}, stored_tensors([tmp_path])) == {}
    write(tmp_path, awq_tensors(rounded(drawn(), 32)))
    with pytest.raises(HimapError, match=r"is quantised: config\.json has no quantization_config .*q_proj") as caught:
        ready_made({}, stored_tensors([tmp_path]))
    assert caught.value.code == Exit.USAGE


def test_nothing_is_read_but_what_the_form_hangs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer is known before its numbers are read; they are the file's pages."""
    r = rounded(drawn(), 32)
    seen: list[str] = []
    from himap_export.exporter.quantize import grid

    mapped: Callable[..., Any] = grid.mapped
    monkeypatch.setattr(grid, "mapped", lambda tensor: (seen.append(tensor.name), mapped(tensor))[1])
    linear = opened(tmp_path, gptq_tensors(r), GPTQ)
    assert f"{LAYER}.qzeros" in seen and f"{LAYER}.qweight" not in seen
    linear.values()
    assert f"{LAYER}.qweight" in seen


# --- what is refused ---


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
        (packed() | {"quantization_status": "frozen"}, "whose quantization_status is frozen"),
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
        ready_made({"quantization_config": said}, stored_tensors([tmp_path]))
    assert caught.value.code == Exit.USAGE and len(str(caught.value)) < 1500 and "\n" not in str(caught.value)


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
