"""Checkpoints that come quantised: each layout against plain NumPy, in our form and multiplied out."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ready_checkpoints import (
    Tensors,
    awq_tensors,
    compressed_tensors,
    compressed_tensors_helpers,
    gptq_tensors,
    rounded,
)
from ready_layers import (
    AWQ,
    GPTQ,
    INT4,
    INT8,
    LAYER,
    check,
    drawn,
    held,
    multiplied,
    opened,
    packed,
    ready_made,
    refused,
    write,
)
from safetensors.torch import save_file

from himap_export.engines.checkpoint_files import SINGLE
from himap_export.engines.weight_file import as_numbers, as_stored, map_tensors, read_header
from himap_export.exporter.quantize.packing import unpack_int4
from himap_export.exporter.quantize.taking import taken, write_multiplied
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import LinearForm
from himap_export.graphs.spec import Dtype

# --- each layout, what it holds, and the form that takes it over ---

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


# --- as a bundle stores it ---


def test_whole_outputs_with_scales_below_zero(tmp_path: Path) -> None:
    """TensorRT-RTX refuses to read them; of blocks it does not."""
    r = rounded(drawn(), -1, 8)
    r.scales[0, 5] *= -1
    said = packed(num_bits=8, strategy="channel", group_size=None)
    check(opened(tmp_path, compressed_tensors(r, 8), said), r, None, "scales below zero")
    r = rounded(drawn(), 32)
    r.scales[1, 5] *= -1
    check(opened(tmp_path, gptq_tensors(r), GPTQ), r, INT4)


@pytest.mark.parametrize(("bits", "form"), [(4, INT4), (8, LinearForm("int8"))])
def test_a_scale_of_zero_becomes_one(tmp_path: Path, bits: int, form: LinearForm) -> None:
    """Its numbers are zeros; TensorRT-RTX wants it above zero."""
    r = rounded(drawn(), form.block or -1, bits)
    r.scales[0, 5], r.codes[r.groups == 0, 5] = 0, 2 ** (bits - 1)
    linear = opened(tmp_path, gptq_tensors(r, bits), GPTQ | {"bits": bits, "group_size": form.block or -1})
    check(linear, r, form)
    found = taken(linear, "fp16")
    scales = np.atleast_2d(found.parts["scale"]).astype(np.float32)
    assert scales[0, 5] == 1 and (scales > 0).all() and found.error == 0
    values = unpack_int4(found.parts["int4"]) if bits == 4 else found.parts["int8"]
    np.testing.assert_array_equal((values * scales.repeat(len(values) // len(scales), axis=0)).T, r.weight)


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
    found = ready_made(tmp_path, {"text_config": {"quantization_config": said}})
    assert {name: linear.form for name, linear in found.items()} == {"a.weight": INT4, "b.weight": LinearForm("int8")}
    np.testing.assert_array_equal(held(found["b.weight"]), eight.weight)
    del said["config_groups"]["group_1"]
    with pytest.raises(HimapError, match=r"b\.weight_scale does not fit: 1 scales for 64 inputs, .* none share one"):
        ready_made(tmp_path, {"quantization_config": said})


def test_gptq_with_layers_of_other_bits(tmp_path: Path) -> None:
    r = rounded(drawn(), 64, 8)
    said = GPTQ | {"dynamic": {r"+:.*q_proj": {"bits": 8, "group_size": 64}}}
    check(opened(tmp_path, gptq_tensors(r, 8), said), r, LinearForm("int8", 64))
    refused(tmp_path, gptq_tensors(r, 8), GPTQ, r"it has 8 bits for each of 48 outputs, config\.json says 4")


def test_an_unquantised_checkpoint(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / SINGLE)
    assert ready_made(tmp_path, {}) == {}
    assert ready_made(tmp_path, {"quantization_config": None, "text_config": {}}) == {}
    write(tmp_path, awq_tensors(rounded(drawn(), 32)))
    with pytest.raises(HimapError, match=r"is quantised: config\.json has no quantization_config .*q_proj") as caught:
        ready_made(tmp_path, {})
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
