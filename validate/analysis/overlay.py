"""A heat map over the image as the model saw it, and a contact sheet of all layers."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from himap_export.engines.image import ImagePreprocessing, crop_view

SIDE, GAP, HEAD = 168, 10, 22  # pixels: the longer side of a panel, between panels, of the line above one
INK, PAPER = (28, 32, 38), (255, 255, 255)
# Inferno's path from black to yellow at five places: even steps look even, and grey prints keep their order.
PLACES = np.linspace(0, 1, 5)
HUES = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)


def overlay(image: Image.Image, how: ImagePreprocessing, heat: npt.NDArray[np.floating]) -> Image.Image:
    """Returns `heat` [h,w] in [0,1] over what the model sees of `image`: cold patches are grey, hot ones glow."""
    view = crop_view(image, how, 1).convert("RGB")
    size = (round(SIDE * view.width / max(view.size)), round(SIDE * view.height / max(view.size)))
    view = view.resize(size, Image.Resampling.LANCZOS)
    spread = Image.fromarray((255 * np.clip(heat, 0, 1)).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    level = np.asarray(spread, np.float64) / 255
    colour = np.stack([np.interp(level, PLACES, HUES[:, channel]) for channel in range(3)], -1)
    grey = np.asarray(ImageOps.grayscale(view).convert("RGB"), np.float64)
    share = (0.15 + 0.7 * level)[..., None]
    return Image.fromarray(((1 - share) * grey + share * colour).astype(np.uint8))


def strip(panels: Sequence[tuple[str, Image.Image]], columns: int = 5) -> Image.Image:
    """Returns captioned panels in rows of `columns`."""
    rows = -(-len(panels) // columns)
    width, height = min(columns, len(panels)) * (SIDE + GAP) + GAP, rows * (SIDE + HEAD + GAP) + GAP
    page = Image.new("RGB", (width, height), PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for n, (caption, panel) in enumerate(panels):
        left, top = GAP + n % columns * (SIDE + GAP), GAP + n // columns * (SIDE + HEAD + GAP)
        pen.text((left, top), caption, INK, font)
        page.paste(panel, (left, top + HEAD))
    return page
