"""The contract of every command, whatever it is given, and the machine that holds a command to it.

A bad input ends in one clear line and the right exit code, in bounded time and memory; nothing is left behind, and
nothing of the user's is touched. Commands run in this process: a case takes milliseconds.
"""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import IO
from unittest import mock

SECONDS = 10.0  # of the CPU that a refusal may take; the code aims at a tenth of a second
PATIENCE = 40.0  # seconds after which a command hangs, on a machine that does other things too
MEGABYTES = 1000.0  # how much more memory than before a refusal may touch
WIDEST = 2000  # characters of one clear line
CODES = (1, 2, 3, 4)
COMMANDS: Mapping[str, str] = {
    "himap-export": "himap_export.exporter.cli",
    "himap-run": "himap_export.engines.cli",
    "himap-validate": "himap_export.validate.cli",
    "himap-analyze": "himap_export.validate.analysis.cli",
    "himap-tune": "himap_export.validate.tuning.cli",
}
Arguments = Sequence[object]
Main = Callable[[], object]


@dataclass(frozen=True)
class Room:
    """A fresh folder for one case. `originals`: good checkpoints, bundles and files by name, never written to."""

    folder: Path
    originals: Mapping[str, Path]

    def copy(self, name: str) -> Path:
        """The original `name` in this room. Its files are hard links: write with `Room.write`, which breaks them."""
        target, source = self.folder / name, self.originals[name]
        if source.is_dir():
            shutil.copytree(source, target, copy_function=os.link)
        else:
            os.link(source, target)
        return target

    def write(self, path: Path, content: bytes) -> Path:
        """A new file at `path`, whatever was there."""
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return path


@dataclass(frozen=True)
class Case:
    """One bad input for one command.

    `prepare` spoils something in the room and returns the command's arguments. Exit 0 is right if `harmless` says why;
    or if `same`, where the answer is that to the good input: what was spoiled does not matter. `may_make`: names in the
    room that an accepted input may bring about. `patches`: what stands in for "module:attribute", mostly `stop`:
    what follows there is long and has no door. `main`: a body under `run_command`, for doors that are no command.
    """

    door: str
    fault: str
    command: str
    prepare: Callable[[Room], Arguments]
    harmless: str = ""
    same: bool = False
    may_make: tuple[str, ...] = ()
    patches: Mapping[str, Callable[..., object]] = field(default_factory=dict)
    main: Main | None = None
    result: Callable[[str], str] = str  # the part of standard output that tells answers apart

    @property
    def name(self) -> str:
        return f"{self.door} | {self.fault}"


@dataclass
class Outcome:
    """What became of a case. `broken`: how it broke the contract, empty if it kept it; `cause` groups equal ways."""

    case: Case
    code: int | None = None
    said: str = ""
    result: str = ""
    seconds: float = 0.0
    words: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    cause: str = ""


class TooSlowError(BaseException):
    """The alarm rang; nothing that catches Exception catches this."""


def check(case: Case, originals: Mapping[str, Path], place: Path, expected: str | None = None) -> Outcome:
    """Runs the case in a new room under `place`, which is gone afterwards. `expected`: the good input's result."""
    folder = Path(tempfile.mkdtemp(prefix="room-", dir=place))
    room, outcome = Room(folder, originals), Outcome(case)
    (folder / "tmp").mkdir()
    before_all = _listing(*originals.values())
    try:
        with _inside(folder):
            outcome.words = [case.command, *map(str, case.prepare(room))]
            before = _listing(folder)
            _run(outcome, folder)
        _judge(outcome, expected)
        _compare(outcome, case, before, _listing(folder), folder)
        if _listing(*originals.values()) != before_all:
            outcome.broken.append("an original outside the room has changed")
    finally:
        _remove(folder)
    if outcome.broken and not outcome.cause:
        outcome.cause = f"{case.door}: {outcome.broken[0]}"
    return outcome


@dataclass(frozen=True)
class Door:
    """A way in. `good`: the case in which nothing is spoiled, which is accepted; `bad`: all others, made on demand."""

    name: str
    good: Case
    bad: Callable[[], Sequence[Case]]

    def expected(self, originals: Mapping[str, Path], place: Path) -> str:
        """What the good input brings. AssertionError if it is not accepted: then the door proves nothing."""
        outcome = check(replace(self.good, harmless="nothing is spoiled"), originals, place)
        assert outcome.code == 0 and not outcome.broken, (self.name, outcome.code, outcome.said, outcome.broken)
        return outcome.result


def _run(outcome: Outcome, folder: Path) -> None:
    case, files = outcome.case, [_spool(), _spool()]
    start = time.process_time()
    with (
        _streams(files[0], files[1]),
        _alarm(PATIENCE),
        _patched(case.patches),
        mock.patch.object(sys, "argv", ["fuzz", *outcome.words[1:]]),
        warnings.catch_warnings(record=True) as warned,
        _peak() as grown,
    ):
        warnings.simplefilter("default", RuntimeWarning)
        try:
            _call(outcome)
        except TooSlowError as slow:
            outcome.broken, outcome.cause = [f"no end within {PATIENCE:.0f} s"], f"slow at {_place(slow)}"
    outcome.seconds = time.process_time() - start
    for file, name in zip(files, ("result", "said"), strict=True):
        file.seek(0)
        setattr(outcome, name, file.read().replace(str(folder), "ROOM"))
        file.close()
    if (found := [str(w.message) for w in warned if issubclass(w.category, RuntimeWarning)]) and not outcome.broken:
        outcome.broken.append(f"a bare warning: {found[0][:200]}")
    if outcome.seconds > SECONDS and not outcome.broken:
        outcome.broken.append("too much time")
    if grown[0] > MEGABYTES and not outcome.broken:
        outcome.broken.append(f"more than {MEGABYTES:.0f} MB of memory")


def _call(outcome: Outcome) -> None:
    """The command itself; what it raises is a bug, unless it leaves with an exit code."""
    case = outcome.case
    try:
        (case.main or import_module(COMMANDS[case.command]).main)()
        outcome.broken.append("the command returned")
    except SystemExit as left:
        outcome.code = left.code if isinstance(left.code, int) else 1
    except TooSlowError:
        raise
    except BaseException as problem:
        outcome.cause = f"{type(problem).__name__} at {_place(problem)}"
        outcome.broken.append(f"traceback: {type(problem).__name__}: {str(problem)[:200]}")


def _spool() -> IO[str]:
    return tempfile.TemporaryFile("w+", errors="backslashreplace")


def _judge(outcome: Outcome, expected: str | None) -> None:
    if outcome.code is None:
        return
    case, errors = outcome.case, [line for line in outcome.said.splitlines() if "error:" in line]
    if outcome.code == 0:
        outcome.result = case.result(outcome.result)
        if not (case.harmless or (case.same and expected == outcome.result)):
            outcome.broken.append("accepted")
            outcome.cause = f"{case.door}: accepted"
        return
    if outcome.code not in CODES:
        outcome.broken.append(f"exit code {outcome.code}")
    if len(errors) != 1:
        outcome.broken.append(f"{len(errors)} lines of error")
    elif len(errors[0]) > WIDEST:
        outcome.broken.append(f"a line of more than {WIDEST} characters")
    elif not errors[0].replace("\t", " ").isprintable():
        outcome.broken.append("a line that is not printable")
    if "\nTraceback" in f"\n{outcome.said}":
        outcome.broken.append("a traceback on standard error")
    if "too little memory" in outcome.said:
        outcome.broken.append("it ran into the end of memory")


Listing = Mapping[Path, tuple[int, ...]]


def _compare(outcome: Outcome, case: Case, before: Listing, after: Listing, folder: Path) -> None:
    free = [folder / name for name in case.may_make] if outcome.code == 0 else []
    temporary = folder / "tmp"
    known = (temporary / f"himap-{os.getuid()}", temporary / ".ses")  # our place for scratch, onnxruntime's own mark
    for path in sorted({*before, *after}):
        if before.get(path) == after.get(path) or path in known or any(path.is_relative_to(f) for f in free):
            continue
        what = "left behind" if path not in before else "gone" if path not in after else "changed"
        outcome.broken.append(f"{what}: {path.relative_to(folder)}")
        break


def _listing(*roots: Path) -> Listing:
    """Every file below: its kind and permissions, size, time and inode; of folders only the kind."""
    found: dict[Path, tuple[int, ...]] = {}
    for root in roots:
        for path in (root, *root.rglob("*")) if root.is_dir() else (root,):
            s = path.lstat()
            found[path] = (s.st_mode,) if path.is_dir() else (s.st_mode, s.st_size, s.st_mtime_ns, s.st_ino)
    return found


def _place(problem: BaseException) -> str:
    """The last line of ours in a traceback, else of the tests."""
    frames = traceback.extract_tb(problem.__traceback__)
    ours = [f for f in frames if "/tests/" not in f.filename and "/lib/python" not in f.filename]
    last = (ours or frames)[-1]
    return f"{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno} {last.name}"


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Temporary files and relative names go into the room; signals and the environment are put back."""
    here, temporary = Path.cwd(), folder / "tmp"
    os.chdir(folder)
    kept = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    with mock.patch.object(tempfile, "tempdir", str(temporary)), mock.patch.dict(os.environ, TMPDIR=str(temporary)):
        try:
            yield
        finally:
            os.chdir(here)
            for sent, handler in kept.items():
                signal.signal(sent, handler)


@contextlib.contextmanager
def _streams(out: IO[str], err: IO[str]) -> Iterator[None]:
    """Both streams of Python and of the libraries below it, into files."""
    kept = [os.dup(1), os.dup(2)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            yield
        finally:
            out.flush()
            err.flush()
            for number, descriptor in enumerate(kept, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlowError

    kept = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)


def stop(*_: object, **__: object) -> None:
    """Ends a command as accepted."""
    raise SystemExit(0)


@contextlib.contextmanager
def _patched(patches: Mapping[str, Callable[..., object]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for place, stand_in in patches.items():
            module, _, attribute = place.partition(":")
            owner, _, name = attribute.rpartition(".")
            target = getattr(import_module(module), owner) if owner else import_module(module)
            stack.enter_context(mock.patch.object(target, name, stand_in))
        yield


@contextlib.contextmanager
def _peak() -> Iterator[list[float]]:
    """By how many MB the resident memory rose at most; 0 where the kernel does not let us ask."""
    grown = [0.0]
    try:
        Path("/proc/self/clear_refs").write_text("5")
        start = _memory("VmRSS")
    except OSError:
        yield grown
        return
    try:
        yield grown
    finally:
        grown[0] = (_memory("VmHWM") - start) / 1000


def _memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1])


def _remove(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
