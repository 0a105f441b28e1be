"""The log of answers: JSON lines, a header and then one line per answer, so that an interrupted run goes on.

What is measured stands in the header: a log goes on only under the same one. Lines are written whole batches at a
time and in one piece; what a kill cut off in the last line is dropped and asked again.
"""

import fcntl
import io
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from msgspec import Meta, Struct, structs

from himap_export.engines.documents import MEGABYTE, parse_json, read_file, typed
from himap_export.engines.files import check_outside, check_report
from himap_export.graphs.errors import Exit, HimapError

_MARK = {"himap-validate": "answers"}  # first in every header: other files are not touched
MOST_BYTES = 1000 * MEGABYTE  # of a log: it is read whole
MOST_ANSWERS = 2_000_000  # that are asked for: as many fill such a log, at 500 bytes each
OTHERWISE = "remove it, or choose another folder"
Count = Annotated[int, Meta(ge=0, le=2**53)]
Key = tuple[str, int, int]


class Answered(Struct, frozen=True, forbid_unknown_fields=True):
    """What policy `policy` at `seed` said to the example in line `line` of the data set."""

    policy: str
    seed: Count
    line: Count
    id: str
    type: str
    said: str
    expected: str
    right: bool

    @property
    def key(self) -> Key:
        return self.policy, self.seed, self.line


def claim(folder: Path, name: str, *others: str) -> None:
    """Raises HimapError (usage) if `folder` cannot take a report, the log `name` and the `others` beside them, or holds
    anything and not the log: then it is somebody else's. Called before any work."""
    check_report(folder, ("report.html", "report.json", name, *others))
    if folder.exists() and any(folder.iterdir()) and not (folder / name).is_file():
        hint = f"choose another folder: answers go on in one that holds {name}"
        raise HimapError(f"{folder} is neither empty nor ours", hint=hint, code=Exit.USAGE)


def check_count(answers: int) -> None:
    """Raises HimapError (usage) if so many answers are more than a log takes. Called before any work."""
    if answers > MOST_ANSWERS:
        details, hint = f"at most {MOST_ANSWERS} are asked for", "name fewer plans, or `limit` the questions"
        raise HimapError(f"{answers} answers are too many", details, hint, Exit.USAGE)


class AnswerLog:
    """A log open for more answers; `done` are the keys of those that it holds."""

    def __init__(self, file: Path, header: Mapping[str, Any]) -> None:
        """Creates `file`, or goes on with it. HimapError (usage) if it is no log, has another header, is damaged or in
        use, or lies in a bundle."""
        self.file = file
        check_outside(file)
        self._stream = _opened(file)
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.done = self._resume(json.loads(_line(_MARK | dict(header))))  # as it reads back: tuples are lists
        except BlockingIOError:
            self.close()
            hint = "wait for it, or choose another folder"
            raise HimapError(f"{file} is in use by another command", hint=hint, code=Exit.USAGE) from None
        except BaseException:
            self.close()
            raise

    def append(self, answers: Sequence[Answered]) -> None:
        """Writes the answers of one batch."""
        self._write([structs.asdict(a) for a in answers])
        self.done |= {a.key for a in answers}

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resume(self, header: dict[str, Any]) -> set[Key]:
        content = read_file(self.file, "log", MOST_BYTES)
        whole = content.rfind(b"\n") + 1
        if not whole and _line(header).startswith(content):  # new, or killed before the header was out
            self._stream.truncate(0)
            self._write([header])
            return set()
        _compare(self.file, _header(self.file, content), header)
        done = {a.key for a in _answers(self.file, content[:whole])}
        if whole < len(content):
            self._stream.truncate(whole)
        return done

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        content = b"".join(map(_line, rows))
        try:
            written = self._stream.write(content)
        except OSError as problem:
            raise HimapError(f"cannot write {self.file}", problem.strerror or str(problem)) from None
        if written != len(content):
            raise HimapError(f"cannot write {self.file}", "the disk is full")


def check_log(file: Path, known: Mapping[str, Any]) -> None:
    """Raises HimapError (usage) if a log in `file` cannot go on under a header with what is `known` of it already.
    Called before engines are opened; a file that is not there, or has no whole header yet, is no matter."""
    if not file.is_file():
        return
    content = read_file(file, "log", MOST_BYTES)
    if b"\n" in content:
        found = _header(file, content)
        _compare(file, {k: v for k, v in found.items() if k in known}, json.loads(_line(known)))
        for _ in _answers(file, content[: content.rfind(b"\n") + 1]):
            pass


def read_log(file: Path) -> list[Answered]:
    """Returns the answers in a log, in order; a last line that is not whole is left out. HimapError (usage) if it is no
    log, or is damaged."""
    content = read_file(file, "log", MOST_BYTES)
    content = content[: content.rfind(b"\n") + 1]
    _header(file, content)
    return list(_answers(file, content))


def _opened(file: Path) -> io.FileIO:
    """Open for writing at its end, made if it is not there. HimapError (usage) if it is no plain file; never waits."""
    try:
        # Without O_NONBLOCK opening a pipe waits for its reader.
        descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except (OSError, ValueError) as problem:
        reason = (problem.strerror if isinstance(problem, OSError) else None) or str(problem)
        raise HimapError(f"cannot write {file}", reason, code=Exit.USAGE) from None
    stream = io.FileIO(descriptor, "a")  # unbuffered, a batch is one write to the end: Ctrl-C comes before or after
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        stream.close()
        raise HimapError(f"cannot write {file}", "it is not a plain file", code=Exit.USAGE)
    return stream


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _header(file: Path, content: bytes) -> dict[str, Any]:
    try:
        found = parse_json(content.partition(b"\n")[0], "its first line")
    except HimapError:
        found = None
    if not isinstance(found, dict) or not _MARK.items() <= found.items():
        raise HimapError(f"{file} is no log of ours", hint="choose another folder", code=Exit.USAGE)
    return found


def _compare(file: Path, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    """HimapError (usage) unless a log with the header `found` is one of the measurement of `header`."""
    if found != header:
        names = [k for k in {**header, **found} if header.get(k) != found.get(k)]
        differing = ", ".join(f"{k} is {header.get(k)!r:.80}, was {found.get(k)!r:.80}" for k in names)
        raise HimapError(f"{file} logs another measurement", differing[:600], OTHERWISE, Exit.USAGE)


def _answers(file: Path, content: bytes) -> Iterator[Answered]:
    for number, line in enumerate(io.BytesIO(content), 1):
        if number == 1:
            continue
        try:
            yield typed(parse_json(line, "it"), Answered, "it")
        except HimapError as problem:
            details = ": ".join(filter(None, ("the log is damaged", problem.summary, problem.details[:200])))
            raise HimapError(f"line {number} of {file} is no answer", details, OTHERWISE, Exit.USAGE) from None
