"""Children: what they answer, what becomes of their errors and deaths, and that nobody waits for them or is left."""

import functools
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import workers

from himap_export.engines.backends import load_backend
from himap_export.engines.isolation import MEMORY, child, isolated
from himap_export.graphs.errors import Exit, HimapError


def test_it_answers_and_keeps_standard_output_clean(capfd: pytest.CaptureFixture[str]) -> None:
    assert isolated("adding", {}, operator.add, 1, 2) == 3
    assert isolated("reading", {"HIMAP_TEST": "here"}, os.getenv, "HIMAP_TEST") == "here"
    assert os.getenv("HIMAP_TEST") is None
    isolated("printing", {}, print, "noise")
    out, err = capfd.readouterr()
    assert out == "" and err == "noise\n"


def test_its_own_error_is_raised_here(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HimapError, match=r"^unknown backend nothing \(known: onnxruntime") as told:
        isolated("opening", {}, load_backend, "nothing")
    assert told.value.code == Exit.USAGE and capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        (operator.truediv, (1, 0), "ZeroDivisionError: division by zero"),
        (threading.Lock, (), "TypeError: cannot pickle"),  # the answer itself cannot be sent
        (operator.getitem, ((), 7), "IndexError: tuple index out of range"),
    ],
)
def test_a_bug_is_told_as_what_it_is(
    function: Callable[..., object], arguments: tuple[object, ...], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(HimapError, match="the process that was computing failed") as told:
        isolated("computing", {}, function, *arguments)
    assert words in str(told.value) and MEMORY not in str(told.value)
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("function", "argument", "reason", "hint"),
    [
        (signal.raise_signal, signal.SIGKILL, "killed by SIGKILL", MEMORY),
        (signal.raise_signal, signal.SIGTERM, "killed by SIGTERM", ""),
        (signal.raise_signal, signal.SIGSEGV, "killed by SIGSEGV", ""),
        (os._exit, 3, "exit code 3", ""),
    ],
)
def test_a_death_is_told_and_memory_suspected_only_where_the_kernel_killed(
    function: Callable[[int], object], argument: int, reason: str, hint: str
) -> None:
    with pytest.raises(HimapError, match="the process that was building died") as told:
        isolated("building", {}, function, argument)
    assert (told.value.details, told.value.hint) == (reason, hint)
    assert not workers()


def test_too_little_memory_in_python_is_said() -> None:
    with pytest.raises(HimapError, match="too little memory for filling"):
        isolated("filling", {}, bytearray, 1 << 60)


def test_an_interrupt_is_the_parents() -> None:
    assert isolated("listening", {}, signal.raise_signal, signal.SIGINT) is None


@pytest.mark.parametrize("stopped", [False, True])
def test_whoever_leaves_does_not_wait(stopped: bool) -> None:
    start = time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt),
        child("sleeping", {}, functools.partial, functools.partial(time.sleep)) as asleep,
    ):
        asleep.ask(0)
        (process,) = workers()
        asleep.send(600)
        if stopped:
            os.kill(process, signal.SIGSTOP)
        raise KeyboardInterrupt
    assert time.monotonic() - start < 60 and not workers()


def test_a_child_that_has_died_is_told_to_whoever_asks() -> None:
    with child("waiting", {}, functools.partial, functools.partial(time.sleep)) as one:
        one.ask(0)
        (process,) = workers()
        os.kill(process, signal.SIGKILL)
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        with pytest.raises(HimapError, match=r"waiting died: killed by SIGKILL"):
            one.ask(0)


PARENT = """
import functools, time
from himap_export.engines.isolation import child
with child("sleeping", {}, functools.partial, functools.partial(time.sleep)) as asleep:
    asleep.ask(0)
    print("ready", flush=True)
    asleep.ask(600)
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_its_parent(sent: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        children = workers(parent.pid)
        parent.send_signal(sent)
        parent.wait(60)
    deadline = time.monotonic() + 30
    while (left := [pid for pid in children if _lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(children) == 1 and not left


def _lives(pid: int) -> bool:
    """Not gone, and not a zombie that nobody has reaped."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


ADDS = """
import operator
from himap_export.engines.isolation import isolated
print(isolated("adding", {}, operator.add, 1, 2))
"""
EXPORTS = """
from pathlib import Path
from himap_export.graphs.plan import TokenBudget, himap
from himap_export.validate.baseline import export_baseline
from himap_export.validate.checkpoint import checkpoint_folder
plan, budget = himap(1, 3, 0.5, 0.5), TokenBudget((64,), 16, 4)
kinds = {"dtype": "fp16", "backend": "tensorrt-rtx", "plans": {"himap": (plan, plan.kept(64))}}
bundle = export_baseline(checkpoint_folder("shapes"), budget, out=Path("bundle"), **kinds)
print(len(bundle.manifest.engines["tensorrt-rtx"]))
"""


@pytest.mark.parametrize(
    ("how", "script", "said"),
    [
        pytest.param("file", EXPORTS, "5\n", marks=pytest.mark.slow),
        ("file", ADDS, "3\n"),
        ("stdin", ADDS, "3\n"),
        ("exec", ADDS, "3\n"),
    ],
    ids=["a file that exports", "a file", "standard input", "exec"],
)
def test_a_caller_needs_no_main_guard(tmp_path: Path, how: str, script: str, said: str) -> None:
    """As users write: statements at the top of a script, none of which runs twice."""
    (tmp_path / "mine.py").write_text(f"exec(compile({script!r}, '<cell>', 'exec'))" if how == "exec" else script)
    words = [sys.executable, "-" if how == "stdin" else "mine.py"]
    found = subprocess.run(words, input=script, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (found.returncode, found.stdout) == (0, said), found.stderr
