"""A data set's lines: what each may hold, how every bad one is told, and which answers count as right."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import QUESTIONS_64
from PIL import Image

from himap_export.engines.questions import Example, expected, prompt_of, read_dataset
from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.accuracy.choices import is_right

GOOD = {"image": "a.png", "question": "what?", "answer": "red"}
CHOICE = {"image": "a.png", "question": "which?", "options": ["cat", "dog", "emu"], "answer": "B"}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A data set of these lines (objects, or text and bytes as they are) beside the picture a.png."""
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")

    def lines(*rows: Any) -> Path:
        texts = [r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode() for r in rows]
        (tmp_path / "set.jsonl").write_bytes(b"\n".join(texts))
        return tmp_path / "set.jsonl"

    return lines


def one(write: Write, **changes: Any) -> Example:
    return read_dataset(write({**GOOD, **changes})).examples[0]


def choice(options: Sequence[str], answer: str) -> Example:
    return Example(1, "1", Path("a.png"), "which?", answer, "", tuple(options))


def test_a_data_set_of_five_types() -> None:
    found = read_dataset(QUESTIONS_64)
    assert found.skipped == () and [e.line for e in found.examples] == [1, 2, 3, 4, 5]
    first = found.examples[0]
    assert first == Example(
        1, "1", QUESTIONS_64.parent / "letter.png", "what letter is in the yellow box?", "C", "letter"
    )


def test_names_types_and_paths(write: Write, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    far = tmp_path / "far" / "b.png"
    Image.new("L", (3, 3)).save(far)
    rows = [{**GOOD, "id": "x7", "type": "t", "more": 1}, "", "  \r", {**GOOD, "image": str(far), "id": 12}, GOOD]
    found = read_dataset(write(*rows)).examples
    assert [(e.line, e.id, e.type) for e in found] == [(1, "x7", "t"), (4, "12", ""), (5, "5", "")]
    assert [e.image for e in found] == [tmp_path / "a.png", far, tmp_path / "a.png"]


def test_a_text_may_hold_any_character(write: Write) -> None:
    found = read_dataset(write("\ufeff" + json.dumps({**GOOD, "question": "a\u2028b\x85c é"}, ensure_ascii=False)))
    assert found.examples[0].question == "a\u2028b\x85c é"


BAD = {
    "not json": ("{", "not JSON"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "not a number": ('{"image": "a.png", "question": "q", "answer": "x", "more": NaN}', "NaN is no JSON number"),
    "a key twice": ('{"image": "a.png", "question": "q", "answer": "x", "answer": "y"}', "it holds 'answer' twice"),
    "too long": ({**GOOD, "more": "x" * 10**6}, "at most 1000000 are read"),
    "not an object": ([1], "Expected object, got array"),
    "not utf-8": (b'{"image": "\xff"}', "not valid UTF-8"),
    "half a character": ('{"image": "a.png", "question": "\\ud800", "answer": "x"}', "not valid UTF-8"),
    "no image": ({"question": "q", "answer": "a"}, "missing required field image"),
    "no question": ({"image": "a.png", "answer": "a"}, "missing required field question"),
    "no answer": ({"image": "a.png", "question": "q"}, "missing required field answer"),
    "image is a number": ({**GOOD, "image": 3}, "Expected str, got int - at $.image"),
    "question is a list": ({**GOOD, "question": ["q"]}, "got array - at $.question"),
    "question is blank": ({**GOOD, "question": " "}, "\"question\" is ' '"),
    "answer is a number": ({**GOOD, "answer": 3}, '"answer" is 3'),
    "answer is blank": ({**GOOD, "answer": ""}, "\"answer\" is ''"),
    "id is a list": ({**GOOD, "id": []}, "got array - at $.id"),
    "id is a truth value": ({**GOOD, "id": True}, "got bool - at $.id"),
    "type is a number": ({**GOOD, "type": 1}, "got int - at $.type"),
    "image is missing": ({**GOOD, "image": "b.png"}, "b.png"),
    "image is a folder": ({**GOOD, "image": "."}, "Is a directory"),
    "image is no image": ({**GOOD, "image": "set.jsonl"}, "not an image"),
    "image has an impossible name": ({**GOOD, "image": "a\0"}, "without control characters"),
    "image has a name too long": ({**GOOD, "image": "a" * 300}, "File name too long"),
    "image is a pipe": ({**GOOD, "image": "pipe"}, "not a plain file"),
    "image is a link to itself": ({**GOOD, "image": "itself"}, "symbolic links"),
    "image is in two lines": ({**GOOD, "image": "a.png\nb"}, "without control characters"),
    "image is too large": ({**GOOD, "image": "large.png"}, "is too large"),
    "image is damaged": ({**GOOD, "image": "damaged.png"}, "damaged.png cannot be read"),
    "an option is blank": ({**CHOICE, "options": ["cat", " "]}, "\"option\" is ' '"),
    "options are a text": ({**CHOICE, "options": "cat"}, "Expected array, got str - at $.options"),
    "options are null": ({**CHOICE, "options": None}, "Expected array, got null - at $.options"),
    "an option is a number": ({**CHOICE, "options": ["cat", 3]}, "Expected str, got int - at $.options[1]"),
    "one option": ({**CHOICE, "options": ["cat"]}, "of length >= 2 - at $.options"),
    "no option": ({**CHOICE, "choices": [], "options": []}, "of length >= 2 - at $.options"),
    "27 options": ({**CHOICE, "options": [f"o{n}" for n in range(27)]}, "of length <= 26 - at $.options"),
    "equal options": ({**CHOICE, "options": ["cat", "cat"]}, "an option twice"),
    "letter of no option": ({**CHOICE, "answer": "D"}, "none of the 3 options"),
    "index of no option": ({**CHOICE, "answer": 3}, "none of the 3 options"),
    "negative index": ({**CHOICE, "answer": -1}, "none of the 3 options"),
    "truth value of an option": ({**CHOICE, "answer": True}, "got bool - at $.answer"),
    "text of no option": ({**CHOICE, "answer": "cow"}, "none of the 3 options"),
    "options without an answer": ({k: v for k, v in CHOICE.items() if k != "answer"}, "missing required field answer"),
    "a letter that is another's text": ({**CHOICE, "options": ["B", "A"], "answer": "A"}, "options A and B"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_told_by_its_number(case: str, write: Write, tmp_path: Path) -> None:
    row, reason = BAD[case]
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "damaged.png").write_bytes(content[:-16] + b"\0\0\0\0" + content[-12:])  # a checksum
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "itself").symlink_to("itself")
    with (tmp_path / "large.png").open("wb") as large:
        large.truncate(2**30 + 1)  # of no blocks
    file = write(GOOD, row, GOOD)
    with pytest.raises(HimapError) as told:
        read_dataset(file)
    assert told.value.code == Exit.USAGE and "line 2 " in told.value.summary and "`skip_bad`" in told.value.hint
    assert reason in told.value.details
    kept = read_dataset(file, skip_bad=True)
    assert [e.line for e in kept.examples] == [1, 3]
    assert len(kept.skipped) == 1 and kept.skipped[0].startswith("line 2: ") and reason in kept.skipped[0]


def test_the_first_bad_line_and_how_many_more(write: Write) -> None:
    with pytest.raises(HimapError, match="line 2 of") as told:
        read_dataset(write(GOOD, "{", GOOD, "[]", "3"))
    assert "2 more" in told.value.details


@pytest.mark.parametrize(("rows", "reason"), [([], "it is empty"), (["", " "], "it is empty"), (["{", "[]"], "all 2")])
def test_no_good_line(rows: list[str], reason: str, write: Write) -> None:
    with pytest.raises(HimapError, match="holds no example") as told:
        read_dataset(write(*rows), skip_bad=True)
    assert reason in told.value.details and told.value.code == Exit.USAGE


def test_an_unreadable_file(tmp_path: Path) -> None:
    for file, summary in ((tmp_path / "none.jsonl", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(HimapError, match="cannot read data set") as told:
            read_dataset(file)
        assert told.value.code == Exit.USAGE and summary in told.value.details


@pytest.mark.parametrize("answer", ["B", "b", "dog", "Dog.", 1])
@pytest.mark.parametrize("key", ["options", "choices"])
def test_an_option_by_letter_text_or_index(answer: str | int, key: str, write: Write) -> None:
    row = {"image": "a.png", "question": "which?", key: ["cat", "dog", "emu"], "answer": answer}
    found = read_dataset(write(row)).examples[0]
    assert (found.answer, expected(found), found.options) == ("dog", "B", ("cat", "dog", "emu"))


def test_an_index_is_never_ambiguous_and_an_exact_text_wins(write: Write) -> None:
    rows = [
        {**CHOICE, "options": ["B", "A"], "answer": 0},
        {**CHOICE, "options": ["it is?", "it is."], "answer": "it is."},
    ]
    assert [expected(e) for e in read_dataset(write(*rows)).examples] == ["A", "B"]


def test_the_prompt_lists_options() -> None:
    asked = "which?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    assert prompt_of(choice(["cat", "dog"], "dog")) == asked
    assert prompt_of(choice([], "dog")) == "which?"


def test_open_answers(write: Write) -> None:
    for answer, right, wrong in (
        ("red", ["red", " Red.\n", "RED!", "\uff52\uff45\uff44"], ["", "dark red", "re d"]),
        ("two  dogs", ["Two dogs", "two\tdogs,"], ["twodogs", "two dogs cats"]),
        ("50%", ["50%", "50%."], ["50"]),
        ("Straße", ["STRASSE"], ["strase"]),
        ("?", ["?"], ["", "!"]),
    ):
        example = one(write, answer=answer)
        assert expected(example) == answer
        assert [is_right(example, said) for said in right + wrong] == [True] * len(right) + [False] * len(wrong)


def test_options_are_judged_by_their_letters() -> None:
    example = choice(["cat", "dog", "emu"], "dog")
    assert is_right(example, "The answer is B.") and is_right(example, "Dog")
    assert not is_right(example, "A dog, so the answer is C") and not is_right(example, "")


def test_a_pipe_is_no_data_set_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(HimapError, match="cannot read data set") as told:
        read_dataset(tmp_path / "pipe")
    assert "plain file" in told.value.details and told.value.code == Exit.USAGE


def test_a_file_that_is_too_large_is_not_read(write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "huge.jsonl").open("wb") as huge:
        huge.truncate(10**12)  # of no blocks
    with pytest.raises(HimapError, match="too large") as told:
        read_dataset(tmp_path / "huge.jsonl")
    assert told.value.code == Exit.USAGE
    monkeypatch.setattr("himap_export.engines.questions.MOST_LINES", 3)
    assert len(read_dataset(write(GOOD, GOOD, GOOD)).examples) == 3
    with pytest.raises(HimapError, match="too large"):
        read_dataset(write(GOOD, "", "", ""))
