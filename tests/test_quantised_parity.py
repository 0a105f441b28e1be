"""Quantised bundles of every family on both CPU backends, against PyTorch over the same dequantised weights.

One export holds both backends' engines. Judged are the engines with activations as they are, by the gates of fp32: what
is kept must be identical. How far rounding activations carries them, as deployed, is reported.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import OPENVINO, ORT, Workshop, call
from families import FAMILIES
from tiny import make_inputs
from transformers import AutoModelForImageTextToText

from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.session import open_pipeline
from himap_export.exporter.cli import main as export_main
from himap_export.validate.cli import main as validate_main
from himap_export.validate.reference.criteria import reference_himap

CUTS = reference_himap(1, 3, 0.5, 0.75)
SIZES = {"qwen2.5-vl": ("140x84", "84x140"), "qwen3-vl": ("160x96", "96x160")}
Capture = pytest.CaptureFixture[str]


def validated(capsys: Capture, bundle: Path, *flags: object) -> dict[str, Any]:
    capsys.readouterr()
    asked = ("--prompts", 4, "--max-new-tokens", 4, "--no-speed", "--threads", 1, "--json")
    left = call(validate_main, bundle, *asked, *flags)
    said = capsys.readouterr()
    assert left == 0, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


SLOW = {
    "int4": FAMILIES.keys() - {"qwen3-vl"},
    "int8": FAMILIES.keys() - {"llava"},
}  # they repeat what others show


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[pytest.mark.slow] * (name in slow))
        for kind, slow in SLOW.items()
        for name in FAMILIES
    ],
)
def test_families_pass_validation(work: Workshop, name: str, kind: str, capsys: Capture) -> None:
    """GQA, biases, q/k norms, M-RoPE, deepstack, tiles; batches of 3 leave one prompt of four to itself."""
    size = ("--image-size", SIZES[name][0]) if name in SIZES else ()
    flags = ("--batch", 3, "--k1", 1, "--k2", 2, "--r1", 0.5, "--r2", 0.5, *size, "--quantize", kind, "--quantize-head")
    bundle = work.family_bundle(name, *ORT, *OPENVINO, *flags)
    manifest = Bundle.open(bundle).manifest
    assert {weight.kind for weight in manifest.quantised().values()} == {kind}
    assert any("lm_head" in weight or "embed" in weight or "output" in weight for weight in manifest.quantised())
    for backend in ("onnxruntime", "openvino"):
        found = validated(capsys, bundle, "--model", work.family(name), "--backend", backend)
        verdicts = {cut["verdict"] for what, cut in found["parity"].items() if what.startswith("kept_")}
        assert verdicts == {"identical"}


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_decode_reads_weights_as_they_are_stored(work: Workshop, kind: str, tmp_path: Path) -> None:
    """Each of a layer's seven linear layers is MatMulNBits, over weights that every graph maps from one file; OpenVINO
    has a compressed product in fp32 only."""
    import onnx

    bundle = work.bundle("tied", "--quantize", kind, "--backend", "onnxruntime", cuts=CUTS)
    manifest = Bundle.open(bundle).manifest
    engine, layers = manifest.engines["onnxruntime"]["decode"], manifest.decoder.layers
    graph = onnx.load(bundle / engine.file, load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("MatMulNBits") == 7 * layers and "DequantizeLinear" not in operators
    held = [{entry.key: entry.value for entry in part.external_data} for part in graph.initializer]
    assert sum(entries.get("location") == engine.weights for entries in held) == 2 * 7 * layers
    stored = "i4" if kind == "int4" else "i8"
    for dtype in ("fp32", "bf16"):
        made = work.bundle("tied", "--quantize", kind, *OPENVINO, "--dtype", dtype, cuts=CUTS)
        listed = Bundle.open(made).manifest.engines["openvino"]["decode"].kernels
        assert any(k.startswith(f"{7 * layers}x FullyConnected") and k.endswith(f", {stored})") for k in listed), listed


def test_inputs_may_fill_no_block(work: Workshop, capsys: Capture, tmp_path: Path) -> None:
    """One scale for all 72 inputs: onnxruntime takes them in blocks of 32, the last one padded."""
    config = FAMILIES["llava"].config()
    config.text_config.intermediate_size = 72
    folder, out = tmp_path / "model", tmp_path / "out"
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    assert call(export_main, folder, "--out", out, "--k1", 1, "--k2", 2, *ORT, "--quantize", "int8") == 0
    validated(capsys, out, "--model", folder)


def test_embedded_weights_give_the_same_answers(work: Workshop) -> None:
    inputs = make_inputs(work.tiny("tied"), [9], [5])
    shared, embedded = (
        work.bundle("tied", "--quantize", "int4", *ORT, *form, cuts=CUTS)
        for form in ((), ("--weight-form", "embedded"))
    )
    one, other = (work.answer(bundle, inputs, "--max-new-tokens", "8") for bundle in (shared, embedded))
    for what in ("kept_k1", "kept_k2", "tokens", "logits"):
        np.testing.assert_array_equal(other[what], one[what])


def test_prefill_in_int4_is_exact_as_deployed(work: Workshop) -> None:
    """What is kept does not hang on how activations are rounded: in int4 only decode rounds them."""
    bundle = Bundle.open(work.bundle("tied", "--quantize", "int4", *ORT, cuts=CUTS))
    inputs, found = make_inputs(work.tiny("tied"), [9], [5]), []
    for exact in (False, True):
        pipeline = open_pipeline(bundle.select(), "onnxruntime", Opening(1, exact=exact))
        prefilled, layout = pipeline.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
        found.append((prefilled.logits.copy(), pipeline.step(prefilled.logits.argmax(-1), layout.lengths).copy()))
    (first, step), (exact_first, exact_step) = found
    np.testing.assert_array_equal(first, exact_first)
    assert 0 < np.abs(step - exact_step).max() < 0.1 * np.abs(exact_step).max()
