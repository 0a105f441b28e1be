"""Example images for a report's galleries."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from himap_export.engines.drawing import fade_dropped

SMALLEST = 336  # pixels of the shorter side on which the line around a patch is still a thin one


def png(image: Image.Image, max_side: int = 640) -> bytes:
    """The image as PNG, shrunk so that no side is longer than `max_side` pixels."""
    small = image.copy()
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, format="PNG", optimize=True)
    return file.getvalue()


def kept_patches(image: Image.Image, mask: NDArray[np.bool_]) -> Image.Image:
    """The image with the dropped patches faded, a line around the kept ones; `mask` [rows, columns], true where kept.

    A small image is drawn larger, by a whole factor.
    """
    scale = -(-SMALLEST // min(image.size))
    return fade_dropped(image.convert("RGB").resize((image.width * scale, image.height * scale)), mask)
