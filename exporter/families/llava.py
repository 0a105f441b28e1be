"""`LlavaForConditionalGeneration`, as Hugging Face writes it: CLIP tower, two-layer projector, LLaMA-family decoder."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from himap_export.engines.image import ImagePreprocessing, clip_preprocessing
from himap_export.exporter.config import Llava
from himap_export.exporter.family import (
    ACTIVATIONS,
    Config,
    Family,
    Picture,
    PromptRules,
    VisionSpec,
    built,
    check_tower,
    fixed_size,
    only,
    only_kinds,
    require,
    text_spec,
)
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    import torch
    from transformers import LlavaConfig

TEMPLATE = "USER: <image>\n{prompt} ASSISTANT:"


def _full(config: Config) -> "LlavaConfig":
    from transformers import LlavaConfig

    only_kinds("text model", config.get("text_config", {}), "llama")
    only_kinds("vision tower", config.get("vision_config", {}), "clip_vision_model")
    return built(LlavaConfig, config)


def decoder(config: Config) -> DecoderSpec:
    return text_spec(_full(config).text_config)


def vision(config: Config, asked: Picture) -> VisionSpec:
    full = _full(config)
    tower, layers = full.vision_config, full.vision_feature_layer
    check_tower(tower.hidden_size, tower.num_attention_heads, tower.hidden_act)
    only("activation of the projector", full.projector_hidden_act, *ACTIVATIONS)
    for layer in [layers] if isinstance(layers, int) else layers:
        depth = tower.num_hidden_layers
        require(-depth - 1 <= layer <= depth, f"vision_feature_layer {layer} of a vision tower of {depth} layers")
    side = tower.image_size // tower.patch_size
    whole = config.get("vision_feature_select_strategy", "default") == "full"
    size = fixed_size(asked, (tower.image_size, tower.image_size))
    return VisionSpec(size, tower.num_channels, side * side + whole, (side, side))


def names(config: Config, role: str) -> Iterator[str]:
    """As releases of transformers stored them, the published checkpoints' first."""
    if role.startswith("multi_modal_projector."):
        yield from (role, f"model.{role}")
    elif role.startswith("vision_tower."):
        rest = role.removeprefix("vision_tower.").removeprefix("vision_model.")
        for prefix in ("vision_tower.", "model.vision_tower."):
            yield from (f"{prefix}vision_model.{rest}", prefix + rest)
    elif role == "lm_head.weight":
        yield from ("language_model.lm_head.weight", role)
        # A tied head is stored once, as the embedding; config.json says so and `WeightNames` has checked it.
    else:
        for prefix in ("language_model.model.", "model.language_model.", "language_model."):
            yield prefix + role


def prompt(config: Config) -> PromptRules:
    image_token = config.get("image_token_index", config.get("image_token_id", 32000))
    # LlamaConfig's default is 2048; LLaVA-1.5's checkpoints say 4096.
    positions = config.get("text_config", {}).get("max_position_embeddings", 2048)
    return PromptRules(image_token, "<image>", TEMPLATE, positions, eos=(2,))


def image(config: Config, spec: VisionSpec) -> ImagePreprocessing:
    return clip_preprocessing(spec.size[0])


def module(config: Config, spec: VisionSpec, dtype: "torch.dtype") -> "torch.nn.Module":
    """Hugging Face's own tower and projector, joined as in LlavaModel."""
    import torch
    from transformers import AutoModel
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    full = _full(config)
    layer, strategy = full.vision_feature_layer, full.vision_feature_select_strategy

    class Vision(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_tower = AutoModel.from_config(full.vision_config, attn_implementation="sdpa")
            self.multi_modal_projector = LlavaMultiModalProjector(full)
            buffers = {name: b.shape for name, b in self.named_buffers() if name.endswith("position_ids")}
            self.constants = {name: np.arange(shape[-1]).reshape(shape) for name, shape in buffers.items()}

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
            chosen = [states[i] for i in ([layer] if isinstance(layer, int) else layer)]
            if strategy == "default":
                chosen = [state[:, 1:] for state in chosen]
            features: torch.Tensor = self.multi_modal_projector(torch.cat(chosen, dim=-1))
            return features

    with torch.device("meta"):
        return Vision().to(dtype).eval()


FAMILY = Family(
    "LlavaForConditionalGeneration", decoder, vision, module, names, prompt, image, model_type="llava", schema=Llava
)
