"""What Qwen2.5-VL and Qwen3-VL share: prompts, static sizes, the order of patches, rotary tables, attention.

Hugging Face's towers read the image's grid at run time and see all images as one ragged sequence. Here the grid is
known, so whatever depends on it alone is a table written into the graph, and images are a batch [B,N,D], N patches. A
patch is of two frames: of a picture and itself, or of a film; no patch sees another step of time, so a film's steps
are a batch like any other.
Letters of this file: m `spatial_merge_size`, N patches, V = N / m^2 merged tokens.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from himap_export.engines.film import Film, Sampling
from himap_export.engines.image import ImagePreprocessing, mean_color
from himap_export.exporter.checks import require_supported, require_tower
from himap_export.exporter.family import Family, ImageOptions, PromptRules, S, VisionSpec, llama_decoder
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import MOST_FRAMES
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]
DEFAULT_SIDE = 448  # pixels
PAIR = 2  # frames of a patch
ROPES = ("default", "mrope")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
FILM = "<|vision_start|><|video_pad|><|vision_end|>"
USER = "<|im_start|>user\n{}{{prompt}}<|im_end|>\n<|im_start|>assistant\n"


class QwenFamily(Family[S]):
    """What both models say alike, over the transformers' configuration `full` of each."""

    system: ClassVar[str] = ""
    mean: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    sampling: ClassVar[Sampling] = "arange"

    @property
    @abstractmethod
    def full(self) -> Any:
        """transformers' configuration."""

    def prompt(self) -> PromptRules:
        """Returns ChatML, `system` in front; ids as in every published checkpoint."""
        return PromptRules(
            image_token=self.fields.get("image_token_id", 151655),
            image_text="<|image_pad|>",
            template=self.system + USER.format("{pictures}"),
            lead=IMAGE,
            turn="<|im_end|>\n" + USER.format(""),
            film_token=self.fields.get("video_token_id", 151656),
            film_text="<|video_pad|>",
            film_lead=FILM,
            positions=self.full.text_config.max_position_embeddings,
            eos=(151645, 151643),
            pad=151643,
        )

    def image(self, spec: VisionSpec) -> ImagePreprocessing:
        """Returns the whole image within `spec.size`; the rest has the mean colour, which normalises to about zero."""
        return ImagePreprocessing(
            resize=spec.size, crop=None, resample="bicubic", mean=self.mean, std=self.std,
            pad_color=mean_color(self.mean), letterbox=True,
        )  # fmt: skip

    def rotated_decoder(self, sections: Sequence[int], axes: tuple[int, ...], **more: Any) -> DecoderSpec:
        """Returns the decoder under M-RoPE, frequency i turned by the position's coordinate `axes[i]`.

        HimapError (usage) for `sections` that do not turn the whole head."""
        spec = llama_decoder(self.full.text_config, ROPES, rope_axes=axes, **more)
        require_supported("sum of mrope_section", sum(sections), spec.head_dim // 2)
        require_supported("number of mrope_section", len(sections), 3)
        return spec

    def vision_spec(self, asked: ImageOptions, deepstack: int = 0, rope_per_second: float = 0.0) -> VisionSpec:
        """Returns the tower's sizes; HimapError (usage) for a size that is no whole number of merged patches, and for
        frames of a film that are no pairs."""
        tower = self.full.vision_config
        require_supported("width of vision features", tower.out_hidden_size, self.full.text_config.hidden_size)
        require_supported("frames of a patch", tower.temporal_patch_size, PAIR)
        require_tower(tower.hidden_size, tower.num_heads, tower.hidden_act, multiple=4)  # rows and columns turn pairs
        asked.require_whole()
        unit = tower.patch_size * tower.spatial_merge_size
        near = max(1, round(DEFAULT_SIDE / unit)) * unit
        height, width = size = asked.size or (near, near)
        if height % unit or width % unit or min(size) < unit:
            # Halves round up: `round` would take them to the even multiple.
            fits = [max(1, (side + unit // 2) // unit) * unit for side in size]
            details = f"both sides must be multiples of {unit}; the nearest size is {fits[1]}x{fits[0]}"
            raise HimapError(f"an image size of {width}x{height} does not fit", details, code=Exit.USAGE)
        rows, columns = grid = (height // unit, width // unit)
        film = None if asked.frames is None else self.film(asked.frames, rope_per_second)
        return VisionSpec(
            size=size, channels=tower.in_channels, tokens=(film.steps if film else 1) * rows * columns, grid=grid,
            tiles=film.frames if film else 1, deepstack=deepstack, film=film,
        )  # fmt: skip

    def film(self, frames: int, rope_per_second: float) -> Film:
        """Returns how a film becomes so many `frames`, where the model's own processor takes two a second.

        HimapError (usage) if they are no pairs."""
        if frames % PAIR or not PAIR <= frames <= MOST_FRAMES:
            details = f"this model sees frames in pairs: an even number from {PAIR} to {MOST_FRAMES}"
            raise HimapError(f"a film of {frames} frames does not fit", details, code=Exit.USAGE)
        return Film(frames, frames // PAIR, self.sampling, fps=2.0, rope_per_second=rope_per_second)


@dataclass(frozen=True)
class Windows:
    """Merged tokens ordered so that each window's stand together, windows of one size side by side.

    `order` [V]: the place in reading order of each. `groups`: (windows, merged tokens of one), largest first.
    """

    order: Array
    groups: tuple[tuple[int, int], ...]

    @property
    def reading_order(self) -> Array:
        """[V], the index that undoes `order`."""
        return np.argsort(self.order)


def windows(grid: tuple[int, int], side: int) -> Windows:
    """Returns windows of `side` x `side` merged tokens, the last row and column of them cut off at the image's edge.

    As in transformers' `get_vision_window_index`, but the ragged windows come last so that each size is one batch.
    """
    members: dict[tuple[int, int], list[int]] = {}
    for row, column in np.ndindex(*grid):
        members.setdefault((row // side, column // side), []).append(row * grid[1] + column)
    sized = sorted(members.values(), key=len, reverse=True)
    lengths = [len(window) for window in sized]
    groups = tuple((lengths.count(n), n) for n in dict.fromkeys(lengths))
    return Windows(np.concatenate([np.array(window) for window in sized]), groups)


def patch_order(grid: tuple[int, int], merge: int, order: Array) -> Array:
    """Returns [N]: where, in reading order, the patches of the merged tokens `order` are, m*m behind each other."""
    rows, columns = grid
    patches = np.arange(rows * columns * merge * merge).reshape(rows, merge, columns, merge)
    ordered: Array = patches.transpose(0, 2, 1, 3).reshape(rows * columns, -1)[order].reshape(-1)
    return ordered


def rotary_tables(tower: Any, columns: int, patches: Array) -> tuple[Array, Array]:
    """Returns cos and sin [N,E/2] in fp32: half of the frequencies turn by a patch's row, half by its column.

    The image is `columns` patches wide; `patches` are their places in reading order. As Hugging Face's
    Qwen2_5_VLVisionRotaryEmbedding, whose tables hold each half twice.
    """
    rope, half = getattr(tower, "rope_parameters", None) or {}, tower.hidden_size // tower.num_heads // 2
    exponent = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequency = 1 / np.float32(rope.get("rope_theta", 10000.0)) ** exponent
    place = np.stack([patches // columns, patches % columns], axis=1).astype(np.float32)
    angle = (place[:, :, None] * frequency).reshape(len(patches), -1)
    return np.cos(angle), np.sin(angle)


def embed(proj: Any, pixels: "torch.Tensor", order: "torch.Tensor", film: bool) -> "torch.Tensor":
    """Returns the patches [B,N,D], in `order`, of pixels: pictures [B,3,H,W], or the frames [B*2,3,H,W] of a `film`.

    `proj` is a Conv3d over two frames, which are a picture twice. The frames become channels: a Conv2d over
    [c0,c0,c1,c1,..] adds the same products.
    """
    import torch.nn.functional as F

    frames, stride = proj.kernel_size[0], proj.kernel_size[1:]
    if film:
        pairs = pixels.reshape(-1, frames, *pixels.shape[1:]).transpose(1, 2)
    else:
        pairs = pixels.unsqueeze(2).expand(-1, -1, frames, -1, -1)
    found = F.conv2d(pairs.flatten(1, 2), proj.weight.flatten(1, 2), proj.bias, stride)
    return found.flatten(2).transpose(1, 2)[:, order]


def attend(
    attention: Any, x: "torch.Tensor", cos: "torch.Tensor", sin: "torch.Tensor", groups: Sequence[tuple[int, int]]
) -> "torch.Tensor":
    """Computes Hugging Face's Qwen VL vision attention, from x [B,N,D] to [B,N,D]; rotary positions in fp32 as there.

    `groups` (windows, patches of one) cover N: patches attend within their window, and a group is one Attention node.
    """
    import torch
    import torch.nn.functional as F

    batch, heads = x.shape[0], attention.num_heads
    tables = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    q, k, v = attention.qkv(x).unflatten(-1, (3, -1)).unbind(2)  # `chunk` would make a sequence, which TensorRT refuses
    q, k = (torch.onnx.ops.rotary_embedding(y.float(), *tables, num_heads=heads).to(x.dtype) for y in (q, k))
    edges, parts = [0, *accumulate(count * patches for count, patches in groups)], []
    for (count, patches), start, stop in zip(groups, edges[:-1], edges[1:], strict=True):
        shape = (batch * count, patches, heads, -1)
        query, key, value = (y[:, start:stop].reshape(shape).transpose(1, 2) for y in (q, k, v))
        seen = F.scaled_dot_product_attention(query, key, value)
        parts.append(seen.transpose(1, 2).reshape(batch, count * patches, -1))
    found: torch.Tensor = attention.proj(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    return found
