"""Every policy through the real commands: one kind of bundle, and what it answers is what the reference answers."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import Workshop, call, greedy, padded, save_inputs
from tiny import make_inputs

from himap_export.engines.bundle import Bundle
from himap_export.engines.cli import main as run_main
from himap_export.exporter.cli import main as export_main
from himap_export.validate.cli import main as validate_main
from himap_export.validate.reference.criteria import Cuts, ReferenceCut, reference_himap

PLANS: dict[str, tuple[tuple[object, ...], Cuts]] = {
    "himap": (("--k1", 1, "--k2", 3), reference_himap(1, 3, 0.5, 0.75)),
    "fastv": (("--k1", 2, "--r1", 0.6), (ReferenceCut(2, "last", 0.6),)),
    "truncation": (("--k1", 4, "--keep", 5), (ReferenceCut(4, "boundary", keep=5),)),
    "intra-visual": (("--k1", 1, "--k2", 3), (ReferenceCut(1, "image", 0.5), ReferenceCut(3, "image", 0.75))),
    "random": (("--k1", 1, "--k2", 3), (ReferenceCut(1, "random", 0.5), ReferenceCut(3, "random", 0.75))),
    "uniform": (("--k1", 1, "--k2", 3), (ReferenceCut(1, "uniform", 0.5), ReferenceCut(3, "uniform", 0.75))),
    "key-norm": (("--k1", 2, "--k2", 4), (ReferenceCut(2, "key-norm", 0.5), ReferenceCut(4, "key-norm", 0.75))),
    "v2drop": (("--k1", 2, "--k2", 3), (ReferenceCut(2, "v2drop", 0.5), ReferenceCut(3, "v2drop", 0.75))),
    "hawk": (("--k1", 1, "--keep", 6), (ReferenceCut(1, "hawk", keep=6),)),
    "dart": (("--k1", 2, "--keep", 11), (ReferenceCut(2, "dart", keep=11),)),
    "none": ((), ()),
}
THREE = """
[three]
cuts = [
    {layer = 1, criterion = "last", remove = 0.25},
    {layer = 2, criterion = "random", keep = 8},
    {layer = 4, criterion = "image", remove = 0.5},
]
"""


def bundle_of(work: Workshop, policy: str) -> Path:
    return work.bundle("gqa2", "--policy", policy, *PLANS[policy][0], "--batch", 2)


@pytest.mark.parametrize("policy", PLANS)
def test_bundles_answer_as_the_reference_does(work: Workshop, policy: str) -> None:
    inputs, cuts = make_inputs(work.tiny("gqa2"), [9, 3, 12], [5, 2, 1], seed=4), PLANS[policy][1]
    found = work.answer(bundle_of(work, policy), inputs, "--max-new-tokens", 6, "--seed", 11)
    arrays, seeds = (inputs.input_ids, inputs.pixel_values, inputs.attention_mask), (11, 12, 13)
    truth = work.reference("gqa2").prefill(*arrays, cuts, seeds=seeds)
    assert {name for name in found if name.startswith("kept")} == {f"kept_k{n + 1}" for n in range(len(cuts))}
    for n, kept in enumerate(truth.kept, 1):
        np.testing.assert_array_equal(found[f"kept_k{n}"], padded(kept, found[f"kept_k{n}"].shape[1]))
    np.testing.assert_allclose(found["logits"], truth.logits, atol=1e-3)
    said = greedy(work.reference("gqa2"), *arrays, max_new_tokens=6, cuts=cuts, seeds=seeds)
    np.testing.assert_array_equal(found["tokens"], said)


@pytest.mark.parametrize("policy", [*PLANS, "three"])
def test_validation_passes(work: Workshop, policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if policy == "three":
        (tmp_path / "plans.toml").write_text(THREE)
        bundle = work.bundle("gqa2", "--plan", tmp_path / "plans.toml")
        assert Bundle.open(bundle).select().budget.visual == (16, 12, 8, 4)
    else:
        bundle = bundle_of(work, policy)
    capsys.readouterr()
    assert call(validate_main, bundle, "--prompts", 4, "--max-new-tokens", 4, "--no-speed", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    cuts = len(Bundle.open(bundle).select().plan.cuts)
    verdicts = [found["parity"][f"kept_k{n + 1}"]["verdict"] for n in range(cuts)]
    assert set(verdicts) <= {"identical", "tie"} and found["passed"]


def test_another_seed_keeps_other_tokens_and_the_same_one_the_same(work: Workshop) -> None:
    inputs = make_inputs(work.tiny("gqa2"), [9], [5])
    first, again, other = (work.answer(bundle_of(work, "random"), inputs, "--seed", seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first["kept_k1"], again["kept_k1"])
    assert not np.array_equal(first["kept_k1"], other["kept_k1"])


def test_several_policies_share_one_bundle(work: Workshop) -> None:
    flags = ("--policy", "himap", "--policy", "random", "--policy", "none")
    manifest = Bundle.open(work.bundle("gqa2", *flags, "--task", "qa", "--k2", "4")).manifest
    assert [v.plan_name for v in manifest.variants] == ["custom", "random", "none"]
    assert [v.plan.policy for v in manifest.variants] == ["himap", "random", "none"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--policy", "truncation"), "the policy truncation has no default cut"),
        (("--policy", "truncation", "--k1", 2), "the policy truncation has no default cut"),
        (("--policy", "fastv", "--k2", 4), "--k2 is not for the policy fastv (it has 1 cut: --k1, --r1, --keep)"),
        (("--policy", "himap", "--keep", 4), "--keep is not for the policy himap"),
        (("--policy", "none", "--r1", 0.5), "--r1 is not for the policy none (it has 0 cuts: no flags)"),
        (("--policy", "fastv", "--r1", 0.5, "--keep", 4), "--r1 and --keep exclude each other"),
        (("--policy", "fastv", "--keep", 17), "the cut at layer 2 keeps 17 image tokens: only 16 reach it"),
        (("--policy", "fastv", "--k1", 6), "--k1 6 is past the last layer"),
        (("--policy", "random", "--k1", 4, "--k2", 3), "--k2 3 is not above --k1 4"),
        (("--policy", "random", "--plan", "qa"), "--policy changes one plan only"),
    ],
)
def test_plans_that_cannot_be(
    work: Workshop, flags: tuple[object, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(export_main, work.checkpoint("gqa2"), *flags, "--dry-run") == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[a]\npolicy = "loudest"', "unknown policy loudest"),
        ('[a]\npolicy = "fastv"\nk1 = 2', "lacks r1"),
        ('[a]\npolicy = "none"\nk1 = 2', "unknown field k1"),
        ("[a]\ncuts = 3", "Expected array, got int - at $.cuts"),
        ('[a]\nk1 = 2\ncuts = [{layer = 1, criterion = "last", keep = 2}]', "unknown field k1"),
        ('[a]\ncuts = [{layer = 1, criterion = "loudest", keep = 2}]', "unknown criterion loudest"),
        ('[a]\ncuts = [{criterion = "last", keep = 2}]', "missing required field layer - at $.cuts[0]"),
        ('[a]\ncuts = [{layer = 1, criterion = "last"}]', "needs either a fraction to remove or a number to keep"),
        ("[a]\ncuts = [{layer = 1, criterion = 2, keep = 2}]", "got int - at $.cuts[0].criterion"),
        (
            '[a]\ncuts = [{layer = 3, criterion = "last", keep = 2}, {layer = 2, criterion = "last", keep = 1}]',
            "--k2 2 is not above --k1 3",
        ),
    ],
)
def test_plan_files_that_cannot_be(
    work: Workshop, text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plans.toml").write_text(text)
    assert call(export_main, work.checkpoint("gqa2"), "--plan", tmp_path / "plans.toml", "--dry-run") == 2
    assert words in capsys.readouterr().err


def test_a_policy_the_bundle_does_not_hold(work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = save_inputs(tmp_path / "in.npz", make_inputs(work.tiny("gqa2")))
    assert call(run_main, bundle_of(work, "himap"), "--policy", "himap", "--load-inputs", inputs) == 0  # named custom
    for main, flags in ((run_main, ("--load-inputs", inputs)), (validate_main, ())):
        assert call(main, bundle_of(work, "fastv"), "--plan", "random", *flags) == 2
        assert "holds no plan random: it holds fastv" in capsys.readouterr().err
    assert call(run_main, bundle_of(work, "random"), "--load-inputs", inputs, "--seed", -1) == 2
    assert "argument --seed: '-1' is not" in capsys.readouterr().err
