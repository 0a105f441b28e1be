"""`himap-analyze` from its arguments to its report, on the shipped model; overlays; what it refuses."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import QUESTIONS_64, SHAPES_64, call
from PIL import Image

from himap_export.engines.image import clip_preprocessing
from himap_export.validate.analysis.cli import main
from himap_export.validate.analysis.overlay import overlay, strip
from himap_export.validate.analysis.page import report_files


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("analysis") / "flow"
    flags = ("--dataset", QUESTIONS_64, "--out", out, "--cams", 1, "--smooth", 2, "--threads", 1)
    assert call(main, SHAPES_64, *flags) == 0
    return out


def test_the_report_holds_every_analysis(report: Path) -> None:
    found = json.loads((report / "report.json").read_text())
    layers, questions = 10, len(QUESTIONS_64.read_text().splitlines())
    assert found["questions"] == questions and len(found["saliency"]) == len(found["attention_shares"]) == layers
    for layer in found["attention_shares"]:
        assert layer["system"] + layer["image"] + layer["user"] == pytest.approx(1, abs=1e-4)
    assert {(d["kind"], d["first"]) for d in found["disruption"]} == {
        (kind, first) for kind in ("image-to-text", "image-to-image", "random") for first in range(layers)
    }
    assert found["recommendation"]["reasons"]
    page = (report / "report.html").read_text()
    plots = ("saliency-shares", "saliency-visual", "attention-shares", "label-consistency", "score-consistency")
    for name in (*plots, "bias-ratio", "cam-1-decoder", "cam-1-tower"):
        assert (report / f"{name}.png").is_file(), name
    assert "Grad-CAM" in page and "default-src 'none'" in page
    assert "http" not in re.sub("<script.*?</script>", "", page, flags=re.DOTALL).replace("http-equiv", "")


def test_one_object_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--limit", 2, "--cams", 0, "--width", 3, "--json", "--threads", 1)
    assert call(main, SHAPES_64, "--dataset", QUESTIONS_64, "--out", tmp_path / "flow", *flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["questions"] == 2 and max(d["first"] for d in found["disruption"]) == 7


def test_what_is_refused(report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = Path(shutil.copytree(QUESTIONS_64.parent, tmp_path / "images")) / "bad.jsonl"
    bad.write_text(QUESTIONS_64.read_text() + '{"image": "nowhere.png", "question": "?", "answer": "red"}\n')
    for arguments, words in (
        ((SHAPES_64, "--dataset", QUESTIONS_64, "--out", report), "is not an empty folder"),
        ((SHAPES_64, "--dataset", tmp_path / "none.jsonl", "--out", tmp_path / "a"), "cannot read data set"),
        ((SHAPES_64, "--dataset", bad, "--out", tmp_path / "a"), "line 6"),
        (("no-such-model", "--dataset", QUESTIONS_64, "--out", tmp_path / "a"), "unknown model"),
        ((SHAPES_64, "--dataset", QUESTIONS_64, "--out", tmp_path / "a", "--width", 11), "windows must lie within"),
        (
            (SHAPES_64, "--dataset", QUESTIONS_64, "--out", tmp_path / "a", "--limit", 0),
            "--limit: '0' is not a",
        ),
        ((SHAPES_64, "--dataset", QUESTIONS_64, "--out", tmp_path / "a", "--cams", 10**9), "--cams: "),
        ((SHAPES_64, "--dataset", QUESTIONS_64, "--out", tmp_path / "a", "--threads", 10**5), "--threads: "),
        ((SHAPES_64, "--dataset", QUESTIONS_64, "--out", bad, "--overwrite"), "it is no folder"),
        ((SHAPES_64, "--dataset", QUESTIONS_64, "--out", tmp_path / "images" / "bad.jsonl" / "a"), "cannot write"),
    ):
        assert call(main, *arguments) == 2, arguments
        assert words in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_places_are_checked_before_any_work(report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, out = tmp_path / "mine", tmp_path / "out"
    mine.write_text("mine")
    out.mkdir()
    names = {path.name for path in report.iterdir()}
    assert names <= set(report_files(1)) and len(names) > 8
    for name in ("report.html", "bias-ratio.png", "cam-2-tower.png"):
        (out / name).symlink_to(mine)
        arguments = ("no-such-model", "--dataset", tmp_path / "none.jsonl", "--out", out, "--overwrite")
        assert call(main, *arguments) == 2
        assert f"{name} is there and is not a plain file" in capsys.readouterr().err
        (out / name).unlink()
    assert mine.read_text() == "mine"


def test_heat_glows_where_it_is(tmp_path: Path) -> None:
    image, heat = Image.new("RGB", (56, 56), (120, 120, 120)), np.zeros((4, 4), np.float32)
    heat[3, 0] = 1
    drawn = np.asarray(overlay(image, clip_preprocessing(56), heat), np.float64)
    side = drawn.shape[0]
    hot, cold = drawn[side * 7 // 8, side // 8], drawn[side // 8, side * 7 // 8]
    assert hot[0] - hot[2] > 60 and np.ptp(cold) < 10 and hot.sum() > cold.sum()
    sheet = strip([(f"layer {n}", overlay(image, clip_preprocessing(56), heat)) for n in range(7)])
    assert sheet.width > 5 * side and sheet.height > 2 * side
