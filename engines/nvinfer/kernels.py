"""What an engine is made of, as far as its build says: without a GPU it cannot be opened and asked."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from himap_export.graphs.ports import ElementType, WeightSpec

# TensorRT's words for the numbers of quantised weights.
_NUMBERS: Mapping[ElementType, str] = {"int8": "Int8", "int4": "Int4", "fp8": "FP8", "fp4": "FP4E2M1"}
UNSEEN = "kernels that are not in the log"
_PRODUCT = re.compile("Fc|MulSum")  # in the name of a generated kernel; the latter of one row, where it is small
_CONSTANT = re.compile(r"Dimensions: \[(?P<shape>[\d,]*)\].*?Datatype: (?P<type>\w+)")
_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+),.*?Metadata: (?P<metadata>.*)$", re.MULTILINE)


def layers(network: Any) -> tuple[str, ...]:
    """Returns a parsed network's layers by type, most first: "64x KV_CACHE_UPDATE". An Attention is two of them."""
    found = Counter(network.get_layer(i).type.name for i in range(network.num_layers))
    return tuple(f"{count}x {name}" for name, count in found.most_common())


def kernels(log: str, operators: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the kernels in a build's `Layers:` log, equal ones counted: "32x _gemm_mha_v2 (Attention)", by first use.

    In parentheses the ONNX operators that became this kernel; `operators` gives each node's by name.
    """
    found: Counter[str] = Counter()
    for layer in _LAYER.finditer(log):
        if layer["type"] in ("signal", "wait"):  # order between streams, no work
            continue
        name = _name(layer)
        nodes = re.findall(r"ONNX Layer: ([^\]]+)\]", layer["metadata"])
        # What the parser inlined from a function is named "node | caller (function)".
        sources = sorted({operators.get(node, re.sub(r".* \| .* \((\w+)\)$", r"\1", node)) for node in nodes})
        found[f"{name} ({', '.join(sources)})"] += 1
    return tuple(f"{count}x {kernel}" for kernel, count in found.items())


def multiplied_out(log: str, weights: Iterable[WeightSpec]) -> tuple[str, ...]:
    """Returns the kernels that turn quantised weights into floats for another's product, as the `Layers:` log of a
    build says, or UNSEEN if it names none; empty: each of `weights` goes into a matrix product as it is.

    Of a build for several targets the log has one list, of one of them: nothing is proved of the others.
    """
    held = Counter[str]()
    for spec in weights:
        if spec.constant and spec.dtype in _NUMBERS and len(spec.shape) == 2:
            held[_NUMBERS[spec.dtype]] += prod(spec.shape)
    apart, found = list[str](), Counter[str]()
    for layer in _LAYER.finditer(log):
        read = _constants(layer[0])
        if layer["type"] == "gemm" or _PRODUCT.search(_name(layer)):
            found += read
        elif any(read[kind] for kind in held):
            apart.append(_name(layer))
    if all(found[kind] >= count for kind, count in held.items()):
        return ()
    return tuple(apart) or (UNSEEN,)


def _name(layer: re.Match[str]) -> str:
    """Returns a kernel's name. Library kernels bear the node's, generated and fused ones that of what they do; both end
    in their number."""
    generated = layer["type"] in ("kgen", "runtime_fusion")
    return re.sub(r"^__myl_|_myl\d+_\d+$", "", layer["name"]) if generated else layer["type"]


def _constants(layer: str) -> Counter[str]:
    """Counts the numbers of a kernel's constants by their type."""
    found = Counter[str]()
    for constant in _CONSTANT.finditer(layer.partition("Constants: [")[2].partition("Outputs: [")[0]):
        found[constant["type"]] += prod(int(size) for size in constant["shape"].split(",") if size)
    return found
