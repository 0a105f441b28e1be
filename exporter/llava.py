"""`LlavaForConditionalGeneration` as Hugging Face writes it: its numbers, its tensors' names, its vision module."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    import torch

ARCHITECTURE = "LlavaForConditionalGeneration"


@dataclass(frozen=True)
class VisionSpec:
    """What the vision graph takes and gives: pixels [B,channels,image_size,image_size] to features [B,tokens,D]."""

    image_size: int
    channels: int
    tokens: int
    grid: tuple[int, int]


def decoder_spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder of a LLaVA configuration; HimapError if it is not the LLaMA family's."""
    from transformers import LlavaConfig

    text = LlavaConfig(**{k: v for k, v in config.items() if k != "model_type"}).text_config
    rope = text.rope_parameters or {}
    for what, found, wanted in (
        ("text model", text.model_type, "llama"),
        ("activation", text.hidden_act, "silu"),
        ("rotary embedding", rope.get("rope_type", "default"), "default"),
    ):
        if found != wanted:
            raise HimapError(f"unsupported {what} {found}", f"supported: {wanted}", code=Exit.USAGE)
    return DecoderSpec(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        ffn=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.head_dim or text.hidden_size // text.num_attention_heads,
        vocab=text.vocab_size,
        norm_eps=text.rms_norm_eps,
        rope_base=rope.get("rope_theta", 10000.0),
        qkv_bias=text.attention_bias,
        out_bias=text.attention_bias,
        mlp_bias=text.mlp_bias,
    )


def vision_spec(config: Mapping[str, Any]) -> VisionSpec:
    from transformers import LlavaConfig

    vision = LlavaConfig(**{k: v for k, v in config.items() if k != "model_type"}).vision_config
    if vision.model_type != "clip_vision_model":
        raise HimapError(
            f"unsupported vision tower {vision.model_type}", "supported: clip_vision_model", code=Exit.USAGE
        )
    side = vision.image_size // vision.patch_size
    whole = config.get("vision_feature_select_strategy", "default") == "full"
    return VisionSpec(vision.image_size, vision.num_channels, side * side + whole, (side, side))


def tensor_candidates(role: str) -> Iterator[str]:
    """The names under which releases of transformers stored a tensor, newest last.

    `role` is a decoder name as in `graphs` ("layers.0.self_attn.q_proj.weight", "lm_head.weight") or a name in the
    vision module ("vision_tower.encoder...", "multi_modal_projector...").
    """
    if role.startswith("multi_modal_projector."):
        yield from (role, f"model.{role}")
    elif role.startswith("vision_tower."):
        rest = role.removeprefix("vision_tower.").removeprefix("vision_model.")
        for prefix in ("vision_tower.", "model.vision_tower."):
            yield from (f"{prefix}vision_model.{rest}", prefix + rest)
    elif role == "lm_head.weight":
        yield from ("language_model.lm_head.weight", role)
        # A tied head is stored once, as the embedding; config.json says so and `weight_names` has checked it.
    else:
        for prefix in ("language_model.model.", "model.language_model.", "language_model."):
            yield prefix + role


def tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding's matrix."""
    return bool(config.get("text_config", {}).get("tie_word_embeddings", config.get("tie_word_embeddings", False)))


def vision_module(config: Mapping[str, Any], dtype: "torch.dtype") -> "torch.nn.Module":
    """Hugging Face's own tower and projector without storage (meta device), joined as in LlavaModel."""
    import torch
    from transformers import AutoModel, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    full = LlavaConfig(**{k: v for k, v in config.items() if k != "model_type"})
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

    with torch.device("meta"):
        return Vision().to(dtype).eval()
