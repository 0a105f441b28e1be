"""What an export must know of a family of models: one row of functions over its config.json.

Adding a family is writing such a row; docs/add-a-model.md goes through it.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from himap_export.engines.image import ImagePreprocessing
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]
# Those of transformers that published towers and projectors use, or used.
ACTIVATIONS = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")
T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """What the user asked the image to be: `size` (height, width) in pixels, `tiles` in number; None: the model's."""

    size: tuple[int, int] | None = None
    tiles: int | None = None


@dataclass(frozen=True)
class VisionSpec:
    """What the vision graph takes and gives, all of it static.

    Pixels [B*tiles,channels,height,width] to features [B,tokens,D]; `size` is (height, width) of one tile. `tokens` are
    V0, of all tiles; `grid` is (rows, columns) of those that stand for one tile, in reading order, behind
    `tokens` - tiles * rows * columns that stand for no place (a class token). `deepstack` counts further outputs
    [B,tokens,D], added to the image tokens behind the first decoder layers.
    """

    size: tuple[int, int]
    channels: int
    tokens: int
    grid: tuple[int, int]
    tiles: int = 1
    deepstack: int = 0


@dataclass(frozen=True)
class PromptRules:
    """How prompts of a family look where its checkpoint does not say, and the ids that say where images are.

    `image_token`: the id of an image token in `input_ids`. `between`: if set, image tokens are whatever ids stand
    between these two. `image_text`: the placeholder in `template` and in the tokenizer, which also holds `{prompt}`.
    `surround` (before, after) goes around the placeholder in a rendered chat template. `eos`, `pad`: for checkpoints
    without a generation_config.json; `stop`: ids at which the release's code stops besides. `positions`: how many
    the decoder has.
    """

    image_token: int
    image_text: str
    template: str
    positions: int
    eos: tuple[int, ...]
    pad: int | None = None
    between: tuple[int, int] | None = None
    surround: tuple[str, str] = ("", "")
    stop: tuple[int, ...] = ()


@dataclass(frozen=True)
class Family:
    """One architecture of config.json. HimapError (usage) from any of these for a configuration they cannot follow.

    `module`: the tower and projector without storage (meta device), as `exporter/vision.py` exports it. `names`: the
    names under which checkpoints store a tensor, the published checkpoints' first. Its role is a decoder name as in
    `graphs` ("layers.0.self_attn.q_proj.weight", "lm_head.weight") or a parameter's name in `module`. A name with
    `[a:b]` behind it is those rows of a fused tensor. `image`: how pictures become pixels if the checkpoint does not
    say. `tokenizer`: makes tokenizer.json's content for a checkpoint folder that has none, if it can. `tower`: another
    checkpoint, folder or Hugging Face id, that holds the vision tower's tensors. `own_image`: the release's code makes
    pictures as `image` says, whatever a preprocessor_config.json beside it says. `schema`: the fields of config.json,
    and all of it that the functions are given. `model_type`: the name by which transformers knows the model, if it
    does; which tokenizers it takes depends on it.
    """

    architecture: str
    decoder: Callable[[Config], DecoderSpec]
    vision: Callable[[Config, Picture], VisionSpec]
    module: Callable[[Config, VisionSpec, "torch.dtype"], "torch.nn.Module"]
    names: Callable[[Config, str], Iterator[str]]
    prompt: Callable[[Config], PromptRules]
    image: Callable[[Config, VisionSpec], ImagePreprocessing]
    tokenizer: Callable[[Path, PromptRules], bytes | None] = lambda folder, rules: None
    tower: Callable[[Config], str | None] = lambda config: None
    own_image: bool = False
    model_type: str = ""
    schema: type[Struct] = field(kw_only=True)


def tied(config: Config) -> bool:
    """Whether the head is the embedding's matrix."""
    return bool(config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False)))


def built(kind: type[T], config: Config) -> T:
    """transformers' configuration class `kind` from a copy of `config`: it writes into the dictionaries it is given.

    The copy says nothing of the weights' type, which is asked for where a module is made. transformers says nothing of
    ids that it would rather have otherwise."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    copy = deepcopy({key: value for key, value in config.items() if key != "model_type"})
    for part in (copy, *(value for value in copy.values() if isinstance(value, dict))):
        part.pop("dtype", None), part.pop("torch_dtype", None)
    return kind(**copy)


def only_kinds(what: str, part: Config, *supported: str) -> None:
    """HimapError (usage) unless `part` of a configuration is of one of `supported` types, the first if it says none:
    transformers would make whatever class it names."""
    only(what, part.get("model_type", supported[0]), *supported)


def text_spec(text: Any, ropes: tuple[str, ...] = ("default",), **more: Any) -> DecoderSpec:
    """The decoder of one of transformers' text configurations, with `more` fields that this family adds or changes.

    HimapError (usage) for an activation, a rotary embedding (but `ropes`), a sliding window or heads that no graph has.
    """
    rope, bias = text.rope_parameters or {}, getattr(text, "attention_bias", False)
    only("activation", text.hidden_act, "silu")
    only("rotary embedding", rope.get("rope_type", "default"), *ropes)
    only("partial rotary factor", rope.get("partial_rotary_factor", 1.0), 1.0)
    for kind in dict.fromkeys(getattr(text, "layer_types", None) or ()):
        only("kind of layer", kind, "full_attention")
    found = DecoderSpec(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        ffn=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab=text.vocab_size,
        norm_eps=text.rms_norm_eps,
        rope_base=float(rope.get("rope_theta", 10000.0)),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=getattr(text, "mlp_bias", False),
    )
    groups, rest = divmod(found.heads, found.kv_heads)
    require(groups > 0 and not rest, f"{found.heads} attention heads are not shared evenly by {found.kv_heads}")
    require(found.head_dim % 2 == 0, f"heads of {found.head_dim} cannot be rotated by halves")
    return replace(found, **more)


def only(what: str, found: object, *supported: object) -> None:
    """HimapError (usage) unless `found` is one of `supported`."""
    if found not in supported:
        raise HimapError(f"unsupported {what} {found}", f"supported: {', '.join(map(str, supported))}", code=Exit.USAGE)


def require(holds: bool, otherwise: str) -> None:
    """HimapError (usage) that says what is the case `otherwise`, unless it `holds`."""
    if not holds:
        raise HimapError("unsupported configuration", otherwise, code=Exit.USAGE)


def check_tower(width: int, heads: int, activation: str, multiple: int = 1) -> None:
    """HimapError (usage) unless a vision tower's `width` falls into `heads`, a `multiple` of numbers each, and its
    `activation` is one that transformers has."""
    even = width % (heads * multiple) == 0
    require(even, f"a vision tower of {width} channels has no {heads} equal heads of a multiple of {multiple}")
    only("activation of the vision tower", activation, *ACTIVATIONS)


def fixed_size(asked: Picture, size: tuple[int, int]) -> tuple[int, int]:
    """`size`, of a tower that takes one picture of this one size; HimapError (usage) if anything else was asked for."""
    if asked.size not in (None, size):
        details = f"this model's pictures are {size[1]}x{size[0]}"
        raise HimapError(f"--image-size {asked.size[1]}x{asked.size[0]} does not fit", details, code=Exit.USAGE)
    if asked.tiles not in (None, 1):
        raise HimapError(f"--tiles {asked.tiles} does not fit", "this model sees its picture whole", code=Exit.USAGE)
    return size
