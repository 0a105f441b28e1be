"""The gate of the pixels: it holds for what the bundle makes of a picture, and fails for every wrong preprocessing."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ORT, SHAPES_64, Workshop, call
from families import FAMILIES
from msgspec import structs
from msgspec.structs import asdict
from PIL import Image
from sklearn.datasets import load_sample_images

from himap_export.engines.bundle import Bundle
from himap_export.engines.image import ImagePreprocessing, load_image, preprocess
from himap_export.engines.manifest import ImageSpec
from himap_export.engines.prompt import Expansion, Segment
from himap_export.exporter.family import ImageOptions
from himap_export.exporter.planning import describe
from himap_export.exporter.processor import read_processor
from himap_export.exporter.registry import resolve
from himap_export.validate.checkpoint import Source
from himap_export.validate.cli import main
from himap_export.validate.parity.compare import Answers, Parity
from himap_export.validate.parity.pixels import PixelParity, compare_pixels, with_pixels

SOURCE = Source(SHAPES_64, None, False)
RIGHT = ImagePreprocessing(112, (112, 112))
PICTURE = ImageSpec((112, 112), 1, 64, (8, 8), RIGHT, Expansion((Segment("", 64),)))
EMPTY = Parity(1, (), (), Answers(1, 1, None, 0.0), (), {})


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph, turned as cameras do."""
    file, exif = tmp_path_factory.mktemp("pictures") / "china.jpg", Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(load_sample_images().images[0]).save(file, exif=exif, quality=95)
    return file


def spec_of(how: ImagePreprocessing) -> ImageSpec:
    return ImageSpec(how.output_size, how.tiles, how.tiles, (1, 1), how, Expansion((Segment("", how.tiles),)))


def compared(photograph: Path, how: ImagePreprocessing | ImageSpec, source: Source = SOURCE) -> PixelParity:
    picture = how if isinstance(how, ImageSpec) else spec_of(how)
    ours = preprocess(load_image(photograph), picture.preprocessing)
    return compare_pixels(ours, [photograph], picture, source)


def passes(found: PixelParity) -> bool:
    return with_pixels(EMPTY, found).passed


def test_the_right_pixels_are_equal_bit_for_bit(photograph: Path) -> None:
    found = compared(photograph, RIGHT)
    assert found.found is not None and found.found.max_abs == 0 and found.found.scale > 1 and not found.note
    assert passes(found)


WRONG: dict[str, dict[str, Any]] = {
    "another mean": {"mean": (0.48145466, 0.4578275, 0.4083)},
    "means of another order": {"mean": (0.40821073, 0.4578275, 0.48145466)},
    "another deviation": {"std": (0.26862954, 0.26130258, 0.27578)},
    "another filter": {"resample": "bilinear"},
    "another scale": {"rescale_factor": 1 / 256},
    "padded": {"pad_color": (122, 116, 104)},
    "stretched": {"resize": (112, 112), "crop": None},
    "another shorter edge": {"resize": 113},
    "another size": {"resize": 56, "crop": (56, 56)},
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_preprocessing_fails_the_gate(photograph: Path, mistake: str) -> None:
    found = compared(photograph, ImagePreprocessing(**{**asdict(RIGHT), **WRONG[mistake]}))
    assert not passes(found)
    parity = with_pixels(EMPTY, found)
    assert [gate.name for gate in parity.gates if not gate.passed] == ["pixels"]
    assert ("[1, 3, 56, 56]" in found.note) == (mistake == "another size")


def test_the_least_mistake_is_far_above_the_limit(photograph: Path) -> None:
    """One byte of one pixel."""
    ours = preprocess(load_image(photograph), RIGHT)
    ours[0, 0, 5, 5] += 1 / 255 / RIGHT.std[0]
    found = compare_pixels(ours, [photograph], PICTURE, SOURCE)
    (gate,) = with_pixels(EMPTY, found).gates
    assert not gate.passed and gate.value > 1000 * gate.limit
    ours = preprocess(load_image(photograph), RIGHT)
    ours[0, 0, 0, 0] = np.nan
    assert not passes(compare_pixels(ours, [photograph], PICTURE, SOURCE))


@pytest.fixture(scope="module", params=[name for name, row in FAMILIES.items() if not row.frames])
def family(work: Workshop, request: pytest.FixtureRequest) -> tuple[str, Source]:
    name: str = request.param
    return name, Source(work.family(name), None, False)


def spec_of_family(name: str, folder: Path) -> ImageSpec:
    """As an export reads it; colours are those of the family's row. How pictures are cut, the family says."""
    row = FAMILIES[name]
    if row.view is not None:
        model = resolve(str(folder))
        _, (vision,) = describe(model, ImageOptions(row.size))
        return read_processor(folder, model.family, {"": vision}).images[""]
    processor = row.processor()
    colours = {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}
    if row.patch is not None:
        return spec_of(ImagePreprocessing(row.size, None, pad_color=(127, 127, 127), letterbox=True, **colours))
    if name == "llava":
        return spec_of(ImagePreprocessing(56, row.size, **colours))
    return spec_of(ImagePreprocessing(row.size, None, tiles=row.tiles, **colours))


def test_every_family_is_compared_where_it_sees_the_same_picture(
    family: tuple[str, Source], photograph: Path, tmp_path: Path
) -> None:
    name, source = family
    row, picture = FAMILIES[name], spec_of_family(name, source.folder)
    proportional = tmp_path / "proportional.png"
    load_image(photograph).resize((row.size[1], row.size[0])).save(proportional)
    found = compared(proportional, picture, source)
    assert found.found is not None and found.found.max_abs == 0, found.note
    darker = structs.replace(picture.preprocessing, mean=(0.1, 0.2, 0.3))
    assert not passes(compared(proportional, structs.replace(picture, preprocessing=darker), source))
    found = compared(photograph, picture, source)
    if row.patch is None and row.view is None:
        assert found.found is not None and found.found.max_abs == 0
    else:
        assert found.found is None and passes(found)
        assert found.note.startswith("pixels not compared: 427x640 is letterboxed to") and "by design" in found.note


def test_why_nothing_is_compared(photograph: Path, tmp_path: Path) -> None:
    found = compared(photograph, RIGHT, Source(SHAPES_64, None, True))
    assert found.note.startswith("pixels not compared: the release prepares pictures by its own code")
    bare = Path(shutil.copytree(SHAPES_64, tmp_path / "bare"))
    settings = json.loads((bare / "processor_config.json").read_text())
    (bare / "processor_config.json").unlink()
    assert compared(photograph, RIGHT, Source(bare, None, False)).note == (
        f"pixels not compared: {bare} holds no image processor"
    )
    for changes, words in (
        ({"image_processor_type": "NoSuchImageProcessor"}, f"transformers cannot use the processor in {bare}: "),
        ({"size": {"shortest_edge": 10**9}}, "size.shortest_edge is 1000000000, expected 1 to 448"),
    ):
        (bare / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"] | changes))
        found = compared(photograph, RIGHT, Source(bare, None, False))
        assert found.found is None and words in found.note and "\n" not in found.note, found.note


def test_no_code_of_the_checkpoint_runs(photograph: Path, tmp_path: Path) -> None:
    folder, ran = Path(shutil.copytree(SHAPES_64, tmp_path / "evil")), tmp_path / "ran"
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    (folder / "processor_config.json").unlink()
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    del settings["image_processor_type"]
    code = {"auto_map": {"AutoImageProcessor": "evil.Evil"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | code))
    found = compared(photograph, RIGHT, Source(folder, None, False))
    assert passes(found) and not ran.exists()


def test_the_command_tells_of_the_pixels(
    photograph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from himap_export.engines import processor
    from himap_export.exporter.cli import main as export_main

    bundle = tmp_path / "bundle"
    assert call(export_main, SHAPES_64, *ORT, "--out", bundle) == 0
    asked = (bundle, "--image", photograph, "--prompt", "what?", "--no-speed", "--max-new-tokens", 2, "--threads", 1)
    capsys.readouterr()
    assert call(main, *asked) == 0
    assert any(line.startswith("ok    pixels ") for line in capsys.readouterr().out.splitlines())
    assert call(main, *asked, "--json", "--report", tmp_path / "report") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parity"]["pixels"]["max_abs"] == 0
    assert found["gates"][0]["name"] == "pixels"
    assert ">pixels<" in (tmp_path / "report" / "report.html").read_text()

    how = Bundle.open(bundle).select().image.preprocessing
    wrong = ImagePreprocessing(**{**asdict(how), "resample": "bilinear"})
    monkeypatch.setattr(processor, "preprocess", lambda image, _: preprocess(image, wrong))
    assert call(main, *asked) == 3
    out, err = capsys.readouterr()
    assert any(line.startswith("FAIL  pixels ") for line in out.splitlines())
    assert err.splitlines()[-1] == "himap-validate: gates failed: pixels"
