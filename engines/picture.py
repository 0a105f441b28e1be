"""The image as the model saw it, with the patches that each cut kept: panels side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from himap_export.engines.image import ImagePreprocessing, crop_view
from himap_export.graphs.errors import Exit, HimapError

PANEL, MARGIN, GAP = 672, 48, 36  # pixels; PANEL is a lower bound, a whole multiple of the model's own pixels
INK, PALE, LINE = (28, 32, 38), (105, 112, 122), (214, 40, 57)
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Panel:
    title: str
    note: str
    kept: Mask | None  # [rows, columns] of patches; None shows them all


def kept_patches(input_ids: Integers, kept: Integers, image_token: int) -> Mask:
    """Which patches, [g,g] in reading order, are among the `kept` positions of one prompt [S].

    A class token in front of them (feature strategy "full") is not drawn.
    """
    alive = np.isin(np.flatnonzero(input_ids == image_token), kept)
    side = isqrt(len(alive))
    return alive[len(alive) - side * side :].reshape(side, side)


def draw_kept(
    file: Path,
    image: Image.Image,
    how: ImagePreprocessing,
    masks: Sequence[Mask],
    cuts: Sequence[int],
    question: str,
    answer: str,
) -> None:
    """Writes the picture as PNG; `masks` are the patches kept by the cuts at layers `cuts`. HimapError if it cannot."""
    panels = [Panel("what the model sees", f"{masks[0].size} patches", None)]
    for n, (layer, mask) in enumerate(zip(cuts, masks, strict=True), 1):
        note = f"{mask.sum()} of {mask.size} patches ({mask.mean():.0%}) from layer {layer} on"
        panels.append(Panel(f"kept after K{n}", note, mask))
    scale = -(-PANEL // min(how.output_size))
    view = crop_view(image, how, scale).convert("RGB")
    picture = _compose(view, panels, question, answer)
    try:
        picture.save(file, format="PNG")
    except OSError as problem:
        raise HimapError(f"cannot write {file}", problem.strerror or str(problem), code=Exit.FAILURE) from None


def _compose(view: Image.Image, panels: list[Panel], question: str, answer: str) -> Image.Image:
    width, height = view.size
    top = MARGIN + 84
    page = Image.new("RGB", (2 * MARGIN + len(panels) * width + (len(panels) - 1) * GAP, top + height + 150), "white")
    pen = ImageDraw.Draw(page)
    for i, panel in enumerate(panels):
        left = MARGIN + i * (width + GAP)
        pen.text((left, MARGIN - 8), panel.title, INK, _font(36))
        pen.text((left, MARGIN + 38), panel.note, PALE, _font(25))
        page.paste(view if panel.kept is None else fade_dropped(view, panel.kept), (left, top))
        pen.rectangle((left - 1, top - 1, left + width, top + height), outline=PALE)
    room = page.width - 2 * MARGIN
    pen.text((MARGIN, top + height + 28), _fit(f"Q: {question}", _font(30), room), INK, _font(30))
    pen.text((MARGIN, top + height + 76), _fit(f"A: {answer.strip()}", _font(30), room), INK, _font(30))
    return page


def fade_dropped(view: Image.Image, kept: Mask) -> Image.Image:
    """Dropped patches fade to a pale grey; a line runs around what is kept."""
    faded = Image.blend(ImageOps.grayscale(view).convert("RGB"), Image.new("RGB", view.size, "white"), 0.72)
    mask = Image.fromarray(kept.astype(np.uint8) * 255).resize(view.size, Image.Resampling.NEAREST)
    panel = Image.composite(view, faded, mask)
    pen = ImageDraw.Draw(panel)
    rows, columns = kept.shape
    dy, dx = view.height / rows, view.width / columns
    framed = np.pad(kept, 1)
    for r, c in zip(*np.nonzero(framed[:-1, 1:-1] != framed[1:, 1:-1]), strict=True):  # between rows r-1 and r
        pen.line((c * dx, r * dy, (c + 1) * dx, r * dy), LINE, 3)
    for r, c in zip(*np.nonzero(framed[1:-1, :-1] != framed[1:-1, 1:]), strict=True):
        pen.line((c * dx, r * dy, c * dx, (r + 1) * dy), LINE, 3)
    return panel


def _fit(text: str, font: Any, room: int) -> str:
    text = " ".join(text.split())
    while font.getlength(text) > room:
        text = text[:-2].rstrip(" …") + "…"
    return text


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
