"""Processes of our own: for variables that are read at the start, for memory that ends, for clocks nobody disturbs.

A child answers one request after the other, until its parent kills it: nobody ever waits for one. It dies with its
parent, however that ends, leaves Ctrl-C to it and standard output to the command's result. Its HimapError is raised in
the parent; so is any other error, as what it is, its traceback on standard error.
"""

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn, TypeVar, TypeVarTuple

from himap_export.engines.supervisor import die_with_parent
from himap_export.graphs.errors import HimapError

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")
Reply = Callable[[Any], object]  # what a child does with a request, both picklable
MEMORY = "is there enough memory?"


class Child:
    """A process that answers requests; errors name `what` it does. Made by `child`."""

    def __init__(self, what: str, door: Connection, process: BaseProcess, hint: str) -> None:
        self._what, self._door, self._process, self._hint = what, door, process, hint

    def send(self, request: object) -> None:
        """Asks for something; HimapError as `receive`, if the child is no longer there."""
        try:
            self._door.send(request)
        except ConnectionError:
            self.receive()  # what it left behind says why
            self._died()

    def receive(self) -> Any:
        """The next answer. The child's own HimapError; HimapError if it died, as compilers written in C++ may."""
        try:
            found = self._door.recv()
        except (EOFError, ConnectionError):
            self._died()
        if isinstance(found, HimapError):
            raise found
        return found

    def ask(self, request: object = None) -> Any:
        """`send`, then `receive`."""
        self.send(request)
        return self.receive()

    def _died(self) -> NoReturn:
        self._process.join()
        code = self._process.exitcode or 0
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = self._hint if code == -signal.SIGKILL else ""  # as the kernel kills when memory runs out
        raise HimapError(f"the process that was {self._what} died", reason, hint)


def answered(children: Sequence[Child]) -> list[Child]:
    """Those of which there is something to receive, as soon as there is of one."""
    ready = wait([one._door for one in children])
    return [one for one in children if one._door in ready]


@contextmanager
def child(
    what: str,
    variables: Mapping[str, str],
    prepare: Callable[[*Arguments], Reply],
    *arguments: *Arguments,
    hint: str = MEMORY,
) -> Iterator[Child]:
    """A fresh interpreter with `variables` in its environment: it calls `prepare`, which is picklable like `arguments`,
    and answers requests by what that returns. `hint` is what to do should it be killed for its memory."""
    context = get_context("spawn")
    mine, his = context.Pipe()
    process = context.Process(target=_serve, args=(his, what, prepare, arguments), daemon=True)
    with environment(variables), _deaf():
        process.start()
    his.close()
    try:
        yield Child(what, mine, process, hint)
    finally:
        process.kill()  # in the middle of its work too, which may take minutes
        process.join()
        mine.close()


def isolated(
    what: str, variables: Mapping[str, str], function: Callable[[*Arguments], Result], *arguments: *Arguments
) -> Result:
    """`function(*arguments)` in a child; HimapError as `Child.receive`."""
    with child(what, variables, _calls, function, arguments) as one:
        result: Result = one.ask()
        return result


def _calls(function: Callable[..., object], arguments: tuple[object, ...]) -> Reply:
    return lambda request: function(*arguments)


def serve_parent() -> None:
    """What a child process does first: it dies with its parent, and leaves Ctrl-C and standard output to it."""
    for sent in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sent, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # libraries print
    if (parent := parent_process()) is not None and parent.pid is not None:
        die_with_parent(parent.pid)


def _serve(door: Connection, what: str, prepare: Callable[..., Reply], arguments: tuple[object, ...]) -> None:
    serve_parent()
    try:
        reply = prepare(*arguments)
        while True:
            door.send(reply(_request(door)))
    except HimapError as problem:
        door.send(problem)
    except MemoryError:
        door.send(HimapError(f"the machine has too little memory for {what}"))
    except Exception as problem:  # a bug: told as what it is, where it can be mended
        traceback.print_exc()
        details = " ".join(f"{type(problem).__name__}: {problem}".split())
        door.send(HimapError(f"the process that was {what} failed", details, "its traceback is above"))


def _request(door: Connection) -> object:
    try:
        return door.recv()
    except (EOFError, ConnectionError):
        os._exit(1)  # the parent has left


@contextmanager
def _deaf() -> Iterator[None]:
    """A child that starts meanwhile ignores Ctrl-C from its first moment on: it is the parent's to handle."""
    if threading.current_thread() is not threading.main_thread():  # only that one may say so, or hears of it
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
