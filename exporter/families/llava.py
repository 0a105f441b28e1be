"""`LlavaForConditionalGeneration`, as Hugging Face writes it: CLIP tower, two-layer projector, LLaMA-family decoder."""

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from himap_export.engines.image import ImagePreprocessing, clip_preprocessing
from himap_export.exporter import config as schemas
from himap_export.exporter.checks import require, require_activation, require_model_type, require_tower
from himap_export.exporter.families.constants import on_meta
from himap_export.exporter.family import Family, ImageOptions, PromptRules, VisionSpec, llama_decoder, make_config
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    import torch
    from transformers import LlavaConfig

TEMPLATE = "USER: {pictures}{prompt} ASSISTANT:"
TURN = " USER: {prompt} ASSISTANT:"


class Llava(Family[schemas.Llava]):
    """LLaVA-1.5."""

    architecture = "LlavaForConditionalGeneration"
    schema = schemas.Llava
    model_type = "llava"
    # As releases of transformers stored them.
    decoder_prefixes = ("language_model.model.", "model.language_model.", "language_model.")
    head_names = ("language_model.lm_head.weight", "lm_head.weight")

    @cached_property
    def full(self) -> "LlavaConfig":
        """transformers' configuration."""
        from transformers import LlavaConfig

        require_model_type("text model", self.fields.get("text_config", {}), "llama")
        require_model_type("vision tower", self.fields.get("vision_config", {}), "clip_vision_model")
        return make_config(LlavaConfig, self.fields)

    def decoder(self) -> DecoderSpec:
        return llama_decoder(self.full.text_config)

    def vision(self, asked: ImageOptions) -> VisionSpec:
        tower, layers = self.full.vision_config, self.full.vision_feature_layer
        require_tower(tower.hidden_size, tower.num_attention_heads, tower.hidden_act)
        require_activation("projector", self.full.projector_hidden_act)
        for layer in [layers] if isinstance(layers, int) else layers:
            depth = tower.num_hidden_layers
            require(-depth - 1 <= layer <= depth, f"vision_feature_layer {layer} of a vision tower of {depth} layers")
        side = tower.image_size // tower.patch_size
        whole = self.full.vision_feature_select_strategy == "full"
        asked.require_whole()
        asked.require_still()
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

    def module(self, spec: VisionSpec, dtype: "torch.dtype") -> "torch.nn.Module":
        """Returns Hugging Face's own tower and projector, joined as in LlavaModel."""
        import torch
        from transformers import AutoModel
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        full = self.full
        layer, strategy = full.vision_feature_layer, full.vision_feature_select_strategy

        class Vision(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.vision_tower = AutoModel.from_config(full.vision_config, attn_implementation="sdpa")
                self.multi_modal_projector = LlavaMultiModalProjector(full)

            def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
                states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
                chosen = [states[i] for i in ([layer] if isinstance(layer, int) else layer)]
                if strategy == "default":
                    chosen = [state[:, 1:] for state in chosen]
                features: torch.Tensor = self.multi_modal_projector(torch.cat(chosen, dim=-1))
                return features

        places = np.arange(spec.grid[0] * spec.grid[1] + 1)[None]
        return on_meta(Vision, dtype, {"position_ids": places}, "vision_tower.embeddings")
