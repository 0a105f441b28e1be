"""Single linear layers as quantisers store them, what config.json says of them, and what is read."""

from collections.abc import Mapping
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
)
from safetensors.torch import save_file

from himap_export.engines.checkpoint_files import SINGLE, stored_tensors
from himap_export.exporter.quantize.declared import declared
from himap_export.exporter.quantize.ready import ready_linears
from himap_export.exporter.quantize.ready_linear import ReadyLinear
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import LinearForm

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


def ready_made(folder: Path, config: Mapping[str, Any]) -> dict[str, ReadyLinear]:
    """The quantised layers of the checkpoint in `folder`, as its `config` says."""
    return ready_linears(declared(config, "config.json"), stored_tensors([folder]))


def read(folder: Path, said: Mapping[str, Any]) -> ReadyLinear:
    found = ready_made(folder, {"quantization_config": dict(said)})
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


INT4, INT8 = LinearForm("int4", 32), LinearForm("int8", 32)


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
