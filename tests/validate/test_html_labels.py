"""Where a report's labels go, and what happens to its example images."""

import io

import numpy as np
from PIL import Image

from himap_export.validate.html.images import kept_patches, png
from himap_export.validate.html.labels import Box, place, spread, stagger


def test_png_shrinks_and_never_grows() -> None:
    for size, expected in (((1280, 320), (640, 160)), ((100, 50), (100, 50))):
        with Image.open(io.BytesIO(png(Image.new("RGB", size)))) as image:
            assert image.format == "PNG" and image.size == expected


def test_kept_patches_fades_what_was_dropped() -> None:
    mask = np.array([[True, False], [False, True]])
    image = kept_patches(Image.new("RGB", (100, 100), (0, 0, 200)), mask)
    assert image.size == (400, 400)
    for row in range(2):
        for column in range(2):
            pixel = image.getpixel((100 + 200 * column, 100 + 200 * row))
            assert isinstance(pixel, tuple)
            assert (pixel == (0, 0, 200)) == mask[row, column]
            assert mask[row, column] or (min(pixel) > 150 and len(set(pixel)) == 1)  # a pale grey


def test_spread_keeps_labels_apart_and_near() -> None:
    assert spread([10, 90, 50], [20, 20, 20], 0, 100) == [10, 90, 50]
    assert spread([50, 50, 50], [20, 20, 20], 0, 100) == [30, 50, 70]
    assert spread([99, 98], [20, 30], 0, 100) == [90, 65]
    rng = np.random.default_rng(0)
    for _ in range(200):
        heights = rng.uniform(5, 20, 6)
        centres = np.array(spread(rng.uniform(0, 150, 6).tolist(), heights.tolist(), 0, 150))
        order = np.argsort(centres)
        gaps = np.diff(centres[order]) - (heights[order][1:] + heights[order][:-1]) / 2
        assert gaps.min() > -1e-9
        assert (centres - heights / 2).min() > -1e-9 and (centres + heights / 2).max() < 150 + 1e-9


def test_stagger_gives_touching_labels_rows_of_their_own() -> None:
    assert stagger([10, 50, 90], [30, 30, 30]) == [0, 0, 0]
    assert stagger([50, 10, 20], [30, 30, 30]) == [0, 0, 1]


def test_place_avoids_what_is_taken() -> None:
    points = [(50.0, 50.0), (52.0, 50.0), (98.0, 2.0)]
    taken = [Box(45, 45, 57, 55), Box(50, 0, 100, 44)]
    inside = Box(0, 0, 100, 100)
    boxes = place(points, [(20, 10)] * 3, taken, inside)
    for i, box in enumerate(boxes[:2]):
        assert box.covered([*taken, *boxes[:i]], inside) == 0
    assert boxes[2].right <= 100 and boxes[2].top >= 0
