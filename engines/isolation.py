"""One call in a process of its own: with variables that are read at its start, and memory that ends with it."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TypeVar, TypeVarTuple

from himap_export.graphs.errors import HimapError

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


def isolated(
    what: str, variables: Mapping[str, str], function: Callable[[*Arguments], Result], *arguments: *Arguments
) -> Result:
    """`function(*arguments)`, both picklable, in a fresh interpreter; its HimapError is raised here.

    HimapError if the process dies, as compilers written in C++ may: it names `what` was being done.
    """
    context = get_context("spawn")
    mine, his = context.Pipe()
    process = context.Process(target=_answer, args=(his, function, arguments), daemon=True)
    with environment(variables):
        process.start()
    his.close()
    try:
        result: Result | HimapError = mine.recv()
    except (EOFError, ConnectionError):
        process.join()
        hint = "is there enough memory?" if process.exitcode == -signal.SIGKILL else ""
        raise HimapError(f"the process that was {what} died", f"exit code {process.exitcode}", hint) from None
    finally:
        process.kill()  # it has answered, or is of no use any more
        process.join()
    if isinstance(result, HimapError):
        raise result
    return result


def _answer(door: Connection, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.dup2(2, 1)  # libraries print; standard output is the command's result
    try:
        result = function(*arguments)
    except HimapError as problem:
        result = problem
    door.send(result)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """`variables` in this process's environment, where a child that starts meanwhile inherits them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
