"""The image as the model saw it, with the patches that each cut kept: panels side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from himap_export.engines.files import write_file
from himap_export.engines.image import ImagePreprocessing, crop_view, tile_grid, view_size
from himap_export.engines.manifest import ImageSpec

# Pixels; a panel has at least PANEL * PANEL of them, a whole multiple of the model's own.
PANEL, MARGIN, GAP, HEAD = 672, 48, 36, 84
INK, PALE, LINE = (28, 32, 38), (105, 112, 122), (214, 40, 57)
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Panel:
    title: str
    note: str
    kept: Mask | None  # [rows, columns] of patches; None shows them all


def kept_patches(alive: Mask, grid: tuple[int, int], tiles: tuple[int, int]) -> Mask:
    """Returns which patches are kept, as they lie in the image: bool [tile rows * rows, tile columns * columns].

    `alive` [V0] says it of each image token; `grid` (rows, columns) are the tokens of one tile, `tiles` (rows, columns)
    the tiles of the picture. Tokens in front that stand for no place (a class token) and those of a thumbnail behind
    several tiles are not drawn.
    """
    (rows, columns), each = grid, prod(grid)
    shown = prod(tiles) * each
    thumbnail = each if prod(tiles) > 1 and len(alive) >= shown + each else 0
    start = len(alive) - thumbnail - shown
    places = alive[start : start + shown].reshape(*tiles, rows, columns).swapaxes(1, 2)
    return places.reshape(tiles[0] * rows, tiles[1] * columns)


def draw_answer(
    file: Path,
    pictures: Sequence[Image.Image],
    spec: ImageSpec,
    *,
    alive: Sequence[Mask],
    cuts: Sequence[int],
    seconds: Sequence[float],
    question: str,
    answer: str,
) -> None:
    """Writes what cuts at layers `cuts` kept of `pictures`; `alive` [V0] says it of each image token."""
    tiles = tile_grid(pictures[0].size, spec.preprocessing)
    masks = [kept_patches(mask, spec.grid, tiles) for mask in alive]
    draw_kept(file, pictures[0], spec.preprocessing, masks=masks, cuts=cuts, question=question, answer=answer)


def draw_kept(
    file: Path,
    image: Image.Image,
    how: ImagePreprocessing,
    *,
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
    picture = _compose(model_view(image, how, PANEL), panels, question, answer)
    write_file(file, lambda f: picture.save(f, format="PNG"))


def model_view(image: Image.Image, how: ImagePreprocessing, side: int) -> Image.Image:
    """Returns what the model sees of `image`, RGB, of at least `side` * `side` pixels: a whole multiple of its own."""
    return crop_view(image, how, ceil(side / sqrt(prod(view_size(image.size, how))))).convert("RGB")


def _compose(view: Image.Image, panels: list[Panel], question: str, answer: str) -> Image.Image:
    """Lays panels side by side, or below each other if they are twice as wide as high, over question and answer."""
    width = max(view.width, *(ceil(_font(25).getlength(panel.note)) for panel in panels))
    right, down = (width + GAP, 0) if view.width < 2 * view.height else (0, HEAD + view.height + GAP)
    last, top = len(panels) - 1, MARGIN + HEAD
    bottom = top + last * down + view.height
    page = Image.new("RGB", (2 * MARGIN + last * right + width, bottom + 150), "white")
    pen = ImageDraw.Draw(page)
    for i, panel in enumerate(panels):
        x, y = MARGIN + i * right, top + i * down
        pen.text((x, y - HEAD - 8), panel.title, INK, _font(36))
        pen.text((x, y - HEAD + 38), panel.note, PALE, _font(25))
        page.paste(view if panel.kept is None else fade_dropped(view, panel.kept), (x, y))
        pen.rectangle((x - 1, y - 1, x + view.width, y + view.height), outline=PALE)
    room = page.width - 2 * MARGIN
    pen.text((MARGIN, bottom + 28), _fit(f"Q: {question}", _font(30), room), INK, _font(30))
    pen.text((MARGIN, bottom + 76), _fit(f"A: {answer.strip()}", _font(30), room), INK, _font(30))
    return page


def fade_dropped(view: Image.Image, kept: Mask) -> Image.Image:
    """Fades dropped patches to a pale grey, and draws a line around what is kept."""
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
