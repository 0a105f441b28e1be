"""Tiles and overviews equal Hugging Face's own PIL processors, bit for bit, on photographs of the canvas's size."""

import math
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import (
    SmolVLMImageProcessorPil,
    get_resize_output_image_size,
)

from himap_export.engines.image import ImagePreprocessing, crop_view, preprocess, seen_box, tile_grid, view_size
from himap_export.engines.split import Split
from himap_export.graphs.errors import HimapError

CHINA = Image.fromarray(load_sample_images().images[0])  # 640 x 427
SIZES = [(427, 640), (224, 224), (60, 224), (113, 60), (57, 801), (300, 31), (56, 112)]
NEXT: Any = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
NEXT["image_grid_pinpoints"] = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
ONEVISION: Any = {"size": {"height": 56, "width": 56}}
ONEVISION["image_grid_pinpoints"] = [[56 * rows, 56 * columns] for rows in range(1, 7) for columns in range(1, 7)]


def photograph(size: tuple[int, int]) -> Image.Image:
    """The photograph, cut to the shape of `size` (height, width) and resized to it."""
    height, width = size
    shrink = min(CHINA.height / height, CHINA.width / width)
    box = CHINA.crop((0, 0, max(1, int(width * shrink)), max(1, int(height * shrink))))
    return box.resize((width, height), Image.Resampling.LANCZOS)


def canvas_of(size: tuple[int, int], split: Split, processor: Any) -> ImagePreprocessing:
    colours: Any = {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    resample = processor.resample.name.lower()
    return ImagePreprocessing(size, None, resample, **colours, pad_color=(9, 9, 9), letterbox=True, split=split)


def anyres(size: tuple[int, int], pinpoints: list[list[int]]) -> Split:
    sheet = select_best_resolution(size, pinpoints)
    spread = get_patch_output_size(np.empty((3, *size)), sheet, "channels_first")
    return Split((spread,), sheet, (56, 56), "first")


def smol(size: tuple[int, int]) -> Split:
    first = height, width = get_resize_output_image_size(np.empty((3, *size)), 200)
    ratio = width / height
    if width >= height:
        width = math.ceil(width / 56) * 56
        height = math.ceil(int(width / ratio) / 56) * 56
    else:
        height = math.ceil(height / 56) * 56
        width = math.ceil(int(height * ratio) / 56) * 56
    return Split((first, (height, width)), (height, width), (56, 56), "last")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "processor", [LlavaNextImageProcessorPil(**NEXT), LlavaOnevisionImageProcessorPil(**ONEVISION)], ids=["next", "ov"]
)
def test_anyres_is_that_of_hugging_face(processor: Any, size: tuple[int, int]) -> None:
    split, image = anyres(size, processor.image_grid_pinpoints), photograph(size)
    ours = preprocess(image, canvas_of(size, split, processor))
    theirs = processor(images=image, return_tensors="np")["pixel_values"][0]
    assert ours.shape == (split.tiles, 3, 56, 56)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("size", SIZES)
def test_splitting_is_that_of_smolvlm(size: tuple[int, int]) -> None:
    sides: Any = {"size": {"longest_edge": 200}, "max_image_size": {"longest_edge": 56}}
    processor: Any = SmolVLMImageProcessorPil(**sides)
    split, image = smol(size), photograph(size)
    how = canvas_of(size, split, processor)
    theirs = processor(images=[[image]], return_tensors="np", return_row_col_info=True)
    np.testing.assert_array_equal(preprocess(image, how), theirs["pixel_values"][0])
    assert tile_grid(image.size, how) == split.grid == (theirs["rows"][0][0], theirs["cols"][0][0])


def test_another_picture_is_letterboxed_to_the_canvas_and_drawn_without_the_sheets_border() -> None:
    how = canvas_of((60, 200), anyres((60, 200), NEXT["image_grid_pinpoints"]), LlavaNextImageProcessorPil(**NEXT))
    boxed = crop_view(CHINA, replace(how, split=None))
    np.testing.assert_array_equal(preprocess(CHINA, how), preprocess(boxed, how))
    assert tile_grid(CHINA.size, how) == (1, 1)  # the tiles' tokens are one grid
    assert view_size(CHINA.size, how) == (51, 168)
    assert crop_view(CHINA, how).size == (168, 51) and crop_view(CHINA, how, 3).size == (3 * 168, 3 * 51)
    tiles = (
        preprocess(CHINA, how)[1:] * np.float32(how.std)[:, None, None] + np.float32(how.mean)[:, None, None]
    ) * 255
    sheet = tiles.transpose(1, 2, 0, 3).reshape(3, 56, 168)
    assert sheet[:, 2:53].round().astype(int).tolist() == np.asarray(crop_view(CHINA, how)).transpose(2, 0, 1).tolist()
    assert abs(sheet[:, [0, 1, 53, 54, 55]]).max() < 0.001  # black
    assert seen_box(CHINA.size, how) == seen_box(CHINA.size, replace(how, split=None))


def test_without_an_overview_the_tiles_are_all() -> None:
    split = Split(((100, 100),), (112, 112), (56, 56))
    assert split.tiles == len(split.cut(CHINA, Image.Resampling.BICUBIC)) == 4
    assert replace(split, overview="last").tiles == len(
        replace(split, overview="last").cut(CHINA, Image.Resampling.BOX)
    )


BAD: list[tuple[dict[str, Any], str]] = [
    ({"resizes": ()}, "one resize"),
    ({"resizes": ((100, 0),)}, "outside"),
    ({"sheet": (112, 20000)}, "outside"),
    ({"sheet": (112, 100)}, "no multiple"),
    ({"resizes": ((100, 113),)}, "does not fit"),
    ({"resizes": ((16000, 16000), (100, 100))}, "pixels"),
    ({"sheet": (2**13, 2**14), "tile": (2**13, 2**13), "overview": "first"}, "pixels"),
]


@pytest.mark.parametrize(("change", "said"), BAD)
def test_a_damaged_split_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(HimapError, match=said):
        Split(**{"resizes": ((100, 100),), "sheet": (112, 112), "tile": (56, 56)} | change)


@pytest.mark.parametrize(
    "change", [{"letterbox": False, "pad_color": None}, {"letterbox": False, "tiles": 3}, {"tiles": 3}]
)
def test_a_split_needs_a_canvas(change: dict[str, Any]) -> None:
    how = ImagePreprocessing((60, 60), None, pad_color=(0, 0, 0), letterbox=True)
    with pytest.raises(HimapError, match="take"):
        replace(how, split=Split(((56, 56),), (56, 56), (56, 56)), **change)
