"""Which option an answer names: the published cases of the rule, what ours adds to it, and that chance has no part."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from himap_export.engines.questions import LETTERS
from himap_export.validate.accuracy.choices import chosen

COLOURS = ["red", "blue", "green", "yellow"]
# From EvolvingLMMs-Lab/lmms-eval, test/eval/mcq_extract/cases.json at 3e7e22d2: responses by the letter expected of
# them, "" for none. Options are A to D.
PUBLISHED = {
    "A": [
        "A because it is the only valid option", "Answer: A", "Option A is correct", "a", "the answer is a",
        "A. because it handles text better", "(a) a blue sphere", "a. a dog lying on the floor", "A: a triangle",
        "I choose *A* because it is symmetric.", "Answer: D\nFinal answer: a", "답: a",
        "A seems correct given the reflection.", "a because two circles are shown.",
        "A. A cat is sitting on the table.", "The question mentions (C). Answer: A",
        "C was rejected. The answer is A.", "(E) was a previous candidate. <answer>a</answer>",
    ],
    "B": [
        "The answer is b because the image shows a dog.", "<answer>b</answer>", "B", "The correct answer is (B).",
        "The best option is B)", "(b) the nucleus", "b. the nucleus", "b is correct", "b", "b)", "B. a yellow bus",
        "The red object is above the table.\nB", "(B) is my selection.\n(B)", "**B**", "**B.** The object is a bus.",
        "A could work. <answer>B</answer> The diagram also contains C labels.", "The two panels differ. \\boxed{b}",
        "<answer>B</answer>\nAnswer: C", "\\boxed{\\text{B}}", "'B'", "_B_", "I pick b and stop.", "答案是B。",
        "答案是\uff08B\uff09", "정답은 b입니다.", "答えはBです。", "I choose A. Actually, the answer is B.",
        "The answer is B.\n(D)",
        "The answer is D. Option B is correct.", "Answer: Z. I choose B.", "(D) was a previous candidate. Answer: b",
        "The diagram labels an earlier candidate (A). The answer is B.",
    ],
    "C": [
        "I pick C and stop", "<answer> c", "\n\t C \t\n", "C.", "c: the object on the left",
        "The visible count matches (C).", "After checking the diagram, C.", "*c*", "Answer: `C`", "\\boxed{(C)}",
        "<answer>A</answer>\n\\boxed{C}", "Answer:\nC", "A. Red\nB. Green\nC. Blue\nD. Yellow\nAnswer: C",
        "Answer: A or B. Actually, I choose C.", "옵션 C", '"c"',
        "The lamp is behind the sofa, so I choose C. The letters A and D printed in the figure are annotations.",
    ],
    "D": [
        "D) three objects", "d:", "The wheel count is four; D", "**(D)**", "<answer>\n  d \n</answer>",
        "THE ANSWER IS d.", "\\boxed{D}", "选D\uff0c因为它与图片一致。", "“d”",
        "The answer is b. After checking, the answer is D.",
    ],
    "": [
        "A triangle has three sides.", "The DNA helix unwinds during replication.", "I saw a movie", "the value of c",
        "I'll go with plan b", "", "   ", "...", "I cannot determine the answer from the image.", "2", "E", "z",
        "A cat", "<answer>B</answer>\n<answer>Z</answer>", "<answer>A or B</answer>", "\\boxed{A} then \\boxed{E}",
        "\\boxed{B", "The answer is A. <answer>none</answer>", "Answer: dog", "The answer is DNA.",
        "The answer is probably B.", "I choose plan B.", "The answer is E because five edges are visible.",
        "I pick B. Final answer: E", "A or B", "Answer: C\nFinal answer: unknown", "I choose D. Final answer: A or B",
        "B and C", "A/B", "The answer is A or B.", "I choose C/D", "Answer: A, B", "(A) or (D)", "A. A dog\nB. A cat",
        "(A) red\n(B) blue\n(C) green\n(D) yellow", "I compared A and B; neither can be ruled out.",
        "There are two possibilities.\nB\nD", "ABCD", "The label says cubic) in the caption.", "field_B is missing.",
        "The camera model is B2.", "ID_B. See the appendix.", "Version 1.b is installed.",
        "See https://example.org/B.", "See https://example.org/(B)", "Contact b@example.org.", "图B显示了结果。", "éB.",
        "Bé.", "Vitamin B", "A bus is parked beside the road.", "Options A, B, C, D", "The answer is B.</answer>",
        "The figure contains labels A and C, but the image is too blurred to identify the correct option.",
        "答えはB猫。", "<answer><answer>B</answer></answer>", "<answer>B</wrong>", "<answer>B\nD</answer>",
        "B is not my selection.", "I cannot decide; the object is not yellow at all.",
        "A close-up view of a triangle.", "Doubt remains; no option is selected.",
    ],
}  # fmt: skip


@pytest.mark.parametrize("letter", PUBLISHED)
def test_published_cases(letter: str) -> None:
    found = {said: chosen(said, COLOURS) for said in PUBLISHED[letter]}
    assert found == dict.fromkeys(PUBLISHED[letter], LETTERS.index(letter) if letter else None)


@pytest.mark.parametrize(
    "template", ["{}", "({})", "{}. So it is.", "Answer: {}", "I choose {}.", "\\boxed{{{}}}", "`{}`"]
)
def test_any_letter_that_is_offered(template: str) -> None:
    """As lmms-eval's test_letter_substitution and test_removing_selected_choice_causes_abstention."""
    for n, letter in enumerate(LETTERS):
        options = [f"option {m}" for m in range(26)]
        for said in (template.format(letter), template.format(letter.lower())):
            assert chosen(said, options) == n
            assert chosen(said, options[: max(n, 1)]) is (None if n else 0)


ANIMALS = ["cat", "dog", "emu"]


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("A cat sits there, so the answer is C", "C"),
        ("Neither A nor B, but C", "C"),
        ("Neither A nor B, but C.", "C"),
        ("A cat sits there, so", ""),
        ("dog", "B"), ("Dog.", "B"), ("cat", "A"), ("dogs", ""), ("a dog", ""),
        ("\uff22", "B"), (" (B)", "B"), ("B. cat", "B"), ("**B. dog**", "B"), ("B\n\nThe dog is there.", "B"),
        ("B, not A", "B"), ("The answer is A, not B.", "A"),
        ("The answer is B, a dog.", "B"), ("The answer is a dog.", ""),
        ("<answer>\\boxed{B}</answer>", "B"), ("<answer>dog</answer>", "B"),
        ("", ""), ("D", ""), ("Bé", ""), ("B's", ""), ("ab", ""),
        ("It is B", ""), ("probably B", ""), ("A or B, so C", ""),
    ],
)  # fmt: skip
def test_ours(said: str, letter: str) -> None:
    assert chosen(said, ANIMALS) == ("ABC".index(letter) if letter else None)


def test_an_options_text_before_a_letter_inside_it() -> None:
    assert chosen("A dog.", ["cat", "A dog"]) == 1
    assert chosen("A", ["B", "A"]) == 0  # a bare letter is what was asked for
    assert chosen("D", ["C", "D", "E"]) == 1  # which no option has


def test_what_cannot_be_read_is_never_drawn() -> None:
    assert {chosen(said, COLOURS) for said in ("I cannot say.", "Something else") for _ in range(50)} == {None}


PARTS = [
    "A",
    "b",
    "C",
    "Z",
    "The answer is ",
    "Answer: ",
    "<answer>",
    "</answer>",
    "\\boxed{",
    "}",
    "(",
    ")",
    ".",
    ", ",
    " or ",
]


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(st.text(), st.lists(st.sampled_from([*PARTS, " ", "\n", "cat", "not "])).map("".join)), st.integers(2, 26)
)
def test_any_text_names_an_option_or_none(said: str, count: int) -> None:
    options = [f"option {n}" for n in range(count)]
    found = chosen(said, options)
    assert found is None or 0 <= found < count
    if found is not None:  # some letter, or the option's text, says so
        assert LETTERS[found] in unicodedata.normalize("NFKC", said).upper()


def test_long_answers_are_read_at_once() -> None:
    for said in (
        "A, " * 20_000,
        "(" * 50_000,
        "<answer>" * 20_000,
        "\\boxed{" * 20_000,
        " " * 50_000 + "B",
        "B" + "\n" * 50_000,
    ):
        chosen(said, COLOURS)
