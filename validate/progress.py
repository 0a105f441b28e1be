"""Counting on standard error: a bar on a terminal, else a line at every tenth."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RESUMED = "what was answered is kept: the same command goes on"
Count = Callable[[int, int], None]  # how much is done, of how much


def silent(done: int, total: int) -> None:
    """Counts nothing."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def counted(what: str) -> Iterator[Count]:
    """`what` is being counted: "answers", "saliency: prompts"."""
    from tqdm import tqdm

    told = -1
    with tqdm(desc=what, disable=not sys.stderr.isatty(), leave=False) as bar:

        def count(done: int, total: int) -> None:
            nonlocal told
            bar.total, bar.n = total, done
            bar.refresh()
            if bar.disable and 10 * done // total > told:
                told = 10 * done // total
                say(f"{what}: {done} of {total}")

        yield count
