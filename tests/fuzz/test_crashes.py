"""Signals at every step of an export: --out is the old bundle or the new one, what is said is true, and the next export
finds nothing in its way and leaves nothing of the killed one."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import msgspec
import pytest
from fuzz.crash import Ended, Job

from himap_export.engines.bundle import open_bundle
from himap_export.engines.manifest import FILE_NAME, manifest_json, read_manifest, sealed

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
NEW = ("himap-export", "the new one")
Run = Callable[[Job], Ended]


@pytest.fixture(scope="module")
def new_bundle(originals: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old bundle in all but its manifest's words."""
    folder = Path(shutil.copytree(originals["bundle"], tmp_path_factory.mktemp("new") / "new"))
    changed = msgspec.structs.replace(read_manifest(folder), command=NEW)
    (folder / FILE_NAME).write_bytes(manifest_json(sealed(changed)))
    return folder


@pytest.fixture(scope="module")
def run(new_bundle: Path) -> Iterator[Run]:
    """Exports in processes of their own, forked from one that has imported everything."""
    command = [sys.executable, Path(__file__).with_name("crash.py"), new_bundle]
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
    return "new" if open_bundle(out).manifest.command == NEW else "old"


class Place:
    """A folder of its own in which `out` is about to be written."""

    def __init__(self, folder: Path, originals: Mapping[str, Path], before: str) -> None:
        folder.mkdir()
        self.home, self.out, self.log = folder / "home", folder / "home" / "out", folder / "log"
        self.home.mkdir()
        self.model, self.before = originals["model"], before
        if before == "old":
            shutil.copytree(originals["bundle"], self.out)

    def job(self, **more: object) -> Job:
        self.log.unlink(missing_ok=True)
        return Job(str(self.model), str(self.out), log=str(self.log), **more)  # type: ignore[arg-type]


def crash(run: Run, place: Place, at: int, sent: signal.Signals, **more: object) -> None:
    """The signal at one step, what must hold then, and the next export."""
    ended = run(place.job(at=at, sent=int(sent), **more))
    where = f"{sent.name} at step {at}, {ended.steps[at - 1] if at <= len(ended.steps) else 'never'}: {ended}"
    found = state(place.out)
    assert found in (place.before, "new") or (found == "nothing" and sent == signal.SIGKILL and not more.get("exchange", True)), where  # fmt: skip
    left = [p.name for p in place.home.iterdir() if p != place.out]
    if sent == signal.SIGKILL:
        assert ended.code in (-signal.SIGKILL, 0), where
    else:
        assert ended.code == 130 or (ended.code == 0 and found == "new"), where
        assert "Traceback" not in ended.said and not left, (where, left)
        assert ("nothing was left behind" in ended.said) == (ended.code == 130 and found == place.before), where
    again = run(place.job(exchange=more.get("exchange", True)))
    assert again.code == 0 and state(place.out) == "new", (where, again)
    assert [p.name for p in place.home.iterdir()] == ["out"], (where, again)


def _steps(run: Run, folder: Path, originals: Mapping[str, Path], before: str, exchange: bool) -> int:
    """How many steps an undisturbed export has."""
    place = Place(folder, originals, before)
    ended = run(place.job(exchange=exchange))
    assert ended.code == 0 and state(place.out) == "new", ended
    return len(ended.steps)


@pytest.mark.parametrize(("before", "exchange"), [("old", True), ("old", False), ("nothing", True)])
def test_a_signal_at_every_step(
    run: Run, originals: Mapping[str, Path], tmp_path: Path, before: str, exchange: bool
) -> None:
    """Another of the four signals at each step; test_every_signal_at_every_step has them all."""
    for at in range(1, _steps(run, tmp_path / "0", originals, before, exchange) + 1):
        place = Place(tmp_path / str(at), originals, before)
        crash(run, place, at, SIGNALS[at % len(SIGNALS)], exchange=exchange)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "exchange"), [("old", True), ("old", False), ("nothing", True)])
def test_every_signal_at_every_step(
    run: Run, originals: Mapping[str, Path], tmp_path: Path, before: str, exchange: bool
) -> None:
    for at in range(1, _steps(run, tmp_path / "0", originals, before, exchange) + 1):
        for sent in SIGNALS:
            place = Place(tmp_path / f"{at}-{sent.name}", originals, before)
            crash(run, place, at, sent, exchange=exchange)


@pytest.mark.slow
@pytest.mark.parametrize("sent", SIGNALS)
def test_signals_to_the_process_that_waits(
    run: Run, originals: Mapping[str, Path], tmp_path: Path, sent: signal.Signals
) -> None:
    """As a shell sends them: to the parent of the one that works."""
    for at in range(1, _steps(run, tmp_path / "0", originals, "old", True) + 1, 3):
        crash(run, Place(tmp_path / str(at), originals, "old"), at, sent, supervised=True)
