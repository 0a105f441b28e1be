"""A selector in a package of somebody else, the one of docs/add-a-selector.md: no file of ours is changed for it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ORT, Workshop, call
from outside_package import install
from PIL import Image
from test_docs import ROOT, blocks

from himap_export.engines.bundle import Bundle
from himap_export.engines.cli import main as run_main
from himap_export.engines.questions import Example
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.errors import Exit
from himap_export.validate.cli import main as validate_main
from himap_export.validate.reference import criteria
from himap_export.validate.reference.criteria import ReferenceCut
from himap_export.validate.tuning.grid import grid
from himap_export.validate.tuning.sweep import Job, _answering

PAGE = [block.text for block in blocks(ROOT / "docs" / "add-a-selector.md")]
FLAGS = ("--policy", "value-norm", "--k1", 2, "--k2", 4, "--text-budget", 120, "--max-new-tokens", 8, *ORT)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder on the path, of this process and those it starts; what is imported from it is forgotten."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(criteria, "CRITERIA", dict(criteria.CRITERIA))
    monkeypatch.setattr("himap_export.validate.reference.reference.CRITERIA", criteria.CRITERIA)
    for name in [name for name in sys.modules if name.startswith("himap_value_norm")]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def changed(old: str, new: str) -> list[str]:
    assert sum(old in text for text in PAGE) == 1
    return [text.replace(old, new) for text in PAGE]


def test_it_is_exported_run_judged_and_scored(
    place: Path, work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert install(PAGE, place)
    bundle = tmp_path / "bundle"
    assert call(export_main, work.family("llava"), *FLAGS, "--out", bundle) == 0
    plan = Bundle.open(bundle).select().plan
    assert plan.policy == "value-norm" and [cut.criterion for cut in plan.cuts] == ["value-norm"] * 2

    capsys.readouterr()
    judged = ("--policy", "value-norm", "--no-speed", "--prompts", 2, "--threads", 1, "--json")
    assert call(validate_main, bundle, *judged) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and {found["parity"][f"kept_k{n}"]["verdict"] for n in (1, 2)} == {"identical"}

    pixels = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), np.uint8)
    lines = []
    for n, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{n}.png")
        lines.append(json.dumps({"image": f"{n}.png", "question": "What?", "answer": "a"}))
    (tmp_path / "two.jsonl").write_text("\n".join(lines))
    assert call(run_main, bundle, "--image", tmp_path / "0.png", "--prompt", "What?", "--threads", 1) == 0
    scoring = ("--dataset", tmp_path / "two.jsonl", "--seeds", 1, "--threads", 1, "--report", tmp_path / "r", "--json")
    capsys.readouterr()
    assert call(validate_main, bundle, *scoring, "--no-speed") == 0
    assert "value-norm" in capsys.readouterr().out


def test_its_cuts_are_tuned(place: Path, work: Workshop, tmp_path: Path) -> None:
    """As a worker of himap-tune answers, in this process."""
    install(PAGE, place)
    (made,) = grid({"k1": (2,), "r1": (0.5,), "k2": (4,), "r2": (0.5,)}, 6, "value-norm")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)).save(tmp_path / "0.png")
    example = Example(1, "1", tmp_path / "0.png", "What?", "a", "")
    cuts = tuple(ReferenceCut(cut.layer, cut.criterion, cut.remove or 0.0) for cut in made.plan.cuts)
    answer = _answering(Job(work.family("llava"), "fp32", 1, {"none": (), made.name: cuts}, (0,)))
    _, tokens, _ = answer((0, example))
    assert set(tokens) == {("none", 0), (made.name, 0)} and "value-norm" in criteria.CRITERIA


def test_a_reference_that_ranks_otherwise_fails_the_gate(place: Path, work: Workshop, tmp_path: Path) -> None:
    assert install(changed("return s.value.float()", "return -s.value.float()"), place)
    assert call(export_main, work.family("llava"), *FLAGS, "--out", tmp_path / "bundle") == 0
    assert call(validate_main, tmp_path / "bundle", "--no-speed", "--prompts", 2, "--threads", 1) == Exit.GATE


@pytest.mark.parametrize(
    ("old", "new", "code", "told"),
    [
        ("import onnx_ir", "import no_such_module", Exit.MISSING, "the package himap-value-norm cannot give"),
        ("_norm:SELECTOR", "_norm:score", Exit.MISSING, "himap_value_norm:score is a function, no himap_export.Selec"),
        ("return s.op.ReduceMean", "return s.op.Identity(values)  #", Exit.USAGE, "value-norm scores in another shape"),
        ('value-norm = "hi', 'Value-norm = "hi', Exit.USAGE, "'value-norm' is none of himap, fastv"),
    ],
)
def test_a_package_that_is_broken_is_one_line(
    place: Path, tmp_path: Path, work: Workshop, old: str, new: str, code: Exit, told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    install(changed(old, new), place)
    assert call(export_main, work.family("llava"), *FLAGS, "--out", tmp_path / "bundle") == code
    said = capsys.readouterr().err.strip().splitlines()
    assert told in said[-1] and "Traceback" not in "".join(said)
    assert call(export_main, work.family("llava"), "--policy", "himap", "--k1", 2, "--k2", 4, "--dry-run") == 0


def test_two_packages_that_offer_one_name_are_both_named(
    place: Path, work: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    install(PAGE, place)
    install(changed('name = "himap-value-norm"', 'name = "himap-value-norm-too"'), place)
    assert call(export_main, work.family("llava"), *FLAGS, "--dry-run") == Exit.USAGE
    told = capsys.readouterr().err
    assert "several packages offer the criterion value-norm" in told and "himap-value-norm-too" in told
