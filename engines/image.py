"""From a picture file to `pixel_values`, with Pillow and NumPy only.

What happens to the pixels is data, `ImagePreprocessing`, read from a checkpoint at export and stored in the bundle's
manifest. The arithmetic is that of Hugging Face's PIL image processors (transformers 5.23: `PilBackend._preprocess` in
image_processing_backends.py, `LlavaImageProcessorPil.pad_to_square`, `GotOcr2ImageProcessorPil.crop_image_to_patches`),
in the same order and the same precisions: the result is equal bit for bit (tests/engines/test_image.py). transformers
uses those classes when torchvision is missing; its torchvision classes resample differently, by up to a few grey
levels. Letterboxing has no equivalent there.
"""

import io
import math
import threading
import warnings
from collections.abc import Sequence
from fractions import Fraction
from math import prod
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from himap_export.engines.documents import read_file
from himap_export.engines.split import MAX_PIXELS, MAX_SIDE, Split
from himap_export.graphs.errors import Exit, HimapError

RESAMPLING = {filter.name.lower(): filter for filter in Image.Resampling}  # nearest, box, bilinear, ..
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_BYTES = 2**30  # of a picture's file
_OPENING = threading.Lock()  # what warnings.catch_warnings changes and restores is the whole process's


class ImagePreprocessing(Struct, frozen=True, forbid_unknown_fields=True):
    """Pad to a square, resize, crop the centre, rescale, normalise; always RGB. Sizes are (height, width) in pixels.

    `resize` is the length of the shorter edge, or a size to which the picture is stretched, or None. `pad_color` (RGB,
    0 to 255) fills the square; None: no padding. A crop larger than the picture is filled with black. Rescaling
    multiplies bytes by `rescale_factor`; normalising is `(x - mean) / std` per channel. The output size must not depend
    on the picture. `letterbox`: the picture keeps its aspect ratio, in the middle of a canvas of the size `resize` and
    the colour `pad_color`. `tiles`: it becomes so many pictures of the size `resize`: tiles in reading order and, if
    there are three or more, a thumbnail of the whole behind them. `split`: the letterboxed canvas is cut as it says.
    Raises HimapError for values that make no sense.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: str = "bicubic"
    rescale_factor: float = 1 / 255
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    pad_color: tuple[int, int, int] | None = None
    letterbox: bool = False
    tiles: int = 1
    split: Split | None = None

    def __post_init__(self) -> None:
        sides = [*((self.resize,) if isinstance(self.resize, int) else self.resize or ()), *(self.crop or ())]
        numbers = (self.rescale_factor, *self.mean, *self.std)
        problem = ""
        if any(not 0 < side <= MAX_SIDE for side in sides):
            problem = f"a size is outside 1..{MAX_SIDE}: {sides}"
        elif self.resample not in RESAMPLING:
            problem = f"resample {self.resample!r} is not one of {', '.join(RESAMPLING)}"
        elif not all(math.isfinite(number) for number in numbers) or min(self.rescale_factor, *self.std) <= 0:
            problem = f"rescale_factor, mean or std is not usable: {numbers}"
        elif self.pad_color is not None and any(not 0 <= channel <= 255 for channel in self.pad_color):
            problem = f"pad_color is outside 0..255: {self.pad_color}"
        elif self.crop is None and not (isinstance(self.resize, tuple) or (self.resize and self.pad_color)):
            problem = "the output size depends on the picture; a size or a crop is needed"
        else:
            problem = self._problem_of_canvas() or self._problem_of_tiles()
        if problem:
            raise HimapError("unusable image preprocessing", problem)

    def _problem_of_canvas(self) -> str:
        if self.letterbox and not (isinstance(self.resize, tuple) and self.pad_color and self.crop is None):
            return "letterboxing takes a size, a pad_color and no crop"
        if self.split is not None and not self.letterbox:
            return "a split takes letterboxing"
        canvas = self.resize if self.letterbox and isinstance(self.resize, tuple) else self.output_size
        return "" if math.prod(canvas) <= MAX_PIXELS else f"{canvas} is more than {MAX_PIXELS} pixels"

    def _problem_of_tiles(self) -> str:
        if self.tiles == 1:
            return ""
        if not isinstance(self.resize, tuple) or self.crop or self.pad_color:
            return "tiles take a size, and neither a crop nor a pad_color"
        if self.tiles < 1 or self.tiles * self.resize[0] * self.resize[1] > MAX_PIXELS:
            return f"tiles cannot be {self.tiles}"
        return ""

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of what the model sees, of each tile."""
        if self.split is not None:
            return self.split.tile
        if self.crop is not None:
            return self.crop
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize or (0, 0)


def mean_color(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """Returns the colour (0 to 255) of padding that normalises to about zero."""
    return int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)


def clip_preprocessing(side: int) -> ImagePreprocessing:
    """Returns what CLIP towers expect when a checkpoint says nothing: shorter edge to `side`, bicubic, centre crop."""
    return ImagePreprocessing(resize=side, crop=(side, side))


def load_image(path: Path) -> Image.Image:
    """Returns the image in `path`, upright (EXIF) and RGB, as transformers' `load_image`: transparency is dropped.

    Raises HimapError (Exit.USAGE) if the file is missing, unreadable, not a picture, damaged, or a decompression bomb.
    """
    return decode_image(read_file(path, "image", MAX_BYTES), str(path))


def decode_image(
    content: bytes, where: str, formats: tuple[str, ...] | None = None, max_pixels: int | None = None
) -> Image.Image:
    """Returns the image that `content`, found at `where`, is a file of, as `load_image` does.

    Raises HimapError (Exit.USAGE) if it is of none of Pillow's `formats` (None: all), damaged, or has more than
    `max_pixels` (None: twice Pillow's MAX_IMAGE_PIXELS), which its header tells before any pixel is decoded.
    """
    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half the limit: a large photograph
            opened = Image.open(io.BytesIO(content), formats=formats)
        with opened:
            if max_pixels is not None and opened.width * opened.height > max_pixels:
                raise Image.DecompressionBombError(f"{opened.width} x {opened.height} pixels, at most {max_pixels}")
            return upright(opened)
    except Image.DecompressionBombError as error:
        raise HimapError("image has too many pixels", where, str(error), code=Exit.USAGE) from error
    except UnidentifiedImageError as error:
        readable = "Pillow can read" if formats is None else f"is {', '.join(formats)}"
        raise HimapError(f"not an image that {readable}", where, code=Exit.USAGE) from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error... on bad bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HimapError("image is damaged", where, reason, code=Exit.USAGE) from error


def upright(image: Image.Image) -> Image.Image:
    """Returns the image turned as its EXIF says, RGB."""
    return (ImageOps.exif_transpose(image) or image).convert("RGB")


def nearest_size(images: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns the one of `sizes` (at least one) on which `images` of these sizes, letterboxed, waste least.

    All are (height, width). It is the one whose aspect ratio is the least factor away, the factors of several images
    multiplied; of equals the largest.
    """

    def key(size: tuple[int, int]) -> tuple[Fraction, int]:
        factors = [Fraction(height * size[1], width * size[0]) for height, width in images]
        return prod((max(factor, 1 / factor) for factor in factors), start=Fraction(1)), -size[0] * size[1]

    return min(sizes, key=key)


def preprocess(image: Image.Image, how: ImagePreprocessing) -> NDArray[np.float32]:
    """Returns `pixel_values` of one image, float32 [tiles,3,height,width], as Hugging Face's processor makes them.

    An image with transparency is laid over white, as there. Raises HimapError (Exit.USAGE) for a picture whose shape
    would blow up in resizing.
    """
    cut = _cut(image, how)
    scaled = (cut.astype(np.float64) * how.rescale_factor).astype(np.float32)
    normal = (scaled - np.array(how.mean, np.float32)) / np.array(how.std, np.float32)
    return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))


def _cut(image: Image.Image, how: ImagePreprocessing) -> NDArray[np.uint8]:
    """Returns the bytes of what the model sees, uint8 [tiles,height,width,3]."""
    if how.split is not None:
        return how.split.cut(_letterbox(_to_rgb(image), how, 1), RESAMPLING[how.resample])
    view = np.asarray(crop_view(image, how))  # uint8 [rows * height, columns * width, 3]
    (rows, columns), (height, width) = tile_grid(image.size, how), how.output_size
    cut = view.reshape(rows, height, columns, width, 3).swapaxes(1, 2).reshape(-1, height, width, 3)
    if how.tiles == len(cut):
        return cut
    thumbnail = _to_rgb(image).resize((width, height), RESAMPLING[how.resample])
    return np.concatenate([cut, np.asarray(thumbnail)[None]])


def tile_grid(size: tuple[int, int], how: ImagePreprocessing) -> tuple[int, int]:
    """Returns (rows, columns) of the tiles that an image of `size` (width, height) is cut into, but its thumbnail;
    (1, 1) if it is seen whole, or its tiles' tokens are joined into one grid.

    Of `how.tiles` it is the arrangement whose aspect ratio is nearest to the picture's, by difference; of two as near,
    the taller one unless the picture has more than half of the tiles' pixels (`get_optimal_tiled_canvas` of
    GotOcr2ImageProcessorPil, where all arrangements have as many tiles).
    """
    if how.split is not None:
        return (1, 1) if how.split.overview == "first" else how.split.grid
    count = how.tiles - 1 if how.tiles > 2 else how.tiles  # the thumbnail of a single tile would be that tile again
    height, width = how.output_size
    large = size[0] * size[1] > 0.5 * height * width * count
    best, least = (1, 1), math.inf
    for columns in (n for n in range(1, count + 1) if count % n == 0):
        rows = count // columns
        difference = abs(size[0] / size[1] - columns / rows)
        if difference < least or (difference == least and large):
            best, least = (rows, columns), difference
    return best


def crop_view(image: Image.Image, how: ImagePreprocessing, scale: int = 1) -> Image.Image:
    """Returns what the model sees, RGB of `view_size` times `scale`.

    With `scale` 1 these are the very pixels before normalisation, tiles side by side and without the thumbnail or a
    split's black border. A larger scale shows the same region from the original picture in more detail: pixel (y, x) of
    the model's view is the block from (scale * y, scale * x) on.
    """
    image = _to_rgb(image)
    if how.letterbox:
        canvas, resample = _letterbox(image, how, scale), RESAMPLING[how.resample]
        if how.split is None:
            return canvas
        height, width = how.split.resizes[-1]
        return (
            canvas.resize((width * scale, height * scale), resample)
            if scale > 1
            else how.split.spread(canvas, resample)
        )
    if how.pad_color is not None:
        image = _pad_to_square(image, how.pad_color)
    (rows, columns), (height, width) = tile_grid(image.size, how), _resized(image.height, image.width, how.resize)
    height, width = height * rows, width * columns
    _check_pixels(image, height * scale, width * scale)
    if how.resize is not None or scale != 1:
        image = image.resize((width * scale, height * scale), RESAMPLING[how.resample])
    if how.crop is not None:
        top, left = (height - how.crop[0]) // 2, (width - how.crop[1]) // 2  # negative: black border, rounded outwards
        box = (left, top, left + how.crop[1], top + how.crop[0])
        image = image.crop((box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale))
    return image


def view_size(size: tuple[int, int], how: ImagePreprocessing) -> tuple[int, int]:
    """Returns (height, width) in pixels of `crop_view` of an image of `size` (width, height)."""
    if how.split is not None:
        return how.split.resizes[-1]
    (rows, columns), (height, width) = tile_grid(size, how), how.output_size
    return rows * height, columns * width


def seen_share(image: Image.Image, how: ImagePreprocessing) -> float:
    """Returns the share of the image that the model sees: less than 1 where its preprocessing crops."""
    if how.crop is None or how.pad_color is not None:
        return 1.0
    height, width = _resized(image.height, image.width, how.resize)
    return min(how.crop[0] / height, 1) * min(how.crop[1] / width, 1)


def seen_box(size: tuple[int, int], how: ImagePreprocessing) -> tuple[float, float, float, float]:
    """Returns left, top, right and bottom of what the model sees of an image of `size` (width, height), as shares of
    its sides: outside 0 to 1 where the view is padded."""
    square = max(size)
    if how.letterbox and isinstance(how.resize, tuple):
        height, width = how.resize
        shrink = min(Fraction(height, size[1]), Fraction(width, size[0]))
        sides = [max(1, round(side * shrink)) for side in size]
        starts = [-((room - side) // 2) / side for room, side in zip((width, height), sides, strict=True)]
        ends = [start + room / side for start, room, side in zip(starts, (width, height), sides, strict=True)]
        return starts[0], starts[1], ends[0], ends[1]
    padded = [(square, square)] if how.pad_color is not None else [size]
    rows, columns = _resized(padded[0][1], padded[0][0], how.resize)
    crop = how.crop or (rows, columns)
    box = list[float]()
    for side, own, whole, seen in zip(padded[0], size, (columns, rows), (crop[1], crop[0]), strict=True):
        first, offset = (whole - seen) // 2, (side - own) // 2
        box += [(edge / whole * side - offset) / own for edge in (first, first + seen)]
    return box[0], box[2], box[1], box[3]


def _to_rgb(image: Image.Image) -> Image.Image:
    """Returns the image as RGB, transparency over white (transformers' `convert_to_rgb`)."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def _letterbox(image: Image.Image, how: ImagePreprocessing, scale: int) -> Image.Image:
    """Returns the image as large as fits, in the middle of its canvas; an odd remainder goes to the bottom or right."""
    (height, width), color = _resized(image.height, image.width, how.resize), how.pad_color
    shrink = min(Fraction(height, image.height), Fraction(width, image.width))
    h, w = (max(1, round(side * shrink)) for side in (image.height, image.width))
    _check_pixels(image, height * scale, width * scale)
    canvas = Image.new("RGB", (width * scale, height * scale), color)
    resized = image.resize((w * scale, h * scale), RESAMPLING[how.resample])
    canvas.paste(resized, ((width - w) // 2 * scale, (height - h) // 2 * scale))
    return canvas


def _pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Returns the image in the middle of a square of its longer edge; an odd remainder goes to the bottom or right."""
    side = max(image.size)
    _check_pixels(image, side, side)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _resized(height: int, width: int, resize: int | tuple[int, int] | None) -> tuple[int, int]:
    """Returns (height, width) after resizing; the longer edge is rounded down (`get_resize_output_image_size`)."""
    if resize is None:
        return height, width
    if isinstance(resize, tuple):
        return resize
    longer = int(resize * max(height, width) / min(height, width))
    return (longer, resize) if width <= height else (resize, longer)


def _check_pixels(image: Image.Image, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        shape = f"{image.width} x {image.height} pixels would become {width} x {height}"
        raise HimapError("image is too long and thin", shape, code=Exit.USAGE)
