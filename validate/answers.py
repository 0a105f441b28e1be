"""The log of answers: JSON lines, a header and then one line per answer, so that an interrupted run goes on.

What is measured stands in the header: a log goes on only under the same one. Lines are written whole batches at a
time and in one piece; what a kill cut off in the last line is dropped and asked again.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from himap_export.graphs.errors import Exit, HimapError

_MARK = {"himap-validate": "answers"}  # first in every header: other files are not touched
Key = tuple[str, int, int]


@dataclass(frozen=True)
class Answered:
    """What policy `policy` at `seed` said to the example in line `line` of the data set."""

    policy: str
    seed: int
    line: int
    id: str
    type: str
    said: str
    expected: str
    right: bool

    @property
    def key(self) -> Key:
        return self.policy, self.seed, self.line


def claim(folder: Path, name: str) -> None:
    """HimapError (usage) if `folder` holds anything, and not the log `name`: then it is somebody else's."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / name).is_file())):
        hint = f"choose another folder: answers go on in one that holds {name}"
        raise HimapError(f"{folder} is neither empty nor ours", hint=hint, code=Exit.USAGE)


class AnswerLog:
    """A log open for more answers; `done` are the keys of those that it holds."""

    def __init__(self, file: Path, header: Mapping[str, Any]) -> None:
        """Creates `file`, or goes on with it. HimapError (usage) if it is no log, has another header or is in use."""
        self.file = file
        try:
            self._stream = file.open("ab", buffering=0)  # a batch is one write to the end: Ctrl-C comes before or after
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            hint = "wait for it, or choose another folder"
            raise HimapError(f"{file} is in use by another command", hint=hint, code=Exit.USAGE) from None
        except OSError as problem:
            raise HimapError(f"cannot write {file}", problem.strerror or str(problem), code=Exit.USAGE) from None
        try:
            self.done = self._resume(json.loads(_line(_MARK | dict(header))))  # as it reads back: tuples are lists
        except BaseException:
            self.close()
            raise

    def append(self, answers: Sequence[Answered]) -> None:
        """Writes the answers of one batch."""
        self._write([asdict(a) for a in answers])
        self.done |= {a.key for a in answers}

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resume(self, header: dict[str, Any]) -> set[Key]:
        content = self.file.read_bytes()
        whole = content.rfind(b"\n") + 1
        if not whole and _line(header).startswith(content):  # new, or killed before the header was out
            self._stream.truncate(0)
            self._write([header])
            return set()
        found = _header(self.file, content[:whole])
        if found != header:
            names = [k for k in header | found if header.get(k) != found.get(k)]
            differing = ", ".join(f"{k} is {header.get(k)!r}, was {found.get(k)!r}" for k in names)
            hint = "remove it, or choose another folder"
            raise HimapError(f"{self.file} logs another measurement", differing, hint, Exit.USAGE)
        done = {a.key for a in _answers(self.file, content[:whole])}
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


def read_log(file: Path) -> list[Answered]:
    """The answers in a log, in order; a last line that is not whole is left out. HimapError (usage) if it is no log."""
    try:
        content = file.read_bytes()
    except OSError as problem:
        raise HimapError(f"cannot read {file}", problem.strerror or str(problem), code=Exit.USAGE) from None
    content = content[: content.rfind(b"\n") + 1]
    _header(file, content)
    return list(_answers(file, content))


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _header(file: Path, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content.partition(b"\n")[0])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not _MARK.items() <= found.items():
        raise HimapError(f"{file} is no log of ours", hint="choose another folder", code=Exit.USAGE)
    return found


def _answers(file: Path, content: bytes) -> Iterator[Answered]:
    types = {field.name: field.type for field in fields(Answered)}
    for number, line in enumerate(content.split(b"\n")[1:-1], 2):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or {name: type(value) for name, value in row.items()} != types:
            hint = "remove it, or choose another folder"
            raise HimapError(f"line {number} of {file} is no answer", "the log is damaged", hint, Exit.USAGE)
        yield Answered(**row)
