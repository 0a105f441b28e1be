"""`LlavaForConditionalGeneration`, as Hugging Face writes it: CLIP tower, two-layer projector, LLaMA-family decoder."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from himap_export.engines.image import ImagePreprocessing, clip_preprocessing
from himap_export.exporter import config as schemas
from himap_export.exporter.checks import require, require_activation, require_model_type, require_tower
from himap_export.exporter.families.constants import on_meta
from himap_export.exporter.family import Family, ImageOptions, PromptRules, VisionSpec, llama_decoder, make_config
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    import torch

TEMPLATE = "USER: {pictures}{prompt} ASSISTANT:"
TURN = " USER: {prompt} ASSISTANT:"


@dataclass(frozen=True)
class Arrangement:
    """How the projector's features of all tiles [tiles,N,D] become the tokens of the pictures [n,V,D].

    `place` does it in the module that it is given, which has the parameter `image_newline` [D] and a buffer for each of
    `constants`.
    """

    place: "Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]"
    constants: Mapping[str, npt.NDArray[np.float32]]


class Llava(Family[schemas.Llava]):
    """LLaVA-1.5, and what its successors share with it.

    `configuration`: transformers' class; `texts` and `tower_type`: the models of it that the graphs follow.
    """

    architecture = "LlavaForConditionalGeneration"
    schema: ClassVar[type[Struct]] = schemas.Llava
    model_type = "llava"
    configuration: ClassVar[str] = "LlavaConfig"
    texts: ClassVar[tuple[str, ...]] = ("llama",)
    tower_type: ClassVar[str] = "clip_vision_model"
    # As releases of transformers stored them.
    decoder_prefixes = ("language_model.model.", "model.language_model.", "language_model.")
    head_names = ("language_model.lm_head.weight", "lm_head.weight")

    @cached_property
    def full(self) -> Any:
        """transformers' configuration."""
        import transformers

        require_model_type("text model", self.fields.get("text_config", {}), *self.texts)
        require_model_type("vision tower", self.fields.get("vision_config", {}), self.tower_type)
        return make_config(getattr(transformers, self.configuration), self.fields)

    @property
    def side(self) -> int:
        """How many patches the tower's image has along a side."""
        patches: int = self.full.vision_config.image_size // self.full.vision_config.patch_size
        return patches

    def decoder(self) -> DecoderSpec:
        return llama_decoder(self.full.text_config)

    def check(self) -> None:
        """Raises HimapError (usage) for a tower, a projector or a choice of features that the graphs cannot follow."""
        tower, layers = self.full.vision_config, self.full.vision_feature_layer
        require_tower(tower.hidden_size, tower.num_attention_heads, tower.hidden_act)
        require_activation("projector", self.full.projector_hidden_act)
        for layer in [layers] if isinstance(layers, int) else layers:
            depth = tower.num_hidden_layers
            require(-depth - 1 <= layer <= depth, f"vision_feature_layer {layer} of a vision tower of {depth} layers")

    def vision(self, asked: ImageOptions) -> VisionSpec:
        self.check()
        asked.require_whole()
        asked.require_still()
        tower, side = self.full.vision_config, self.side
        whole = self.full.vision_feature_select_strategy == "full"
        size = asked.fixed((tower.image_size, tower.image_size))
        return VisionSpec(size, tower.num_channels, side * side + whole, (side, side))

    def names(self, role: str) -> Iterator[str]:
        if not role.startswith("vision_tower."):
            yield from super().names(role)
            return
        rest = role.removeprefix("vision_tower.").removeprefix("vision_model.")
        for prefix in ("vision_tower.", "model.vision_tower."):
            yield from (f"{prefix}vision_model.{rest}", prefix + rest)

    def prompt(self) -> PromptRules:
        return PromptRules(
            image_token=self.fields.get("image_token_index", self.fields.get("image_token_id", 32000)),
            image_text="<image>",
            template=TEMPLATE,
            lead="<image>\n",
            turn=TURN,
            positions=self.full.text_config.max_position_embeddings,
            eos=(2,),
        )

    def image(self, spec: VisionSpec) -> ImagePreprocessing:
        return clip_preprocessing(spec.size[0])

    def arrangement(self, spec: VisionSpec) -> Arrangement | None:
        """Returns how features become a picture's tokens; None: they are its tokens."""
        return None

    def module(self, spec: VisionSpec, dtype: "torch.dtype") -> "torch.nn.Module":
        """Returns Hugging Face's own tower and projector, joined as in LlavaModel, and what `arrangement` adds."""
        import torch
        from transformers import AutoModel
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        full, arranged = self.full, self.arrangement(spec)
        layer, strategy = full.vision_feature_layer, full.vision_feature_select_strategy

        class Vision(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.vision_tower = AutoModel.from_config(full.vision_config, attn_implementation="sdpa")
                self.multi_modal_projector = LlavaMultiModalProjector(full)
                if arranged is not None:
                    self.image_newline = torch.nn.Parameter(torch.empty(full.text_config.hidden_size))

            def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
                states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
                chosen = [states[i] for i in ([layer] if isinstance(layer, int) else layer)]
                if strategy == "default":
                    chosen = [state[:, 1:] for state in chosen]
                features: torch.Tensor = self.multi_modal_projector(torch.cat(chosen, dim=-1))
                return features if arranged is None else arranged.place(self, features)

        places = np.arange(self.side**2 + (self.tower_type == "clip_vision_model"))[None]  # CLIP's class token
        constants = {} if arranged is None else arranged.constants
        return on_meta(Vision, dtype, {"vision_tower.embeddings.position_ids": places, **constants})
