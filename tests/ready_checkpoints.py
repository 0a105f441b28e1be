"""Checkpoints as quantisers leave them, made of unquantised ones: AWQ GEMM, GPTQ and compressed-tensors.

    made = write_awq(source, out)              # `source`: a folder as `make_llava` writes it
    write_multiplied(source, plain, made)      # the same model, its quantised weights multiplied out

Packing is restated from its authors' definitions, number by number; compressed-tensors' is its own code.
"""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ, awq/modules/linear/gemm.py: `order_map`
BLOCK = 32
LINEAR = re.compile(r"(\.layers\.\d+\.(self_attn|mlp)\.\w+_proj|^transformer\.h\.\d+\.(attn|mlp)\.\w+)\.weight$")


@dataclass(frozen=True)
class Rounded:
    """A weight [out,in] as (codes [in,out] - zeros [groups,out]) * scales [groups,out]; `groups` [in] says which."""

    codes: Integers
    zeros: Integers
    scales: Floats
    groups: Integers

    @property
    def weight(self) -> Floats:
        """[out,in], exact in fp32 for scales of 16 bits."""
        found = (self.codes - self.zeros[self.groups]) * self.scales[self.groups].astype(np.float64)
        return np.asarray(found.T, np.float32)


def rounded(
    weight: Floats, group: int, bits: int = 4, symmetric: bool = True, scales: torch.dtype = torch.float16
) -> Rounded:
    """Rounds to nearest; blocks of `group` inputs share a scale, -1: all do."""
    wide, middle = weight.shape[1], 2 ** (bits - 1)
    groups = np.arange(wide) // (wide if group == -1 else group)
    blocks = [weight[:, groups == g] for g in range(groups[-1] + 1)]
    low, high = (np.stack([f(b, 1) for b in blocks]).astype(np.float64) for f in (np.min, np.max))
    if symmetric:
        step = np.maximum(-low, high) / (middle - 1)
    else:
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        step = (high - low) / (2 * middle - 1)
    held = torch.from_numpy(np.maximum(step, 1e-6)).to(scales).float().numpy()
    zeros = np.full(low.shape, middle) if symmetric else np.rint(-low / held).clip(1, 2 * middle - 1)
    codes = (np.rint(weight.T / held[groups]) + zeros[groups]).clip(0, 2 * middle - 1)
    return Rounded(codes.astype(np.int64), zeros.astype(np.int64), held, groups)


class _Weight(Protocol):
    @property
    def weight(self) -> Floats: ...


R = TypeVar("R", bound=_Weight)

# --- the layouts ---


def awq_words(numbers: Integers) -> torch.Tensor:
    """[n,out] of 4 bits to int32 [n,out/8]."""
    words = np.zeros((numbers.shape[0], numbers.shape[1] // 8), np.uint32)
    for column in range(words.shape[1]):
        for i in range(8):
            words[:, column] |= numbers[:, column * 8 + AWQ_ORDER[i]].astype(np.uint32) << np.uint32(4 * i)
    return torch.from_numpy(words.view(np.int32))


def gptq_words(numbers: Integers, bits: int) -> torch.Tensor:
    """[n,out] to int32 [n*bits/32,out]: the numbers of a word stand below each other."""
    share = 32 // bits
    words = np.zeros((numbers.shape[0] // share, numbers.shape[1]), np.uint32)
    for row in range(numbers.shape[0]):
        words[row // share] |= numbers[row].astype(np.uint32) << np.uint32(bits * (row % share))
    return torch.from_numpy(words.view(np.int32))


def compressed_tensors_helpers() -> Any:
    """The library's module of packing functions, without the rest of the library, which takes seconds to import."""
    library = importlib.util.find_spec("compressed_tensors")
    assert library is not None and library.submodule_search_locations
    file = Path(library.submodule_search_locations[0]) / "compressors" / "pack_quantized" / "helpers.py"
    spec = importlib.util.spec_from_file_location("compressed_tensors_helpers", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def awq_tensors(r: Rounded, scales: torch.dtype = torch.float16) -> Tensors:
    return {
        "qweight": awq_words(r.codes),
        "qzeros": awq_words(r.zeros),
        "scales": torch.from_numpy(r.scales.copy()).to(scales),
    }


def gptq_tensors(r: Rounded, bits: int = 4, version: int = 1, scales: torch.dtype = torch.float16) -> Tensors:
    stored = r.zeros - 1 if version == 1 else r.zeros
    return {
        "qweight": gptq_words(r.codes, bits),
        "qzeros": gptq_words(stored.T, bits).T.contiguous(),
        "scales": torch.from_numpy(r.scales.copy()).to(scales),
        "g_idx": torch.from_numpy(r.groups.astype(np.int32)),
    }


def compressed_tensors(
    r: Rounded, bits: int = 4, symmetric: bool = True, scales: torch.dtype = torch.float16
) -> Tensors:
    pack, middle = compressed_tensors_helpers().pack_to_int32, 2 ** (bits - 1)
    signed = torch.from_numpy((r.codes - middle).T.astype(np.int8).copy())
    found = {
        "weight_packed": pack(signed, bits),
        "weight_scale": torch.from_numpy(r.scales.T.copy()).to(scales),
        "weight_shape": torch.tensor(signed.shape),
    }
    if not symmetric:
        zeros = torch.from_numpy((r.zeros - middle).T.astype(np.int8).copy())
        found["weight_zero_point"] = pack(zeros, bits, packed_dim=0).contiguous()
    return found


# --- whole checkpoints ---


def write_awq(source: Path, out: Path, symmetric: bool = False, group: int = BLOCK) -> dict[str, Floats]:
    """Writes the checkpoint `source` with its decoder's linear layers in 4 bits, as AutoAWQ does; returns what each of
    their weights then is, by name. Published ones are not `symmetric`."""
    said = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": not symmetric, "version": "gemm"}
    return _write(
        source, out, said | {"modules_to_not_convert": ["vision_tower"]},
        lambda weight, _: rounded(weight, group, symmetric=symmetric), lambda r, _: awq_tensors(r),
    )  # fmt: skip


def write_gptq(
    source: Path,
    out: Path,
    version: int = 1,
    bits: int = 4,
    symmetric: bool = True,
    group: int = BLOCK,
    activation_order: bool = False,
) -> dict[str, Floats]:
    """As `write_awq`, as GPTQModel does it, in its first or second format; with `activation_order` the inputs that
    share a scale lie anywhere."""
    said = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": activation_order,
        "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version], "lm_head": False, "pack_dtype": "int32",
    }  # fmt: skip

    def shuffled(weight: Floats) -> Rounded:
        order = np.random.default_rng(0).permutation(weight.shape[1])
        found, back = rounded(weight[:, order], group, bits, symmetric), np.argsort(order)
        return replace(found, codes=found.codes[back], groups=found.groups[back])

    return _write(
        source, out, said,
        lambda weight, _: shuffled(weight) if activation_order else rounded(weight, group, bits, symmetric),
        lambda r, _: gptq_tensors(r, bits, version),
    )  # fmt: skip


def write_compressed(
    source: Path, out: Path, bits: int = 4, symmetric: bool = True, group: int = BLOCK
) -> dict[str, Floats]:
    """As `write_awq`, as llm-compressor does it: W4A16 or W8A16, scales in the weights' dtype. `group` -1: one scale
    for each output."""
    said = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*vision_tower.*"], "kv_cache_scheme": None,
        "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": None, "output_activations": None,
            "weights": {
                "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, "actorder": None,
                "strategy": "channel" if group == -1 else "group", "group_size": None if group == -1 else group,
            },
        }},
    }  # fmt: skip
    return _write(
        source, out, said,
        lambda weight, dtype: rounded(weight, group, bits, symmetric, dtype),
        lambda r, dtype: compressed_tensors(r, bits, symmetric, dtype),
    )  # fmt: skip


def write_float8(source: Path, out: Path, static: bool = False) -> dict[str, Floats]:
    """As `write_awq`, as llm-compressor does it: fp8, one scale for each output and none for activations; if `static`,
    one for all outputs and one for the activations."""
    activations = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": not static}
    activations["strategy"] = "tensor" if static else "token"
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor" if static else "channel"}
    said = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "kv_cache_scheme": None,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
    }  # fmt: skip

    def quantise(weight: Floats, dtype: torch.dtype) -> Float8:
        found = torch.from_numpy(weight)
        scale = (found.abs().max().reshape(1) if static else found.abs().amax(1, keepdim=True)) / 448
        return Float8((found / scale.to(dtype)).to(torch.float8_e4m3fn), scale.to(dtype))

    def pack(r: Float8, dtype: torch.dtype) -> Tensors:
        found = {"weight": r.codes, "weight_scale": r.scale}
        return found | ({"input_scale": torch.tensor([0.03125], dtype=dtype)} if static else {})

    return _write(source, out, said, quantise, pack)


@dataclass(frozen=True)
class Float8:
    """A weight [out,in] as codes * scale, [out,1] or [1]."""

    codes: torch.Tensor
    scale: torch.Tensor

    @property
    def weight(self) -> Floats:
        return np.asarray((self.codes.float() * self.scale.float()).numpy())


def write_multiplied(source: Path, out: Path, weights: Mapping[str, Floats]) -> None:
    """Writes the checkpoint `source` with `weights` in place of its own, in its own dtype."""
    _copy_rest(source, out)
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = stored(source)
    save_file(
        {n: torch.from_numpy(weights[n]).to(t.dtype).contiguous() if n in weights else t for n, t in tensors.items()},
        out / "model.safetensors",
    )


def stored(folder: Path) -> Tensors:
    """Returns all tensors of a checkpoint."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def _write(
    source: Path,
    out: Path,
    said: Mapping[str, Any],
    quantise: Callable[[Floats, torch.dtype], R],
    pack: Callable[[R, torch.dtype], Tensors],
) -> dict[str, Floats]:
    _copy_rest(source, out)
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    made, tensors = dict[str, Floats](), Tensors()
    for name, tensor in stored(source).items():
        if not LINEAR.search(name) or "vision" in name:
            tensors[name] = tensor
            continue
        found = quantise(tensor.float().numpy(), tensor.dtype)
        made[name] = found.weight
        tensors |= {f"{name.removesuffix('weight')}{part}": t for part, t in pack(found, tensor.dtype).items()}
    assert made, f"{source} has no linear layers of a decoder"
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return made


def _copy_rest(source: Path, out: Path) -> None:
    """Copies what is no weight and no config.json."""
    out.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(file, out / file.name)
