"""Checkpoints that come quantised, exported: a bundle holds their weights to the last bit and answers like them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ORT, Workshop, call, padded
from legacy import make_qwen_vl
from ready_checkpoints import (
    Floats,
    gptq_tensors,
    rounded,
    stored,
    write_awq,
    write_compressed,
    write_float8,
    write_gptq,
    write_multiplied,
)
from safetensors.torch import save_file
from tiny import Inputs, make_inputs

from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.pipeline import Pipeline
from himap_export.engines.weight_file import write_safetensors
from himap_export.exporter.cli import main as export_main
from himap_export.exporter.quantize import taking
from himap_export.exporter.quantize.packing import unpack_int4
from himap_export.graphs.errors import Exit
from himap_export.graphs.ports import LinearForm
from himap_export.validate.cli import main as validate_main
from himap_export.validate.reference.criteria import reference_himap
from himap_export.validate.reference.reference import Reference

Maker = Callable[[Path, Path], dict[str, Floats]]
CUTS = reference_himap(1, 3, 0.5, 0.75)
SMALL = ("--k1", 1, "--k2", 3, "--text-budget", 24, "--max-new-tokens", 8)
INT4, INT8, WHOLE = LinearForm("int4", 32), LinearForm("int8", 32), LinearForm("int8")
MAKERS: Mapping[str, tuple[Maker, LinearForm | None]] = {  # and the form that takes it over
    "awq": (write_awq, INT8),
    "awq without zero points": (lambda s, o: write_awq(s, o, symmetric=True), INT4),
    "gptq": (write_gptq, INT4),
    "gptq v2, 8 bits": (lambda s, o: write_gptq(s, o, version=2, bits=8, group=-1), WHOLE),
    "gptq in order of activation": (lambda s, o: write_gptq(s, o, activation_order=True), None),
    "W4A16": (write_compressed, INT4),
    "W8A16": (lambda s, o: write_compressed(s, o, bits=8, group=-1), WHOLE),
    "W8A16 with zero points": (lambda s, o: write_compressed(s, o, bits=8, symmetric=False), None),
    "fp8, dynamic": (write_float8, None),
    "fp8": (lambda s, o: write_float8(s, o, static=True), None),  # which no CPU backend computes on
}
WHY = {
    "awq": "zero points taken off, which makes 4 bits 8",
    "gptq in order of activation": "scales in order of activation",
    "W8A16 with zero points": "zero points of 8 bits", "fp8, dynamic": "fp8 without a stored scale of activations",
    "fp8": "{backend} has no fp8 weights",
}  # fmt: skip


def export(source: Path, out: Path, *flags: object, backend: str = "onnxruntime") -> Bundle:
    assert call(export_main, source, *SMALL, "--backend", backend, *flags, "--out", out) == 0
    return Bundle.open(out)


def held(bundle: Bundle) -> dict[str, Floats]:
    """The weights [out,in] of a bundle's linear layers, quantised or not."""
    tensors: dict[str, torch.Tensor] = {}
    for file in bundle.manifest.weights:
        tensors |= stored(bundle.folder / Path(file).parent)
    found = {}
    for name, weight in bundle.manifest.quantised().items():
        values = tensors[f"{name}.{weight.kind}"].numpy()
        values = unpack_int4(values) if weight.kind == "int4" else values
        scales = tensors[f"{name}.scale"].float().numpy().reshape(-1, values.shape[1])
        found[name] = np.asarray((values * scales.repeat(len(values) // len(scales), axis=0)).T)
    return {name: t.float().numpy() for name, t in tensors.items() if name.endswith(".weight")} | found


def check_answers(bundle: Path, plain: Path, inputs: Inputs, backend: str = "onnxruntime") -> None:
    """A prompt, and a token behind it, activations as they are: kept sets and logits are those of the checkpoint
    `plain`, in PyTorch."""
    pipeline = Pipeline(Bundle.open(bundle).select(), backend, Opening(threads=1, exact=True))
    found, layout = pipeline.prefill(inputs.input_ids, inputs.pixel_values)
    reference, arrays = Reference(plain, torch.float32), (inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
    truth = reference.prefill(*arrays, cuts=CUTS)
    for kept, expected in zip(found.kept.values(), truth.kept, strict=True):
        np.testing.assert_array_equal(kept, padded(expected, kept.shape[1]))
    np.testing.assert_allclose(found.logits, truth.logits, atol=1e-3)
    given = np.full((1, 2), 7)
    logits = reference.answer(truth, 2, given)[1]
    np.testing.assert_allclose(pipeline.step(given[:, 0], layout.lengths), logits[:, 1], atol=1e-3)


ALWAYS = ("awq", "gptq", "gptq in order of activation", "fp8")  # the layouts themselves are tests/exporter's


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "onnxruntime") for name in ALWAYS),
        ("gptq", "openvino"),
        *(pytest.param(name, "onnxruntime", marks=pytest.mark.slow) for name in MAKERS if name not in ALWAYS),
        pytest.param("awq", "openvino", marks=pytest.mark.slow),
    ],
)
def test_a_bundle_holds_the_weights_and_answers_like_them(
    work: Workshop, tmp_path: Path, name: str, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, form = MAKERS[name]
    source = work.checkpoint("mqa4")
    made = make(source, tmp_path / "made")
    assert len(made) == 7 * 6
    bundle = export(tmp_path / "made", tmp_path / "bundle", backend=backend)
    told = capsys.readouterr().err
    block = f" in blocks of {form.block}" if form and form.block else ""
    became = f": {len(made)} weights {f'as {form.kind}{block}' if form else 'multiplied out to fp32'}"
    reason = f" ({WHY[name].format(backend=backend)})" if name in WHY else ""
    assert [line for line in told.splitlines() if line.endswith(became + reason)], told
    records = bundle.manifest.quantised()
    assert set(records) == (set(made) if form else set())
    assert all((w.kind, w.block, w.error) == (form.kind, form.block, 0) for w in records.values() if form)
    found = held(bundle)
    for weight, values in made.items():
        np.testing.assert_array_equal(found[weight], values, weight)
    write_multiplied(source, tmp_path / "plain", made)
    check_answers(bundle.folder, tmp_path / "plain", make_inputs(work.tiny("mqa4"), [9], [5]), backend)


@pytest.mark.parametrize("name", ["awq", "gptq in order of activation"])
def test_validation_passes(work: Workshop, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Judged by the same weights, multiplied out: Hugging Face's modules read none of these checkpoints."""
    MAKERS[name][0](work.checkpoint("mqa4"), tmp_path / "made")
    bundle = export(tmp_path / "made", tmp_path / "bundle")
    capsys.readouterr()
    assert call(validate_main, bundle.folder, "--prompts", 2, "--max-new-tokens", 3, "--no-speed", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and found["parity"]["kept_k1"]["verdict"] in ("identical", "tie")


def test_a_fused_projection(tmp_path: Path) -> None:
    """Qwen-VL's GPTQ release holds query, key and value as one layer."""
    make_qwen_vl(tmp_path / "source")
    made = write_gptq(tmp_path / "source", tmp_path / "made")
    bundle = export(tmp_path / "made", tmp_path / "bundle")
    records, found = bundle.manifest.quantised(), held(bundle)
    assert len(made) == 5 * 5 and len(records) == 5 * 7
    for n, part in enumerate(("[0:128]", "[128:256]", "[256:384]")):
        fused = "transformer.h.3.attn.c_attn.weight"
        np.testing.assert_array_equal(found[fused + part], made[fused][128 * n : 128 * (n + 1)])


def test_layers_of_each_own_form(work: Workshop, tmp_path: Path) -> None:
    """Where the width of a layer allows no block it is multiplied out; what is not quantised stays as it is."""
    source = work.checkpoint("gqa2")  # 48 wide; 64 and 96 where a layer goes back to that
    made = write_gptq(source, tmp_path / "made", group=-1)
    bundle = export(tmp_path / "made", tmp_path / "bundle", "--weight-form", "embedded")
    forms = {name.split(".")[-2]: LinearForm(w.kind, w.block) for name, w in bundle.manifest.quantised().items()}
    assert forms == {"o_proj": LinearForm("int4", 64), "down_proj": LinearForm("int4", 32)}
    found = held(bundle)
    for weight, values in made.items():
        np.testing.assert_array_equal(found[weight], values, weight)
    write_multiplied(source, tmp_path / "plain", made)
    check_answers(bundle.folder, tmp_path / "plain", make_inputs(work.tiny("gqa2"), [9], [5]))


def test_a_quantised_head_that_is_the_embedding_too(work: Workshop, tmp_path: Path) -> None:
    """Rows of it are looked up, so it is multiplied out."""
    source, made = work.checkpoint("tied"), tmp_path / "made"
    weights, name = write_gptq(source, made), "language_model.model.embed_tokens"
    table = rounded(stored(source)[f"{name}.weight"].numpy(), 32)

    def quantise_table(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{name}.weight"]
        tensors.update({f"{name}.{part}": tensor for part, tensor in gptq_tensors(table).items()})

    spoiled(made, quantise_table)
    bundle = export(made, tmp_path / "bundle")
    assert set(bundle.manifest.quantised()) == set(weights)
    np.testing.assert_array_equal(held(bundle)[f"{name}.weight"], table.weight)
    write_multiplied(source, tmp_path / "plain", weights | {f"{name}.weight": table.weight})
    check_answers(bundle.folder, tmp_path / "plain", make_inputs(work.tiny("tied"), [9], [5]))


@pytest.mark.parametrize("form", ["shared", "embedded"])
def test_what_is_multiplied_out_never_lies_in_a_temporary_folder(
    work: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """That may be memory: it is written beside the bundle, and shared by all graphs where it is."""
    MAKERS["gptq in order of activation"][0](work.checkpoint("mqa4"), tmp_path / "made")
    written, write = list[Path](), write_safetensors
    monkeypatch.setattr(taking, "write_safetensors", lambda file, *rest: (written.append(file), write(file, *rest)))
    bundle = export(tmp_path / "made", tmp_path / "bundle", "--weight-form", form)
    assert [file.is_relative_to(tmp_path) for file in written] == [True]
    files = {Path(file).name for file in bundle.manifest.files if file.startswith("weights/")}
    assert (form == "shared") == (files == {"plain.safetensors", "multiplied.safetensors"})
    assert {path.name for path in bundle.folder.iterdir() if path.is_dir()} == {"weights"}
    assert not any("tmp" in file for file in bundle.manifest.files)


# --- what is refused, before anything is built ---


def refused(capsys: pytest.CaptureFixture[str], source: Path, out: Path, words: str, *flags: object) -> None:
    capsys.readouterr()
    assert call(export_main, source, *SMALL, *ORT, *flags, "--out", out) == Exit.USAGE
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and words in errors[0] and not out.exists(), errors


def test_what_does_not_go_with_a_quantised_checkpoint(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gptq(work.checkpoint("mqa4"), made := tmp_path / "made")
    out = tmp_path / "bundle"
    refused(capsys, made, out, "comes quantised: by gptq (leave --quantize out", "--quantize", "int8")
    refused(capsys, made, out, "quantised weights cannot be inputs of engines", "--engines-only")
    refused(capsys, made, out, "quantised weights cannot be links", "--hard-link")
    refused(capsys, made, out, "--block goes with --quantize", "--block", "64")
    refused(capsys, made, out, "cannot be inputs", "--weight-form", "shared", "--backend", "tensorrt-rtx")


def test_a_dry_run_says_how_a_checkpoint_comes(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gptq(work.checkpoint("mqa4"), tmp_path / "made")
    (tmp_path / "made" / "model.safetensors").unlink()
    capsys.readouterr()
    assert call(export_main, tmp_path / "made", *SMALL, *ORT, "--dry-run") == 0
    assert "linear layers as gptq has them" in capsys.readouterr().out


def spoiled(made: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = stored(made)
    change(tensors)
    save_file(tensors, made / "model.safetensors")


def test_quantised_weights_that_are_none_of_the_decoders(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_awq(work.checkpoint("mqa4"), made := tmp_path / "made")
    tower, layer = "vision_tower.encoder.layers.0.mlp.fc1", "language_model.model.layers.0.mlp.up_proj"

    def quantise_tower(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{tower}.weight"]
        tensors.update(
            {f"{tower}.{part}": tensors[f"{layer}.{part}"].clone() for part in ("qweight", "qzeros", "scales")}
        )

    spoiled(made, quantise_tower)
    refused(capsys, made, tmp_path / "out", f"1 quantised weights are none of the decoder's: {tower}.weight;")


def test_quantised_weights_of_another_model(work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_awq(work.checkpoint("mqa4"), made := tmp_path / "made")
    down, up = (f"language_model.model.layers.0.mlp.{name}_proj" for name in ("down", "up"))
    spoiled(
        made, lambda tensors: tensors.update({k.replace(up, down): t.clone() for k, t in tensors.items() if up in k})
    )
    words = f"{down}.weight does not fit: it is [128, 64], the model's configuration says [64, 128]"
    refused(capsys, made, tmp_path / "out", words)
