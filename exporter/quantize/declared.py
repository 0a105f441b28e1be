"""What config.json says of a checkpoint that somebody else quantised: typed, bounded, refused if it is not read here.

How many bits a linear layer has, and how many inputs share a scale, its tensors say themselves; a configuration is what
they are held against. The patterns in it, of layers that are quantised or not, are regular expressions and never run.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeAlias

from msgspec import Meta, Struct

from himap_export.engines.documents import typed
from himap_export.exporter.config import Name
from himap_export.graphs.errors import Exit, HimapError

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
PLACES = ("quantization_config", "compression_config")  # the second is of 2024

Bits = Annotated[int, Meta(ge=1, le=64)]
GroupSize = Annotated[int, Meta(ge=-1, le=2**24)]  # inputs that share a scale; -1: all
Options: TypeAlias = dict[str, Any]  # only whether there are any is asked


class Awq(Struct, frozen=True, kw_only=True):
    """AutoAWQ's: `version` is the order in which numbers are packed."""

    method: ClassVar[str] = "awq"
    bits: Bits
    group_size: GroupSize
    version: Name = "gemm"


class Gptq(Struct, frozen=True, kw_only=True):
    """AutoGPTQ's and GPTQModel's. `checkpoint_format`: "gptq" stores zero points less one, "gptq_v2" as they are.
    `dynamic`: layers of other bits or blocks than these."""

    method: ClassVar[str] = "gptq"
    bits: Bits
    group_size: GroupSize
    sym: bool = True
    checkpoint_format: Name | None = None
    is_marlin_format: bool | None = None
    dynamic: Options | None = None


class Rounding(Struct, frozen=True, kw_only=True):
    """How compressed-tensors rounds weights or activations."""

    num_bits: Bits = 8
    type: Name = "int"
    symmetric: bool = True
    strategy: Name | None = None
    group_size: GroupSize | None = None
    dynamic: bool | Name = False

    @property
    def inputs(self) -> int:
        """How many inputs share a scale, -1: all. As compressed-tensors infers it where no strategy is told."""
        return self.group_size or -1 if self.strategy in (None, "group") else -1


class Scheme(Struct, frozen=True, kw_only=True):
    """One of compressed-tensors' groups of layers."""

    weights: Rounding | None = None
    input_activations: Rounding | None = None
    format: Name | None = None


class CompressedTensors(Struct, frozen=True, kw_only=True):
    """compressed-tensors', of llm-compressor."""

    method: ClassVar[str] = "compressed-tensors"
    config_groups: Annotated[dict[str, Scheme], Meta(min_length=1, max_length=1024)]
    format: Name
    quantization_status: Name = "compressed"
    kv_cache_scheme: Options | None = None
    sparsity_config: Options | None = None
    transform_config: Options | None = None


class _Method(Struct, frozen=True):
    quant_method: Name


Declared: TypeAlias = Awq | Gptq | CompressedTensors


def declared(config: Mapping[str, Any], where: str) -> Declared | None:
    """Returns what `config`, found at `where`, says of its checkpoint's quantisation; None if it is not quantised.

    HimapError (usage) for a method, a format or an option of it that is not read.
    """
    text = config.get("text_config")
    levels = (config, text if isinstance(text, Mapping) else {})
    found = next((level[place] for level in levels for place in PLACES if level.get(place) is not None), None)
    if found is None:
        return None
    where = f"{where}: quantization_config"
    method = typed(found, _Method, where).quant_method
    if method == Awq.method:
        return _checked_awq(typed(found, Awq, where))
    if method == Gptq.method:
        return _checked_gptq(typed(found, Gptq, where))
    if method == CompressedTensors.method:
        return _checked_compressed(typed(found, CompressedTensors, where))
    details = f"{Awq.method}, {Gptq.method} and {CompressedTensors.method} can be read"
    hint = "export the checkpoint that it was made from"
    raise HimapError(f"cannot read weights quantised by {method[:80]}", details, hint, Exit.USAGE)


def _checked_awq(found: Awq) -> Awq:
    _require(found.method, "version", found.version.lower(), "gemm")
    _require(found.method, "bits", found.bits, 4)
    return found


def _checked_gptq(found: Gptq) -> Gptq:
    _require(found.method, "bits", found.bits, 4, 8)
    _require(found.method, "checkpoint_format", found.checkpoint_format or "gptq", "gptq", "gptq_v2")
    _require(found.method, "is_marlin_format", bool(found.is_marlin_format), False)
    return found


def _checked_compressed(found: CompressedTensors) -> CompressedTensors:
    method = found.method
    # Many that are compressed were saved as "frozen". One that is not holds floats, and is refused for these.
    _require(method, "quantization_status", found.quantization_status, "compressed", "frozen")
    for name in ("kv_cache_scheme", "transform_config"):
        _require(method, name, "one" if getattr(found, name) else "none", "none")
    _require(method, "sparsity_config.format", (found.sparsity_config or {}).get("format", "dense"), "dense")
    for scheme in found.config_groups.values():
        _require(method, "format", scheme.format or found.format, *_FORMATS)
        if scheme.weights is not None:
            _require(method, "strategy", scheme.weights.strategy or "tensor", "tensor", "channel", "group")
            _require(method, "type", scheme.weights.type, "int", "float")
            _require(method, "num_bits", scheme.weights.num_bits, *((4, 8) if scheme.weights.type == "int" else (8,)))
    return found


def _require(method: str, name: str, found: object, *readable: object) -> None:
    if found not in readable:
        details = f"{', '.join(map(str, readable))} can be read"
        raise HimapError(f"cannot read {method} weights whose {name} is {str(found)[:80]}", details, code=Exit.USAGE)
