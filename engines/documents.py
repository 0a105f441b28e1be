"""Files from elsewhere, read within bounds and turned into typed values, or refused in one line.

A document is JSON or TOML that somebody else wrote: a manifest, a configuration, a data set, a plan. Its type is a
`msgspec.Struct`, whose annotations are its schema: no value is converted silently, none is unbounded.
"""

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import msgspec

from himap_export.graphs.errors import Exit, HimapError

T = TypeVar("T")
MEGABYTE = 10**6
# Whole numbers as documents may hold them: how many of something there are, and ids of tokens.
Id = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]


def open_file(path: Path, what: str, code: Exit = Exit.USAGE) -> BinaryIO:
    """Opens a plain file that is `what` ("plan") for reading.

    HimapError (`code`) if there is none, it is a folder, pipe or device, or cannot be read.
    """
    try:
        # Without O_NONBLOCK opening a pipe waits for its writer, for ever.
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: PTH123, SIM115
    except (OSError, ValueError) as problem:  # ValueError: a null byte in the name
        reason = (problem.strerror if isinstance(problem, OSError) else None) or str(problem)
        raise HimapError(f"cannot read {what} {str(path)[:300]}", reason, code=code) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise HimapError(f"cannot read {what} {path}", "it is not a plain file", code=code)
    return file


def read_file(path: Path, what: str, most: int, code: Exit = Exit.USAGE) -> bytes:
    """Returns the bytes of a plain file that is `what`, at most `most` of them. HimapError (`code`) as `open_file`, or
    if it is longer."""
    with open_file(path, what, code) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise HimapError(f"{what} {path} is too large", f"{size} bytes, at most {most} are read", code=code)
        return file.read(most)


def parse_json(text: bytes, where: str, code: Exit = Exit.USAGE) -> Any:
    """Returns the value of a JSON text (UTF-8), found at `where`.

    HimapError (`code`) for what JSON does not allow (NaN, infinity), leaves open (a key twice) or can spell but no
    UTF-8 can (half a character), and for nesting deeper than Python follows.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_number)
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise HimapError(f"{where} is not valid UTF-8 text", code=code) from None
    except RecursionError:
        raise HimapError(f"{where} is not usable JSON", "it is nested too deeply", code=code) from None
    except ValueError as problem:
        raise HimapError(f"{where} is not JSON", str(problem), code=code) from None
    return value


def typed(value: object, kind: type[T], where: str, code: Exit = Exit.USAGE) -> T:
    """Returns `value`, as JSON or TOML gives it, as a `kind`: nothing is converted but lists to tuples and whole
    numbers to floats. HimapError (`code`) that says what was expected, and at which place of the document `where`."""
    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as problem:
        raise HimapError(f"{where} is not usable", str(problem).replace("`", ""), code=code) from None
    except RecursionError:
        raise HimapError(f"{where} is not usable", "it is nested too deeply", code=code) from None


def read_json(path: Path, kind: type[T], what: str, code: Exit = Exit.USAGE) -> T:
    """Returns the JSON document `what` in `path`, up to 16 MB, as a `kind`. HimapError as the functions it calls."""
    text, where = read_file(path, what, 16 * MEGABYTE, code), f"{what} {path}"
    return typed(parse_json(text, where, code), kind, where, code)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"it holds {twice[:100]!r} twice")
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no JSON number")
