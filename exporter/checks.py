"""What families require of a configuration; HimapError (usage) for anything else."""

from collections.abc import Mapping
from typing import Any

from himap_export.graphs.errors import Exit, HimapError

# Those of transformers that published towers and projectors use, or used.
_ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")


def require(holds: bool, otherwise: str) -> None:
    """Raises HimapError (usage) that says what is the case `otherwise`, unless it `holds`."""
    if not holds:
        raise HimapError("unsupported configuration", otherwise, code=Exit.USAGE)


def require_supported(what: str, found: object, *supported: object) -> None:
    """Raises HimapError (usage) unless `found` is one of `supported`."""
    if found not in supported:
        raise HimapError(f"unsupported {what} {found}", f"supported: {', '.join(map(str, supported))}", code=Exit.USAGE)


def require_model_type(what: str, part: Mapping[str, Any], *supported: str) -> None:
    """Raises HimapError (usage) unless `part` of a configuration is of one of `supported` types, the first if it says
    none: transformers would make whatever class it names."""
    require_supported(what, part.get("model_type", supported[0]), *supported)


def require_even_heads(head_dim: int) -> None:
    """Raises HimapError (usage) for heads that rotary positions cannot turn."""
    require(head_dim % 2 == 0, f"heads of {head_dim} cannot be rotated by halves")


def require_activation(part: str, found: str) -> None:
    """Raises HimapError (usage) unless a `part` of the model has an activation that transformers has."""
    require_supported(f"activation of the {part}", found, *_ACTIVATIONS)


def require_tower(width: int, heads: int, activation: str, multiple: int = 1) -> None:
    """Raises HimapError (usage) unless a vision tower's `width` falls into `heads`, a `multiple` of numbers each, and
    its `activation` is one that transformers has."""
    even = width % (heads * multiple) == 0
    require(even, f"a vision tower of {width} channels has no {heads} equal heads of a multiple of {multiple}")
    require_activation("vision tower", activation)
