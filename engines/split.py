"""A picture that is cut into tiles which the vision tower sees one by one, and an overview of the whole.

The arithmetic is that of Hugging Face's PIL image processors (transformers 5.23):
`LlavaNextImageProcessorPil.get_image_patches`, LlavaOnevision's copy of it, and
`SmolVLMImageProcessorPil.split_images`, equal bit for bit (tests/engines/test_split.py).
"""

import math
from typing import Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from PIL import Image

from himap_export.graphs.errors import HimapError

MAX_SIDE = 16384  # pixels; a larger model input is a damaged manifest
# Of an intermediate picture: 400 MB of RGB; only pictures hundreds of times longer than wide reach it.
MAX_PIXELS = 2**27


class Split(Struct, frozen=True, forbid_unknown_fields=True):
    """How a canvas becomes tiles and an overview of it. Sizes are (height, width) in pixels.

    `resizes` are applied to the canvas one after the other; the last is laid on the middle of a black `sheet`, a
    multiple of `tile`, which is cut in reading order. `overview`: "first", the canvas resized to a tile, in front (the
    tiles' tokens are then joined into one grid); "last", the sheet resized to a tile, behind. Raises HimapError for
    values that make no sense.
    """

    resizes: tuple[tuple[int, int], ...]
    sheet: tuple[int, int]
    tile: tuple[int, int]
    overview: Literal["first", "last", "none"] = "none"

    def __post_init__(self) -> None:
        sizes, problem = (*self.resizes, self.sheet, self.tile), ""
        if not self.resizes:
            problem = "a canvas becomes a sheet by one resize at least"
        elif any(not 0 < side <= MAX_SIDE for size in sizes for side in size):
            problem = f"a size is outside 1..{MAX_SIDE}: {sizes}"
        elif max(map(math.prod, sizes)) > MAX_PIXELS or self.tiles * math.prod(self.tile) > MAX_PIXELS:
            problem = f"{self.sheet} is more than {MAX_PIXELS} pixels"
        elif self.sheet[0] % self.tile[0] or self.sheet[1] % self.tile[1]:
            problem = f"the sheet {self.sheet} is no multiple of the tile {self.tile}"
        elif any(side > room for side, room in zip(self.resizes[-1], self.sheet, strict=True)):
            problem = f"{self.resizes[-1]} does not fit on the sheet {self.sheet}"
        if problem:
            raise HimapError("unusable image preprocessing", problem)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the tiles that the sheet is cut into."""
        return self.sheet[0] // self.tile[0], self.sheet[1] // self.tile[1]

    @property
    def tiles(self) -> int:
        """How many pixel arrays a picture becomes, its overview counted."""
        return math.prod(self.grid) + (self.overview != "none")

    def spread(self, canvas: Image.Image, resample: Image.Resampling, scale: int = 1) -> Image.Image:
        """Returns the canvas after all `resizes`, each times `scale`: what lies on the sheet."""
        for height, width in self.resizes:
            canvas = canvas.resize((width * scale, height * scale), resample)
        return canvas

    def cut(self, canvas: Image.Image, resample: Image.Resampling) -> NDArray[np.uint8]:
        """Returns the pixel arrays of an RGB canvas, uint8 [tiles,height,width,3]."""
        (rows, columns), (height, width) = self.grid, self.tile
        spread = self.spread(canvas, resample)
        sheet = Image.new("RGB", (self.sheet[1], self.sheet[0]))
        sheet.paste(spread, ((sheet.width - spread.width) // 2, (sheet.height - spread.height) // 2))
        cut = np.asarray(sheet).reshape(rows, height, columns, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
        if self.overview == "none":
            return cut
        whole = np.asarray((canvas if self.overview == "first" else sheet).resize((width, height), resample))[None]
        return np.concatenate([whole, cut] if self.overview == "first" else [cut, whole])
