"""The one error a user can cause. Anything else that is raised is a bug and keeps its traceback."""

from collections.abc import Iterable
from difflib import get_close_matches
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of the commands; MEANINGS says what each stands for."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    GATE = 3
    MISSING = 4
    INTERRUPTED = 130


MEANINGS = {
    Exit.OK: "done",
    Exit.FAILURE: "failed",
    Exit.USAGE: "wrong usage",
    Exit.GATE: "a parity or speed gate failed",
    Exit.MISSING: "a package, backend, GPU or weight is missing",
    Exit.INTERRUPTED: "interrupted",
}


def suggestion(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean X?" for the name in `known` that `word` looks like, "" if it looks like none."""
    near = get_close_matches(word[:80], tuple(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


class HimapWarning(UserWarning):
    """What went otherwise than asked, and goes on. Commands print it as one line."""


class HimapError(Exception):
    """What was wrong (`summary`), what was found or expected (`details`), what to do about it (`hint`).

    Parameters are named in backticks, as the caller of a function knows them; commands name their options in their
    place, print the whole as one line, without a traceback, and leave with `code`.
    """

    def __init__(self, summary: str, details: str = "", hint: str = "", code: Exit = Exit.FAILURE) -> None:
        super().__init__(summary)
        self.summary, self.details, self.hint, self.code = summary, details, hint, code

    def __str__(self) -> str:
        parts = [self.summary, f": {self.details}" if self.details else "", f" ({self.hint})" if self.hint else ""]
        return "".join(parts)
