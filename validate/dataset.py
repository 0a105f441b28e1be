"""The questions that accuracy is measured on: JSON lines of image, question and answer, and what counts as right.

Multiple choice follows ScienceQA as the HiMAP authors ask it (their eval_scivqa): lettered options under the question.
"""

import json
import re
import string
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from himap_export.graphs.errors import Exit, HimapError

LETTERS = string.ascii_uppercase
INSTRUCTION = "Answer with the option's letter from the given choices directly."
_END_MARKS = ".,;:!?。、"  # not %, quotes or brackets: they can be part of an answer


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


class _BadLineError(Exception):
    """Why a line is no example."""


def read_dataset(file: Path, skip_bad: bool = False) -> Dataset:
    """The examples in a JSON-lines file: `image` (path relative to the file's folder), `question`, `answer`; optionally
    `id`, `type`, and `options` (or `choices`), of which `answer` is the letter, the index from 0, or the text.

    Blank lines and other keys are ignored. HimapError (usage) if the file cannot be read, for the first bad line
    (unless `skip_bad`), and if no good line is left. Images are opened and checked, not decoded.
    """
    try:
        lines = file.read_bytes().split(b"\n")  # not splitlines: JSON strings may hold U+2028
    except FileNotFoundError:
        raise HimapError(f"{file} does not exist", hint="--dataset takes a JSON-lines file", code=Exit.USAGE) from None
    except OSError as problem:
        raise HimapError(f"{file} cannot be read", problem.strerror or str(problem), code=Exit.USAGE) from None
    examples, bad = list[Example](), list[tuple[int, str]]()
    check_image = cache(_check_image)  # many questions share an image
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            example = _example(line, number, file.parent)
            check_image(example.image)
            examples.append(example)
        except _BadLineError as problem:
            bad.append((number, str(problem)))
    if bad and not skip_bad:
        more = f"; {len(bad) - 1} more lines are bad" if len(bad) > 1 else ""
        hint = "--skip-bad leaves bad lines out"
        raise HimapError(f"line {bad[0][0]} of {file} is no example", bad[0][1] + more, hint, Exit.USAGE)
    if not examples:
        details = f"line {bad[0][0]}: {bad[0][1]}; all {len(bad)} lines are bad" if bad else "it is empty"
        raise HimapError(f"{file} holds no example", details, code=Exit.USAGE)
    return Dataset(tuple(examples), tuple(f"line {number}: {problem}" for number, problem in bad))


def prompt_of(example: Example) -> str:
    """The question as it is asked; options follow it, one a line, and the instruction to answer with a letter."""
    if not example.options:
        return example.question
    options = (f"{letter}. {text}" for letter, text in zip(LETTERS, example.options, strict=False))
    return "\n".join([example.question, *options, INSTRUCTION])


def expected(example: Example) -> str:
    """What a right answer says: the option's letter, else the answer."""
    return LETTERS[example.options.index(example.answer)] if example.options else example.answer


def is_right(example: Example, said: str) -> bool:
    """Exact match after `normalised`. With options, `said` is right by the right option's letter or its exact text.

    The letter is the first one that stands alone: "B", "b)", "The answer is (B)."; "a" inside a sentence is a word.
    """
    if not example.options:
        return normalised(said) == normalised(example.answer)
    return _chosen(said, example.options) == example.options.index(example.answer)


def normalised(text: str) -> str:
    """NFKC, without case, single spaces, no marks that end a sentence: "Two  dogs." and "two dogs" are equal."""
    plain = " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())
    return plain.rstrip(_END_MARKS + " ") or plain


def _chosen(said: str, options: Sequence[str]) -> int | None:
    """The index of the option that an answer names, None if it names none."""
    plain, letters = unicodedata.normalize("NFKC", said), LETTERS[: len(options)]
    if bare := re.fullmatch(rf"\W*([{letters}])\W*", plain, re.IGNORECASE):
        return letters.index(bare[1].upper())
    if normalised(said) in (texts := [normalised(text) for text in options]):  # "A dog" may be the text of option B
        return texts.index(normalised(said))
    alone = re.search(rf"(?<![\w'\u2019])[{letters}](?![\w'\u2019])", plain)
    return letters.index(alone[0]) if alone else None


def _example(line: bytes, number: int, folder: Path) -> Example:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        data = json.loads(text)
        json.dumps(data, ensure_ascii=False).encode()  # JSON can spell half a character: no tokenizer takes it
    except UnicodeError:
        raise _BadLineError("it is not valid Unicode in UTF-8") from None
    except (ValueError, RecursionError) as problem:
        raise _BadLineError(f"it is not JSON: {problem}") from None
    if not isinstance(data, dict):
        raise _BadLineError("it is not a JSON object")
    options, answer = _options(data), data.get("answer")
    if options:
        answer = options[_option(answer, options)]
    elif not isinstance(answer, str) or not answer.strip():
        raise _BadLineError(_not_text("answer", answer))
    for key in ("image", "question"):
        if not isinstance(data.get(key), str) or not data[key].strip():
            raise _BadLineError(_not_text(key, data.get(key)))
    name, kind = data.get("id", number), data.get("type", "")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise _BadLineError(f'"id" is {name!r}, expected text or an integer')
    if not isinstance(kind, str):
        raise _BadLineError(f'"type" is {kind!r}, expected text')
    return Example(number, str(name), folder / data["image"], data["question"], answer, kind, options)


def _not_text(key: str, found: object) -> str:
    return f'no "{key}"' if found is None else f'"{key}" is {found!r:.80}, expected text'


def _options(data: dict[str, object]) -> tuple[str, ...]:
    key = "options" if "options" in data else "choices"
    found = data.get(key, [])
    if key not in data:
        return ()
    if not isinstance(found, list) or not all(isinstance(text, str) and text.strip() for text in found):
        raise _BadLineError(f'"{key}" is {found!r:.80}, expected a list of texts')
    if not 2 <= len(found) <= len(LETTERS):
        raise _BadLineError(f'"{key}" are {len(found)}, expected 2 to {len(LETTERS)}')
    if len(set(found)) < len(found):
        raise _BadLineError(f'"{key}" holds an option twice')
    return tuple(found)


def _option(answer: object, options: tuple[str, ...]) -> int:
    """The index of the option that the data set's answer means: a letter, an index, or a text."""
    found: set[int] = set()
    if isinstance(answer, int) and not isinstance(answer, bool):
        found = {answer} & set(range(len(options)))
    elif isinstance(answer, str):
        texts = {n for n, text in enumerate(options) if text.strip() == answer.strip()}
        texts = texts or {n for n, text in enumerate(options) if normalised(text) == normalised(answer)}
        found = texts | {n for n, letter in enumerate(LETTERS[: len(options)]) if letter == answer.strip().upper()}
    if answer is None:
        raise _BadLineError('no "answer"')
    if not found:
        raise _BadLineError(f'"answer" is {answer!r:.80}: none of the {len(options)} options')
    if len(found) > 1:
        both = " and ".join(LETTERS[n] for n in sorted(found))
        raise _BadLineError(f'"answer" is {answer!r:.80}, which can mean the options {both}: give its index')
    return found.pop()


def _check_image(file: Path) -> None:
    try:
        if not file.is_file():
            raise _BadLineError(f"no image {file}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half the limit: a large photograph
            with Image.open(file) as opened:
                opened.verify()
    except _BadLineError:
        raise
    except UnidentifiedImageError:
        raise _BadLineError(f"{file} is not an image that Pillow can read") from None
    except (
        Exception
    ) as problem:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error... on bad bytes
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise _BadLineError(f"{file} cannot be read: {reason}") from None
