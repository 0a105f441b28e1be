"""How quantised bundles are judged: by a reference over the same dequantised weights, which the gates hold them to; and
beside the checkpoint before rounding, which is only reported."""

import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from commands import ORT, QUESTIONS_64, SHAPES_64, Workshop, call
from safetensors.numpy import load_file, save_file

from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.onnxruntime.quantised import TURNED
from himap_export.engines.pipeline import Pipeline
from himap_export.engines.weight_file import read_header
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.errors import HimapError
from himap_export.graphs.plan import PruningPlan
from himap_export.validate import dequantised as dequantised_module
from himap_export.validate import validation
from himap_export.validate.baseline import export_baseline
from himap_export.validate.checkpoint import Source, load_reference
from himap_export.validate.cli import main as validate_main
from himap_export.validate.dequantised import judge_of
from himap_export.validate.parity.compare import Parity, compare
from himap_export.validate.parity.limits import ParityOptions
from himap_export.validate.parity.prompts import drawn_inputs
from himap_export.validate.parity.quantised import (
    EXACT,
    ORIGINAL,
    FreeRun,
    drift,
    other_runs,
    quantisation_cost,
)
from himap_export.validate.parity.runs import batched
from himap_export.validate.parity.weights import LIMIT, weight_errors
from himap_export.validate.reference.activations import int8_dynamic
from himap_export.validate.reference.criteria import reference_himap
from himap_export.validate.validation import validate

CUTS = reference_himap(2, 4, 0.5, 0.5)
OPTIONS = ParityOptions(new_tokens=8)
INT4 = ("--quantize", "int4", "--block", "32")
Arrays = Mapping[str, npt.NDArray[Any]]
Spoil = Callable[[npt.NDArray[np.uint8]], None]  # what a stored tensor's bytes become, in place


def read_all(folder: Path) -> dict[str, npt.NDArray[Any]]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def source_of(folder: Path) -> Source:
    return Source(folder, None, own_image=False)


# --- the gates ---


def judged(work: Workshop, name: str, bundle: Path, of: Path | None = None, verify: bool = True) -> Parity:
    """The parity of a bundle with the weights of the bundle `of`, itself if None."""
    with judge_of(Bundle.open(of or bundle), source_of(work.checkpoint(name))) as judge:
        spec = Bundle.open(bundle, verify=verify).select()
        pipeline = Pipeline(spec, "onnxruntime", Opening(threads=1, exact=True))
        return compare(pipeline, partial(load_reference, judge.folder, threads=1), drawn_inputs(spec, 4, 0), OPTIONS)


def failed(parity: Parity) -> set[str]:
    return {gate.name for gate in parity.gates if not gate.passed}


def spoiled(bundle: Path, folder: Path, ends: str, spoil: Spoil) -> Path:
    """A copy of `bundle` in `folder`, in whose engines the first tensor whose name ends so was changed."""
    shutil.copytree(bundle, folder)
    file = folder / TURNED
    tensor = next(t for name, t in read_header(file).items() if name.endswith(ends))
    stored = np.memmap(file, np.uint8, "r+", tensor.offset, (tensor.nbytes,))
    spoil(stored)
    stored.flush()
    return folder


def flip_a_nibble(stored: npt.NDArray[np.uint8]) -> None:
    stored[100] ^= 0x80  # of one weight of 4096 the sign


def enlarge(stored: npt.NDArray[np.uint8]) -> None:
    scales = stored.view(np.float32)
    scales *= 1.01


@pytest.mark.parametrize(
    ("ends", "spoil"),
    [("layers.0.self_attn.v_proj.weight.int4", flip_a_nibble), ("layers.0.mlp.down_proj.weight.scale", enlarge)],
)
def test_a_wrong_weight_fails(work: Workshop, tmp_path: Path, ends: str, spoil: Spoil) -> None:
    bundle = work.bundle("mha", *INT4, cuts=CUTS)
    assert not failed(judged(work, "mha", bundle))
    wrong = spoiled(bundle, tmp_path / "wrong", ends, spoil)
    assert {"prefix", "logits", "decode"} <= failed(judged(work, "mha", wrong, of=bundle, verify=False))


def test_weights_of_another_layer_fail_though_parity_holds(work: Workshop, tmp_path: Path) -> None:
    """Parity compares a bundle with a reference that holds the same wrong weights."""
    bundle, source = work.bundle("mha", *INT4, cuts=CUTS), source_of(work.checkpoint("mha"))
    wrong = tmp_path / "wrong"
    shutil.copytree(bundle, wrong)
    for file in ("weights/quantised.safetensors", TURNED):  # what the reference reads, and what the engines do
        at = {name: t for name, t in read_header(bundle / file).items() if "mlp.gate_proj" in name}
        for kind in ("int4", "scale"):
            own, theirs = (
                next(t for n, t in at.items() if f"layers.{i}.mlp.gate_proj.weight.{kind}" in n) for i in (2, 3)
            )
            content = np.fromfile(bundle / file, np.uint8, theirs.nbytes, offset=theirs.offset)
            np.memmap(wrong / file, np.uint8, "r+", own.offset, (own.nbytes,))[:] = content
    errors = {}
    for each in (bundle, wrong):
        opened = Bundle.open(each, verify=False)
        with judge_of(opened, source) as judge:
            errors[each] = weight_errors(opened, source, judge)
            pipeline = Pipeline(opened.select(), "onnxruntime", Opening(threads=1, exact=True))
            load = partial(load_reference, judge.folder, threads=1)
            assert not failed(compare(pipeline, load, drawn_inputs(pipeline.spec, 2, 0), OPTIONS))
    assert max(errors[bundle].values()) < LIMIT / 2
    assert {role for role, error in errors[wrong].items() if error > LIMIT} == {"layers.2.mlp.gate_proj.weight"}


def test_recorded_errors_are_the_weights(work: Workshop) -> None:
    """What the manifest says of each weight is what comes out when all is read again."""
    bundle, source = Bundle.open(work.bundle("mha", *INT4, cuts=CUTS)), source_of(work.checkpoint("mha"))
    with judge_of(bundle, source) as judge:
        whole, made = read_all(source.folder), read_all(judge.folder)
    for name, weight in bundle.manifest.quantised().items():
        error = np.linalg.norm(made[name] - whole[name]) / np.linalg.norm(whole[name])
        assert weight.error == pytest.approx(error, rel=1e-3)


def test_scaling_that_is_taken_back_is_no_error(work: Workshop, tmp_path: Path) -> None:
    """As AWQ does: norms divided and what reads them multiplied; so the outputs of up_proj and v_proj."""
    bundle, source = Bundle.open(work.bundle("mha", *INT4, cuts=CUTS)), source_of(work.checkpoint("mha"))
    scaled, random = read_all(source.folder), np.random.default_rng(0)
    prefix = next(name for name in scaled if "layers.0.mlp.up_proj" in name).partition("layers.0")[0]
    for layer in range(3):
        at = f"{prefix}layers.{layer}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            factor = np.exp(random.standard_normal(64)).astype(np.float32)
            scaled[f"{at}{norm}.weight"] /= factor
            for reader in readers:
                scaled[f"{at}{reader}.weight"] *= factor
        for writer, reader in (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")):
            factor = np.exp(random.standard_normal(len(scaled[f"{at}{writer}.weight"]))).astype(np.float32)
            scaled[f"{at}{writer}.weight"] /= factor[:, None]
            scaled[f"{at}{reader}.weight"] *= factor
    shutil.copytree(source.folder, tmp_path / "scaled")
    save_file(scaled, tmp_path / "scaled" / "model.safetensors", {"format": "pt"})
    errors = weight_errors(bundle, source, source_of(tmp_path / "scaled"))
    assert max(errors.values()) < 1e-5 and len(errors) > 70
    scaled[f"{prefix}layers.1.input_layernorm.weight"] *= 2  # taken back by nobody
    save_file(scaled, tmp_path / "scaled" / "model.safetensors", {"format": "pt"})
    errors = weight_errors(bundle, source, source_of(tmp_path / "scaled"))
    names = {f"layers.1.self_attn.{part}_proj.weight" for part in "qk"}
    assert {role for role, error in errors.items() if error > LIMIT} >= names


# --- what rounds activations ---


def test_int8_dynamic_is_onnxs() -> None:
    onnxruntime, helper = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx.helper")
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "step", "zero"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(name, 1, [5, 8]) for name in "xy"]
    graph = helper.make_graph(nodes, "rounded", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for shift in (-9.0, 0.0, 0.3, 9.0):
        x = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32) + np.float32(shift)
        np.testing.assert_allclose(int8_dynamic(torch.from_numpy(x)), session.run(None, {"x": x})[0], atol=1e-6)
    assert not int8_dynamic(torch.zeros(3)).any()


def test_rounding_inside_the_graph_is_measured_and_allowed(work: Workshop) -> None:
    """A graph that rounds activations is as far from the reference as PyTorch is that rounds them, and a mistake in it
    is further."""
    bundle = Bundle.open(work.bundle("mha", "--quantize", "int8-dynamic", cuts=CUTS))
    found = validate(bundle, speed=False, threads=1, max_new_tokens=6)
    assert found.passed
    logits = next(t for t in found.parity.tensors if t.name == "logits")
    limit = {gate.name: gate.limit for gate in found.parity.gates}
    assert 1e-3 < logits.max_abs < limit["logits"] < logits.scale and limit["vision"] == 1e-3
    assert found.quantised is not None and [d.over for d in found.quantised.drifts] == [ORIGINAL]


# --- beside the original: reported ---


def test_deployed_differs_where_exact_passes(work: Workshop, tmp_path: Path) -> None:
    """onnxruntime's decode rounds activations to 8 bits: with exact engines parity is tight, as deployed it is not."""
    bundle = Bundle.open(work.bundle("mha", *INT4, cuts=CUTS))
    found = validate(bundle, speed=False, threads=1, max_new_tokens=8, outputs=tmp_path / "out.npz")
    assert found.passed and found.quantised is not None
    original, exact = found.quantised.drifts
    assert (original.over, exact.over) == (ORIGINAL, EXACT)
    decode = next(t for t in found.parity.tensors if t.name == "decode")
    assert decode.max_abs < 1e-3 < exact.logits  # the same weights, multiplied otherwise
    assert 0 < exact.kl_mean < original.kl_mean <= original.kl_max < 1
    assert exact.positions <= 4 * 8 and original.total <= 4 * 8
    assert [cut.name for cut in original.cuts] == ["k1", "k2"]
    assert [cut.kept for cut in original.cuts] == [4 * n for n in bundle.select().budget.visual[1:]]
    told = "\n".join(found.lines())
    assert (
        "as deployed, beside the original checkpoint" in told and "kept k2" in told and "weights: the furthest" in told
    )
    facts = found.to_json()
    assert facts["quantised"]["original"]["kl_mean"] == original.kl_mean
    assert facts["quantised"]["exact"]["cuts"]["k1"]["share"] == exact.cuts[0].share
    page = found.write(tmp_path / "report").read_text()
    assert "What quantising cost" in page and f"{original.kl_mean:.1e}" in page
    assert not any("dequantised" in path.name for path in tmp_path.rglob("*"))  # it was a temporary checkpoint


def test_drift_is_what_its_definition_says(work: Workshop) -> None:
    """KL, tokens and kept tokens of made-up runs, by hand; what follows the end of an answer does not count."""
    pipeline = work.pipeline(work.bundle("mha", *INT4, cuts=CUTS))
    (prompts,) = batched(drawn_inputs(pipeline.spec, 1, 0), pipeline)
    image = np.flatnonzero(prompts.inputs.input_ids[0] == pipeline.manifest.model.image.token)
    text, eos = np.setdiff1d(np.arange(image[-1] + 5), image), pipeline.manifest.model.eos_tokens[0]

    def run(kept: list[int], answer: list[int], p: list[list[float]]) -> FreeRun:
        positions = np.sort(np.concatenate([text, image[kept]]))[None]
        tokens = np.array([answer])
        return FreeRun((positions, positions), tokens, np.log(np.array([p], np.float32)), tokens)

    other = run([0, 1, 2, 3], [7, eos, 0], [[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]])
    own = run([0, 1, 2, 9], [7, 5, 5], [[0.5, 0.5], [0.5, 0.5], [0.01, 0.99]])
    found = drift("x", own, other, prompts, pipeline)
    expected = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    assert found.positions == found.total == 2 and found.equal == 1
    assert found.kl_max == pytest.approx(expected, rel=1e-5) and found.kl_mean == pytest.approx(expected / 2, rel=1e-5)
    assert found.logits == pytest.approx(np.log(2), rel=1e-5)
    assert [(c.name, c.kept, c.replaced, c.share) for c in found.cuts] == [("k1", 4, 1, 0.25), ("k2", 4, 1, 0.25)]
    both = found + found
    assert both.kl_mean == found.kl_mean and both.positions == 4 and both.cuts[0].share == 0.25


def test_what_is_published_quantised_has_no_original(work: Workshop) -> None:
    pipeline = work.pipeline(work.bundle("mha", *INT4, cuts=CUTS))
    asked = drawn_inputs(pipeline.spec, 2, 0), 6
    found = quantisation_cost(pipeline, other_runs(pipeline, None, True, *asked), *asked)
    assert [d.over for d in found.drifts] == [EXACT] and "published quantised" in found.note
    assert found.drifts[0].kl_max == 0 and found.drifts[0].equal == found.drifts[0].total


class Lives:
    """Which pipelines and models of PyTorch there are at once, each by a weak reference."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, weakref.ref[object]]] = []
        self.beside: list[set[str]] = []

    def watched(self, name: str, make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*asked: Any, **named: Any) -> Any:
            self.beside.append({kind for kind, each in self.opened if each() is not None})
            found = make(*asked, **named)
            self.opened.append((name, weakref.ref(found)))
            return found

        return made


@pytest.mark.parametrize("kind", ["int4", "int8-dynamic"])
def test_engines_and_models_are_in_memory_in_turn(work: Workshop, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """At most one pipeline and one model, of 7B too: deployed engines are opened when the exact ones are gone, or are
    the same where nothing can be exact."""
    bundle, lives = Bundle.open(work.bundle("mha", "--quantize", kind, cuts=CUTS)), Lives()
    monkeypatch.setattr(validation, "open_pipeline", lives.watched("engines", validation.open_pipeline))
    monkeypatch.setattr(validation, "load_reference", lives.watched("model", validation.load_reference))
    assert validate(bundle, speed=False, threads=1, max_new_tokens=2, prompts=1).passed
    made = [kind for kind, _ in lives.opened]
    assert made.count("engines") == (2 if kind == "int4" else 1) and made.count("model") >= 2
    for name, beside in zip(made, lives.beside, strict=True):
        assert beside <= ({"engines"} if name == "model" else set())


# --- baselines ---


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantised") / "shapes"
    flags = ("--text-budget", 20, "--max-new-tokens", 4, "--batch", 2, *INT4, *ORT)
    assert call(export_main, SHAPES_64, *flags, "--out", out) == 0
    return out


def test_accuracy_has_baselines_of_the_same_weights_and_the_original(shapes: Path, tmp_path: Path) -> None:
    flags = ("--dataset", QUESTIONS_64, "--limit", 4, "--seeds", 1, "--threads", 1, "--no-speed")
    assert call(validate_main, shapes, *flags, "--report", tmp_path / "report") == 0
    found = json.loads((tmp_path / "report" / "report.json").read_text())["accuracy"]
    over = {name: set(cells["all"]["over"]) for name, cells in found.items()}
    assert over == {
        "qa": {"none", "random", "original"}, "none": {"original"}, "random": {"none", "original"},
        "uniform": {"none", "original"}, "original": set(),
    }  # fmt: skip


def test_a_baseline_holds_the_bundles_weights(shapes: Path, tmp_path: Path) -> None:
    bundle, budget = Bundle.open(shapes), Bundle.open(shapes).select().budget
    plans = {"none": (PruningPlan(), budget.visual[:1])}
    made = export_baseline(
        SHAPES_64, budget, dtype="fp32", backend="onnxruntime", plans=plans, out=tmp_path / "none", beside=bundle
    )
    assert made.manifest.quantization == bundle.manifest.quantization
    ours, theirs = (read_all(each.folder / "weights") for each in (made, bundle))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert made.select().plan.policy == "none"


# --- bad input ---


def test_a_disk_without_room_is_one_line(work: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, source = Bundle.open(work.bundle("mha", *INT4, cuts=CUTS)), source_of(work.checkpoint("mha"))
    monkeypatch.setattr(dequantised_module.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(HimapError, match="no room for the dequantised weights") as refused, judge_of(bundle, source):
        pass
    assert refused.value.hint == "set TMPDIR"
