"""What only a process of its own shows: streams that nobody reads or that are full, names that are no text, and how
long a command takes to end when it is asked to."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

PROMPT_END = 5.0  # seconds; a command ends within one, the machine may be busy
Originals = Mapping[str, Path]


def command(name: str, *arguments: object) -> list[str | Path]:
    """An installed command."""
    return [Path(sys.executable).with_name(name), *map(str, arguments)]


@pytest.fixture
def asked(originals: Originals) -> list[str | Path]:
    """A question that himap-run answers."""
    return command("himap-run", originals["bundle"], "--load-inputs", originals["in.npz"], "--threads", "1")


def test_a_full_standard_output(asked: Sequence[str | Path]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*asked, "--json"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr


def test_nobody_reads(asked: Sequence[str | Path]) -> None:
    """`himap-run .. | true`: the reader has left before the answer is there."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*asked, "--json"], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr


def test_a_standard_error_that_is_full(originals: Originals) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command("himap-run", originals["model"]), stderr=full, check=False)
    assert done.returncode == 2


@pytest.mark.parametrize("name", ["himap-export", "himap-run"])
def test_a_name_that_is_no_text(name: str, tmp_path: Path) -> None:
    words = [os.fsencode(Path(sys.executable).with_name(name)), b"\xff\xfe", b"--dry-run"]
    words = words if name == "himap-export" else [*words[:2], b"--load-inputs", b"\xff.npz"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("wait", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("name", ["himap-export", "himap-run", "himap-validate", "himap-analyze", "himap-tune"])
def test_every_command_ends_when_asked(
    name: str, wait: float, sent: signal.Signals, originals: Originals, tmp_path: Path
) -> None:
    """Whatever it is doing after `wait` seconds; nothing of it is left, but what it says can be gone on with."""
    out, data = tmp_path / "out", originals["data.jsonl"]
    arguments = {
        "himap-export": (originals["model"], "--k1", 1, "--k2", 3, "--out", out),
        "himap-run": (originals["bundle"], "--image", originals["image.png"], "--prompt", "what?"),
        "himap-validate": (originals["bundle"], "--model", originals["model"], "--prompts", 64),
        "himap-analyze": (originals["model"], "--dataset", data, "--out", out),
        "himap-tune": (originals["model"], "--dataset", data, "--out", out),
    }[name]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command(name, *arguments), stderr=subprocess.PIPE, text=True, env=environment)
    time.sleep(wait)
    process.send_signal(sent)
    asked_at = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - asked_at < PROMPT_END, said
    assert process.returncode in (0, 130, -sent) and "Traceback" not in said, said
    left = [p.name for p in tmp_path.iterdir() if p.name not in ("out", ".ses", f"himap-{os.getuid()}")]
    assert not left and not any(tmp_path.glob("himap-*/*")), left
