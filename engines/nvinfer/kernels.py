"""What an engine is made of, as far as its build says: without a GPU it cannot be opened and asked."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

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
        # Library kernels bear the node's name, generated and fused ones that of what they do; both end in their number.
        generated = layer["type"] in ("kgen", "runtime_fusion")
        name = re.sub(r"^__myl_|_myl\d+_\d+$", "", layer["name"]) if generated else layer["type"]
        nodes = re.findall(r"ONNX Layer: ([^\]]+)\]", layer["metadata"])
        # What the parser inlined from a function is named "node | caller (function)".
        sources = sorted({operators.get(node, re.sub(r".* \| .* \((\w+)\)$", r"\1", node)) for node in nodes})
        found[f"{name} ({', '.join(sources)})"] += 1
    return tuple(f"{count}x {kernel}" for kernel, count in found.items())
