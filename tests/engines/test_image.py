"""Pixels equal Hugging Face's own PIL processors, bit for bit, on real photographs and awkward pictures."""

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import to_builtins
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images
from transformers.image_utils import load_image as hf_load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from himap_export.engines.documents import typed
from himap_export.engines.image import (
    ImagePreprocessing,
    clip_preprocessing,
    crop_view,
    load_image,
    nearest_size,
    preprocess,
    tile_grid,
)
from himap_export.graphs.errors import Exit, HimapError

CHINA, FLOWER = (Image.fromarray(each) for each in load_sample_images().images)  # 640 x 427
BLOSSOM = FLOWER.crop((100, 0, 464, 427)).resize((512, 600), Image.Resampling.LANCZOS)  # portrait, 512 x 600
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def transparent(mode: str) -> Image.Image:
    image = CHINA.copy()
    image.putalpha(FLOWER.convert("L"))
    return image.convert(mode)


def logo() -> Image.Image:
    """Coloured letters on nothing: half transparent at their edges alone."""
    image = Image.new("RGBA", (542, 130))
    ImageDraw.Draw(image).text((10, 20), "himap-export", (17, 85, 124), ImageFont.load_default(80))
    return image


def palette_with_transparency() -> Image.Image:
    image = CHINA.quantize(16)
    image.info["transparency"] = 3
    return image


PICTURES = {
    "china": CHINA,
    "flower": FLOWER,
    "blossom": BLOSSOM,
    "logo": logo(),
    "portrait": CHINA.transpose(Image.Transpose.ROTATE_90),
    "square": CHINA.crop((0, 0, 427, 427)),
    "odd": FLOWER.resize((337, 335)),
    "exact": FLOWER.resize((336, 336)),
    "long": FLOWER.resize((900, 31)),
    "thin": FLOWER.resize((7, 500)),
    "tiny": FLOWER.resize((3, 5)),
    "pixel": FLOWER.resize((1, 1)),
    "grey": CHINA.convert("L"),
    "grey alpha": transparent("LA"),
    "rgba": transparent("RGBA"),
    "palette": CHINA.quantize(64),
    "palette alpha": palette_with_transparency(),
    "bilevel": CHINA.convert("1"),
    "cmyk": CHINA.convert("CMYK"),
    "16 bit": Image.fromarray(np.arange(400 * 300, dtype=np.uint16).reshape(300, 400)),
}
LLAVA_PAD = {"do_pad": True, "size": {"shortest_edge": 336}, "crop_size": 336}
SETTINGS: dict[str, tuple[Any, ImagePreprocessing]] = {
    "llava-1.5": (
        CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        clip_preprocessing(336),
    ),
    "odd crop": (
        CLIPImageProcessorPil(size={"shortest_edge": 90}, crop_size={"height": 61, "width": 84}, resample=2),
        ImagePreprocessing(90, (61, 84), "bilinear"),
    ),
    "crop beyond the picture": (
        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 97, "width": 90}),
        ImagePreprocessing(64, (97, 90)),
    ),
    "crop only": (
        CLIPImageProcessorPil(do_resize=False, crop_size={"height": 112, "width": 113}),
        ImagePreprocessing(None, (112, 113)),
    ),
    "pad to square": (
        LlavaImageProcessorPil(**LLAVA_PAD),
        ImagePreprocessing(336, (336, 336), pad_color=(122, 116, 104)),
    ),
    "siglip": (
        SiglipImageProcessorPil(size={"height": 384, "width": 380}),
        ImagePreprocessing((384, 380), None, mean=(0.5,) * 3, std=(0.5,) * 3),
    ),
    "bytes": (
        CLIPImageProcessorPil(size={"shortest_edge": 50}, crop_size=50, do_rescale=False, resample=1),
        ImagePreprocessing(50, (50, 50), "lanczos", rescale_factor=1.0),
    ),
    "not normalised": (
        CLIPImageProcessorPil(size={"shortest_edge": 50}, crop_size=50, do_normalize=False, resample=0),
        ImagePreprocessing(50, (50, 50), "nearest", mean=(0.0,) * 3, std=(1.0,) * 3),
    ),
}


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_pixels_equal_hugging_face(setting: str, picture: str) -> None:
    processor, how = SETTINGS[setting]
    image = PICTURES[picture]
    expected = processor(image.copy(), return_tensors="np")["pixel_values"][0]
    ours = preprocess(image, how)
    assert ours.dtype == np.float32 and ours.flags.c_contiguous
    assert ours.shape == (1, 3, *how.output_size)
    np.testing.assert_array_equal(ours[0], expected)


def tiled(tiles: int, height: int = 28, width: int = 28) -> ImagePreprocessing:
    return ImagePreprocessing((height, width), None, tiles=tiles)


LETTERBOX = ImagePreprocessing((90, 160), None, pad_color=(122, 116, 104), letterbox=True)
SETTINGS |= {"letterbox": (None, LETTERBOX), "tiles": (None, tiled(5))}


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("tiles", [3, 4, 5, 7, 13])
def test_tiles_equal_hugging_face(tiles: int, picture: str) -> None:
    """Where its processor chooses as many tiles by itself, and where it is told to."""
    image, how = PICTURES[picture], tiled(tiles, 28, 35)
    ours = preprocess(image, how)
    assert ours.dtype == np.float32 and ours.flags.c_contiguous and ours.shape == (tiles, 3, 28, 35)
    for least in (1, tiles - 1):
        processor = GotOcr2ImageProcessorPil(
            size={"height": 28, "width": 35}, crop_to_patches=True, min_patches=least, max_patches=tiles - 1
        )
        expected = processor(image.copy(), return_tensors="np")["pixel_values"]
        assert least == 1 or len(expected) == tiles
        if len(expected) == tiles:
            np.testing.assert_array_equal(ours, expected)


def test_two_tiles_have_no_thumbnail() -> None:
    processor = GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=2, max_patches=2
    )
    for image in (CHINA, BLOSSOM):
        expected = processor(image, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(preprocess(image, tiled(2)), expected[:2])


@pytest.mark.parametrize(
    ("tiles", "size", "grid"),
    [
        (1, (9, 1), (1, 1)),
        (2, (640, 427), (1, 2)),
        (2, (427, 640), (2, 1)),
        (3, (640, 427), (1, 2)),
        (5, (640, 427), (2, 2)),
        (5, (640, 200), (1, 4)),
        (7, (640, 427), (2, 3)),
        (7, (427, 640), (3, 2)),
        (8, (400, 400), (7, 1)),  # by difference a square is nearer to 1/7 than to 7
        (3, (25, 20), (2, 1)),  # as near to 1/2 as to 2: tall, as it is small
        (3, (50, 40), (1, 2)),
    ],
)
def test_arrangements(tiles: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
    image = CHINA.resize(size)
    assert tile_grid(image.size, tiled(tiles)) == grid
    assert crop_view(image, tiled(tiles)).size == (28 * grid[1], 28 * grid[0])


@pytest.mark.parametrize("picture", PICTURES)
def test_tiles_of_a_view_are_the_pixels_of_the_model(picture: str) -> None:
    image, how = PICTURES[picture], tiled(7)
    view, (_, columns) = np.asarray(crop_view(image, how)), tile_grid(image.size, how)
    pixels = preprocess(image, how).transpose(0, 2, 3, 1) * np.array(how.std) + np.array(how.mean)
    for n, tile in enumerate(pixels[:-1]):
        top, left = 28 * (n // columns), 28 * (n % columns)
        np.testing.assert_array_equal(view[top : top + 28, left : left + 28], np.rint(tile * 255))


@pytest.mark.parametrize(
    ("size", "place"),  # left, top, right, bottom
    [
        ((640, 360), (0, 0, 160, 90)),
        ((640, 427), (12, 0, 147, 90)),
        ((100, 200), (57, 0, 102, 90)),
        ((640, 10), (0, 44, 160, 46)),
        ((9000, 1), (0, 44, 160, 45)),
        ((1, 1), (35, 0, 125, 90)),
    ],
)
def test_letterbox_keeps_the_aspect_ratio(size: tuple[int, int], place: tuple[int, int, int, int]) -> None:
    image, (left, top, right, bottom) = FLOWER.resize(size), place
    view = crop_view(image, LETTERBOX)
    assert view.size == (160, 90)
    wanted = image.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(view.crop(place)), np.asarray(wanted))
    border = np.asarray(view).astype(int)
    border[top:bottom, left:right] = LETTERBOX.pad_color
    assert (border == LETTERBOX.pad_color).all()
    assert preprocess(image, LETTERBOX).shape == (1, 3, 90, 160)


def test_nearest_size_wastes_least() -> None:
    sizes = [(224, 224), (448, 448), (224, 448), (448, 224), (224, 672)]
    assert nearest_size([(427, 640)], sizes) == (224, 448)
    assert nearest_size([(640, 427)], sizes) == (448, 224)
    assert nearest_size([(500, 500)], sizes) == nearest_size([(500, 600)], sizes) == (448, 448)
    assert nearest_size([(1, 1000)], sizes) == (224, 672)
    assert nearest_size([(3, 3)], [(10, 20), (20, 10)]) == (10, 20)  # equal in all: the first
    assert nearest_size([(1, 1000)], [(8, 4)]) == (8, 4)


def test_nearest_size_of_several_images_wastes_least_of_all_together() -> None:
    """The factors multiply: two wide ones outvote a square; where all waste alike, the largest it is."""
    sizes = [(448, 448), (224, 448), (448, 224)]
    wide, tall, square = (224, 448), (448, 224), (300, 300)
    assert nearest_size([wide, wide, square], sizes) == nearest_size([square, wide, wide], sizes) == (224, 448)
    assert nearest_size([square, square, wide], sizes) == (448, 448)
    assert nearest_size([wide, tall], sizes) == (448, 448) and nearest_size([tall, tall, wide], sizes[1:]) == (448, 224)


@pytest.mark.parametrize("setting", SETTINGS)
def test_json_round_trip_is_exact(setting: str) -> None:
    how = SETTINGS[setting][1]
    assert typed(json.loads(json.dumps(to_builtins(how))), ImagePreprocessing, "image") == how


def test_defaults_are_clips() -> None:
    how = clip_preprocessing(224)
    assert (how.mean, how.std, how.output_size) == (MEAN, STD, (224, 224))


@pytest.mark.parametrize("picture", ["china", "rgba", "grey", "palette alpha", "16 bit"])
def test_files_are_read_as_hugging_face_reads_them(picture: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    PICTURES[picture].save(path)
    ours, theirs = load_image(path), hf_load_image(str(path))
    assert ours.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    processor, how = SETTINGS["llava-1.5"]
    np.testing.assert_array_equal(preprocess(ours, how), processor(str(path), return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "rotated.jpg"
    CHINA.save(path, exif=exif, quality=95)
    ours = load_image(path)
    assert ours.size == ((427, 640) if orientation >= 5 else (640, 427))
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(hf_load_image(str(path))))


@pytest.mark.parametrize("picture", ["china", "blossom", "tiny", "rgba"])
@pytest.mark.parametrize(
    "setting", ["llava-1.5", "odd crop", "crop beyond the picture", "pad to square", "siglip", "letterbox"]
)
def test_view_shows_the_pixels_of_the_model(setting: str, picture: str) -> None:
    how, image = SETTINGS[setting][1], PICTURES[picture]
    pixels = preprocess(image, how)[0].transpose(1, 2, 0) * np.array(how.std) + np.array(how.mean)
    view = crop_view(image, how)
    assert view.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(view), np.rint(pixels / how.rescale_factor))


@pytest.mark.parametrize(
    "setting",
    ["llava-1.5", "odd crop", "crop beyond the picture", "crop only", "pad to square", "letterbox", "tiles"],
)
def test_scaled_view_shows_the_same_region(setting: str) -> None:
    how = SETTINGS[setting][1]
    small, large = crop_view(BLOSSOM, how), crop_view(BLOSSOM, how, scale=3)
    assert large.size == (small.width * 3, small.height * 3)
    difference = np.asarray(large.reduce(3), np.float64) - np.asarray(small, np.float64)
    assert np.abs(difference).mean() < 3
    blurred = large.reduce(3)
    shifted = np.roll(np.asarray(blurred, np.float64), 1, axis=1) - np.asarray(small, np.float64)
    assert np.abs(shifted).mean() > 1.5 * np.abs(difference).mean()


def bomb(path: Path) -> None:
    """A PNG header that claims 30000 x 30000 pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(1000))]
    sized = [struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(sized))


def bad_file(kind: str, path: Path) -> None:
    if kind == "a folder":
        path.mkdir()
    elif kind == "bomb":
        bomb(path)
    elif kind in ("jpeg", "png", "gif", "tiff", "webp"):
        CHINA.save(path, kind.upper())
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    elif kind == "png with a broken chunk":
        CHINA.save(path, "PNG")
        content = bytearray(path.read_bytes())
        content[200:260] = bytes(60)
        path.write_bytes(content)
    elif kind == "text":
        path.write_text("not a picture")
    elif kind == "empty":
        path.touch()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "cannot read image .*No such file"),
        ("a folder", "Is a directory"),
        ("text", "not an image"),
        ("empty", "not an image"),
        ("bomb", "image has too many pixels"),
        *((kind, "image is damaged") for kind in ("jpeg", "png", "gif", "tiff", "webp", "png with a broken chunk")),
    ],
)
def test_bad_files_give_one_clear_line(kind: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    bad_file(kind, path)
    with pytest.raises(HimapError, match=message) as caught:
        load_image(path)
    assert caught.value.code == Exit.USAGE
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_needle_shaped_picture_does_not_fill_the_memory() -> None:
    needle = Image.new("RGB", (60000, 1))
    for how in (clip_preprocessing(336), SETTINGS["pad to square"][1]):
        with pytest.raises(HimapError, match="too long and thin") as caught:
            preprocess(needle, how)
        assert caught.value.code == Exit.USAGE


GOOD = to_builtins(clip_preprocessing(336))


@pytest.mark.parametrize(
    "change",
    [
        {"resize": "336"},
        {"resize": 0},
        {"resize": {"longest_edge": 336}},
        {"resize": None, "crop": None},
        {"crop": None},
        {"crop": [336]},
        {"crop": [336, 10**9]},
        {"crop": [16384, 16384]},
        {"crops": [336, 336]},
        {"resample": "cubic"},
        {"resample": 3},
        {"rescale_factor": None},
        {"rescale_factor": math.nan},
        {"mean": [0.5, 0.5]},
        {"mean": [0.5, 0.5, True]},
        {"std": [0.5, 0.5, 0]},
        {"std": [0.5, 0.5, -1]},
        {"rescale_factor": 0},
        {"pad_color": [0, 0, 256]},
        {"pad_color": [0.0, 0.0, 0.0]},
        {"letterbox": 1},
        {"letterbox": None},
        {"letterbox": True},
        {"letterbox": True, "resize": [4, 4], "crop": None},
        {"letterbox": True, "resize": [4, 4], "pad_color": [0, 0, 0]},
        {"letterbox": True, "crop": None, "pad_color": [0, 0, 0]},
        {"tiles": 0},
        {"tiles": 2},
        {"tiles": True},
        {"tiles": None},
        {"tiles": 10**9, "resize": [4, 4], "crop": None},
        {"tiles": -1, "resize": [4, 4], "crop": None},
        {"tiles": 2, "resize": [4, 4], "crop": None, "pad_color": [0, 0, 0]},
    ],
)
def test_damaged_manifests_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(HimapError, match="usable"):
        typed({**GOOD, **change}, ImagePreprocessing, "image")


@pytest.mark.parametrize("data", [None, [], "bicubic", {}])
def test_manifests_without_preprocessing_are_refused(data: object) -> None:
    with pytest.raises(HimapError, match="image is not usable"):
        typed(data, ImagePreprocessing, "image")
