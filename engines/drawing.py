"""What the model saw, with the patches that each cut kept: a panel for each, of pictures or of a film's frames."""

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
WIDEST, BETWEEN = 2400, 16  # of a page; of one view and the next
INK, PALE, LINE = (28, 32, 38), (105, 112, 122), (214, 40, 57)
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class View:
    """A picture or a frame as the model sees it, RGB, and what is written below it."""

    picture: Image.Image
    caption: str = ""


@dataclass(frozen=True)
class Panel:
    title: str
    note: str
    sheet: Image.Image


def kept_patches(alive: Mask, grid: tuple[int, int], tiles: tuple[int, int], newline: int = 0) -> Mask:
    """Returns which patches are kept, as they lie in the image: bool [tile rows * rows, tile columns * columns].

    `alive` [V] says it of each of its tokens; `grid` (rows, columns) are the tokens of one tile, `tiles` (rows,
    columns) the tiles of the picture. Not drawn are tokens that stand for no place: in front (a class token, an
    overview), those of a thumbnail behind several tiles, and `newline` behind each row of the grid.
    """
    (rows, columns), each = grid, grid[0] * (grid[1] + newline)
    shown = prod(tiles) * each
    thumbnail = each if prod(tiles) > 1 and len(alive) >= shown + each else 0
    start = len(alive) - thumbnail - shown
    places = alive[start : start + shown].reshape(*tiles, rows, columns + newline)[..., :columns].swapaxes(1, 2)
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
    """Writes what cuts at layers `cuts` kept of `pictures`, or of a film's frames, which were at `seconds`, as PNG.

    `alive` [V0] says it, for each cut, of each image token. Of the frames that one step of time covers, the first is
    drawn. HimapError if the file cannot be written."""
    how, film = spec.preprocessing, spec.film
    if film is not None:
        shown, times = pictures[:: film.frames // film.steps], seconds[:: film.frames // film.steps]
        captions = [f"{time:.1f} s" for time in times]
        places = film.steps * prod(spec.grid)  # tokens behind them stand for none
        masks = [list(mask[:places].reshape(film.steps, *spec.grid)) for mask in alive]
    else:
        shown = pictures
        captions = [f"image {n}" for n in range(1, len(pictures) + 1)] if len(pictures) > 1 else [""]
        places = prod(spec.grid) if spec.several else spec.tokens  # of several pictures, others stand behind
        masks = [
            [
                kept_patches(own[:places], spec.grid, tile_grid(picture.size, how), spec.newline)
                for own, picture in zip(np.split(mask, len(pictures)), pictures, strict=True)
            ]
            for mask in alive
        ]
    side = min(PANEL, _room(len(shown)))
    views = [View(model_view(p, how, side), caption) for p, caption in zip(shown, captions, strict=True)]
    draw_kept(file, views, masks=masks, cuts=cuts, question=question, answer=answer)


def draw_kept(
    file: Path,
    views: Sequence[View],
    *,
    masks: Sequence[Sequence[Mask]],
    cuts: Sequence[int],
    question: str,
    answer: str,
) -> None:
    """Writes the views as PNG: as they are, and with the patches that each of the cuts at layers `cuts` kept, which
    `masks` say by cut and view. HimapError if it cannot."""
    patches = sum(mask.size for mask in masks[0])
    beside = len(views) == 1 and views[0].picture.width < 2 * views[0].picture.height
    room = (WIDEST - 2 * MARGIN + GAP) // (len(cuts) + 1) - GAP if beside else _room(len(views))
    panels = [Panel("what the model sees", f"{patches} patches", _sheet(views, None, room))]
    for n, (layer, kept) in enumerate(zip(cuts, masks, strict=True), 1):
        count = sum(int(mask.sum()) for mask in kept)
        note = f"{count} of {patches} patches ({count / patches:.0%}) from layer {layer} on"
        panels.append(Panel(f"kept after K{n}", note, _sheet(views, kept, room)))
    picture = _compose(panels, question, answer, beside=beside)
    write_file(file, lambda f: picture.save(f, format="PNG"))


def model_view(image: Image.Image, how: ImagePreprocessing, side: int) -> Image.Image:
    """Returns what the model sees of `image`, RGB, of at least `side` * `side` pixels: a whole multiple of its own."""
    return crop_view(image, how, ceil(side / sqrt(prod(view_size(image.size, how))))).convert("RGB")


def _sheet(views: Sequence[View], masks: Sequence[Mask] | None, room: int) -> Image.Image:
    """Returns the views in rows, at most `room` pixels wide each, captions below them, faded where `masks` drop a
    patch."""
    columns, sizes = _columns(len(views)), [view.picture.size for view in views]
    shrink = min(1.0, room / max(width for width, _ in sizes))
    small = [(max(1, int(width * shrink)), max(1, int(height * shrink))) for width, height in sizes]
    wide, high = max(width for width, _ in small), max(height for _, height in small)
    font = _font(max(13, min(25, wide // 12)))
    below = 2 * font.size if any(view.caption for view in views) else 0
    right, down, rows = wide + BETWEEN, high + below + BETWEEN, ceil(len(views) / columns)
    sheet = Image.new("RGB", (columns * right - BETWEEN, rows * down - BETWEEN), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (view, size) in enumerate(zip(views, small, strict=True)):
        x, y = i % columns * right, i // columns * down
        picture = view.picture if size == sizes[i] else view.picture.resize(size, Image.Resampling.LANCZOS)
        sheet.paste(picture if masks is None else fade_dropped(picture, masks[i]), (x, y))
        pen.rectangle((x, y, x + size[0] - 1, y + size[1] - 1), outline=PALE)
        pen.text((x, y + size[1] + font.size // 3), view.caption, INK, font)
    return sheet


def _columns(count: int) -> int:
    """Returns how many of `count` views stand in a row: up to 4 all; of more, up to 8 or so, those that leave the
    fewest gaps in a sheet about three times as wide as high."""
    if count <= 4:
        return count
    able = range(ceil(sqrt(count)), max(8, ceil(1.5 * sqrt(count))) + 1)
    return min(able, key=lambda n: (-count % n, abs(n - sqrt(3 * count))))


def _room(count: int) -> int:
    """Returns how wide each of `count` views in rows may be for a page of WIDEST."""
    return (WIDEST - 2 * MARGIN + BETWEEN) // _columns(count) - BETWEEN


def _compose(panels: list[Panel], question: str, answer: str, beside: bool) -> Image.Image:
    """Lays panels `beside` each other or below, over question and answer."""
    sheet = panels[0].sheet
    width = max(sheet.width, *(ceil(_font(25).getlength(panel.note)) for panel in panels))
    columns, right, down = len(panels) if beside else 1, width + GAP, HEAD + sheet.height + GAP
    bottom = MARGIN + ceil(len(panels) / columns) * down - GAP
    page = Image.new("RGB", (2 * MARGIN + columns * right - GAP, bottom + 150), "white")
    pen = ImageDraw.Draw(page)
    for i, panel in enumerate(panels):
        x, y = MARGIN + i % columns * right, MARGIN + HEAD + i // columns * down
        pen.text((x, y - HEAD - 8), panel.title, INK, _font(36))
        pen.text((x, y - HEAD + 38), panel.note, PALE, _font(25))
        page.paste(panel.sheet, (x, y))
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
    thick = max(1, min(3, int(min(dy, dx) / 6)))
    framed = np.pad(kept, 1)
    for r, c in zip(*np.nonzero(framed[:-1, 1:-1] != framed[1:, 1:-1]), strict=True):  # between rows r-1 and r
        pen.line((c * dx, r * dy, (c + 1) * dx, r * dy), LINE, thick)
    for r, c in zip(*np.nonzero(framed[1:-1, :-1] != framed[1:-1, 1:]), strict=True):
        pen.line((c * dx, r * dy, c * dx, (r + 1) * dy), LINE, thick)
    return panel


def _fit(text: str, font: Any, room: int) -> str:
    text = " ".join(text.split())
    while font.getlength(text) > room:
        text = text[:-2].rstrip(" …") + "…"
    return text


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
