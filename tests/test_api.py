"""The package's face: export, ask, stream, generate and validate in Python, as the commands do it."""

import ast
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from commands import Workshop, call, greedy
from PIL import Image
from tiny import make_inputs

import himap_export as hx
from himap_export.engines import session as session_module
from himap_export.engines.cli import main as run_main

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "examples" / "shapes" / "images"
LINES = [json.loads(line) for line in (IMAGES / "questions.jsonl").read_text().splitlines()[:2]]
IMAGE, QUESTION = IMAGES / LINES[0]["image"], LINES[0]["question"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> hx.Bundle:
    told: list[str] = []
    out = tmp_path_factory.mktemp("api") / "bundle"
    made = hx.export(
        "shapes",
        out=out,
        r1=0.5,
        r2=0.75,
        text_budget=(32, 48),
        dtype="fp32",
        backend="onnxruntime",
        progress=told.append,
    )
    assert [line.split()[0] for line in told] == ["vision", "stages", "weights", "compile", "finalise"]
    return made


def test_importing_costs_nothing_and_every_name_is_there() -> None:
    code = "import sys, himap_export as hx; print(sorted({'numpy', 'msgspec', 'torch'} & set(sys.modules)), dir(hx))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"[] {sorted(hx.__all__)}\n"
    assert all(getattr(hx, name) is not None for name in hx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        hx.exprot  # noqa: B018


@pytest.mark.parametrize(
    "first", ["hx.register_criterion", "hx.validate", "import_module('himap_export.validate.cli')"]
)
def test_validate_is_the_function_whatever_was_imported_before(first: str) -> None:
    code = f"from importlib import import_module; import himap_export as hx; {first}; print(callable(hx.validate))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_no_room_imports_the_face() -> None:
    for room in ("graphs", "engines", "serve", "exporter", "validate"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                named = [node.module] if isinstance(node, ast.ImportFrom) else []
                named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                assert "himap_export" not in named, file


def test_a_session_answers_as_the_command_does(
    bundle: hx.Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--image", IMAGE, "--prompt", QUESTION, "--threads", 1)
    assert call(run_main, bundle.folder, *flags, "--show-kept", tmp_path / "command.png", "--json") == 0
    expected = json.loads(capsys.readouterr().out)
    with hx.Bundle.open(bundle.folder).session(threads=1) as session:
        answer = session.ask(IMAGE, QUESTION)
        assert (answer.text, answer.tokens.tolist()) == (expected["text"], expected["tokens"])
        assert answer.text == LINES[0]["answer"] and answer.request.spec.budget.text == expected["text_budget"] == 32
        stream = session.stream(Image.open(IMAGE), QUESTION)
        assert "".join(stream) == answer.text == stream.answer.text
        again = session.generate(
            {"input_ids": answer.request.inputs.input_ids, "pixel_values": answer.request.inputs.pixel_values}
        )
        np.testing.assert_array_equal(again.tokens, answer.tokens)
        assert again.text == "" and again.outputs.keys() == answer.outputs.keys()
    answer.draw_kept(tmp_path / "session.png")
    assert (tmp_path / "session.png").read_bytes() == (tmp_path / "command.png").read_bytes()
    with pytest.raises(hx.HimapError, match="no image to draw on"):
        again.draw_kept(tmp_path / "no.png")


def test_a_session_takes_the_budget_that_fits_over_one_copy_of_the_weights(bundle: hx.Bundle) -> None:
    with bundle.session(threads=1) as session:
        short, long = session.ask(IMAGE, QUESTION), session.ask(IMAGE, f"{'red ' * 20}{QUESTION}", max_new_tokens=1)
        assert [a.request.spec.budget.text for a in (short, long)] == [32, 48] and long.tokens.shape == (1, 1)
        engines = {id(session.pipeline(a.request.spec).engines) for a in (short, long)}
        assert len(engines) == 1
    with bundle.session(threads=1, text_budget=48) as session:
        assert session.ask(IMAGE, QUESTION).request.spec.budget.text == 48


def test_a_session_answers_one_at_a_time(bundle: hx.Bundle) -> None:
    """Its tensors are allocated once: a second answer would write into the first one's."""
    with bundle.session(threads=1) as session:
        first = session.stream(IMAGE, QUESTION)
        assert next(first)
        with pytest.raises(hx.HimapError, match="in the middle of an answer"):
            session.ask(IMAGE, QUESTION)
        expected = first.answer.text
        abandoned = session.stream(IMAGE, QUESTION)
        next(abandoned)
        del abandoned
        assert session.ask(IMAGE, QUESTION).text == expected


def test_a_picture_of_which_little_is_seen_is_told(bundle: hx.Bundle) -> None:
    """CLIP's preprocessing crops to the centre square."""
    with bundle.session(threads=1) as session:
        with pytest.warns(hx.HimapWarning, match="the model sees 25% of this image"):
            session.prepare(Image.new("RGB", (400, 100)), QUESTION)
        with warnings.catch_warnings(action="error"):
            session.prepare(Image.new("RGB", (150, 100)), QUESTION)


def test_plans_as_objects(work: Workshop, tmp_path: Path) -> None:
    checkpoint, cuts = work.checkpoint("gqa2"), (hx.Cut(1, "last", keep=5), hx.Cut(3, "random", remove=0.2))
    plan = hx.PruningPlan(cuts)
    planned = hx.plan(checkpoint, plan=plan)
    assert [v.budget.visual for v in planned.variants] == [(16, 5, 4)] and planned.variants[0].plan_name == "custom"
    assert not list(tmp_path.iterdir())
    made = hx.export(
        checkpoint,
        out=tmp_path / "b",
        plan={"tight": plan, "whole": hx.PruningPlan()},
        dtype="fp32",
        max_new_tokens=8,
        backend="onnxruntime",
    )
    assert [v.plan_name for v in made.manifest.variants] == ["tight", "whole"]
    inputs = make_inputs(work.tiny("gqa2"), [9], [5], seed=4)
    with made.session(plan="whole", threads=1) as session:
        found = session.generate(hx.Inputs(inputs.input_ids, inputs.pixel_values), max_new_tokens=4)
    truth = greedy(work.reference("gqa2"), inputs.input_ids, inputs.pixel_values, max_new_tokens=4)
    np.testing.assert_array_equal(found.tokens[:, : truth.shape[1]], truth)
    with pytest.raises(hx.HimapError, match="is no name for a plan"):
        hx.plan(checkpoint, plan={"../x": plan})


def test_validation(bundle: hx.Bundle, tmp_path: Path) -> None:
    told: list[str] = []
    report = hx.validate(bundle, image=IMAGE, prompt=QUESTION, speed=False, threads=1, tell=told.extend)
    assert report.passed and report.failed == () and report.lines() == told
    assert json.loads(json.dumps(report.to_json()))["parity"]["tokens"]["first"] is None
    assert report.to_json()["answer"] == report.answer == {"engine": "C", "reference": "C"}
    assert "      answer      'C', the reference's 'C'" in told
    assert report.to_json()["image_tokens"] == list(report.run.budget.visual)
    page = report.write(tmp_path / "report", ("python", "a script.py"))
    shown = re.sub(r"<[^>]*>", "", page.read_text())
    assert "python &#39;a script.py&#39;" in shown and bundle.manifest.digest in shown
    drawn = hx.validate(bundle, prompts=1, speed=False, threads=1, atol=0.0)
    assert not drawn.passed and drawn.answer is None and drawn.to_json()["answer"] is None
    by_name = hx.validate(bundle, image=str(IMAGE), prompt=QUESTION, max_new_tokens=1, speed=False, threads=1)
    assert "pixels" in {t.name for t in by_name.parity.tensors}  # they are judged however the file is named


def test_a_question_that_is_half_asked_is_no_validation(bundle: hx.Bundle) -> None:
    with pytest.raises(hx.HimapError, match="`image` or `video`, and `prompt` go together"):
        hx.validate(bundle, image=IMAGE)
    with pytest.raises(hx.HimapError, match="`inputs` excludes `image`"):
        hx.validate(bundle, image=IMAGE, prompt=QUESTION, inputs={})


def test_a_session_reads_its_tokenizer_once(bundle: hx.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    real = session_module.load_processor
    monkeypatch.setattr(session_module, "load_processor", lambda *asked: read.append(asked) or real(*asked))
    session = bundle.session(threads=1)
    assert session.prepare(IMAGE, QUESTION).processor is session.prepare(IMAGE, "what?").processor
    assert len(read) == 1
