"""Which option an answer in free text names, and whether it is right.

The rule is the contract of lmms-eval's shared reader of multiple-choice answers (EvolvingLMMs-Lab/lmms-eval,
lmms_eval/tasks/_task_utils/mcq_extract.py, test/eval/mcq_extract/README.md), which reads formats and judges no prose:

1. The last <answer>..</answer> or \\boxed{..} is all that counts. A broken one names nothing.
2. Else the last declaration counts: "Answer: B", "the best option is b", "I choose C", "Option A is correct", and their
   like in Chinese, Japanese and Korean. The letter stands right behind it; one that is no option names nothing.
3. Else a letter counts that leads the answer ("B", "B. a bus", "A because .."), stands in parentheses, or ends it as a
   line or a clause of its own. Two different ones name nothing.
4. Alternatives ("A or B", "B/C") name nothing. "A cat" begins with an article, "plan b" is prose, "B's" and "DNA" are
   words: no letter of an option is in them.

Nothing is chosen at random. Ours differs in this: an answer that is an option's very text names it, before letters
count (the contract knows letters only); full-width letters are letters; "the answer is a dog" holds an article; "B, not
A" leads with B, and so does a B in a first line of its own; a word of conclusion may stand before the letter of a last
clause: "Neither A nor B, but C".

What it cannot read names nothing, and so counts as wrong: "It is B", "probably B", an option's text in a sentence.
"""

import re
import unicodedata
from collections.abc import Sequence

from himap_export.engines.questions import LETTERS, Example, normalised

_QUOTES = str.maketrans("\u201c\u201d\u2018\u2019", "\"\"''")

# A letter by itself: in no word, "1.b", "B's", "B.com", "A-list" or path. Japanese and Korean end a sentence without a
# space behind it.
_BEFORE = r"(?<![\w\u0300-\u036f@/\\])(?<!\w[.'-])"
_AFTER = r"(?:입니다|です)?(?![\w\u0300-\u036f@]|['.:/-][\w/])"
_ADJACENT = rf"([A-Za-z]){_AFTER}(?:\s*[)\]}}])*"
_LETTER = rf"[(\[{{]*\s*{_BEFORE}{_ADJACENT}"
_OR = r"(?:and\s*/\s*or\b|and\b|or\b|[/&,+|]|或者?|和|또는|か|と)"

# What is taken away, or taken off, before letters are looked for.
_PRESENTATION = (
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\*\*|`"), ""),
    (re.compile(r"(?<!\w)(__|[*_\"'$])\s*([(\[]?[A-Za-z][)\].:!?]*)\s*\1(?!\w)"), r"\2"),
    (re.compile(r"(?:[a-z][a-z0-9+.-]*://|\bwww\.)\S*", re.IGNORECASE), " "),
)
_CONTAINER = re.compile(
    r"<answer\b[^<>]*>([^<>]*)(?:</answer\s*>|\Z)|\\boxed\s*\{([^{}]*)\}",  # one may have been cut off
    re.IGNORECASE,
)
_CONTAINER_PART = re.compile(r"</?answer\b|\\boxed\b", re.IGNORECASE)
_DECLARATION = re.compile(
    r"(?<!\w)(?:answer|option|choice)\s*(?:is\b|[:=])|(?<!\w)i\s+(?:choose|select|pick)\b"
    r"|(?<!\w)option(?=\s+\(?[a-z]\)?\s+is\s+(?:the\s+)?(?:correct|right|best)\b)"
    r"|答案是|答案为|选|옵션|정답은|답은|답\s*:|答えは",
    re.IGNORECASE,
)
_DECLARED = re.compile(rf"[\s:=,;]*(?:(?i:option|choice)\b[\s:]*)?[(\[{{]*\s*{_ADJACENT}")
_ALTERNATIVE = re.compile(rf"[.:)]?[ \t]*{_OR}\s*{_LETTER}|[ \t]+{_LETTER}\W*\Z")
_NOUN = re.compile(r"\s+(?!(?:because|since|as|and|or)\b)\w")  # behind "a", which then is no letter
_LEADING = re.compile(_LETTER)
_LEADS = re.compile(
    r"\W*\Z|[.:]|[^\S\n]*\n|\s+because\b|\s*,\s*not\b"
    r"|\s+(?:is|seems|looks|appears)\s+(?:(?:the|a)\s+)?(?:correct|right|best|answer|option|choice)\b"
)
_LABEL = re.compile(rf"{_BEFORE}(?:\(\s*([A-Za-z])\s*\)(?!\w)|([A-Za-z])[.):](?=\s|\Z))")
_LINE = re.compile(rf"^\s*{_LETTER}[^\w\n]*$", re.MULTILINE)
_LAST = re.compile(rf"(?:\A|[\n,;])\s*(?:(?:but|so|thus|hence|therefore|then)\s+)?{_LETTER}\W*\Z")
_LISTED = re.compile(rf"(?<!\w)[A-Z]\s*{_OR}\s*[A-Z](?!\w)")


def is_right(example: Example, said: str) -> bool:
    """Returns whether `said` is the expected answer, `normalised`, or names the right option, as `chosen` rules."""
    if not example.options:
        return normalised(said) == normalised(example.answer)
    return chosen(said, example.options) == example.options.index(example.answer)


def chosen(said: str, options: Sequence[str]) -> int | None:
    """Returns the index of the option, one of up to 26, that the answer `said` names; None if it names none, or
    several."""
    text, letters = _plain(said), LETTERS[: len(options)]
    containers = list(_CONTAINER.finditer(text))
    if _CONTAINER_PART.search(_CONTAINER.sub("", text)):
        return None
    if containers:
        return chosen(containers[-1][containers[-1].lastindex or 0], options)
    if bare := re.fullmatch(rf"\W*([{letters}])\W*", text, re.IGNORECASE):
        return letters.index(bare[1].upper())
    if (plain := normalised(said)) in (texts := [normalised(option) for option in options]):
        return texts.index(plain)  # "A dog" may be the text of option B
    declarations = list(_DECLARATION.finditer(text))
    letter = _declared(text, declarations[-1].end()) if declarations else _implied(text)
    return letters.index(letter) if letter and letter in letters else None


def _plain(said: str) -> str:
    text = unicodedata.normalize("NFKC", said).translate(_QUOTES)
    for pattern, instead in _PRESENTATION:
        text = pattern.sub(instead, text)
    return text.strip()


def _declared(text: str, at: int) -> str | None:
    """The letter behind a declaration that ends at `at`."""
    found = _DECLARED.match(text, at)
    article = found is not None and found[1] == "a" and _NOUN.match(text, found.end())
    return None if found is None or article or _has_alternative(text, found) else found[1].upper()


def _implied(text: str) -> str | None:
    """The one letter that stands where an answer stands."""
    leading, last = _LEADING.match(text), _LAST.search(text)
    labels = list(_LABEL.finditer(text))
    if any(_has_alternative(text, found) for found in (leading, *labels) if found):
        return None
    named = {found[1].upper() for found in labels if found[1]}
    leads = leading is not None and (leading[0][-1] in ")]}" or _LEADS.match(text, leading.end()) is not None)
    if leading is not None and leads:
        named.add(leading[1].upper())
    elif _LISTED.search(text):
        return None
    if last is not None and last[1].isupper():
        named.add(last[1])
    others = {(found[1] or found[2]).upper() for found in labels} | {found[1] for found in _LINE.finditer(text)}
    return next(iter(named)) if named and len(named | others) == 1 else None


def _has_alternative(text: str, letter: re.Match[str]) -> bool:
    """Whether another letter follows as a further choice; "B, a dog" has none."""
    found = _ALTERNATIVE.match(text, letter.end())
    if found is None:
        return False
    other, first = found[1] or found[2], letter[letter.lastindex or 0]
    return other.upper() != first.upper() and not (other in "aA" and _NOUN.match(text, found.end()))
