"""How commands read their options and how they end: asked to, killed, or with nobody to write to."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from commands import MAIN, call

from himap_export.engines import scratch
from himap_export.engines.command import MOST_THREADS, SIGNALS, Parser, held_signals, number, whole
from himap_export.engines.scratch import clear_leftovers, scratch_folder
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.errors import MEANINGS, Exit

# A command as installed ones are: a script of its name. What it does stands in its first argument.
SCRIPT = """\
import os, signal, sys
from pathlib import Path
from himap_export.engines.command import run_command
from himap_export.engines.scratch import scratch_folder
from himap_export.engines.supervisor import announced

def deaf():  # as inside a library: no handler of Python's runs
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sent, signal.SIG_IGN)
    busy()

def work():
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True)
    with announced(folder, folder.parent), scratch_folder("test"):
        (folder / "half").touch()
        deaf()

def busy():
    print("ready", flush=True)
    while True:
        pass

bodies = {
    "deaf": deaf, "work": work, "busy": busy,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "print": lambda: print("x" * 100_000),
    "memory": lambda: bytearray(1 << 60),
    "file": lambda: open("/nowhere"),
    "bug": lambda: 1 / 0,
}
run_command("himap-test", bodies[sys.argv[1]])
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = tmp_path_factory.mktemp("bin") / "himap-test"
    script.write_text(SCRIPT)
    return script


def start(command: Path, *words: object, **how: object) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, command, *map(str, words)], stdout=pipe, stderr=pipe, text=True, **how)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("body", ["deaf", "busy"])
def test_commands_end_when_they_are_asked_to(command: Path, body: str, sent: signal.Signals) -> None:
    """Even inside a library that runs for minutes; a second, on a machine that is not busy."""
    process = start(command, body)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(sent)
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == 130
    assert said == "himap-test: interrupted, nothing was left behind\n"


def test_what_a_killed_command_announced_is_gone(command: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    process = start(command, "work", tmp_path / "deep" / "work", env=environment)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130 and [p.name for p in tmp_path.iterdir()] == ["tmp"]
    assert len(list((tmp_path / "tmp").glob("himap-*/test-*"))) == 1
    start(command, "print", env=environment).communicate(timeout=30)  # the next start of any command
    assert not list((tmp_path / "tmp").glob("himap-*/test-*"))


def test_the_child_dies_with_its_parent(command: Path) -> None:
    process = start(command, "busy")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 1
    process.kill()
    process.communicate(timeout=30)  # returns when the child's end of the pipes is closed, too
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("killed", "himap-test: error: killed by SIGKILL (the machine may have too little memory)"),
        ("crash", "himap-test: error: killed by SIGSEGV (a library crashed)"),
        ("memory", "himap-test: error: the machine has too little memory for this"),
        ("file", "himap-test: error: /nowhere: No such file or directory"),
    ],
)
def test_other_ends_are_one_line(command: Path, body: str, words: str) -> None:
    process = start(command, body)
    assert process.communicate(timeout=30) == ("", words + "\n")
    assert process.returncode == 1


def test_a_bug_keeps_its_traceback(command: Path) -> None:
    process = start(command, "bug")
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1 and "ZeroDivisionError" in said


def test_nobody_to_write_to(command: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, command, "print"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1 and done.stderr == "himap-test: error: No space left on device\n"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, command, "print"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


def test_words_that_are_no_text(command: Path) -> None:
    done = subprocess.run([sys.executable, command, "print", b"a\xff.png"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("himap-test: error: argument 2 is not valid UTF-8: a\\xff.png")


# --- options ---


@pytest.mark.parametrize("text", ["", "nan", "1.5", "1e3", "0", "65", "-1", "٣", "9" * 5000, "0x10", "1_0"])
def test_whole_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from 1 to 64"):
        whole(1, 64)(text)
    assert whole(1, 64)(" 64 ") == 64 and MOST_THREADS >= 64


@pytest.mark.parametrize("text", ["", "nan", "inf", "-inf", "2", "-0.1", "1,5"])
def test_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a number from 0 to 1"):
        number(0, 1)(text)
    assert number(0, 1)("1e-3") == 1e-3


def test_an_option_without_its_value_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    """argparse reads `--limit=--` as an empty list."""
    parser = Parser(prog="himap-test")
    parser.add_argument("--limit", type=whole(1, 9))
    for words in (["--limit=--"], ["--limit="], ["--limit"]):
        with pytest.raises(SystemExit) as left:
            parser.parse_args(words)
        said = capsys.readouterr().err
        assert (
            left.value.code == 2 and said.startswith("himap-test: error: argument --limit: ") and said.count("\n") == 1
        )


# --- temporary folders ---


def test_scratch_folders_are_in_one_place_and_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_folder("one") as one:
        assert one.is_dir() and not list(one.iterdir()) and one.is_relative_to(tmp_path / f"himap-{os.getuid()}")
        assert clear_leftovers() == []
        with pytest.raises(ZeroDivisionError), scratch_folder("two") as two:
            raise ZeroDivisionError
        assert not two.parent.exists()
        place = one.parent.parent
        left = place / "three-abc"
        left.mkdir()
        assert clear_leftovers() == []  # its maker may be about to lock it
        os.utime(left, (0, 0))
        assert clear_leftovers() == [left] and list(place.iterdir()) == [one.parent]
    assert not list(place.iterdir())


def test_a_place_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = tmp_path / f"himap-{os.getuid()}"
    place.symlink_to(tmp_path / "theirs")
    (tmp_path / "theirs").mkdir()
    with scratch_folder("one") as one:
        assert one.parent.parent == tmp_path
    place.unlink()
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    assert scratch.scratch_place() is None
    shutil.rmtree(place)


def test_signals_are_held_back() -> None:
    before = {sent: signal.getsignal(sent) for sent in SIGNALS}
    done = []
    try:
        with pytest.raises(KeyboardInterrupt), held_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            done.append("all of it")
    finally:
        for sent, handler in before.items():
            signal.signal(sent, handler)
    assert done == ["all of it"]
    with held_signals():
        pass


# --- what every command offers ---

PARSERS = [import_module(module)._parser() for module in MAIN.values()]
everywhere = pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)


def said(parser: Parser, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of parsing `words`."""
    with pytest.raises(SystemExit) as left:
        parser.parse_args(words)
    assert isinstance(left.value.code, int)
    return left.value.code, *capsys.readouterr()


@everywhere
def test_every_option_has_help(parser: Parser) -> None:
    assert [action.dest for action in parser._actions if not (action.help or "").strip()] == []


@everywhere
def test_help_ends_with_the_exit_codes(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(parser, capsys, "--help")
    assert code == 0 and set(MEANINGS) == set(Exit)
    told = " ".join(out.split()).partition("exit codes: ")[2]
    assert told.split("; ") == [f"{int(code)} {meaning}" for code, meaning in MEANINGS.items()]


@everywhere
def test_version(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(parser, capsys, "--version") == (0, f"{parser.prog} {version('himap-export')}\n", "")


@everywhere
@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(parser: Parser, shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(parser, capsys, "--print-completion", shell)
    assert (code, err) == (0, "") and all(option.lstrip("-") in out for option in parser._option_string_actions)
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=out, text=True, check=True)


def test_completion_without_shtab(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, out, err = said(Parser(prog="himap-test"), capsys, "--print-completion", "bash")
    assert (code, out, err.count("\n")) == (4, "", 1) and "pip install 'himap-export[completion]'" in err


@everywhere
def test_a_mistyped_option_is_one_line_with_the_right_one(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("--versoin",), ("one", "--versoin=3", "--out", "there")):
        line = "error: unknown option --versoin; did you mean --version?"
        assert said(parser, capsys, *words) == (2, "", f"{parser.prog}: {line} (usage: {parser.prog} --help)\n")
    assert "did you mean" not in said(parser, capsys, "--zzz")[2]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("llava-7b", "--dtype", "fp61"), "fp16"),
        (("llava-7b", "--policy", "fast"), "fastv"),
        (("llava-7b", "--backend", "tensorrt-rtz"), "tensorrt-rtx"),
        (("lava-7b", "--dry-run"), "llava-7b"),
        (("llava-7b", "--dry-run", "--plan", "captoin"), "caption"),
    ],
)
def test_a_mistyped_name_is_one_line_with_the_right_one(
    words: tuple[str, ...], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = call(export_main, *words, *(() if "--dry-run" in words else ("--out", "out")))
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and f"; did you mean {meant}?" in err
