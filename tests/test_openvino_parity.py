"""OpenVINO's engines against PyTorch, the authors' goldens and the NumPy oracle: families, policies, forms, dtypes.

Through the commands, on one thread. An engine takes a fifth of a second to compile: each bundle proves several things.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from commands import OPENVINO, ORT, Workshop, call, golden_inputs, greedy, padded
from drawn_models import Chain, Example, check_chain, examples
from families import FAMILIES
from hypothesis import Phase, given, settings
from legacy import FIXTURES, make_both_layouts
from msgspec import structs
from tiny import TINY, make_inputs
from unsealed import unsealed

from himap_export.engines.backends import Opening, openvino
from himap_export.engines.bundle import Bundle
from himap_export.engines.openvino import operators, run
from himap_export.engines.openvino.run import OpenVino
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.errors import Exit
from himap_export.graphs.spec import SEEDS
from himap_export.graphs.stages import StagedModel
from himap_export.validate.cli import main as validate_main
from himap_export.validate.reference.criteria import Cuts, ReferenceCut, reference_himap

CUTS = reference_himap(1, 3, 0.5, 0.75)
SIZES = {"qwen2.5-vl": ("140x84", "84x140"), "qwen3-vl": ("160x96", "96x160")}
Capture = pytest.CaptureFixture[str]


def validated(capsys: Capture, bundle: Path, *flags: object, code: Exit = Exit.OK) -> dict[str, Any]:
    """What `himap-validate` finds on four drawn prompts, whose lengths differ; it leaves with `code`."""
    capsys.readouterr()
    asked = ("--prompts", 4, "--max-new-tokens", 6, "--no-speed", "--threads", 1, "--json", "--backend", "openvino")
    left = call(validate_main, bundle, *asked, *flags)
    said = capsys.readouterr()
    assert left == code, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


def identical(found: Mapping[str, Any], cuts: int) -> None:
    assert {found["parity"][f"kept_k{n + 1}"]["verdict"] for n in range(cuts)} <= {"identical"}


def plan_file(folder: Path, plans: Mapping[str, Cuts]) -> Path:
    """A TOML file of plans, each a list of cuts."""
    tables = []
    for name, cuts in plans.items():
        rows = (
            f'{{layer = {c.layer}, criterion = "{c.criterion}", coefficients = {list(c.coefficients)}, '
            + (f"remove = {c.remove}}}" if c.keep is None else f"keep = {c.keep}}}")
            for c in cuts
        )
        tables.append(f"[{name}]\ncuts = [{', '.join(rows)}]\n")
    file = folder / f"openvino-{'-'.join(plans)}.toml"
    file.write_text("\n".join(tables))
    return file


# --- families ---


def family(work: Workshop, name: str, *flags: object) -> Path:
    """Batches of 3, which leave one prompt of four to itself; cuts in front of Qwen3-VL's last deepstack layer."""
    sizes = ("--image-size", *SIZES[name]) if name in SIZES else ()
    cuts = ("--k1", 1, "--k2", 2, "--r1", 0.5, "--r2", 0.5)
    return work.family_bundle(name, *OPENVINO, "--batch", 3, *cuts, *sizes, *flags)


REPEATED = ("internvl", "qwen2.5-vl", "llava-next")  # in int4, every family is in test_quantised_parity


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in REPEATED)) for name in FAMILIES]
)
def test_families_pass_validation(work: Workshop, name: str, capsys: Capture) -> None:
    """GQA, biases, q/k norms, M-RoPE, deepstack, tiles, each image size; the tower, too."""
    bundle = family(work, name)
    for size in SIZES.get(name, ("",)):
        found = validated(capsys, bundle, "--model", work.family(name), *(("--image-size", size) if size else ()))
        identical(found, 2)


@pytest.mark.parametrize("name", ["gqa2", pytest.param("mha", marks=pytest.mark.slow)])
def test_llava_in_its_own_layout_passes_validation(work: Workshop, name: str, tmp_path: Path, capsys: Capture) -> None:
    _, model = make_both_layouts(tmp_path, replace(TINY[name], vision_feature_layer=-2, layers=4))
    flags = ("--k1", 1, "--k2", 3, "--batch", 3, "--text-budget", 24, "--max-new-tokens", 8)
    assert call(export_main, model, *OPENVINO, *flags, "--out", tmp_path / "bundle") == 0
    identical(validated(capsys, tmp_path / "bundle"), 2)


# --- goldens ---

GOLDENS = {
    "himap-tiny": {"k2_5_n8_2": reference_himap(2, 5, 0.5, 0.75), "k1_4_n8_4": reference_himap(1, 4, 0.5, 0.5)},
    "qwen-vl-tiny": {"k2_5_n128_32": reference_himap(2, 5, 0.5, 0.75), "k1_4_n128_64": reference_himap(1, 4, 0.5, 0.5)},
    "internvl-v1-tiny": {"k2_5_n288_72": reference_himap(2, 5, 0.5, 0.75)},
}


# Older layouts are onnxruntime's to show in every run.
@pytest.mark.parametrize(
    "fixture", [pytest.param(name, marks=[pytest.mark.slow] * (name != "himap-tiny")) for name in GOLDENS]
)
def test_kept_positions_and_logits_are_the_releases(
    work: Workshop, fixture: str, tmp_path: Path, capsys: Capture
) -> None:
    """Several plans and text budgets in one bundle, one prompt in a batch of two."""
    plans, inputs, budgets = GOLDENS[fixture], golden_inputs(FIXTURES / fixture), (14, 40)
    budgets = budgets if fixture == "himap-tiny" else budgets[1:]
    flags = ("--plan", plan_file(tmp_path, plans), "--text-budget", *budgets, "--batch", 2, "--max-new-tokens", 8)
    assert call(export_main, FIXTURES / fixture, *OPENVINO, *flags, "--out", tmp_path / "bundle") == 0
    for name, cuts in plans.items():
        golden = np.load(FIXTURES / fixture / f"golden_{name}.npz")
        for budget in budgets:
            found = work.answer(tmp_path / "bundle", inputs, "--plan", name, "--text-budget", budget)
            for got, wanted in (("kept_k1", "kept1"), ("kept_k2", "kept2")):
                np.testing.assert_array_equal(found[got], padded(golden[wanted][None], found[got].shape[1]))
            np.testing.assert_allclose(found["logits"], golden["logits_last"], rtol=0, atol=1e-3)
            if "image_features" in golden:
                np.testing.assert_allclose(found["image_features"], golden["image_features"], rtol=0, atol=1e-3)
            if fixture == "himap-tiny":
                expected = greedy(
                    work.reference("golden"), inputs.input_ids, inputs.pixel_values, max_new_tokens=8, cuts=cuts
                )
                np.testing.assert_array_equal(found["tokens"], expected)
    if fixture != "himap-tiny":
        identical(validated(capsys, tmp_path / "bundle", "--plan", next(iter(plans)), "--prompts", 3), 2)


# --- policies ---

PLANS: Mapping[str, Cuts] = {
    "himap": CUTS,
    "fastv": (ReferenceCut(2, "last", 0.6),),
    "truncation": (ReferenceCut(4, "boundary", keep=5),),
    "intra-visual": (ReferenceCut(1, "image", 0.5), ReferenceCut(3, "image", 0.75)),
    "random": (ReferenceCut(1, "random", 0.5), ReferenceCut(3, "random", 0.75)),
    "uniform": (ReferenceCut(1, "uniform", 0.5), ReferenceCut(3, "uniform", 0.75)),
    "states": (ReferenceCut(2, "key-norm", 0.5), ReferenceCut(4, "v2drop", 0.5)),
    "fitted": (
        ReferenceCut(1, "hawk", 0.25),
        ReferenceCut(2, "instruction-debiased", 0.1, coefficients=(0.01,)),
        ReferenceCut(3, "dart", keep=9),
    ),
    "nothing-cut": (),
    "three": (ReferenceCut(1, "last", 0.25), ReferenceCut(2, "random", keep=8), ReferenceCut(4, "image", 0.5)),
    "nothing-kept": (ReferenceCut(2, "last", keep=0),),
}


def policies(work: Workshop) -> Path:
    return work.bundle("gqa2", *OPENVINO, "--plan", plan_file(work.folder, PLANS), "--batch", 2)


@pytest.mark.parametrize("plan", PLANS)
def test_every_policy_passes_validation(work: Workshop, plan: str, capsys: Capture) -> None:
    identical(validated(capsys, policies(work), "--plan", plan), len(PLANS[plan]))


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.slow), SEEDS - 2, 2**32 - 1])
def test_random_cuts_draw_what_the_reference_draws(work: Workshop, seed: int) -> None:
    """Each of three prompts by a seed of its own, up to 2^32 + 1."""
    inputs, cuts = make_inputs(work.tiny("gqa2"), [9, 3, 12], [5, 2, 1], seed=4), PLANS["random"]
    found = work.answer(policies(work), inputs, "--plan", "random", "--max-new-tokens", 1, "--seed", seed)
    arrays, seeds = (inputs.input_ids, inputs.pixel_values, inputs.attention_mask), (seed, seed + 1, seed + 2)
    truth = work.reference("gqa2").prefill(*arrays, cuts, seeds=seeds)
    for n, kept in enumerate(truth.kept, 1):
        np.testing.assert_array_equal(found[f"kept_k{n}"], padded(kept, found[f"kept_k{n}"].shape[1]))
    np.testing.assert_allclose(found["logits"], truth.logits, atol=1e-3)


# --- drawn decoders ---


class OpenVinoChain(Chain):
    """The same graphs as OpenVINO's engines, over tensors bound by their places, as a pipeline binds them."""

    def __init__(self, model: StagedModel, weights: Mapping[str, npt.NDArray[Any]], folder: Path) -> None:
        self.model, self.graphs = model, {graph.name: graph for graph in model.graphs()}
        bundle = unsealed(folder, model, tuple(self.graphs.values()), weights=weights)
        built = {"openvino": {name: openvino.build(bundle, name) for name in self.graphs}}
        bundle = replace(bundle, manifest=structs.replace(bundle.manifest, engines=built))
        engines = OpenVino(bundle, Opening(threads=1))
        ports = {p.place: p for graph in self.graphs.values() for part in graph.ports for p in part.values()}
        self.tensors = {place: engines.tensor(port) for place, port in ports.items()}
        self.runs = {name: engines.bind(name, self._bound(name)) for name in self.graphs}

    def _bound(self, name: str) -> dict[str, Any]:
        return {n: self.tensors[port.place] for part in self.graphs[name].ports for n, port in part.items()}

    def run(self, name: str, have: dict[str, npt.NDArray[Any]]) -> None:
        inputs, outputs = self.graphs[name].ports
        for n, port in inputs.items():
            self.tensors[port.place].write(have[n] % SEEDS if n == "seed" else have[n])  # as `Pipeline.load`
        self.runs[name]()
        have |= {n: self.tensors[port.place].read() for n, port in outputs.items()}


@given(example=examples())
@settings(max_examples=5, phases=[Phase.generate])  # no shrinking: each try would be five engines
def test_drawn_decoders_equal_the_oracle(example: Example, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("drawn") / "work"
    check_chain(example, lambda: OpenVinoChain(example.model, example.weights, folder))


# --- forms of weights, backends ---


@pytest.mark.parametrize("name", ["tied", pytest.param("sharded", marks=pytest.mark.slow)])
def test_all_forms_of_weights_and_both_backends_answer_alike(work: Workshop, name: str) -> None:
    inputs = make_inputs(work.tiny(name), [9, 3], [5, 1])
    flags, asked = (*OPENVINO, "--batch", 2), ("--max-new-tokens", 8, "--backend", "openvino")
    shared = work.bundle(name, *flags, *ORT, cuts=CUTS)
    expected = work.answer(shared, inputs, *asked)
    embedded = work.bundle(name, *flags, "--weight-form", "embedded", cuts=CUTS)
    bare = work.bundle(name, *flags, "--engines-only", cuts=CUTS)
    assert not (bare / "weights").exists()
    for answer in (
        work.answer(embedded, inputs, *asked),
        work.answer(bare, inputs, *asked, "--weights", work.checkpoint(name)),
    ):
        for key, array in expected.items():
            np.testing.assert_array_equal(answer[key], array)
    other = work.answer(shared, inputs, "--max-new-tokens", 8, "--backend", "onnxruntime")
    for key in ("kept_k1", "kept_k2", "tokens"):
        np.testing.assert_array_equal(other[key], expected[key])
    np.testing.assert_allclose(other["logits"], expected["logits"], rtol=0, atol=1e-3)
    assert Bundle.open(shared).manifest.engines.keys() == {"openvino", "onnxruntime"}


# --- half precision ---


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("bf16", "llava"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("fp16", "llava"), ("bf16", "qwen3-vl"), ("fp16", "qwen3-vl"))
        ),
    ],
)
def test_half_precision_passes_validation(work: Workshop, dtype: str, name: str, capsys: Capture) -> None:
    """By what Hugging Face's modules lose in the same dtype, the tower too; scores stay fp32."""
    if dtype not in openvino.computed():
        pytest.skip(f"this CPU does not compute in {dtype}: OpenVINO says {', '.join(openvino.computed())}")
    bundle = family(work, name, "--dtype", dtype)
    found = validated(capsys, bundle, "--model", work.family(name))
    assert found["dtype"] == dtype and found["passed"]


# --- what validation would notice ---


def not_hidden(q: Any, keys: Any, values: Any, mask: Any, scale: Any) -> Any:
    """Attends to what the slot held before its token came, too."""
    nowhere = operators._ops().constant(np.full(keys.at.get_shape(), -1))
    return _CACHED(q, replace(keys, at=nowhere), values, mask=mask, scale=scale)


def one_slot_late(request: Any, append: Any, cache: Any) -> Any:
    rows, at = request.get_tensor(append.new).data[:, :, 0], request.get_tensor(append.at).data.reshape(-1)

    def write() -> None:
        for sample, slot in enumerate(at):
            cache.view[sample, :, slot + 1] = rows[sample]

    return write


_CACHED = operators._cached


@pytest.mark.parametrize(
    ("module", "name", "wrong", "gate"),
    [
        (operators, "_cached", not_hidden, "decode"),
        (run, "_append", one_slot_late, "decode"),
        (operators, "_repeated", lambda x, share: operators._ops().concat([x] * share, 1), "prefix"),
    ],
    ids=["the slot is not hidden", "appended one slot late", "heads shared in another order"],
)
def test_a_rule_that_is_wrong_fails_validation(
    work: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: Capture, module: Any, name: str, wrong: Any, gate: str
) -> None:
    monkeypatch.setattr(module, name, wrong)
    found = validated(capsys, family(work, "llava"), "--model", work.family("llava"), code=Exit.GATE)
    failed = [each["name"] for each in found["gates"] if not each["passed"]]
    assert failed[0] == gate and not found["passed"]
