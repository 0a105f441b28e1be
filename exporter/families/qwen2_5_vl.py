"""`Qwen2_5_VLForConditionalGeneration`: window attention in the tower, M-RoPE in the decoder (arXiv 2502.13923)."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

from himap_export.engines.image import CLIP_MEAN, CLIP_STD
from himap_export.exporter import config as schemas
from himap_export.exporter.checks import require
from himap_export.exporter.families import qwen_vision
from himap_export.exporter.families.constants import on_meta
from himap_export.exporter.family import ImageOptions, VisionSpec, make_config
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2_5_VLConfig


class Qwen25Vl(qwen_vision.QwenFamily[schemas.Qwen25Vl]):
    """Qwen2.5-VL."""

    architecture = "Qwen2_5_VLForConditionalGeneration"
    schema = schemas.Qwen25Vl
    model_type = "qwen2_5_vl"
    # Published checkpoints and transformers' `save_pretrained`, then the modules' own names.
    decoder_prefixes = ("model.", "model.language_model.")
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    mean, std = CLIP_MEAN, CLIP_STD

    @cached_property
    def full(self) -> "Qwen2_5_VLConfig":
        """transformers' configuration. The text model's fields may stand at the top, as published, or under
        `text_config`."""
        from transformers import Qwen2_5_VLConfig

        return make_config(Qwen2_5_VLConfig, self.fields)

    def decoder(self) -> DecoderSpec:
        sections = self.full.text_config.rope_parameters.get("mrope_section", [16, 24, 24])
        # The frequencies in three runs, the fastest for time: apply_multimodal_rotary_pos_emb.
        axes = tuple(axis for axis, count in enumerate(sections) for _ in range(count))
        return self.rotated_decoder(sections, axes, qkv_bias=True)

    def vision(self, asked: ImageOptions) -> VisionSpec:
        tower = self.full.vision_config
        unit = tower.patch_size * tower.spatial_merge_size
        require(tower.window_size >= unit, f"windows of {tower.window_size} pixels hold no merged patch of {unit}")
        return self.vision_spec(asked, rope_per_second=float(tower.tokens_per_second))

    def module(self, spec: VisionSpec, dtype: "torch.dtype") -> "torch.nn.Module":
        """Returns Hugging Face's Qwen2_5_VisionTransformerPretrainedModel over one static grid.

        Merged tokens stand in window order from the patches to the merger; `fullatt_block_indexes` see them all.
        """
        import torch
        import torch.nn.functional as F
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

        tower = self.full.vision_config
        merge = tower.spatial_merge_size
        found = qwen_vision.windows(spec.grid, tower.window_size // merge // tower.patch_size)
        windows = [(count, tokens * merge * merge) for count, tokens in found.groups]
        whole = [(1, len(found.order) * merge * merge)]

        def norm(x: torch.Tensor, by: Any) -> torch.Tensor:
            return F.rms_norm(x, by.weight.shape, by.weight, by.variance_epsilon)

        class Vision(torch.nn.Module):
            patches: torch.Tensor
            cos: torch.Tensor
            sin: torch.Tensor
            reading_order: torch.Tensor

            def __init__(self) -> None:
                super().__init__()
                self.visual = Qwen2_5_VisionTransformerPretrainedModel(tower)
                del self.visual.rotary_pos_emb  # its tables are constants here

            def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
                visual = self.visual
                x = qwen_vision.embed(visual.patch_embed.proj, pixel_values, self.patches, spec.film is not None)
                for i, block in enumerate(visual.blocks):
                    groups = whole if i in tower.fullatt_block_indexes else windows
                    x = x + qwen_vision.attend(
                        block.attn, norm(x, block.norm1), cos=self.cos, sin=self.sin, groups=groups
                    )
                    x = x + block.mlp(norm(x, block.norm2))
                merged = norm(x, visual.merger.ln_q).reshape(x.shape[0], len(found.order), -1)
                features: torch.Tensor = visual.merger.mlp(merged)[:, self.reading_order]
                return features.reshape(-1, spec.tokens, features.shape[-1])

        patches = qwen_vision.patch_order(spec.grid, merge, found.order)
        cos, sin = qwen_vision.rotary_tables(tower, spec.grid[1] * merge, patches)
        constants = {"patches": patches, "cos": cos, "sin": sin, "reading_order": found.reading_order}
        return on_meta(Vision, dtype, constants)
