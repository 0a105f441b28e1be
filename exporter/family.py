"""What an export must know of a family of models: a class over its typed config.json.

Adding a family is writing such a class; docs/add-a-model.md goes through it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from himap_export.engines.documents import typed
from himap_export.engines.film import Film
from himap_export.engines.image import ImagePreprocessing
from himap_export.engines.prompt import Expansion, Segment
from himap_export.exporter.checks import require, require_even_heads, require_supported
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    import torch

Config = Mapping[str, Any]
DECODER_ROLES = ("layers.", "embed_tokens.", "norm.", "lm_head.")
T = TypeVar("T")
S = TypeVar("S", bound=Struct)


@dataclass(frozen=True)
class ImageOptions:
    """What the user asked images to be: `size` (height, width) in pixels, `tiles` in number; None: the model's.

    `frames`: a film of so many, instead of a picture. `several`: there is more than one picture in a prompt, which
    some models then see less closely.
    """

    size: tuple[int, int] | None = None
    tiles: int | None = None
    frames: int | None = None
    several: bool = False

    def require_whole(self) -> None:
        """Raises HimapError (usage) if tiles are asked of a model that has none."""
        if self.tiles not in (None, 1):
            raise HimapError(f"{self.tiles} tiles do not fit", "this model sees its image whole", code=Exit.USAGE)

    def require_still(self) -> None:
        """Raises HimapError (usage) if a film is asked of a model that sees pictures only."""
        if self.frames is not None:
            raise HimapError("`frames` do not fit", "this model sees pictures, no films", code=Exit.USAGE)

    def fixed(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns `size`, of a tower that takes images of this one; HimapError (usage) if another is asked for."""
        if self.size not in (None, size):
            details = f"this model's images are {size[1]}x{size[0]}"
            raise HimapError(f"an image size of {self.size[1]}x{self.size[0]} does not fit", details, code=Exit.USAGE)
        return size


@dataclass(frozen=True)
class VisionSpec:
    """What the vision graph takes and gives, all of it static.

    One picture's or film's pixels [tiles,channels,*view] to features [1,tokens,D]. `size` (height, width): of pictures
    and frames that are seen as they are; others are letterboxed to it, or resized. `view`: of what the tower sees at
    once, `size` unless that is cut into `tiles`; a film has a tile for each frame. `tokens` are V, of all tiles; `grid`
    is (rows, columns) of those that are drawn: of one tile, or one of a film's steps, in reading order, each row with
    `newline` tokens behind it that stand for no place. Tokens that are too many (a class token, an overview) stand in
    front of a picture's, and behind those of a film or of one of `several`. `deepstack` counts further outputs
    [1,tokens,D], added to the image tokens behind the first decoder layers. `several`: it is what several pictures of
    one prompt are seen as, and no picture alone.
    """

    size: tuple[int, int]
    channels: int
    tokens: int
    grid: tuple[int, int]
    tiles: int = 1
    deepstack: int = 0
    newline: int = 0
    cut_to: tuple[int, int] | None = None
    film: Film | None = None
    several: bool = False

    @property
    def view(self) -> tuple[int, int]:
        """(height, width) of what the tower sees at once."""
        return self.cut_to or self.size

    @property
    def name(self) -> str:
        """448x336, with the tiles that it is cut into or the frames of a film: 448x448x4, 448x448-16-frames."""
        height, width = self.size
        many = f"-{self.tiles}-frames" if self.film else f"x{self.tiles}" if self.tiles > 1 else ""
        return f"{width}x{height}{many}"


@dataclass(frozen=True)
class PromptRules:
    """How prompts of a family look where its checkpoint does not say, and the ids that say where images are.

    `image_token`: the id of an image token in `input_ids`. `between`: if set, image tokens are whatever ids stand
    between these two. `image_text`: the placeholder in the tokenizer. `template` holds `{pictures}`, where `lead` goes
    for each of them, with the placeholder in it, and `{prompt}`. `turn` is what goes on behind an answer: the next
    question's `{prompt}`, until the model speaks. `interleaved`: the template of a question that places its pictures
    itself, where that is not `template` without them. `film_token`, `film_text` and `film_lead`: the same of a film.
    `surround` (before, after) goes around the placeholder in a rendered chat template. `eos`, `pad`: for checkpoints
    without a generation_config.json; `stop`: ids at which the release's code stops besides. `positions`: how many
    the decoder has.
    """

    image_token: int
    image_text: str
    template: str
    lead: str
    turn: str
    positions: int
    eos: tuple[int, ...]
    pad: int | None = None
    between: tuple[int, int] | None = None
    surround: tuple[str, str] = ("", "")
    stop: tuple[int, ...] = ()
    interleaved: str = ""
    film_token: int | None = None
    film_text: str = ""
    film_lead: str = ""


class Family(ABC, Generic[S]):
    """One architecture of config.json, over one such file. Its methods raise HimapError (usage) for a configuration
    that the graphs cannot follow.

    `architecture` is config.json's name for it; `schema` types the fields that the family knows. `model_type` is the
    name by which transformers knows the model, if it does: which tokenizers it takes depends on it. `own_image`: the
    release's code makes pixels as `image` says, whatever a preprocessor_config.json beside it says. `head_names` and
    the prefixes say under which names checkpoints store a role, the published checkpoints' first.
    """

    architecture: ClassVar[str]
    schema: ClassVar[type[Struct]]
    model_type: ClassVar[str] = ""
    own_image: ClassVar[bool] = False
    decoder_prefixes: ClassVar[tuple[str, ...]] = ("model.",)
    vision_prefixes: ClassVar[tuple[str, ...]] = ("", "model.")
    head_names: ClassVar[tuple[str, ...]] = ("lm_head.weight",)

    def __init__(self, config: S) -> None:
        self.config = config

    @classmethod
    def parse(cls, config: Config, where: str = "config.json") -> Self:
        """Returns the family over what `config` says of the fields of its schema, found in `where`."""
        return cls(typed(config, cls.schema, where))  # type: ignore[arg-type]  # `schema` is S, which no ClassVar can say

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The fields of `config` as JSON has them, without those that it leaves open."""
        found: dict[str, Any] = msgspec.to_builtins(self.config)
        return found

    @property
    def tied(self) -> bool:
        """Whether a head that the checkpoint does not store is the embedding's matrix."""
        told = self.fields.get("tie_word_embeddings", self.fields.get("text_config", {}).get("tie_word_embeddings"))
        return bool(told)

    @property
    def pinpoints(self) -> tuple[tuple[int, int], ...]:
        """Sizes (height, width) of the sheets that pictures of any resolution are laid on, to be cut; none in families
        that see pictures otherwise."""
        return ()

    @abstractmethod
    def decoder(self) -> DecoderSpec:
        """Returns the decoder's numbers."""

    @abstractmethod
    def vision(self, asked: ImageOptions) -> VisionSpec:
        """Returns what the vision graph takes and gives for images as `asked`."""

    @abstractmethod
    def module(self, spec: VisionSpec, dtype: "torch.dtype") -> "torch.nn.Module":
        """Returns tower and projector without storage (meta device), as `exporter/vision.py` exports them."""

    @abstractmethod
    def prompt(self) -> PromptRules:
        """Returns how prompts look where the checkpoint does not say."""

    @abstractmethod
    def image(self, spec: VisionSpec) -> ImagePreprocessing:
        """Returns how images become pixels where the checkpoint does not say."""

    def expansion(self, spec: VisionSpec) -> Expansion:
        """Returns what the placeholder of one picture or film becomes in a prompt."""
        return Expansion((Segment("", spec.tokens),))

    def names(self, role: str) -> Iterator[str]:
        """Yields the names under which checkpoints store a tensor, the published checkpoints' first.

        `role` is a decoder name as in `graphs` ("layers.0.self_attn.q_proj.weight", "lm_head.weight") or a parameter's
        name in `module`.
        """
        if role == "lm_head.weight":
            yield from self.head_names
        else:
            prefixes = self.decoder_prefixes if role.startswith(DECODER_ROLES) else self.vision_prefixes
            yield from (prefix + role for prefix in prefixes)

    def rows(self, role: str) -> tuple[int, int] | None:
        """Returns which rows (start, stop) of the stored tensor `role` is, where it is fused; None: all of it."""
        return None

    def tokenizer(self, folder: Path) -> bytes | None:
        """Returns tokenizer.json's content for a checkpoint folder that has none; None if it cannot be made."""
        return None

    def tower(self) -> str | None:
        """Returns the folder or Hugging Face id of another checkpoint that holds the vision tower's tensors, if any."""
        return None

    def with_tower(self, config: Config, where: str) -> Self:
        """Returns the family that knows the config.json of its `tower`, found in `where`."""
        raise NotImplementedError(f"{self.architecture} has its vision tower")


def make_config(kind: type[T], config: Config) -> T:
    """Returns transformers' configuration class `kind` from a copy of `config`: it writes into what it is given.

    The copy says nothing of the weights' type, which is asked for where a module is made. transformers says nothing of
    ids that it would rather have otherwise."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    copy = deepcopy({key: value for key, value in config.items() if key != "model_type"})
    for part in (copy, *(value for value in copy.values() if isinstance(value, dict))):
        part.pop("dtype", None), part.pop("torch_dtype", None)
    return kind(**copy)


def llama_decoder(text: Any, ropes: tuple[str, ...] = ("default",), **more: Any) -> DecoderSpec:
    """Returns the decoder of one of transformers' text configurations, with `more` fields that a family changes.

    HimapError (usage) for an activation, a rotary embedding (but `ropes`), a sliding window or heads that no graph has.
    """
    rope, bias = text.rope_parameters or {}, getattr(text, "attention_bias", False)
    require_supported("activation", text.hidden_act, "silu")
    require_supported("rotary embedding", rope.get("rope_type", "default"), *ropes)
    require_supported("partial rotary factor", rope.get("partial_rotary_factor", 1.0), 1.0)
    for kind in dict.fromkeys(getattr(text, "layer_types", None) or ()):
        require_supported("kind of layer", kind, "full_attention")
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
    require_even_heads(found.head_dim)
    return replace(found, **more)
