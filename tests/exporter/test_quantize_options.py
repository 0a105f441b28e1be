"""What an export may be asked about quantised weights, and what it refuses, in one line, before any work."""

from pathlib import Path

import pytest
from commands import OPENVINO, ORT, SHAPES_64, Workshop, call

from himap_export.engines.bundle import Bundle
from himap_export.exporter.cli import main as export_main
from himap_export.validate.reference.criteria import reference_himap

CUTS = reference_himap(1, 3, 0.5, 0.75)
RTX = ("--backend", "tensorrt-rtx")
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--block", 32, *ORT), "--block goes with --quantize"),
        (("--keep-dtype", "*", *ORT), "--keep-dtype goes with --quantize"),
        (("--quantize-head", *ORT), "--quantize-head goes with --quantize"),
        (("--quantize", "int4", "--block", 48, *ORT), "int4 weights have no blocks of 48: it takes 32, 64, 128"),
        (("--quantize", "int4", "--block", 0, *ORT), "int4 weights have no blocks of 0"),
        (("--quantize", "int8-dynamic", "--block", 32, *ORT), "has no blocks to choose"),
        (("--quantize", "int4", "--keep-dtype", "layer.0", *ORT), "--keep-dtype layer.0 matches no layer"),
        (
            ("--quantize", "int4", "--keep-dtype", "*", *ORT),
            "--keep-dtype leaves no layer to quantise (leave --quantize",
        ),
        (("--quantize", "int8-dynamic", "--dtype", "fp32", "--batch", 2, *ORT), "weights need a --batch of 1"),
        (("--quantize", "int8-dynamic", "--dtype", "fp16", *ORT), "int8-dynamic weights need --dtype fp32"),
        (("--quantize", "int8-dynamic", "--dtype", "fp32", *OPENVINO), "openvino has no int8-dynamic weights"),
        (("--quantize", "nvfp4", *ORT), "nvfp4 weights need --calibrate"),
        (("--quantize", "int8-dynamic", "--dtype", "fp32", *RTX), "tensorrt-rtx has no int8-dynamic weights"),
        (("--quantize", "int4", "--engines-only", *ORT), "quantised weights cannot be inputs of engines"),
        (("--quantize", "int4", "--weight-form", "shared", *RTX), "quantised weights cannot be inputs of engines"),
        (("--quantize", "int4", "--hard-link", *ORT), "quantised weights cannot be links"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    flags: tuple[object, ...], words: str, tmp_path: Path, capsys: Capture
) -> None:
    assert call(export_main, SHAPES_64, *flags, "--out", tmp_path / "bundle") == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and words in said[0], said
    assert not any(tmp_path.iterdir())


def test_a_block_that_does_not_divide_names_the_layer_and_what_would(
    work: Workshop, tmp_path: Path, capsys: Capture
) -> None:
    asked = ("--k1", 1, "--k2", 3, "--quantize", "int4", *ORT, "--out", tmp_path / "bundle")
    assert call(export_main, work.checkpoint("gqa2"), *asked) == 2
    assert "layers.0.self_attn.q_proj has 48 inputs (no block does: leave" in capsys.readouterr().err
    assert call(export_main, work.checkpoint("tied"), *asked, "--block", 128) == 2
    assert "layers.0.self_attn.q_proj has 64 inputs (32, 64 would)" in capsys.readouterr().err


def test_layers_are_left_out_and_the_head_is_put_in(work: Workshop) -> None:
    flags = ("--quantize", "int4", "--keep-dtype", "layers.0.*", "--keep-dtype", "*.down_proj", *ORT)
    flags += ("--keep-dtype", "layers.0.mlp.*")  # all of which the first leaves out already
    held = Bundle.open(work.bundle("tied", *flags, cuts=CUTS)).manifest.quantised()
    assert len(held) == 6 * (6 - 1) and not any("layers.0." in name or "down_proj" in name for name in held)
    assert all(weight.block == 32 and 0.03 < weight.error < 0.2 for weight in held.values())
    whole = Bundle.open(
        work.bundle("tied", "--quantize", "int8", "--quantize-head", *ORT, cuts=CUTS)
    ).manifest.quantised()
    assert len(whole) == 7 * 6 + 1


def test_a_bundle_holds_a_quarter_and_nothing_twice(work: Workshop) -> None:
    bundle = Bundle.open(work.bundle("tied", "--quantize", "int4", *ORT, cuts=CUTS))
    assert bundle.manifest.weights == ("weights/plain.safetensors", "weights/quantised.safetensors")
    constants = {name for name, spec in bundle.manifest.wanted().items() if spec.constant}
    assert len(constants) == 2 * len(bundle.manifest.quantised())
    assert set(bundle.tensors) == set(bundle.manifest.wanted())
    assert bundle.weights().keys() - constants == bundle.weights(constants=False).keys()
