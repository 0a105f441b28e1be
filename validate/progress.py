"""Counting on standard error: a bar on a terminal; else a line at every tenth, few of a run that is short."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RESUMED = "what was answered is kept: the same command goes on"
SECONDS = 10.0  # between two lines at least
Count = Callable[[int, int], None]  # how much is done, of how much


def silent(done: int, total: int) -> None:
    """Counts nothing."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def counted(what: str) -> Iterator[Count]:
    """Yields what shows how far `what` has come: "answers", "saliency: prompts"."""
    from tqdm import tqdm

    tenth, said = -1, time.monotonic()
    with tqdm(desc=what, disable=not sys.stderr.isatty(), leave=False) as bar:

        def count(done: int, total: int) -> None:
            nonlocal tenth, said
            bar.total, bar.n = total, done
            bar.refresh()
            due = done == total or time.monotonic() >= said + SECONDS
            if bar.disable and due and 10 * done // total > tenth:
                tenth, said = 10 * done // total, time.monotonic()
                say(f"{what}: {done} of {total}")

        yield count
