"""`Qwen2_5_VLForConditionalGeneration`: window attention in the tower, M-RoPE in the decoder (arXiv 2502.13923)."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from himap_export.engines.image import CLIP_MEAN, CLIP_STD, ImagePreprocessing
from himap_export.exporter.config import Qwen25Vl
from himap_export.exporter.families import qwen_vision
from himap_export.exporter.families.constants import hold
from himap_export.exporter.family import (
    Config,
    Family,
    Picture,
    PromptRules,
    VisionSpec,
    built,
    only,
    require,
    text_spec,
)
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2_5_VLConfig

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def _full(config: Config) -> "Qwen2_5_VLConfig":
    """The text model's fields may stand at the top (published checkpoints) or under `text_config`."""
    from transformers import Qwen2_5_VLConfig

    return built(Qwen2_5_VLConfig, config)


def decoder(config: Config) -> DecoderSpec:
    text = _full(config).text_config
    sections = text.rope_parameters.get("mrope_section", [16, 24, 24])
    # The frequencies in three runs, the fastest for time: apply_multimodal_rotary_pos_emb.
    axes = tuple(axis for axis, count in enumerate(sections) for _ in range(count))
    spec = text_spec(text, qwen_vision.ROPES, qkv_bias=True, rope_axes=axes)
    qwen_vision.only_whole_heads(sections, spec.head_dim)
    return spec


def vision(config: Config, asked: Picture) -> VisionSpec:
    full = _full(config)
    tower = full.vision_config
    only("width of vision features", tower.out_hidden_size, full.text_config.hidden_size)
    unit = tower.patch_size * tower.spatial_merge_size
    require(tower.window_size >= unit, f"windows of {tower.window_size} pixels hold no merged patch of {unit}")
    return qwen_vision.vision_spec(tower, asked)


def names(config: Config, role: str) -> Iterator[str]:
    """Published checkpoints and transformers' `save_pretrained`, then the modules' own names."""
    if role.startswith("visual."):
        yield from (role, f"model.{role}")
    elif role == "lm_head.weight":
        yield role
    else:
        yield from (f"model.{role}", f"model.language_model.{role}")


def prompt(config: Config) -> PromptRules:
    return qwen_vision.prompt_rules(config, SYSTEM, _full(config).text_config.max_position_embeddings)


def image(config: Config, spec: VisionSpec) -> ImagePreprocessing:
    return qwen_vision.letterboxed(spec, CLIP_MEAN, CLIP_STD)


def module(config: Config, spec: VisionSpec, dtype: "torch.dtype") -> "torch.nn.Module":
    """Hugging Face's Qwen2_5_VisionTransformerPretrainedModel over one static grid.

    Merged tokens stand in window order from the patches to the merger; blocks of `fullatt_block_indexes` see them all.
    """
    import torch
    import torch.nn.functional as F
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    tower = _full(config).vision_config
    merge = tower.spatial_merge_size
    found = qwen_vision.windows(spec.grid, tower.window_size // merge // tower.patch_size)
    windows = [(count, tokens * merge * merge) for count, tokens in found.groups]
    whole = [(1, spec.tokens * merge * merge)]

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
            x = qwen_vision.embed(visual.patch_embed.proj, pixel_values, self.patches)
            for i, block in enumerate(visual.blocks):
                groups = whole if i in tower.fullatt_block_indexes else windows
                x = x + qwen_vision.attend(block.attn, norm(x, block.norm1), self.cos, self.sin, groups)
                x = x + block.mlp(norm(x, block.norm2))
            merged = norm(x, visual.merger.ln_q).reshape(x.shape[0], spec.tokens, -1)
            features: torch.Tensor = visual.merger.mlp(merged)[:, self.reading_order]
            return features

    with torch.device("meta"):
        made = Vision().to(dtype).eval()
    patches = qwen_vision.patch_order(spec.grid, merge, found.order)
    cos, sin = qwen_vision.rotary_tables(tower, spec.grid[1] * merge, patches)
    constants = {"patches": patches, "cos": cos, "sin": sin, "reading_order": found.reading_order}
    hold(made, constants)
    return made


FAMILY = Family(
    "Qwen2_5_VLForConditionalGeneration",
    decoder,
    vision,
    module,
    names,
    prompt,
    image,
    model_type="qwen2_5_vl",
    schema=Qwen25Vl,
)
