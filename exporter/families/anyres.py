"""Pictures of any resolution as LLaVA-NeXT and LLaVA-OneVision see them: tiles of one sheet, and an overview.

What Hugging Face decides for each picture (`select_best_resolution`, `get_patch_output_size`, `unpad_image` and
`pack_image_features` of transformers 5.23) is decided here once, for pictures of one size: plain numbers, so that the
vision graph only slices, concatenates and, where `anyres_max_N` asks for it, multiplies by constant matrices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from himap_export.engines.image import ImagePreprocessing, mean_color
from himap_export.engines.split import Split
from himap_export.exporter.checks import require, require_supported
from himap_export.exporter.families.llava import Arrangement, Llava
from himap_export.exporter.families.resize import interpolation, resampled
from himap_export.exporter.family import ImageOptions, VisionSpec
from himap_export.graphs.errors import Exit, HimapError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Size = tuple[int, int]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Layout:
    """Where a picture of one size comes to lie, all of it (height, width) or (rows, columns).

    `spread` pixels lie in the middle of a `sheet`. Of the sheet's tokens, `whole`, the picture covers `covered`, which
    are resized to `grid`.
    """

    sheet: Size
    spread: Size
    whole: Size
    covered: Size
    grid: Size


def lay_out(size: Size, pinpoints: Sequence[Sequence[int]], tile: Size, most: int | None = None) -> Layout:
    """Returns where a picture of `size` (height, width) lies on the best of the sheets `pinpoints`.

    `tile`: its pixels and its tokens along a side. `most`: a grid of more tokens than so many tiles have, by a factor
    above 1.1 along a side, is resized to about as many; None: it never is. HimapError (usage) for a picture so long and
    thin that no token is left of it.
    """
    from transformers.image_processing_utils import select_best_resolution

    (height, width), (pixels, tokens) = size, tile
    sheet = select_best_resolution(size, pinpoints)
    if sheet is not None:
        rows, columns = (length // pixels * tokens for length in sheet)
        if sheet[1] / width < sheet[0] / height:
            spread = min(math.ceil(height * (sheet[1] / width)), sheet[0]), sheet[1]
        else:
            spread = sheet[0], min(math.ceil(width * (sheet[0] / height)), sheet[1])
        if width / height > columns / rows:
            above = (rows - int(round(height * (columns / width), 7))) // 2
            covered = rows - 2 * above, columns
        else:
            left = (columns - int(round(width * (rows / height), 7))) // 2
            covered = rows, columns - 2 * left
        ratio = math.sqrt(math.prod(covered) / (most * tokens**2)) if most else 0.0
        grid = (int(covered[0] // ratio), int(covered[1] // ratio)) if ratio > 1.1 else covered
        if min(grid) > 0:
            return Layout(sheet, spread, whole=(rows, columns), covered=covered, grid=grid)
    details = "its longer side is too many times the other for this model's tiles"
    raise HimapError(f"an image size of {width}x{height} does not fit", details, code=Exit.USAGE)


class Anyres(Llava):
    """What LLaVA-NeXT and LLaVA-OneVision have in common. `selection`: the only one that leaves a tile's grid whole;
    `mean` and `std`: of the pixels, for checkpoints that do not say."""

    selection: ClassVar[str]
    mean: ClassVar[Colour]
    std: ClassVar[Colour]

    @property
    def pinpoints(self) -> tuple[Size, ...]:
        return tuple((height, width) for height, width in self.full.image_grid_pinpoints)

    @property
    def most(self) -> int | None:
        """The number of tiles whose tokens are the most that a grid may have; None: it may have any number."""
        return None

    def layout(self, size: Size) -> Layout:
        """Returns where pictures of `size` (height, width) come to lie; HimapError (usage) if they cannot."""
        return lay_out(size, self.pinpoints, (self.full.vision_config.image_size, self.side), self.most)

    def vision(self, asked: ImageOptions) -> VisionSpec:
        """Returns pictures of the asked size, else of 2 x 2 tiles."""
        self.check()
        asked.require_still()
        pixels = self.full.vision_config.image_size
        size = asked.size or (2 * pixels, 2 * pixels)
        layout = self.layout(size)
        (rows, columns), (height, width) = layout.grid, layout.sheet
        tiles = 1 + (height // pixels) * (width // pixels)
        if asked.tiles not in (None, tiles):
            details = f"a picture of {size[1]}x{size[0]} becomes {tiles}"
            raise HimapError(f"{asked.tiles} tiles do not fit", details, code=Exit.USAGE)
        return VisionSpec(
            size=size,
            channels=self.full.vision_config.num_channels,
            tokens=self.side**2 + rows * (columns + 1),
            grid=layout.grid,
            tiles=tiles,
            newline=1,
            cut_to=(pixels, pixels),
        )

    def check(self) -> None:
        super().check()
        require_supported("vision feature selection", self.full.vision_feature_select_strategy, self.selection)
        pixels = self.full.vision_config.image_size
        for height, width in self.pinpoints:
            whole = not height % pixels and not width % pixels
            require(whole, f"image_grid_pinpoints: {width}x{height} is not made of tiles of {pixels}x{pixels}")

    def image(self, spec: VisionSpec) -> ImagePreprocessing:
        layout = self.layout(spec.size)
        return self.letterboxed(spec.size, Split((layout.spread,), layout.sheet, spec.view, "first"))

    def letterboxed(self, canvas: Size, split: Split) -> ImagePreprocessing:
        """Returns pixels from a canvas (height, width) that is cut as `split` says."""
        color = mean_color(self.mean)
        return ImagePreprocessing(
            canvas, None, mean=self.mean, std=self.std, pad_color=color, letterbox=True, split=split
        )

    def arrangement(self, spec: VisionSpec) -> Arrangement:
        """Returns the overview's tokens, then the grid of all tiles without the sheet's border, row by row, each
        followed by the newline."""
        import torch

        layout, side = self.layout(spec.size), self.side
        (whole, across), (covered, reach), (rows, columns) = layout.whole, layout.covered, layout.grid
        top, left = (whole - covered) // 2, (across - reach) // 2
        shrunk = layout.grid != layout.covered

        def place(module: "Module", features: "Tensor") -> "Tensor":
            blocks = features[1:].reshape(whole // side, across // side, side, side, features.shape[-1])
            grid = blocks.transpose(1, 2).reshape(whole, across, features.shape[-1])
            grid = grid[top : top + covered, left : left + reach]
            if shrunk:
                grid = resampled(grid[None], module.get_buffer("rows"), module.get_buffer("columns"))[0]
            newline = module.get_parameter("image_newline").expand(rows, 1, -1)
            lines = torch.cat([grid, newline], dim=1).reshape(1, rows * (columns + 1), -1)
            return torch.cat([features[:1], lines], dim=1)

        constants = {"rows": (covered, rows), "columns": (reach, columns)} if shrunk else {}
        return Arrangement(place, {name: interpolation(*sides, "bilinear") for name, sides in constants.items()})
