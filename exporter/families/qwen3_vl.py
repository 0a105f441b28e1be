"""`Qwen3VLForConditionalGeneration`: a tower that feeds several decoder layers (deepstack), a Qwen3 decoder, M-RoPE."""

from collections.abc import Iterator
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np

from himap_export.engines.image import ImagePreprocessing
from himap_export.exporter.config import Qwen3Vl
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
    from transformers import Qwen3VLConfig

HALF = (0.5, 0.5, 0.5)


def _full(config: Config) -> "Qwen3VLConfig":
    from transformers import Qwen3VLConfig

    return built(Qwen3VLConfig, config)


def rope_axes(sections: list[int]) -> tuple[int, ...]:
    """Time, row, column in turn while each has frequencies left, then time: `apply_interleaved_mrope`."""
    return tuple(i % 3 if i < 3 * sections[i % 3] else 0 for i in range(sum(sections)))


def decoder(config: Config) -> DecoderSpec:
    full = _full(config)
    text, deepstack = full.text_config, len(full.vision_config.deepstack_visual_indexes)
    sections = text.rope_parameters.get("mrope_section", [24, 20, 20])
    spec = text_spec(text, qwen_vision.ROPES, qk_norm=True, rope_axes=rope_axes(sections), deepstack=deepstack)
    qwen_vision.only_whole_heads(sections, spec.head_dim)
    return spec


def vision(config: Config, asked: Picture) -> VisionSpec:
    full = _full(config)
    tower = full.vision_config
    only("width of vision features", tower.out_hidden_size, full.text_config.hidden_size)
    found = list(tower.deepstack_visual_indexes)
    require(len(found) <= full.text_config.num_hidden_layers, f"{len(found)} deepstack features for fewer layers")
    once = len(set(found)) == len(found) and all(0 <= index < tower.depth for index in found)
    require(once, f"deepstack_visual_indexes {found[:16]} of a vision tower of {tower.depth} layers")
    return qwen_vision.vision_spec(tower, asked, len(found))


def names(config: Config, role: str) -> Iterator[str]:
    """Published checkpoints and transformers' `save_pretrained`, then without the outer model's prefix."""
    if role.startswith("visual."):
        yield from (f"model.{role}", role)
    elif role == "lm_head.weight":
        yield role
    else:
        yield from (f"model.language_model.{role}", f"language_model.{role}")


def prompt(config: Config) -> PromptRules:
    return qwen_vision.prompt_rules(config, "", _full(config).text_config.max_position_embeddings)


def image(config: Config, spec: VisionSpec) -> ImagePreprocessing:
    return qwen_vision.letterboxed(spec, HALF, HALF)


def interpolation(size: tuple[int, int], side: int, patches: qwen_vision.Array) -> dict[str, qwen_vision.Array]:
    """`taps` [N,4] into a table of side*side positions and their `tap_weights` [N,4,1], bilinear, corners aligned.

    `size`: the picture's patches (rows, columns); `patches` [N] their places in reading order. As transformers'
    `get_vision_interpolation_indices_and_weights`, in the same precision.
    """
    axes = []
    for place, length in ((patches // size[1], size[0]), (patches % size[1], size[1])):
        exact = place.astype(np.float32) * np.float32(side - 1) / np.float32(max(length - 1, 1))
        floor = np.floor(exact)
        nearer = np.stack([floor, floor + 1], axis=1)
        weights = np.maximum(1 - np.abs(exact[:, None] - nearer), 0).astype(np.float32)
        axes.append((np.clip(nearer, 0, side - 1).astype(np.int64), weights))
    (rows, by_row), (columns, by_column) = axes
    taps = (rows[:, :, None] * side + columns[:, None, :]).reshape(-1, 4)
    return {"taps": taps, "tap_weights": (by_row[:, :, None] * by_column[:, None, :]).reshape(-1, 4, 1)}


def module(config: Config, spec: VisionSpec, dtype: "torch.dtype") -> "torch.nn.Module":
    """Hugging Face's Qwen3VLVisionModel over one static grid; gives the features and, behind them, each deepstack."""
    import torch
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    tower = _full(config).vision_config
    merge, layers = tower.spatial_merge_size, list(tower.deepstack_visual_indexes)
    whole = [(1, spec.tokens * merge * merge)]

    class Vision(torch.nn.Module):
        patches: torch.Tensor
        cos: torch.Tensor
        sin: torch.Tensor
        taps: torch.Tensor
        tap_weights: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.visual = Qwen3VLVisionModel(tower)
            del self.visual.rotary_pos_emb  # its tables are constants here

        def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            visual, shape = self.visual, (pixel_values.shape[0], spec.tokens, -1)
            x = qwen_vision.embed(visual.patch_embed.proj, pixel_values, self.patches)
            x = x + (visual.pos_embed(self.taps) * self.tap_weights).sum(1).to(dtype)  # summed in fp32
            deepstack = []
            for i, block in enumerate(visual.blocks):
                x = x + qwen_vision.attend(block.attn, block.norm1(x), self.cos, self.sin, whole)
                x = x + block.mlp(block.norm2(x))
                if i in layers:
                    deepstack.append(visual.deepstack_merger_list[layers.index(i)](x).reshape(shape))
            return (visual.merger(x).reshape(shape), *deepstack)

    with torch.device("meta"):
        made = Vision().to(dtype).eval()
    rows, columns = (length * merge for length in spec.grid)
    patches = qwen_vision.patch_order(spec.grid, merge, np.arange(spec.tokens))
    cos, sin = qwen_vision.rotary_tables(tower, columns, patches)
    learned = interpolation((rows, columns), isqrt(tower.num_position_embeddings), patches)
    hold(made, {"patches": patches, "cos": cos, "sin": sin, **learned})
    return made


FAMILY = Family(
    "Qwen3VLForConditionalGeneration",
    decoder,
    vision,
    module,
    names,
    prompt,
    image,
    model_type="qwen3_vl",
    schema=Qwen3Vl,
)
