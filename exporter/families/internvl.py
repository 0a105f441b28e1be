"""`InternVLForConditionalGeneration`: InternVL3 in Hugging Face's layout (transformers/models/internvl).

An InternViT tower, a pixel shuffle that makes one token of 2x2 patches, a two-layer projector, and a Qwen2, Qwen3 or
LLaMA decoder. An image is one tile of 448x448 pixels, or several and a thumbnail.
"""

from functools import cached_property
from typing import TYPE_CHECKING

from himap_export.engines.image import IMAGENET_MEAN, IMAGENET_STD, ImagePreprocessing
from himap_export.exporter import config as schemas
from himap_export.exporter.checks import require_activation, require_model_type, require_supported, require_tower
from himap_export.exporter.families.constants import on_meta
from himap_export.exporter.family import Family, ImageOptions, PromptRules, VisionSpec, llama_decoder, make_config
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    import torch
    from transformers import InternVLConfig

USER = "<|im_start|>user\n{}{{prompt}}<|im_end|>\n<|im_start|>assistant\n"


class InternVl(Family[schemas.InternVl]):
    """InternVL3."""

    architecture = "InternVLForConditionalGeneration"
    schema = schemas.InternVl
    model_type = "internvl"
    # As published, which is how transformers 5 still saves them; then by the paths of its modules.
    decoder_prefixes = ("language_model.model.", "model.language_model.", "language_model.")
    head_names = ("language_model.lm_head.weight", "lm_head.weight")

    @cached_property
    def full(self) -> "InternVLConfig":
        """transformers' configuration."""
        from transformers import InternVLConfig

        require_model_type("text model", self.fields.get("text_config", {}), "qwen2", "qwen3", "llama")
        require_model_type("vision tower", self.fields.get("vision_config", {}), "internvl_vision")
        return make_config(InternVLConfig, self.fields)

    @property
    def tied(self) -> bool:
        """transformers 5 ties by the outer field, true if absent, whatever text_config says."""
        return bool(self.fields.get("tie_word_embeddings", True))

    def decoder(self) -> DecoderSpec:
        text = self.full.text_config
        bias = text.model_type == "qwen2" or getattr(text, "attention_bias", False)
        # Dynamic NTK scaling changes nothing up to `max_position_embeddings`, and `PromptRules.positions` are no more.
        return llama_decoder(text, ("default", "dynamic"), qkv_bias=bias, qk_norm=text.model_type == "qwen3")

    def vision(self, asked: ImageOptions) -> VisionSpec:
        """Returns `asked.tiles` images of the tower's own size, the thumbnail counted."""
        full = self.full
        tower, positions = full.vision_config, full.text_config.max_position_embeddings
        require_tower(tower.hidden_size, tower.num_attention_heads, tower.hidden_act)
        require_supported("norm of the vision tower", tower.norm_type, "layer_norm", "rms_norm")
        require_activation("projector", full.projector_hidden_act)
        require_supported("vision feature layer", full.vision_feature_layer, -1)
        require_supported("vision feature selection", full.vision_feature_select_strategy, "default")
        require_supported("downsample ratio", full.downsample_ratio, 0.5)
        asked.require_still()
        (height, width), (patch, across) = tower.image_size, tower.patch_size
        if height != width or patch != across or height < patch or height // patch % 2:
            details = "supported: square images of an even number of square patches in a row"
            raise HimapError(f"unsupported vision tower of {width}x{height} pixels", details, code=Exit.USAGE)
        size, tiles = asked.fixed((height, width)), 1 if asked.tiles is None else asked.tiles
        side = height // patch // 2
        most = (positions - 1) // side**2
        if not 1 <= tiles <= most:
            details = f"a tile is {side**2} of the model's {positions} positions: 1 to {most}"
            raise HimapError(f"{tiles} tiles do not fit", details, code=Exit.USAGE)
        return VisionSpec(
            size=size, channels=tower.num_channels, tokens=tiles * side**2, grid=(side, side), tiles=tiles
        )

    def prompt(self) -> PromptRules:
        return PromptRules(
            image_token=self.fields.get("image_token_id", 151667),
            image_text="<IMG_CONTEXT>",
            template=USER.format("{pictures}"),
            lead="<img><IMG_CONTEXT></img>\n",
            turn="<|im_end|>\n" + USER.format(""),
            positions=self.full.text_config.max_position_embeddings,
            eos=(151645,),
            pad=151643,
            surround=("<img>", "</img>"),
        )

    def image(self, spec: VisionSpec) -> ImagePreprocessing:
        return ImagePreprocessing(spec.size, None, "bicubic", mean=IMAGENET_MEAN, std=IMAGENET_STD, tiles=spec.tiles)

    def module(self, spec: VisionSpec, dtype: "torch.dtype") -> "torch.nn.Module":
        """Returns Hugging Face's own tower and projector, joined as in InternVLModel.get_image_features."""
        import torch
        from transformers import AutoModel
        from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector, InternVLVisionRMSNorm

        full, (rows, columns) = self.full, spec.grid

        class Vision(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.vision_tower = AutoModel.from_config(full.vision_config, attn_implementation="sdpa")
                self.multi_modal_projector = InternVLMultiModalProjector(full)
                for parent in list(self.vision_tower.modules()):
                    for name, norm in parent.named_children():
                        if isinstance(norm, InternVLVisionRMSNorm):  # its mean exports with axes that TensorRT refuses
                            setattr(parent, name, torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon))

            def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
                patches = self.vision_tower(pixel_values).last_hidden_state[:, 1:]  # [B*tiles,4V,d], no class token
                # The pixel shuffle in one transpose: of 2x2 patches the lower follow the upper, the right the left.
                blocks = patches.reshape(-1, rows, 2, columns, 2, patches.shape[-1]).transpose(2, 3)
                tokens = blocks.reshape(-1, rows * columns, 4 * patches.shape[-1])
                features: torch.Tensor = self.multi_modal_projector(tokens)
                return features.reshape(-1, spec.tokens, features.shape[-1])

        return on_meta(Vision, dtype)
