"""`Qwen3VLForConditionalGeneration`: a tower that feeds several decoder layers (deepstack), a Qwen3 decoder, M-RoPE."""

from functools import cached_property
from math import isqrt
from typing import TYPE_CHECKING

import numpy as np

from himap_export.engines.prompt import Expansion, Segment
from himap_export.exporter import config as schemas
from himap_export.exporter.checks import require
from himap_export.exporter.families import qwen_vision
from himap_export.exporter.families.constants import on_meta
from himap_export.exporter.family import ImageOptions, VisionSpec, make_config
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3VLConfig


STEP, END = "<{seconds} seconds><|vision_start|>", "<|vision_end|>"


def rope_axes(sections: list[int]) -> tuple[int, ...]:
    """Returns time, row, column in turn while each has frequencies left, then time: `apply_interleaved_mrope`."""
    return tuple(i % 3 if i < 3 * sections[i % 3] else 0 for i in range(sum(sections)))


def interpolation(size: tuple[int, int], side: int, patches: qwen_vision.Array) -> dict[str, qwen_vision.Array]:
    """Returns `taps` [N,4] into a table of side*side positions and their `tap_weights` [N,4,1], bilinear, corners
    aligned.

    `size`: the image's patches (rows, columns); `patches` [N] their places in reading order. As transformers'
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


class Qwen3Vl(qwen_vision.QwenFamily[schemas.Qwen3Vl]):
    """Qwen3-VL."""

    architecture = "Qwen3VLForConditionalGeneration"
    schema = schemas.Qwen3Vl
    model_type = "qwen3_vl"
    # Published checkpoints and transformers' `save_pretrained`, then without the outer model's prefix.
    decoder_prefixes = ("model.language_model.", "language_model.")
    vision_prefixes = ("model.", "")
    sampling = "rounded"

    @cached_property
    def full(self) -> "Qwen3VLConfig":
        """transformers' configuration."""
        from transformers import Qwen3VLConfig

        return make_config(Qwen3VLConfig, self.fields)

    def decoder(self) -> DecoderSpec:
        sections = self.full.text_config.rope_parameters.get("mrope_section", [24, 20, 20])
        deepstack = len(self.full.vision_config.deepstack_visual_indexes)
        return self.rotated_decoder(sections, rope_axes(sections), qk_norm=True, deepstack=deepstack)

    def vision(self, asked: ImageOptions) -> VisionSpec:
        tower, layers = self.full.vision_config, self.full.text_config.num_hidden_layers
        found = list(tower.deepstack_visual_indexes)
        require(len(found) <= layers, f"{len(found)} deepstack features for fewer layers")
        once = len(set(found)) == len(found) and all(0 <= index < tower.depth for index in found)
        require(once, f"deepstack_visual_indexes {found[:16]} of a vision tower of {tower.depth} layers")
        return self.vision_spec(asked, len(found))

    def expansion(self, spec: VisionSpec) -> Expansion:
        """Returns a film's steps each behind its time, as Qwen3VLProcessor's `replace_video_token` writes them."""
        if spec.film is None:
            return super().expansion(spec)
        first, each = Segment(STEP, spec.tokens // spec.film.steps), Segment(END + STEP, spec.tokens // spec.film.steps)
        return Expansion((first, *[each] * (spec.film.steps - 1)), after=END)

    def module(self, spec: VisionSpec, dtype: "torch.dtype") -> "torch.nn.Module":
        """Returns Hugging Face's Qwen3VLVisionModel over one static grid: features and, behind them, each deepstack."""
        import torch
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

        tower = self.full.vision_config
        merge, layers = tower.spatial_merge_size, list(tower.deepstack_visual_indexes)
        count = spec.grid[0] * spec.grid[1]
        whole = [(1, count * merge * merge)]

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
                visual, shape = self.visual, (pixel_values.shape[0] // spec.tiles, spec.tokens, -1)
                x = qwen_vision.embed(visual.patch_embed.proj, pixel_values, self.patches, spec.film is not None)
                x = x + (visual.pos_embed(self.taps) * self.tap_weights).sum(1).to(dtype)  # summed in fp32
                deepstack = []
                for i, block in enumerate(visual.blocks):
                    x = x + qwen_vision.attend(block.attn, block.norm1(x), cos=self.cos, sin=self.sin, groups=whole)
                    x = x + block.mlp(block.norm2(x))
                    if i in layers:
                        deepstack.append(visual.deepstack_merger_list[layers.index(i)](x).reshape(shape))
                return (visual.merger(x).reshape(shape), *deepstack)

        rows, columns = (length * merge for length in spec.grid)
        patches = qwen_vision.patch_order(spec.grid, merge, np.arange(count))
        cos, sin = qwen_vision.rotary_tables(tower, columns, patches)
        learned = interpolation((rows, columns), isqrt(tower.num_position_embeddings), patches)
        return on_meta(Vision, dtype, {"patches": patches, "cos": cos, "sin": sin, **learned})
