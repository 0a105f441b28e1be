"""The pixels of an image, as the bundle makes them and as Hugging Face's own image processor does.

Everything else in a validation is fed by our preprocessing on both sides, so nothing behind it can judge it. Theirs is
computed from the image's file, by transformers' PIL classes, whose arithmetic ours repeats.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from himap_export.engines.arrays import pictures_of_patches
from himap_export.engines.documents import MEGABYTE, read_file
from himap_export.engines.manifest import ImageSpec
from himap_export.graphs.errors import Exit
from himap_export.validate.checkpoint import Source
from himap_export.validate.parity.compare import Gate, Parity
from himap_export.validate.parity.tensors import TensorDiff, tensor_diff

Pixels = npt.NDArray[np.float32]
FILES = ("processor_config.json", "preprocessor_config.json")
# Of the largest value. Equal arithmetic gives equal bits. Where a library rounds otherwise, the three operations behind
# the bytes (rescale, subtract, divide) may each err by 2^-24; the least mistake, one grey level, is 2^-8 of the range.
LIMIT = 2.0**-20
MOST_AREA = 2**25  # pixels; published processors that follow the image's size stop at 2^24


@dataclass(frozen=True)
class PixelParity:
    """How far the bundle's pixels lie from Hugging Face's; None, and in `note` why, if they are not compared."""

    found: TensorDiff | None
    note: str = ""


def compare_pixels(ours: Pixels, image_files: Sequence[Path], spec: ImageSpec, source: Source) -> PixelParity:
    """Compares `ours` [n*tiles,3,H,W], made for `spec`, with what the processor of `source` makes of the n files.

    HimapError (usage) for a processor's file that cannot be read.
    """
    folder, held = source.folder, [source.folder / name for name in FILES if (source.folder / name).exists()]
    if source.own_image:
        return _not_compared("the release prepares pictures by its own code, whatever its processor file says")
    if not held:
        return _not_compared(f"{folder} holds no image processor")
    for file in held:
        read_file(file, "image processor", MEGABYTE, Exit.USAGE)
    made = list[Pixels]()
    for file in image_files:
        found = _made(file, spec, folder)
        if isinstance(found, str):
            return _not_compared(found)
        made.append(found)
    return _compared(ours, np.concatenate(made))


def _made(image_file: Path, spec: ImageSpec, folder: Path) -> Pixels | str:
    """Returns what Hugging Face's processor makes of one image, or why that is not to be compared."""
    height, width = spec.size
    try:
        split = spec.preprocessing.split
        largest = max(side for size in (spec.size, *(split.resizes if split else ())) for side in size)
        image, processor = _image(image_file), _processor(folder, 4 * largest)
        by_patches = "image_grid_thw" in processor.model_input_names  # of the image's own size, more or less
        # Splits are by the size of the picture itself.
        if (split and (image.height, image.width) != spec.size) or (by_patches and not _fills(image, spec)):
            return f"{image.width}x{image.height} is letterboxed to {width}x{height}, by design"
        given = [[image] * (1 + spec.several)] if split else image  # the pictures of one prompt
        theirs = processor(images=given, return_tensors="np", **_static(processor, spec))
        made = np.asarray(theirs["pixel_values"], np.float32)
        made = made[0] if split else made
        if by_patches:
            made = pictures_of_patches(str(folder), made, np.asarray(theirs["image_grid_thw"]))
    except Exception as problem:  # transformers raises all kinds, for files of all kinds
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        return f"transformers cannot use the processor in {folder}: {reason}"
    if by_patches and made.shape[2:] != spec.size:
        return f"the processor makes {made.shape[3]}x{made.shape[2]} of it, the bundle {width}x{height}"
    made = made.reshape(-1, *made.shape[-3:])  # tiled pictures come as [1,tiles,3,H,W]
    return made[: spec.tiles] if spec.tiles == 2 or spec.several else made  # a thumbnail of two tiles is a third


def with_pixels(parity: Parity, pixels: PixelParity) -> Parity:
    """Returns the same parity with the pixels in front, and their gate."""
    notes = (*parity.notes, *([pixels.note] if pixels.note else []))
    if pixels.found is None:
        return replace(parity, notes=notes)
    gate = Gate(pixels.found.name, pixels.found.max_abs, LIMIT * pixels.found.scale)
    return replace(parity, tensors=(pixels.found, *parity.tensors), gates=(gate, *parity.gates), notes=notes)


def _not_compared(why: str) -> PixelParity:
    return PixelParity(None, f"pixels not compared: {why}")


def _compared(ours: Pixels, theirs: Pixels) -> PixelParity:
    if ours.shape == theirs.shape:
        return PixelParity(tensor_diff("pixels", [ours], [theirs]))
    shapes = f"pixels are {list(ours.shape)}, Hugging Face's processor makes {list(theirs.shape)}"
    return PixelParity(TensorDiff("pixels", inf, float(np.abs(theirs).max(initial=0)), 0.0), shapes)


def _processor(folder: Path, most_side: int) -> Any:
    """Hugging Face's, in the class that computes with PIL; ValueError for a size that no image should get."""
    from transformers import AutoImageProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    found = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True, backend="pil")
    areas = "image_grid_thw" in found.model_input_names  # whose edges count all pixels of an image
    for name in ("size", "crop_size"):
        for key, side in dict(getattr(found, name, None) or {}).items():
            most = MOST_AREA if areas and key.endswith(("_edge", "_pixels")) else most_side
            if side is not None and not 0 < side <= most:
                raise ValueError(f"{name}.{key} is {side}, expected 1 to {most}")
    return found


def _static(processor: Any, spec: ImageSpec) -> dict[str, object]:
    """Options that ask a processor which tiles as it likes for as many tiles as the bundle has; others get none."""
    tiles = spec.tiles
    if hasattr(processor, "do_image_splitting"):
        return {"do_image_splitting": tiles > 1}
    if not hasattr(processor, "crop_to_patches"):
        return {}
    count = max(1, tiles - 1) if tiles != 2 else 2  # the thumbnail of several tiles counts, except of two
    return {"crop_to_patches": tiles > 1, "min_patches": count, "max_patches": count}


def _image(file: Path) -> Image.Image:
    from transformers.image_utils import load_image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half the limit: a large photograph
        found: Image.Image = load_image(str(file))
        return found


def _fills(image: Image.Image, spec: ImageSpec) -> bool:
    """Whether the letterboxed image has no border."""
    height, width = spec.size
    shrink = min(Fraction(height, image.height), Fraction(width, image.width))
    return (round(image.height * shrink), round(image.width * shrink)) == spec.size
