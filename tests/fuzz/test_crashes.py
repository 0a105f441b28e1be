"""Signals at every step of an export: --out is the old bundle or the new one, what is said is true, and the next export
finds nothing in its way and leaves nothing of the killed one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fuzz.crash import Ended, Job

from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import FILE_NAME, finalised, manifest_json, read_manifest

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NEW = ("himap-export", "the new one")
MODEL = Path(__file__).parent.parent / "fixtures" / "qwen-vl-tiny"  # its family needs no transformers
Run = Callable[[Job], Ended]


@pytest.fixture(scope="module")
def new_bundle(originals: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old bundle in all but its manifest's words."""
    folder = Path(shutil.copytree(originals["bundle"], tmp_path_factory.mktemp("new") / "new"))
    changed = msgspec.structs.replace(read_manifest(folder), command=NEW)
    (folder / FILE_NAME).write_bytes(manifest_json(finalised(changed)))
    return folder


@pytest.fixture(scope="module")
def run(new_bundle: Path) -> Iterator[Run]:
    """Exports in processes of their own, forked from one that has imported everything."""
    command = [sys.executable, Path(__file__).with_name("crash.py"), new_bundle, MODEL]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin and server.stdout

        def ask(job: Job) -> Ended:
            assert server.stdin and server.stdout
            server.stdin.write(json.dumps(asdict(job)) + "\n")
            server.stdin.flush()
            return Ended(**json.loads(server.stdout.readline()))

        yield ask
        server.stdin.close()


def state(out: Path) -> str:
    """Which bundle stands at `out`, checked byte by byte: old, new, or nothing."""
    if not out.exists():
        return "nothing"
    return "new" if Bundle.open(out).manifest.command == NEW else "old"


class Place:
    """A folder of its own in which `out` is about to be written."""

    def __init__(self, folder: Path, originals: Mapping[str, Path], before: str) -> None:
        folder.mkdir()
        self.home, self.out, self.log = folder / "home", folder / "home" / "out", folder / "log"
        self.home.mkdir()
        self.before = before
        if before == "old":
            shutil.copytree(originals["bundle"], self.out)

    def job(self, **more: object) -> Job:
        self.log.unlink(missing_ok=True)
        return Job(str(MODEL), str(self.out), log=str(self.log), **more)  # type: ignore[arg-type]


def crash(run: Run, place: Place, at: int, sent: signal.Signals, **more: Any) -> str:
    """The signal at one step, and the next export; what is wrong with what they left, "" if nothing is."""
    ended = run(place.job(at=at, sent=int(sent), **more))
    found, left = state(place.out), [p.name for p in place.home.iterdir() if p != place.out]
    allowed = {place.before, "new"}
    if sent == signal.SIGKILL and not more.get("exchange", True):
        allowed.add("nothing")  # between two renames; the next export puts it back
    wrong = [] if found in allowed else [f"{found} bundle stands there"]
    if sent != signal.SIGKILL:
        claimed = "nothing was left behind" in ended.said
        wrong += [f"exit {ended.code}"] if ended.code != 130 and (ended.code, found) != (0, "new") else []
        wrong += ["traceback"] if "Traceback" in ended.said else []
        wrong += [f"left behind: {left[0]}"] if left else []
        wrong += ["untrue words"] if claimed != (ended.code == 130 and found == place.before) else []
    if sent != signal.SIGKILL:  # the rest is about what only a kill leaves
        return _told(ended, at, sent, wrong)
    for path in place.home.iterdir():  # a minute later: what is younger may be another export's, just begun
        os.utime(path, (time.time() - 120,) * 2)
    again = run(place.job(exchange=more.get("exchange", True)))
    if again.code != 0 or state(place.out) != "new":
        wrong.append(f"the next export: {again.code} {again.said}")
    elif still := [p.name for p in place.home.iterdir() if p != place.out]:
        wrong.append(f"the next export leaves {still[0]}")
    return _told(ended, at, sent, wrong)


def _told(ended: Ended, at: int, sent: signal.Signals, wrong: Sequence[str]) -> str:
    step = ended.steps[at - 1] if at <= len(ended.steps) else "never"
    return f"{sent.name} at step {at}, {step}: {'; '.join(wrong)}; it said {ended.said!r}" if wrong else ""


def _steps(run: Run, folder: Path, originals: Mapping[str, Path], before: str, exchange: bool) -> int:
    """How many steps an undisturbed export has."""
    place = Place(folder, originals, before)
    ended = run(place.job(exchange=exchange))
    assert ended.code == 0 and state(place.out) == "new", ended
    return len(ended.steps)


WAYS = [("old", True), ("old", False), ("nothing", True)]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "exchange"), WAYS)
def test_a_signal_at_every_step(
    run: Run, originals: Mapping[str, Path], tmp_path: Path, before: str, exchange: bool
) -> None:
    """Another of the four signals at each step; test_every_signal_at_every_step has them all."""
    wrong = []
    for at in range(1, _steps(run, tmp_path / "0", originals, before, exchange) + 1):
        place, sent = Place(tmp_path / str(at), originals, before), SIGNALS[at % len(SIGNALS)]
        wrong.append(crash(run, place, at, sent, exchange=exchange))
    assert not any(wrong), "\n".join(filter(None, wrong))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "exchange"), WAYS)
def test_every_signal_at_every_step(
    run: Run, originals: Mapping[str, Path], tmp_path: Path, before: str, exchange: bool
) -> None:
    wrong = []
    for at in range(1, _steps(run, tmp_path / "0", originals, before, exchange) + 1):
        for sent in SIGNALS:
            place = Place(tmp_path / f"{at}-{sent.name}", originals, before)
            wrong.append(crash(run, place, at, sent, exchange=exchange))
    assert not any(wrong), "\n".join(filter(None, wrong))


@pytest.mark.slow
@pytest.mark.parametrize("sent", SIGNALS)
def test_signals_to_the_process_that_waits(
    run: Run, originals: Mapping[str, Path], tmp_path: Path, sent: signal.Signals
) -> None:
    """As a shell sends them: to the parent of the one that works."""
    wrong = []
    for at in range(1, _steps(run, tmp_path / "0", originals, "old", True) + 1, 3):
        wrong.append(crash(run, Place(tmp_path / str(at), originals, "old"), at, sent, supervised=True))
    assert not any(wrong), "\n".join(filter(None, wrong))
