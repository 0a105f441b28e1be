"""`himap-export --quantize --backend tensorrt-rtx`: engines of the model in the package, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import ORT, SHAPES_64, call
from PIL import Image

from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import Manifest
from himap_export.exporter.cli import main as export_main
from himap_export.exporter.quantize.calibration import LEAST

RTX = ("--backend", "tensorrt-rtx")
SMALL = ("--k1", 1, "--k2", 3, "--text-budget", 24, "--max-new-tokens", 4)


def questions(folder: Path) -> Path:
    """As few as may be, about noise."""
    random = np.random.default_rng(0)
    for n in range(LEAST):
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    rows = [{"image": f"{n}.png", "question": "What is it?", "answer": "it"} for n in range(LEAST)]
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "set.jsonl"


def exported(out: Path, *flags: object) -> Manifest:
    assert call(export_main, SHAPES_64, *RTX, *SMALL, *flags, "--out", out) == 0
    return Bundle.open(out).manifest


def products(manifest: Manifest, graph: str) -> int:
    """Kernels of a graph that dequantise and multiply."""
    engine = manifest.engines["tensorrt-rtx"][graph]
    return sum(int(k.partition("x ")[0]) for k in engine.kernels if "(DequantizeLinear, Gemm" in k and "Conc" not in k)


@pytest.mark.parametrize(
    ("kind", "block", "targets", "joined"),
    [
        pytest.param("int4", 32, (80, 86, 89, 120, 121), 4, marks=pytest.mark.slow),  # as test_nvinfer_quantised has it
        ("fp8", 0, (89, 120, 121), 7),
        pytest.param("nvfp4", 16, (120, 121), 7, marks=pytest.mark.slow),
    ],
)
def test_a_command_makes_engines_of_quantised_weights(
    kind: str, block: int, targets: tuple[int, ...], joined: int, tmp_path: Path
) -> None:
    calibrated = () if kind == "int4" else ("--calibrate", questions(tmp_path))
    manifest = exported(tmp_path / "out", "--quantize", kind, *calibrated)
    assert manifest.weight_form == "embedded" and manifest.weights == () and manifest.quantization is not None
    assert manifest.quantization.method.endswith("round to nearest")
    found = manifest.quantised()
    assert len(found) == 70 and {(weight.kind, weight.block) for weight in found.values()} == {(kind, block)}
    assert all(0 < weight.error < {"int4": 0.12, "fp8": 0.04, "nvfp4": 0.12}[kind] for weight in found.values())
    engines = manifest.engines["tensorrt-rtx"]
    assert {engine.targets for engine in engines.values()} == {targets}
    for graph, layers in {"prefix": 1, "k1": 2, "k2": 7}.items():
        assert products(manifest, graph) == joined * layers, engines[graph].kernels


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--quantize", "fp8", *RTX), "fp8 weights need --calibrate: activations are rounded, too"),
        (("--quantize", "nvfp4", *RTX), "nvfp4 weights need --calibrate"),
        (("--quantize", "nvfp4", "--block", 32, *RTX), "nvfp4 weights have no blocks of 32"),
        (
            ("--quantize", "int8", "--block", 32, *RTX),
            "no int8 weights in blocks: it has one scale for each output; for these",
        ),
        (
            ("--quantize", "int8", "--block", 32, *ORT, "--backend", "tensorrt"),
            "tensorrt has no int8 weights",
        ),
        (("--quantize", "int8-dynamic", "--dtype", "fp32", *RTX), "tensorrt-rtx has no int8-dynamic weights"),
        (("--quantize", "fp8", *ORT), "it has int8, int4, int8-dynamic; for these there is tensorrt-rtx and tensorrt"),
        (("--quantize", "int4", "--engines-only", *RTX), "quantised weights cannot be inputs of engines"),
        (("--quantize", "int4", "--weight-form", "shared", *RTX), "quantised weights cannot be inputs of engines"),
    ],
)
def test_what_engines_cannot_hold_is_refused_before_work(
    flags: tuple[object, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrated = ("--calibrate", questions(tmp_path)) if "it has int8, int4" in words else ()
    assert call(export_main, SHAPES_64, *SMALL, *flags, *calibrated, "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert words in told[-1] and not (tmp_path / "out").exists()
