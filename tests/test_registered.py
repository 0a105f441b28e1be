"""What users bring themselves: a criterion by which tokens are ranked, and a family of models."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from commands import ORT, Workshop, call, padded
from tiny import make_inputs
from torch import Tensor

from himap_export.engines.bundle import Bundle
from himap_export.exporter import registry
from himap_export.exporter.api import plan
from himap_export.exporter.cli import main as export_main
from himap_export.exporter.families.llava import Llava
from himap_export.exporter.registry import register_family, resolve
from himap_export.graphs import selectors
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import Cut
from himap_export.graphs.scoring import ScoringContext
from himap_export.validate.cli import main as validate_main
from himap_export.validate.reference import criteria
from himap_export.validate.reference.criteria import ReferenceCut, State
from himap_export.validate.registration import register_criterion, require_references

PLAN = """
[mine]
cuts = [{layer = 2, criterion = "long-keys", remove = 0.5}, {layer = 4, criterion = "image", remove = 0.5}]
"""
CUTS = (ReferenceCut(2, "long-keys", 0.5), ReferenceCut(4, "image", 0.5))


def long_keys(s: ScoringContext) -> ir.Value:
    """The keys' squared length, [B,S] summed over heads."""
    keys = s.op.Cast(s.key, to=ir.DataType.FLOAT)
    squared: ir.Value = s.op.ReduceSum(s.op.Mul(keys, keys), [1, 3], keepdims=0)
    return squared


def long_keys_reference(state: State, keep: int, seed: int) -> Tensor:
    squared: Tensor = state.key.float().square().sum((0, 2))[state.is_image]
    return squared


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The criterion on both sides, for one test."""
    monkeypatch.setattr(selectors, "_REGISTERED", {})
    monkeypatch.setattr(criteria, "CRITERIA", dict(criteria.CRITERIA))
    monkeypatch.setattr("himap_export.validate.reference.reference.CRITERIA", criteria.CRITERIA)
    register_criterion("long-keys", long_keys, long_keys_reference)
    require_references("this test", ["long-keys"])
    yield


@pytest.fixture
def bundle(registered: None, work: Workshop, tmp_path: Path) -> Path:
    (tmp_path / "plans.toml").write_text(PLAN)
    return work.bundle("gqa2", "--plan", tmp_path / "plans.toml")


def test_a_criterion_of_ones_own_is_exported_and_judged(
    bundle: Path, work: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = make_inputs(work.tiny("gqa2"), [9], [5], seed=4)
    found = work.answer(bundle, inputs, "--max-new-tokens", 4)
    truth = work.reference("gqa2").prefill(inputs.input_ids, inputs.pixel_values, cuts=CUTS)
    by_image = work.reference("gqa2").prefill(
        inputs.input_ids, inputs.pixel_values, cuts=(ReferenceCut(2, "image", 0.5),)
    )
    np.testing.assert_array_equal(found["kept_k1"], padded(truth.kept[0], found["kept_k1"].shape[1]))
    assert truth.kept[0].tolist() != by_image.kept[0].tolist()
    np.testing.assert_allclose(found["logits"], truth.logits, atol=1e-3)
    capsys.readouterr()
    assert call(validate_main, bundle, "--model", work.checkpoint("gqa2"), "--threads", 1, "--no-speed", "--json") == 0
    assert json.loads(capsys.readouterr().out)["passed"]


def test_a_reference_that_ranks_otherwise_fails_the_gate(
    bundle: Path, work: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        criteria.CRITERIA, "long-keys", lambda state, keep, seed: -long_keys_reference(state, keep, seed)
    )
    assert call(validate_main, bundle, "--model", work.checkpoint("gqa2"), "--threads", 1, "--no-speed") == Exit.GATE


def test_a_bundle_runs_where_its_criterion_is_unknown_and_is_not_judged_there(
    bundle: Path, work: Workshop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = make_inputs(work.tiny("gqa2"), [9], [5], seed=4)
    known = work.answer(bundle, inputs)["tokens"]
    monkeypatch.delitem(criteria.CRITERIA, "long-keys", raising=False)
    monkeypatch.delitem(selectors._REGISTERED, "long-keys")
    assert Bundle.open(bundle).select().plan.cuts[0].criterion == "long-keys"
    np.testing.assert_array_equal(work.answer(bundle, inputs)["tokens"], known)
    capsys.readouterr()
    assert call(validate_main, bundle, "--model", work.checkpoint("gqa2")) == Exit.USAGE
    told = capsys.readouterr().err.strip()
    assert "cut by long-keys, which no reference ranks by" in told and "\n" not in told


def test_an_unregistered_criterion_is_not_exported(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plans.toml").write_text(PLAN)
    model = work.checkpoint("gqa2")
    assert call(export_main, model, "--plan", tmp_path / "plans.toml", "--dry-run") == Exit.USAGE
    told = capsys.readouterr().err.strip()
    assert "unknown criterion long-keys" in told and "instruction, image" in told and "\n" not in told


@pytest.mark.parametrize("name", ["", "Mine", "my own", "1st", "a" * 65, "mine\n", "../x"])
def test_names_that_no_criterion_can_have(name: str) -> None:
    with pytest.raises(HimapError, match="cannot name a criterion"):
        register_criterion(name, long_keys)


def test_a_criterion_is_registered_once(registered: None) -> None:
    register_criterion("long-keys", long_keys, long_keys_reference)  # the same again does no harm
    for name in ("image", "himap", "key-norm", "none"):
        with pytest.raises(HimapError, match=f"there is a criterion {name}"):
            register_criterion(name, long_keys, long_keys_reference)
    with pytest.raises(HimapError, match="there is a criterion long-keys"):
        register_criterion("long-keys", long_keys)


def test_a_criterion_of_ones_own_is_a_policy(registered: None, work: Workshop) -> None:
    planned = plan(str(work.checkpoint("gqa2")), policy="long-keys", k2=4)
    assert [(v.plan_name, v.plan.policy) for v in planned.variants] == [("long-keys", "long-keys")]
    assert planned.variants[0].plan.cuts == (Cut(2, "long-keys", 0.5), Cut(4, "long-keys", 0.75))
    with pytest.raises(HimapError, match="unknown policy longkeys"):
        plan(str(work.checkpoint("gqa2")), policy="longkeys")


class Renamed(Llava):
    """LLaVA under another name, with a prompt of its own."""

    architecture = "RenamedForConditionalGeneration"


def test_a_family_of_ones_own_exports(work: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    renamed = Path(shutil.copytree(work.checkpoint("gqa2"), tmp_path / "model"))
    config = json.loads((renamed / "config.json").read_text())
    (renamed / "config.json").write_text(json.dumps(config | {"architectures": [Renamed.architecture]}))
    with pytest.raises(HimapError, match="unsupported architecture RenamedFor"):
        resolve(str(renamed))
    assert register_family(Renamed) is Renamed is register_family(Renamed)
    flags = ("--k1", 2, "--k2", 4, "--text-budget", 24, "--max-new-tokens", 32, *ORT)
    assert call(export_main, renamed, *flags, "--out", tmp_path / "bundle") == 0
    assert Bundle.open(tmp_path / "bundle").manifest.model.architecture == Renamed.architecture
    inputs = make_inputs(work.tiny("gqa2"), [9], [5], seed=4)
    wanted = work.answer(work.bundle("gqa2", "--k1", 2, "--k2", 4), inputs)
    found = work.answer(tmp_path / "bundle", inputs)
    assert {name: values.tolist() for name, values in found.items()} == {n: v.tolist() for n, v in wanted.items()}


def test_an_architecture_has_one_family() -> None:
    class Other(Llava):
        """Another class for LLaVA's own name."""

    with pytest.raises(HimapError, match="LlavaForConditionalGeneration is registered already"):
        register_family(Other)
