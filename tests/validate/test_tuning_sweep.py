"""The sweep's processes: what they answer, what becomes of their errors, of their death, and of Ctrl-C."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from commands import QUESTIONS_64, SHAPES_64, workers

from himap_export.engines.questions import Example, read_dataset
from himap_export.graphs.errors import HimapError
from himap_export.validate.accuracy.answers import read_log
from himap_export.validate.accuracy.prompter import prompter_of_checkpoint
from himap_export.validate.accuracy.systems import request_seed
from himap_export.validate.parity.runs import reference_cuts
from himap_export.validate.reference.criteria import Cuts, ReferenceCut
from himap_export.validate.reference.reference import Reference
from himap_export.validate.tuning.grid import grid
from himap_export.validate.tuning.sweep import Job, sweep

TOKENS = 16  # any: cuts by fractions are alike


def plans_of(policy: str) -> dict[str, Cuts]:
    """The unpruned model and two plans of a policy of two cuts."""
    found = grid({"k1": (1, 2), "r1": (0.5,), "k2": (4,), "r2": (0.75,)}, 10, policy)
    return {"none": (), **{c.name: reference_cuts(c.plan, c.plan.kept(TOKENS)) for c in found}}


def job(checkpoint: Path, plans: Mapping[str, Cuts] | None = None) -> Job:
    return Job(checkpoint, "fp32", 1, plans or plans_of("himap"), (0,))


@pytest.fixture(scope="module")
def asked() -> list[tuple[int, Example]]:
    return list(enumerate(read_dataset(QUESTIONS_64).examples))


@pytest.mark.parametrize("policy", ["random", pytest.param("himap", marks=pytest.mark.slow)])
def test_two_processes_say_what_one_prefill_a_plan_says(asked: list[tuple[int, Example]], policy: str) -> None:
    reference, prompter, plans = Reference(SHAPES_64), prompter_of_checkpoint(SHAPES_64), plans_of(policy)
    swept = sweep(Job(SHAPES_64, "fp32", 1, plans, (3, 4)), asked, 2)
    found = {e.line: (tokens, label) for e, tokens, label in swept}
    assert len(found) == len(asked) >= 5
    for number, example in asked:
        tokens, label = found[example.line]
        assert prompter.processor.tokenizer.decode([label]).strip() == example.answer
        inputs = prompter.arrays(example)
        assert set(tokens) == {(name, n) for name in plans for n in (0, 1)}
        for (name, n), token in tokens.items():
            seeds = [request_seed((3, 4)[n], number)]
            wanted = reference.prefill(inputs.input_ids, inputs.pixel_values, cuts=plans[name], seeds=seeds)
            assert token == int(wanted.logits[0].argmax())


@pytest.mark.slow
def test_an_error_in_a_worker_is_told_as_it_is(
    asked: list[tuple[int, Example]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = Path(shutil.copytree(SHAPES_64, tmp_path / "broken", ignore=shutil.ignore_patterns("*.safetensors")))
    with pytest.raises(HimapError, match=r"PyTorch cannot load .*broken"):
        list(sweep(job(broken), asked, 2))
    assert not workers() and "Traceback" not in capfd.readouterr().err


def test_a_bug_in_a_worker_is_told_as_what_it_is(
    asked: list[tuple[int, Example]], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(HimapError, match=r"sweeping plans failed: IndexError: .*out of range") as told:
        list(sweep(job(SHAPES_64, {"a": (ReferenceCut(99, "last"),)}), asked, 1))
    assert "memory" not in str(told.value) and "Traceback" in capfd.readouterr().err
    assert not workers()


def test_a_worker_that_dies_is_an_error(asked: list[tuple[int, Example]]) -> None:
    answers = sweep(job(SHAPES_64), asked, 1)
    next(answers)
    (worker,) = workers()
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(HimapError, match=r"sweeping plans died: killed by SIGKILL .*`workers` 1"):
        list(answers)
    assert not workers()


@pytest.mark.slow  # what test_isolation shows of an export's workers
@pytest.mark.parametrize("to_group", [False, True], ids=["kill -INT", "Ctrl-C"])
def test_an_interrupt_does_not_wait_for_a_long_walk(tmp_path: Path, to_group: bool) -> None:
    """Workers that are stopped stand for a large model's, at work for minutes."""
    for image in QUESTIONS_64.parent.glob("*.png"):
        shutil.copy(image, tmp_path)
    (tmp_path / "many.jsonl").write_text(QUESTIONS_64.read_text() * 200)
    grid_flags = ("--k1", "1", "--k2", "4", "--r1", "0.5", "--r2", "0.75", "--workers", "2", "--no-time")
    command = Path(sys.executable).with_name("himap-tune")
    words = (command, SHAPES_64, "--dataset", tmp_path / "many.jsonl", "--out", tmp_path / "out", *grid_flags)
    log = tmp_path / "out" / "sweep.jsonl"
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True) as tune:
        while not (log.exists() and len(log.read_bytes().splitlines()) > 2) and tune.poll() is None:
            time.sleep(0.05)
        stopped = workers(tune.pid)
        for worker in stopped:
            os.kill(worker, signal.SIGSTOP)
        (os.killpg if to_group else os.kill)(tune.pid, signal.SIGINT)
        try:
            said = tune.communicate(timeout=60)[1]
        except subprocess.TimeoutExpired:
            for worker in stopped:
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
            pytest.fail("it waits for its workers")
    assert tune.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert len(stopped) == 2 and not any(Path(f"/proc/{worker}").exists() for worker in stopped)
    assert 2 <= len(read_log(log)) < 1000 * 2
