"""`himap-validate --dataset` through the real command, on a model that answers, and reports of both of its modes."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
from commands import ORT, QUESTIONS_64, SHAPES_64, Workshop, call, greedy
from pages import Seen

from himap_export.engines.questions import read_dataset
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.errors import HimapError
from himap_export.validate.accuracy.prompter import prompter_of_checkpoint
from himap_export.validate.checkpoint import load_reference
from himap_export.validate.cli import main
from himap_export.validate.reference.criteria import reference_himap


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scoring") / "bundle"
    flags = ("--policy", "himap", "--policy", "fastv", "--text-budget", 20, "--max-new-tokens", 12, "--batch", 2, *ORT)
    assert call(export_main, SHAPES_64, *flags, "--out", out) == 0
    return out


def score(bundle: Path, report: Path, *flags: object) -> int:
    timing = () if "--iterations" in flags else ("--no-speed",)
    arguments = ("--dataset", QUESTIONS_64, "--report", report, "--seeds", 2, "--threads", 1, *timing)
    return call(main, bundle, *arguments, *flags)


@pytest.fixture(scope="module")
def report(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "accuracy"
    assert score(bundle, out) == 0
    return out


def test_right_answers_are_those_of_the_reference(report: Path) -> None:
    data, prompter = read_dataset(QUESTIONS_64), prompter_of_checkpoint(SHAPES_64)
    reference = load_reference(SHAPES_64, "fp32", 1)
    told = [json.loads(line) for line in (report / "answers.jsonl").read_text().splitlines()[1:]]
    for policy, cuts in (("none", ()), ("qa", reference_himap(2, 8, 0.5, 0.75))):
        for example in data.examples:
            arrays = prompter.arrays(example)
            said = greedy(reference, arrays.input_ids, arrays.pixel_values, max_new_tokens=4, cuts=cuts)[0]
            (answer,) = [a for a in told if a["policy"] == policy and a["line"] == example.line]
            assert answer["said"] == prompter.processor.text(said.tolist(), reference.stop_tokens)


def test_everyone_is_in_the_report(report: Path) -> None:
    found = json.loads((report / "report.json").read_text())
    everyone = ["qa", "fastv", "none", "random-qa", "uniform-qa", "random-fastv", "uniform-fastv"]
    assert list(found["accuracy"]) == list(found["flops_kept"]) == everyone
    assert found["flops_kept"]["qa"] == found["flops_kept"]["random-qa"] < found["flops_kept"]["none"] == 1
    assert set(found["accuracy"]["qa"]["all"]["over"]) == {"none", "random-qa"}
    assert set(found["accuracy"]["fastv"]["all"]["over"]) == {"none", "random-fastv"}
    assert found["accuracy"]["random-qa"]["all"]["seeds"]["seeds"] == 2
    page = (report / "report.html").read_text()
    for name in (*everyone, "What was kept", "himap-validate"):
        assert name in page
    assert (report / "accuracy.png").is_file() and list(report.glob("kept-*.png"))


def test_what_was_answered_is_not_asked_again(bundle: Path, report: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(report, tmp_path / "again"))
    lines = (again / "answers.jsonl").read_text().splitlines(keepends=True)
    marked = [line.replace('"right": true', '"right": false') for line in lines[: len(lines) // 2]]
    (again / "answers.jsonl").write_text("".join(marked) + lines[len(lines) // 2][:20])  # torn by a kill
    assert score(bundle, again) == 0
    assert (again / "answers.jsonl").read_text().startswith("".join(marked))
    assert len((again / "answers.jsonl").read_text().splitlines()) == len(lines)


def test_one_plan_and_one_object(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--plan", "fastv", "--limit", 3, "--iterations", 1, "--warm-up", 0, "--json")
    assert score(bundle, tmp_path / "r", *flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["accuracy"]) == ["fastv", "none", "random", "uniform"]
    assert found["accuracy"]["fastv"]["all"]["questions"] == 3
    timed = found["costs"]["systems"]
    assert list(timed) == list(found["accuracy"]) and "1 interleaved repetitions" in found["costs"]["note"]
    assert timed["none"]["over_unpruned"] == {"prefill": [1, 1, 1], "decode": [1, 1, 1]}
    for cost in timed.values():
        assert 0 < cost["decode"] < cost["prefill"] and 2**24 < cost["peak_bytes"] < 2**32
    assert found["front"]["names"] == [] and "Nothing can be told apart on 3 questions" in found["front"]["note"]
    told = Seen((tmp_path / "r" / "report.html").read_text())
    assert "Nothing can be told apart on 3 questions" in " ".join(told.texts) and "over unpruned" in told.texts
    assert (tmp_path / "r" / "worth.png").is_file()


def test_what_would_not_fit_into_memory_is_not_timed_and_told(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("himap_export.validate.accuracy.costs.memory_bytes", lambda: 1000)
    assert score(bundle, tmp_path / "r", "--plan", "fastv", "--limit", 1, "--iterations", 1) == 0
    assert "Times were left out: 4 processes of their own take 0 GB" in capsys.readouterr().out


def test_what_a_limit_asked_the_whole_goes_on_with(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The longest right answer, which decides how many tokens are generated, is behind the limit."""
    folder, tokens = Path(shutil.copytree(QUESTIONS_64.parent, tmp_path / "images")), list[int]()
    last = {"image": "letter.png", "question": "what?", "answer": "red " * 9}
    (folder / "more.jsonl").write_text(f"{(folder / 'questions.jsonl').read_text().strip()}\n{json.dumps(last)}\n")

    def systems(*_: Any, new_tokens: int, **__: Any) -> NoReturn:
        tokens.append(new_tokens)
        raise HimapError("far enough")

    monkeypatch.setattr("himap_export.validate.accuracy.scoring.open_systems", systems)
    for flags in (("--limit", 2), ()):
        assert score(bundle, tmp_path / "r", "--dataset", folder / "more.jsonl", *flags) == 1
        assert "far enough" in capsys.readouterr().err
    assert tokens[0] == tokens[1] > 8


def test_a_prompt_behind_the_limit_may_be_too_long(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(QUESTIONS_64.parent, tmp_path / "images"))
    last = {"image": "letter.png", "question": "red " * 30, "answer": "red"}
    (folder / "more.jsonl").write_text(f"{(folder / 'questions.jsonl').read_text().strip()}\n{json.dumps(last)}\n")

    def interrupt(*_: Any, **__: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("himap_export.validate.accuracy.scoring.open_systems", interrupt)
    flags = ("--dataset", folder / "more.jsonl")
    assert score(bundle, tmp_path / "r", *flags, "--limit", 2) == 130
    assert score(bundle, tmp_path / "r", *flags) == 2
    assert "line 6 of" in capsys.readouterr().err


def test_what_can_be_known_before_is_checked_before_engines_are_opened(
    bundle: Path, report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(*_: object) -> NoReturn:
        raise AssertionError("engines were opened first")

    monkeypatch.setattr("himap_export.validate.accuracy.scoring.open_pipeline", opened)
    damaged, blocked = (Path(shutil.copytree(report, tmp_path / name)) for name in ("damaged", "blocked"))
    with (damaged / "answers.jsonl").open("a") as log:
        log.write("{}\n")
    (blocked / "report.json").unlink()
    (blocked / "report.json").mkdir()
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / "answers.jsonl")
    before = sorted(bundle.rglob("*"))
    for folder, flags, words in (
        (report, ("--max-new-tokens", 2), "logs another measurement: max_new_tokens is 2, was 8"),
        (report, ("--plan", "qa"), "logs another measurement: plans is ['qa'], was ['qa', 'fastv']"),
        (damaged, (), "is no answer: the log is damaged"),
        (blocked, (), "report.json is there and is not a plain file"),
        (tmp_path / "piped", (), "answers.jsonl is there and is not a plain file"),
        (bundle / "report", (), "is a bundle"),
        (bundle, (), "is a bundle"),
        (tmp_path / ("x" * 300), (), "File name too long"),
    ):
        assert score(bundle, folder, *flags) == 2, words
        err = capsys.readouterr().err
        assert words in err and len(err.splitlines()) == 1
    assert sorted(bundle.rglob("*")) == before


def test_what_is_refused(bundle: Path, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(QUESTIONS_64.parent, tmp_path / "images"))
    good = (folder / "questions.jsonl").read_text()
    (folder / "bad.jsonl").write_text(good + '{"image": "nowhere.png", "question": "?", "answer": "red"}\n{"image\n')
    (folder / "long.jsonl").write_text(
        good + good.splitlines()[0].replace('"question": "', '"question": "' + "red " * 30)
    )
    (folder / "two.jsonl").write_text(good.replace('"question": "', '"question": "<image><image> ', 1))
    here = ("--report", tmp_path / "r")
    for flags, words in (
        (("--dataset", folder / "bad.jsonl", *here), "line 6 of"),
        (("--dataset", folder / "long.jsonl", *here), "the budget is 20"),
        (("--dataset", folder / "two.jsonl", *here), "line 1 of the data set: the prompt contains <image> 2 times"),
        (("--dataset", folder / "questions.jsonl", *here, "--plan", "random"), "holds no plan random"),
        (("--dataset", folder / "questions.jsonl", "--report", folder), "is neither empty nor ours"),
        (("--dataset", folder / "questions.jsonl", *here, "--prompt", "?", "--image", "x.png"), "--dataset excludes"),
        (("--dataset", folder / "questions.jsonl", *here, "--seeds", 0), "argument --seeds: '0' is not a whole number"),
        (("--plan", "qa", "--plan", "fastv"), "several --plan are for --dataset"),
    ):
        assert call(main, bundle, *flags) == 2, flags
        assert words in capsys.readouterr().err
    assert call(main, bundle, "--dataset", QUESTIONS_64, "--report", report, "--max-new-tokens", 2) == 2
    assert "logs another measurement" in capsys.readouterr().err


def test_bad_lines_are_left_out_when_asked(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(QUESTIONS_64.parent, tmp_path / "images"))
    file = folder / "bad.jsonl"
    file.write_text('{"image": "nowhere.png"}\n' + (folder / "questions.jsonl").read_text())
    flags = ("--dataset", file, "--report", tmp_path / "r", "--plan", "qa", "--seeds", 1, "--skip-bad", "--json")
    assert call(main, bundle, *flags) == 0
    out, err = capsys.readouterr()
    assert "left out: line 1" in err and len(json.loads(out)["skipped"]) == 1


@pytest.mark.slow
def test_parity_and_speed_make_a_report_too(work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--prompts", 1, "--max-new-tokens", 2, "--iterations", 1, "--warm-up", 0, "--threads", 1)
    assert call(main, work.bundle("golden"), *flags, "--report", tmp_path) == 0
    page, found = (tmp_path / "report.html").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert found["passed"] and "FLOPs allow" in page and (tmp_path / "speed.png").is_file()
    for tensor in ("vision", "prefix", "score k1", "logits"):
        assert tensor in page
    assert "against PyTorch in fp32: 1 prompt\n" in capsys.readouterr().out and "<dt>prompt</dt>" in page
