"""Questions about images with their answers, in JSON lines: what a model is measured on, and calibrated with.

Multiple choice follows ScienceQA as the HiMAP authors ask it (their eval_scivqa): lettered options under the question.
"""

import codecs
import os
import string
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType
from PIL import Image, UnidentifiedImageError

from himap_export.engines.documents import MEGABYTE, open_file, parse_json, read_file, typed
from himap_export.engines.image import MAX_BYTES
from himap_export.graphs.errors import Exit, HimapError

LETTERS = string.ascii_uppercase
INSTRUCTION = "Answer with the option's letter from the given choices directly."
MOST_BYTES = 256 * MEGABYTE  # of a file: it is read whole; VQAv2, all 1.1 million questions, has 200 MB
MOST_LINES = 2_000_000  # each is a prefill: at 10 ms one, a night is long over
MOST_IN_A_LINE = MEGABYTE  # bytes: more text than any budget holds
_END_MARKS = ".,;:!?。、"  # not %, quotes or brackets: they can be part of an answer
Options = Annotated[tuple[str, ...], Meta(min_length=2, max_length=len(LETTERS))]


@dataclass(frozen=True)
class Example:
    """One question about one image; `line` counts from 1. With `options`, `answer` is the text of the right one."""

    line: int
    id: str
    image: Path
    question: str
    answer: str
    type: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """`examples` in the file's order; `skipped`: one message for every line that was left out."""

    examples: tuple[Example, ...]
    skipped: tuple[str, ...]


class _Line(Struct, frozen=True):
    """A line of the file; other keys are ignored."""

    image: Annotated[str, Meta(max_length=4096)]
    question: str
    answer: str | int
    id: str | int | None = None
    type: str = ""
    options: Options | UnsetType = UNSET
    choices: Options | UnsetType = UNSET

    def __post_init__(self) -> None:
        named = self.options or self.choices or ()
        for key, text in (("image", self.image), ("question", self.question), *(("option", text) for text in named)):
            if not text.strip():
                raise ValueError(f'"{key}" is {text!r:.80}, expected text')
        if any(ord(c) < 32 or 127 <= ord(c) < 160 for c in self.image):
            raise ValueError(f'"image" is {self.image!r:.80}, expected a path without control characters')
        if len(set(named)) < len(named):
            raise ValueError("it holds an option twice")


def read_dataset(file: Path, skip_bad: bool = False) -> Dataset:
    """Returns the examples in a JSON-lines file: `image` (path relative to the file's folder), `question`, `answer`;
    optionally `id`, `type`, and `options` (or `choices`), of which `answer` is the letter, the index from 0, or the
    text.

    Blank lines and other keys are ignored. HimapError (usage) if the file cannot be read or is too large, for the first
    bad line (unless `skip_bad`), and if no good line is left. Images are opened and checked, not decoded.
    """
    content = read_file(file, "data set", MOST_BYTES).removeprefix(codecs.BOM_UTF8)
    if content.count(b"\n") >= MOST_LINES:
        raise HimapError(f"data set {file} is too large", f"at most {MOST_LINES} lines are read", code=Exit.USAGE)
    examples, bad = list[Example](), list[tuple[int, str]]()
    check_image = cache(_check_image)  # many questions share an image
    for number, line in enumerate(content.split(b"\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            example = _example(line, number, file.parent)
            check_image(example.image)
            examples.append(example)
        except HimapError as problem:
            bad.append((number, f"{problem.summary}: {problem.details}"[:400] if problem.details else problem.summary))
    if bad and not skip_bad:
        more = f"; {len(bad) - 1} more lines are bad" if len(bad) > 1 else ""
        hint = "`skip_bad` leaves bad lines out"
        raise HimapError(f"line {bad[0][0]} of {file} is no example", bad[0][1] + more, hint, Exit.USAGE)
    if not examples:
        details = f"line {bad[0][0]}: {bad[0][1]}; all {len(bad)} lines are bad" if bad else "it is empty"
        raise HimapError(f"{file} holds no example", details, code=Exit.USAGE)
    return Dataset(tuple(examples), tuple(f"line {number}: {problem}" for number, problem in bad))


def prompt_of(example: Example) -> str:
    """Returns the question as it is asked; options follow it, one a line, and the instruction to answer with a
    letter."""
    if not example.options:
        return example.question
    options = (f"{letter}. {text}" for letter, text in zip(LETTERS, example.options, strict=False))
    return "\n".join([example.question, *options, INSTRUCTION])


def expected(example: Example) -> str:
    """Returns what a right answer says: the option's letter, else the answer."""
    return LETTERS[example.options.index(example.answer)] if example.options else example.answer


def normalised(text: str) -> str:
    """Returns the text in NFKC, without case, single spaces, no marks that end a sentence: "Two  dogs." and "two dogs"
    are equal."""
    plain = " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())
    return plain.rstrip(_END_MARKS + " ") or plain


@contextmanager
def located(example: Example) -> Iterator[None]:
    """Adds the example's line to an error that is raised within."""
    try:
        yield
    except HimapError as problem:
        summary = f"line {example.line} of the data set: {problem.summary}"
        raise HimapError(summary, problem.details, problem.hint, problem.code) from None


def _example(line: bytes, number: int, folder: Path) -> Example:
    """HimapError, without a word of where, for what is no example."""
    if len(line) > MOST_IN_A_LINE:
        raise HimapError(f"it has {len(line)} bytes", f"at most {MOST_IN_A_LINE} are read")
    data = parse_json(line, "it")
    if isinstance(data, dict) and "options" in data:
        data.pop("choices", None)
    found = typed(data, _Line, "it")
    options, answer = found.options or found.choices or (), found.answer
    if options:
        answer = options[_option(answer, options)]
    elif not isinstance(answer, str) or not answer.strip():
        raise HimapError(f'"answer" is {answer!r:.80}, expected text')
    name = str(number if found.id is None else found.id)
    return Example(
        number, name, image=folder / found.image, question=found.question, answer=answer, type=found.type,
        options=options,
    )  # fmt: skip


def _option(answer: str | int, options: tuple[str, ...]) -> int:
    """The index of the option that the data set's answer means: a letter, an index, or a text."""
    if isinstance(answer, int):
        found = {answer} & set(range(len(options)))
    else:
        texts = {n for n, text in enumerate(options) if text.strip() == answer.strip()}
        texts = texts or {n for n, text in enumerate(options) if normalised(text) == normalised(answer)}
        found = texts | {n for n, letter in enumerate(LETTERS[: len(options)]) if letter == answer.strip().upper()}
    if not found:
        raise HimapError(f'"answer" is {answer!r:.80}: none of the {len(options)} options')
    if len(found) > 1:
        both = " and ".join(LETTERS[n] for n in sorted(found))
        raise HimapError(f'"answer" is {answer!r:.80}, which can mean the options {both}: give its index')
    return found.pop()


def _check_image(file: Path) -> None:
    try:
        with open_file(file, "image") as content, warnings.catch_warnings():
            if os.fstat(content.fileno()).st_size > MAX_BYTES:
                raise HimapError(f"image {file} is too large", f"at most {MAX_BYTES} bytes are read")
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half the limit: a large photograph
            with Image.open(content) as opened:
                opened.verify()
    except HimapError:
        raise
    except UnidentifiedImageError:
        raise HimapError(f"{file} is not an image that Pillow can read") from None
    except Exception as problem:  # Pillow's decoders raise SyntaxError, ValueError, struct.error... on bad bytes
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise HimapError(f"{file} cannot be read: {reason}") from None
