"""Patches lie in the drawing where they lie in the picture."""

from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from numpy.typing import NDArray
from PIL import Image

from himap_export.engines.drawing import PANEL, View, draw_answer, draw_kept, kept_patches, model_view
from himap_export.engines.film import Film
from himap_export.engines.image import ImagePreprocessing, clip_preprocessing, crop_view, seen_box, tile_grid
from himap_export.engines.manifest import ImageSpec
from himap_export.engines.prompt import Expansion, Segment
from himap_export.graphs.errors import HimapError

GREY = (122, 116, 104)
SAID = {"question": "Q", "answer": "A"}


def only(count: int, *kept: int) -> NDArray[np.bool_]:
    return np.isin(np.arange(count), kept)


@pytest.mark.parametrize(
    ("tokens", "grid", "tiles", "kept", "places"),
    [
        (6, (2, 3), (1, 1), (0, 5), [(0, 0), (1, 2)]),
        (7, (2, 3), (1, 1), (0, 1), [(0, 0)]),  # behind a class token
        (2, (1, 1), (1, 1), (0,), []),
        (24, (2, 3), (2, 2), (1, 7, 13, 23), [(0, 1), (0, 4), (2, 1), (3, 5)]),
        (30, (2, 3), (2, 2), (1, 23, 24, 29), [(0, 1), (3, 5)]),  # before a thumbnail
        (12, (2, 3), (1, 2), (3, 6), [(0, 3), (1, 0)]),
        (18, (2, 3), (2, 1), (3, 6, 17), [(1, 0), (2, 0)]),
    ],
)
def test_kept_patches(
    tokens: int, grid: tuple[int, int], tiles: tuple[int, int], kept: tuple[int, ...], places: list[tuple[int, int]]
) -> None:
    mask = kept_patches(only(tokens, *kept), grid, tiles)
    assert mask.dtype == np.bool_ and mask.shape == (grid[0] * tiles[0], grid[1] * tiles[1])
    assert list(zip(*(each.tolist() for each in np.nonzero(mask)), strict=True)) == places


@pytest.mark.parametrize(
    (
        "how",
        "grid",
        "panel",
        "picture",
        "half",
    ),  # shares of a panel: of the picture, of it where the first half is kept
    [
        (clip_preprocessing(336), (24, 24), (672, 672), 1, 1 / 2),
        (ImagePreprocessing((224, 448), None, pad_color=GREY, letterbox=True), (8, 16), (672, 1344), 0.8, 0.4),
        (ImagePreprocessing((448, 224), None, pad_color=GREY, letterbox=True), (16, 8), (1344, 672), 5 / 16, 5 / 32),
        (ImagePreprocessing((448, 448), None, tiles=7), (16, 16), (496, 744), 1, 3.5 / 6),  # of 7, the last not drawn
    ],
)
def test_drawing_has_a_panel_for_the_picture_and_for_each_cut(
    how: ImagePreprocessing, grid: tuple[int, int], panel: tuple[int, int], picture: float, half: float, tmp_path: Path
) -> None:
    """Each of the shape of what the model sees; what is dropped is pale, what is kept is not."""
    image = Image.new("RGB", (640, 400), (0, 0, 200))
    tiles = tile_grid(image.size, how)
    tokens = how.tiles * grid[0] * grid[1]
    masks = [kept_patches(np.arange(tokens) < tokens // n, grid, tiles) for n in (1, 2)]
    views = [View(model_view(image, how, PANEL))]
    draw_kept(tmp_path / "kept.png", views, masks=[[m] for m in masks], cuts=(2, 8), question="Q", answer="A sea.")
    page = np.asarray(Image.open(tmp_path / "kept.png")).astype(int)
    blue = (page[..., 2] - page[..., 0] > 150).sum()
    assert page.shape[0] > panel[0] and page.shape[1] > panel[1]
    np.testing.assert_allclose(blue / np.prod(panel), 2 * picture + half, rtol=0.02)
    assert page.shape[0] * page.shape[1] < 6 * np.prod(panel)


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    mask = np.ones((24, 24), np.bool_)
    with pytest.raises(HimapError, match="cannot write"):
        draw_kept(tmp_path / "no" / "k.png", [View(Image.new("RGB", (9, 9)))], masks=[[mask]], cuts=(2,), **SAID)


@pytest.mark.parametrize(("lead", "newline"), [(0, 1), (9, 1), (4, 0)])
def test_tokens_that_stand_for_no_place_are_not_drawn(lead: int, newline: int) -> None:
    """An overview in front, and the end of each row."""
    alive = np.zeros(lead + 3 * (4 + newline), np.bool_)
    alive[lead + 0], alive[lead + (4 + newline) + 2], alive[-1 - newline] = True, True, True
    alive[:lead] = True
    if newline:
        alive[lead + 4 :: 5] = True
    mask = kept_patches(alive, (3, 4), (1, 1), newline)
    assert list(zip(*(each.tolist() for each in np.nonzero(mask)), strict=True)) == [(0, 0), (1, 2), (2, 3)]


def spec_of(size: tuple[int, int], grid: tuple[int, int], tokens: int, film: Film | None = None) -> ImageSpec:
    how = ImagePreprocessing(size, None, pad_color=GREY, letterbox=True)
    return ImageSpec(size, film.frames if film else 1, tokens, grid, how, Expansion((Segment("", tokens),)), film=film)


BLUE, RED, GREEN = (0, 0, 200), (200, 0, 0), (0, 160, 0)


def painted(page: NDArray[np.int_], color: tuple[int, int, int]) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.abs(page - np.array(color)).max(2) < 7
    return found


@pytest.mark.parametrize("extra", [0, 1])
def test_a_film_is_drawn_by_its_steps(tmp_path: Path, extra: int) -> None:
    """The first frame of each of 3 steps in a row; a token behind them all, as some models have, is not drawn."""
    pictures = [Image.new("RGB", (100, 100), c) for c in (BLUE, GREY, RED, GREY, GREEN, GREY)]
    spec = spec_of((112, 112), (4, 4), 48 + extra, Film(6, 3, "rounded", 2.0))
    alive = np.zeros(48 + extra, np.bool_)
    alive[:8], alive[32:36] = True, True  # half of the first step, a quarter of the last
    seconds = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
    draw_answer(tmp_path / "k.png", pictures, spec, alive=[alive], cuts=[2], seconds=seconds, **SAID)
    page = np.asarray(Image.open(tmp_path / "k.png"))[::3, ::3].astype(int)
    assert page.shape[1] <= 2400 and page.shape[0] < page.shape[1]
    shares = [painted(page, color).sum() for color in (BLUE, RED, GREEN)]
    np.testing.assert_allclose(shares / shares[1], [1.5, 1, 1.25], rtol=0.03)
    assert painted(page, GREY).sum() < 0.02 * shares[1]


def test_several_pictures_are_drawn_side_by_side(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (100, 100), color) for color in (BLUE, RED)]
    alive = np.arange(32) < 12  # of 16 patches of the first
    spec = spec_of((112, 112), (4, 4), 16)
    draw_answer(tmp_path / "k.png", pictures, spec, alive=[alive, alive], cuts=[2, 4], seconds=(), **SAID)
    page = np.asarray(Image.open(tmp_path / "k.png"))[::3, ::3].astype(int)
    blue, red = (painted(page, color) for color in (BLUE, RED))
    np.testing.assert_allclose(blue.sum() / red.sum(), 2.5, rtol=0.03)
    assert blue.any(0).nonzero()[0].max() < red.any(0).nonzero()[0].min() < page.shape[1] <= 2400


def test_of_several_pictures_a_newline_stands_behind_each(tmp_path: Path) -> None:
    """As LLaVA-OneVision has them: 16 patches and one token more, which is not drawn."""
    pictures = [Image.new("RGB", (100, 100), color) for color in (BLUE, RED)]
    alive = np.zeros(34, np.bool_)
    alive[[*range(8), 16, 33]] = True  # the first picture's upper half, and both newlines
    spec = structs.replace(spec_of((112, 112), (4, 4), 17), several=True)
    draw_answer(tmp_path / "k.png", pictures, spec, alive=[alive], cuts=[2], seconds=(), **SAID)
    page = np.asarray(Image.open(tmp_path / "k.png"))[::3, ::3].astype(int)
    blue, red = (painted(page, color).sum() for color in (BLUE, RED))
    np.testing.assert_allclose(blue / red, 1.5, rtol=0.03)  # all of each, and half of one


@pytest.mark.parametrize("steps", [1, 2, 7, 16, 64])
def test_a_page_of_frames_is_legible(tmp_path: Path, steps: int) -> None:
    film = Film(2 * steps, steps, "rounded", 2.0)
    pictures = [Image.new("RGB", (64, 36), BLUE)] * film.frames
    spec = spec_of((252, 448), (9, 16), 144 * steps, film)
    alive, seconds = np.ones(spec.tokens, np.bool_), tuple(range(film.frames))
    draw_answer(tmp_path / "k.png", pictures, spec, alive=[alive], cuts=[2], seconds=seconds, **SAID)
    with Image.open(tmp_path / "k.png") as page:
        assert page.width <= 2400 and page.height <= 4000


WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    ("how", "size", "box"),
    [
        (ImagePreprocessing((50, 70), None), (30, 90), (0, 0, 1, 1)),  # stretched
        (ImagePreprocessing(50, (50, 50)), (200, 100), (0.25, 0, 0.75, 1)),
        (ImagePreprocessing(50, (50, 50)), (100, 200), (0, 0.25, 1, 0.75)),
        (ImagePreprocessing(40, (50, 50)), (100, 100), (-0.125, -0.125, 1.125, 1.125)),  # a black border
        (ImagePreprocessing(50, (50, 50), pad_color=WHITE), (100, 50), (0, -0.5, 1, 1.5)),
        (ImagePreprocessing((60, 60), (30, 30), pad_color=WHITE), (100, 50), (0.25, 0, 0.75, 1)),
        (ImagePreprocessing((100, 200), None, pad_color=WHITE, letterbox=True), (50, 50), (-0.5, 0, 1.5, 1)),
        (ImagePreprocessing((100, 200), None, pad_color=WHITE, letterbox=True), (80, 20), (0, -0.5, 1, 1.5)),
    ],
)
def test_the_box_that_the_model_sees_is_where_its_view_comes_from(
    how: ImagePreprocessing, size: tuple[int, int], box: tuple[float, float, float, float]
) -> None:
    """By hand, and in the view itself: the picture brightens from left to right and from top to bottom."""
    left, top, right, bottom = found = seen_box(size, how)
    assert found == pytest.approx(box)
    x, y = np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1])
    ramps = np.stack([np.tile(x, (size[1], 1)), np.tile(y[:, None], (1, size[0])), np.zeros(size[::-1])], axis=2)
    view = np.asarray(crop_view(Image.fromarray(ramps.astype(np.uint8)), how)).astype(float) / 255
    rows, columns = view.shape[:2]
    for row in range(2, rows, 7):
        for column in range(2, columns, 7):
            across = left + (column + 0.5) / columns * (right - left)
            down = top + (row + 0.5) / rows * (bottom - top)
            if 0.1 < across < 0.9 and 0.1 < down < 0.9:
                assert view[row, column, :2] == pytest.approx([across, down], abs=0.04)
