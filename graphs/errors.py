"""The one error a user can cause. Anything else that is raised is a bug and keeps its traceback."""

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of the three commands."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    GATE = 3
    MISSING = 4
    INTERRUPTED = 130


class HimapError(Exception):
    """What was wrong (`summary`), what was found or expected (`details`), what to do about it (`hint`).

    Commands print it as one line, without a traceback, and leave with `code`.
    """

    def __init__(self, summary: str, details: str = "", hint: str = "", code: Exit = Exit.FAILURE) -> None:
        super().__init__(summary)
        self.summary, self.details, self.hint, self.code = summary, details, hint, code

    def __str__(self) -> str:
        parts = [self.summary, f": {self.details}" if self.details else "", f" ({self.hint})" if self.hint else ""]
        return "".join(parts)
