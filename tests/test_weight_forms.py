"""The same checkpoint with its weights shared, embedded, linked, or left out: the same answers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import HIMAP_TINY, ORT, SHAPES_64, Workshop, call, golden_inputs, save_inputs
from safetensors.torch import load_file, save_file
from tiny import make_inputs

from himap_export.engines.bundle import Bundle
from himap_export.engines.cli import main as run_main
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.ports import WeightSpec
from himap_export.validate.cli import main as validate_main
from himap_export.validate.reference.criteria import reference_himap

CUTS = reference_himap(1, 3, 0.5, 0.75)


@pytest.fixture(params=["gqa2", "sharded", "tied"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_embedded_weights_give_the_same_answers(work: Workshop, name: str) -> None:
    shared, embedded = work.bundle(name, cuts=CUTS), work.bundle(name, "--weight-form", "embedded", cuts=CUTS)
    inputs = make_inputs(work.tiny(name), [9], [5])
    one, other = (work.answer(bundle, inputs, "--max-new-tokens", "16") for bundle in (shared, embedded))
    for what in ("kept_k1", "kept_k2", "tokens"):
        np.testing.assert_array_equal(other[what], one[what])
    np.testing.assert_allclose(other["logits"], one["logits"], atol=1e-4)
    manifest = Bundle.open(embedded).manifest
    assert manifest.weight_form == "embedded"
    files = {f"weights/{graph}.safetensors" for graph in manifest.graphs}
    assert set(manifest.weights) == files <= manifest.files.keys()


def test_an_embedded_graph_needs_no_file_of_another(work: Workshop, tmp_path: Path) -> None:
    import onnxruntime

    bundle = work.bundle("gqa2", "--weight-form", "embedded", cuts=CUTS)
    (tmp_path / "weights").mkdir()
    for file in ("k2.onnx", "weights/k2.safetensors"):
        shutil.copy(bundle / file, tmp_path / file)
    onnxruntime.InferenceSession(str(tmp_path / "k2.onnx"))


def test_engines_hold_embedded_weights_and_nothing_else_is_left(work: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    flags = ("--backend", "tensorrt-rtx", "--weight-form", "embedded", "--k1", 1, "--k2", 3, "--text-budget", 24)
    assert call(export_main, SHAPES_64, *flags, "--out", out) == 0
    bundle = Bundle.open(out)
    assert {p.name for p in out.iterdir()} == {"manifest.json", "tensorrt-rtx", "tokenizer.json"}
    assert bundle.manifest.weights == () and all(g.file == "" for g in bundle.manifest.graphs.values())
    held = sum((out / e.file).stat().st_size for e in bundle.manifest.engines["tensorrt-rtx"].values())
    parameters = sum(np.prod(s.shape) for g in bundle.manifest.graphs.values() for s in g.weights.values())
    assert held > 2 * parameters


def test_engines_only_are_completed_by_the_checkpoint(work: Workshop, name: str, tmp_path: Path) -> None:
    """Where an index names the tensors, the folder is exported without the shards it lists."""
    source = work.checkpoint(name)
    bare, out = tmp_path / "bare", tmp_path / "bundle"
    absent = "*.safetensors" if name == "sharded" else ""
    shutil.copytree(source, bare, ignore=shutil.ignore_patterns(absent))
    flags = ("--k1", 1, "--k2", 3, "--text-budget", 24, "--max-new-tokens", 32, "--engines-only", *ORT)
    assert call(export_main, bare, *flags, "--out", out) == 0
    assert not (out / "weights").exists()
    inputs = make_inputs(work.tiny(name), [9], [5])
    expected = work.answer(work.bundle(name, cuts=CUTS), inputs, "--max-new-tokens", "16")
    found = work.answer(out, inputs, "--max-new-tokens", "16", "--weights", source)
    for what, array in expected.items():
        np.testing.assert_allclose(found[what], array, atol=1e-5)
    flags = ("--model", source, "--prompts", 1, "--max-new-tokens", 2, "--no-speed")
    assert call(validate_main, out, *flags) == 0


def test_the_manifest_lists_every_weight_an_engine_binds(work: Workshop) -> None:
    bundle = Bundle.open(work.bundle("gqa2", cuts=CUTS))
    stored = {name: WeightSpec(t.dtype, t.shape) for name, t in bundle.tensors.items()}
    for graph in bundle.manifest.graphs.values():
        assert graph.weights and all(stored[name] == spec for name, spec in graph.weights.items())


def test_a_wrong_folder_is_refused_before_anything_is_loaded(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = work.bundle("golden", "--k2", "5", "--engines-only")
    inputs = save_inputs(tmp_path / "in.npz", golden_inputs())
    half = work.checkpoint("half")
    for folder, words in (
        (work.checkpoint("gqa2"), "the engines take"),
        (half, "the engines take"),
        (tmp_path, "holds no weights"),
        (None, "give the checkpoint's folder with --weights"),
    ):
        capsys.readouterr()
        weights = () if folder is None else ("--weights", folder)
        assert call(run_main, engines, "--load-inputs", inputs, *weights) == (4 if folder is None else 2)
        assert words in capsys.readouterr().err
    whole = work.bundle("golden", "--k2", "5")
    assert call(run_main, whole, "--load-inputs", inputs, "--weights", HIMAP_TINY) == 2
    assert "has its own weights" in capsys.readouterr().err


@pytest.mark.slow
def test_an_alias_needs_no_network(tmp_path: Path) -> None:
    """LLaVA-7B at real size: graphs and their weights' names, no weights."""
    out = tmp_path / "bundle"
    assert call(export_main, "llava-7b", "--engines-only", *ORT, "--out", out) == 0
    manifest = Bundle.open(out).manifest
    wanted = manifest.graphs["k2"].weights
    assert wanted["language_model.model.layers.31.mlp.down_proj.weight"] == WeightSpec("fp16", (4096, 11008))
    assert wanted["language_model.lm_head.weight"] == WeightSpec("fp16", (32064, 4096))
    vision = manifest.graphs["vision"].weights
    assert vision["multi_modal_projector.linear_1.weight"] == WeightSpec("fp16", (4096, 1024))
    assert vision["vision_tower.vision_model.embeddings.class_embedding"] == WeightSpec("fp16", (1024,))
    assert manifest.prompt and manifest.tokenizer is None and manifest.model.pad_token == 32001
    assert sum(f.bytes for f in manifest.files.values()) < 10e6


def test_hard_links_are_made_on_request(work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(work.checkpoint("gqa2"), tmp_path / "model"))
    flags = ("--k1", 1, "--k2", 3, "--text-budget", 24, *ORT)
    for link in ((), ("--hard-link",)):
        out = tmp_path / f"bundle{len(link)}"
        assert call(export_main, source, *flags, *link, "--out", out) == 0
        weights = out / "weights" / "model.safetensors"
        assert weights.samefile(source / "model.safetensors") == bool(link)
        assert weights.read_bytes() == (source / "model.safetensors").read_bytes()
    out = tmp_path / "converted"
    assert call(export_main, source, *flags, "--dtype", "fp16", "--hard-link", "--out", out) == 2
    assert "cannot hard-link" in capsys.readouterr().err and not out.exists()


def test_flags_that_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (("--engines-only", "--hard-link"), ("--engines-only", "--weight-form", "embedded")):
        assert call(export_main, SHAPES_64, *flags, "--dry-run") == 2
        assert "not allowed with" in capsys.readouterr().err


def test_a_full_bundle_says_how_to_answer(work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    flags = ("--k2", 5, "--text-budget", 24, "--engines-only", "--json")
    assert call(export_main, HIMAP_TINY, *flags, "--out", out) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == sum(f.bytes for f in Bundle.open(out).manifest.files.values())


LAYER = "language_model.model.layers.3.mlp.up_proj.weight"
TOWER = "vision_tower.pre_layrnorm.weight"
UNUSED = "vision_tower.post_layernorm.weight"


def spoiled(folder: Path, dtype: torch.dtype = torch.float32, **values: float) -> Path:
    """himap-tiny, with a value of each of these tensors exchanged, which become of type `dtype`."""
    shutil.copytree(HIMAP_TINY, folder, ignore=shutil.ignore_patterns("*.npz"))
    tensors = load_file(folder / "model.safetensors")
    for name, value in values.items():
        tensors[name] = tensors[name].to(dtype)
        tensors[name].view(-1)[7] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "value", "kind", "code", "words"),
    [
        (TOWER, float("-inf"), torch.bfloat16, 1, f"tensor {TOWER} is not finite: 1 value is NaN or infinite"),
        (LAYER, 7, torch.int64, 2, f"tensor {LAYER} is no weight that a graph can use: it is stored as int64"),
        (LAYER, 1e5, torch.float32, 2, f"tensor {LAYER} does not fit fp16: it holds 100000, fp16 ends at 65504"),
    ],
    ids=["infinite", "integers", "too large"],
)
def test_weights_that_are_no_numbers_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: float,
    kind: torch.dtype,
    code: int,
    words: str,
) -> None:
    source, out = spoiled(tmp_path / "model", kind, **{name: value}), tmp_path / "out"
    assert call(export_main, source, "--k2", 5, "--text-budget", 24, "--dtype", "fp16", *ORT, "--out", out) == code
    said = capsys.readouterr().err
    assert words in said and "Warning" not in said and not out.exists()
    assert kind != torch.int64 or "vision" not in said  # what the decoder needs is looked at before anything is built


def test_only_what_a_graph_reads_must_be_finite_and_on_request_it_is_cut_down(tmp_path: Path) -> None:
    source, out = spoiled(tmp_path / "model", **{LAYER: -1e5, UNUSED: float("nan")}), tmp_path / "out"
    flags = ("--k2", 5, "--text-budget", 24, "--dtype", "fp16", "--allow-overflow", *ORT)
    assert call(export_main, source, *flags, "--out", out) == 0
    stored = load_file(out / "weights" / "model.safetensors")
    assert stored[LAYER].view(-1)[7].item() == -65504 and UNUSED not in stored


def test_a_folder_given_with_weights_is_read_as_the_export_reads_it(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files that are not the checkpoint's change nothing; the first folder that holds a tensor gives it."""
    engines, whole = work.bundle("golden", "--k2", "5", "--engines-only"), work.bundle("golden", "--k2", "5")
    stray = spoiled(tmp_path / "stray", **{LAYER: 9.0})
    shutil.copy(stray / "model.safetensors", stray / "zz-adapter.safetensors")
    shutil.copy(HIMAP_TINY / "model.safetensors", stray / "model.safetensors")
    other = spoiled(tmp_path / "other", **{LAYER: 5.0})
    expected = work.answer(whole, golden_inputs(), "--max-new-tokens", "4")
    found = work.answer(
        engines, golden_inputs(), "--max-new-tokens", "4", "--weights", str(stray), "--weights", str(other)
    )
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-5)
    bad, inputs = spoiled(tmp_path / "bad", **{LAYER: float("nan")}), save_inputs(tmp_path / "in.npz", golden_inputs())
    assert call(run_main, engines, "--load-inputs", inputs, "--weights", bad) == 1
    assert f"tensor {LAYER} is not finite" in capsys.readouterr().err
