"""Several plans and text budgets in one bundle: each prompt is answered as by a bundle of its own plan and budget."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Workshop, call, padded, save_inputs, spawn
from tiny import make_inputs

from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.cli import main as run_main
from himap_export.engines.pipeline import Pipeline
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.errors import HimapError
from himap_export.graphs.plan import align
from himap_export.validate.cli import main as validate_main
from himap_export.validate.reference.criteria import ReferenceCut, reference_himap

BUDGETS = (12, 24, 48)
PLANS = {"wide": (1, 3, 0.25, 0.5), "tight": (1, 4, 0.5, 0.75)}


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plans") / "plans.toml"
    tables = (f"[{n}]\nk1 = {p[0]}\nk2 = {p[1]}\nr1 = {p[2]}\nr2 = {p[3]}\n" for n, p in PLANS.items())
    file.write_text("\n".join(tables))
    return file


@pytest.fixture(scope="module")
def several(work: Workshop, plan_file: Path) -> Path:
    return work.bundle("gqa2", "--plan", plan_file, "--text-budget", *BUDGETS)


def alone(work: Workshop, plan: str, budget: int) -> Path:
    return work.bundle("gqa2", "--text-budget", budget, cuts=reference_himap(*PLANS[plan]))


@pytest.mark.parametrize("text", [9, 20, 40])
@pytest.mark.parametrize("plan", [None, *PLANS])
def test_each_prompt_gets_what_a_bundle_of_its_own_gives(
    work: Workshop, several: Path, text: int, plan: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = make_inputs(work.tiny("gqa2"), [text - 3], [3], seed=text)
    budget = next(b for b in BUDGETS if b >= text)
    expected = work.answer(alone(work, plan or "wide", budget), inputs, "--max-new-tokens", "8")
    capsys.readouterr()
    found = work.answer(several, inputs, "--max-new-tokens", "8", *(("--plan", plan) if plan else ()))
    assert f"plan {plan or 'wide'}, text budget {budget}" in capsys.readouterr().err
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_budget_can_be_asked_for(work: Workshop, several: Path) -> None:
    inputs = make_inputs(work.tiny("gqa2"), [6], [3])
    small, large = (work.answer(several, inputs, "--max-new-tokens", "4", "--text-budget", b) for b in (12, 48))
    assert large["kept_k1"].shape[1] == small["kept_k1"].shape[1] + 36
    np.testing.assert_array_equal(large["tokens"], small["tokens"])
    np.testing.assert_allclose(large["logits"], small["logits"], atol=1e-4)


def test_pipelines_of_all_variants_share_one_copy_of_the_weights(work: Workshop, several: Path) -> None:
    bundle, inputs = Bundle.open(several), make_inputs(work.tiny("gqa2"), [6], [3])
    first = Pipeline(bundle.select(), "onnxruntime", Opening(threads=1))
    for variant in bundle.manifest.variants:
        run = bundle.select(variant.plan_name, variant.budget.text)
        second = Pipeline(run, "onnxruntime", beside=first)
        assert second.engines is first.engines and second.features is first.features
        prefilled, _ = second.prefill(inputs.input_ids, inputs.pixel_values)
        wanted = work.answer(alone(work, variant.plan_name, variant.budget.text), inputs, "--max-new-tokens", "1")
        np.testing.assert_array_equal(prefilled.logits, wanted["logits"])


def test_graphs_that_variants_agree_on_are_stored_once(several: Path) -> None:
    manifest = Bundle.open(several).manifest
    assert [f"{v.plan_name}-{v.budget.text}" for v in manifest.variants] == [f"{p}-{b}" for p in PLANS for b in BUDGETS]
    stored = {file.stem for file in several.glob("*.onnx")}
    assert stored == set(manifest.graphs) == {g for v in manifest.variants for g in v.graphs.values()}
    # One vision; both plans cut after layer 1 and score it alike, so they share the prefix of each budget.
    assert len(stored) == 1 + len(BUDGETS) + 3 * len(BUDGETS) * len(PLANS)


def test_the_longest_prompt_decides_and_one_that_fits_none_is_refused(
    work: Workshop, several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = make_inputs(work.tiny("gqa2"), [5, 17], [3, 3])
    assert work.answer(several, inputs, "--max-new-tokens", "2")["kept_k1"].shape == (2, 24 + 12)
    file = save_inputs(tmp_path / "long.npz", make_inputs(work.tiny("gqa2"), [60], [3]))
    assert call(run_main, several, "--load-inputs", file) == 2
    assert "63 text tokens" in capsys.readouterr().err
    for flags, words in (
        (("--plan", "none"), "it holds wide (himap), tight (himap)"),
        (("--plan", "tigth"), "; did you mean tight?"),
        (("--text-budget", 13), "it holds 12, 24, 48"),
    ):
        assert call(run_main, several, "--load-inputs", file, *flags) == 2
        assert words in capsys.readouterr().err


def test_validation_takes_a_variant(several: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--plan", "tight", "--text-budget", 12, "--prompts", 2, "--max-new-tokens", 4, "--no-speed", "--json")
    assert call(validate_main, several, *flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["plan"], found["text_budget"], found["passed"]) == ("tight", 12, True)


def test_dry_run_lists_every_variant(work: Workshop, plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--plan", plan_file, "--plan", "qa", "--text-budget", 12, 24, "--dry-run")
    assert call(export_main, work.checkpoint("mha"), *flags, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    names = [(v["plan"]["name"], v["budget"]["text"]) for v in found["variants"]]
    assert names == [(p, b) for p in ("wide", "tight", "qa") for b in (12, 24)]
    assert found["plan"] == found["variants"][0]["plan"] and found["budget"]["visual"] == [16, 12, 6]
    assert call(export_main, work.checkpoint("mha"), *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("wide", "tight", "qa")) for line in lines) == 6


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("k1 = 1", "k1 is not a plan"),
        ("", "holds no plan"),
        ("[a]\nk1 = 1", "missing required field k2"),
        ("[a]\nk1 = 1\nk2 = 2\nr1 = 0.5\nr2 = 0.5\nr3 = 1", "unknown field r3"),
        ("[a]\nk1 = 1.5\nk2 = 2\nr1 = 0.5\nr2 = 0.5", "got float - at $.k1"),
        ("[a]\nk1 = 3\nk2 = 2\nr1 = 0.5\nr2 = 0.5", "--k2 2 is not above --k1 3"),
        ("['a/b']\nk1 = 1\nk2 = 2\nr1 = 0.5\nr2 = 0.5", "a/b is not a plan"),
        ("[qa]\nk1 = 1\nk2 = 2\nr1 = 0.5\nr2 = 0.5", "two plans are named qa"),
        ("[a", "is not TOML"),
    ],
)
def test_bad_plan_files(
    work: Workshop, tmp_path: Path, content: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plans.toml"
    file.write_text(content)
    assert call(export_main, work.checkpoint("mha"), "--plan", "qa", "--plan", file, "--dry-run") == 2
    assert words in capsys.readouterr().err


def test_a_plan_that_is_not_there_or_changed_by_a_flag_is_refused(
    work: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, words in (
        (("--plan", "question"), "a plan is one of qa, caption, or a TOML file"),
        (("--plan", "qa", "--k1", "1"), "--k1 changes one plan only"),
    ):
        assert call(export_main, work.checkpoint("mha"), *flags, "--dry-run") == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visual", "text", "multiple", "expected"),
    [
        ((576, 288, 72), 192, 1, (576, 288, 72)),
        ((576, 288, 72), 192, 64, (576, 320, 128)),
        ((576, 288, 72), 170, 128, (576, 342, 86)),
        ((576, 288, 288), 192, 64, (576, 320, 320)),  # a second cut that removes nothing follows the first
        ((576, 576, 72), 100, 64, (576, 576, 92)),
    ],
)
def test_align_rounds_up(visual: Any, text: int, multiple: int, expected: Any) -> None:
    found = align(visual, text, multiple)
    assert found == expected
    behind_cuts = [new for before, after, new in zip(visual, visual[1:], found[1:], strict=False) if after < before]
    assert behind_cuts and all((tokens + text) % multiple == 0 for tokens in behind_cuts)


@pytest.mark.parametrize("multiple", [0, 512])
def test_align_never_undoes_a_cut(multiple: int) -> None:
    with pytest.raises(HimapError, match="`align`"):
        align((576, 288, 72), 192, multiple)


def test_aligned_bundles_keep_more_and_still_equal_the_reference(
    work: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    cuts = reference_himap(1, 3, 0.5, 0.75)
    bundle = work.bundle("gqa2", "--align", 5, cuts=cuts)
    assert Bundle.open(bundle).select().budget.total == (40, 35, 30) and Bundle.open(bundle).select().budget.visual == (
        16,
        11,
        6,
    )
    inputs = make_inputs(work.tiny("gqa2"), [9], [5])
    truth = work.reference("gqa2").prefill(
        inputs.input_ids,
        inputs.pixel_values,
        cuts=(ReferenceCut(1, "instruction", keep=11), ReferenceCut(3, "image", keep=6)),
    )
    found = work.answer(bundle, inputs, "--max-new-tokens", "1")
    np.testing.assert_array_equal(found["kept_k1"], padded(truth.kept[0], 35))
    np.testing.assert_array_equal(found["kept_k2"], padded(truth.kept[1], 30))
    np.testing.assert_allclose(found["logits"], truth.logits, atol=1e-3)
    capsys.readouterr()
    assert call(validate_main, bundle, "--prompts", 1, "--max-new-tokens", 2, "--no-speed") == 0
    done = spawn(
        "himap-export", work.checkpoint("gqa2"), "--k1", 1, "--k2", 3, "--text-budget", 24, "--align", 5, "--dry-run"
    )
    assert "aligned to 5: tokens k1 32 -> 35, k2 26 -> 30" in done.stdout
