"""Processes of our own: for variables that are read at the start, for memory that ends, for clocks nobody disturbs.

A child answers one request after the other, until its parent kills it: nobody ever waits for one. It dies with its
parent, however that ends, leaves Ctrl-C to it and standard output to the command's result. Its HimapError is raised in
the parent; so is any other error, as what it is, its traceback on standard error.

A child is an interpreter with a program of its own, not one of multiprocessing's: those run the caller's main module
again, which a script without an `if __name__ == "__main__"` guard does not survive.
"""

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, TypeVarTuple

from himap_export.engines.supervisor import die_with_parent
from himap_export.graphs.errors import HimapError

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Arguments = TypeVarTuple("Arguments")
MEMORY = "is there enough memory?"
# Its words: the parent's id, what the child does (for who lists processes), and where the parent finds its modules.
_PROGRAM = "import sys; sys.path[:] = sys.argv[3:]; from himap_export.engines.isolation import serve; serve()"


class Child(Generic[Request, Answer]):
    """A process that answers requests; errors name `what` it does. Made by `child`."""

    def __init__(self, what: str, pipe: Connection, process: subprocess.Popen[bytes], hint: str) -> None:
        self._what, self._pipe, self._process, self._hint = what, pipe, process, hint

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, request: Request) -> None:
        """Asks for something; HimapError as `receive`, if the child is no longer there."""
        try:
            self._pipe.send(request)
        except ConnectionError:
            self.receive()  # what it left behind says why
            self._died()

    def receive(self) -> Answer:
        """Returns the next answer. The child's own HimapError; HimapError if it died, as compilers written in C++
        may."""
        try:
            found = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._died()
        if isinstance(found, HimapError):
            raise found
        answer: Answer = found
        return answer

    def ask(self, request: Request) -> Answer:
        """Sends a request and returns its answer."""
        self.send(request)
        return self.receive()

    def _died(self) -> NoReturn:
        code = self._process.wait()
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = self._hint if code == -signal.SIGKILL else ""  # as the kernel kills when memory runs out
        raise HimapError(f"the process that was {self._what} died", reason, hint)


@contextmanager
def child(
    what: str,
    variables: Mapping[str, str],
    prepare: Callable[[*Arguments], Callable[[Request], Answer]],
    *arguments: *Arguments,
    hint: str = MEMORY,
) -> Iterator[Child[Request, Answer]]:
    """Starts a fresh interpreter with `variables` in its environment: it calls `prepare`, which is picklable like
    `arguments`, requests and answers, and answers requests by what that returns.

    `hint` is what to do should it be killed for its memory.
    """
    ours, its = Pipe()
    places = (place or str(Path.cwd()) for place in sys.path)
    program = [sys.executable, "-c", _PROGRAM, str(os.getpid()), what, *places]
    with ExitStack() as ending:
        ending.enter_context(ours)
        with its, _interrupts_wait():
            process = subprocess.Popen(program, stdin=its.fileno(), env={**os.environ, **variables})
            ending.callback(process.wait)
            ending.callback(process.kill)  # in the middle of its work too, which may take minutes
        one = Child[Any, Any](what, ours, process, hint)
        one.send((prepare, arguments))
        yield one


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Holds Ctrl-C back; a process that starts meanwhile never gets it, until it says otherwise: it is the parent's."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def isolated(
    what: str, variables: Mapping[str, str], function: Callable[[*Arguments], Answer], *arguments: *Arguments
) -> Answer:
    """Returns `function(*arguments)` of a child; HimapError as `Child.receive`."""
    with child(what, variables, _calls, function, arguments) as one:
        answer: Answer = one.ask(None)
        return answer


def pooled(
    what: str,
    size: int,
    requests: Iterable[Request],
    prepare: Callable[[*Arguments], Callable[[Request], Answer]],
    *arguments: *Arguments,
    hint: str = MEMORY,
) -> Iterator[Answer]:
    """Yields what up to `size` children, made as by `child`, answer to `requests`, in the order in which they are done.

    HimapError as `Child.receive`, of whichever fails first. Whoever stops early does not wait for them.
    """
    todo = iter(requests)
    with ExitStack() as stack:
        busy: list[Child[Request, Answer]] = []
        for request in islice(todo, size):
            busy.append(stack.enter_context(child(what, {}, prepare, *arguments, hint=hint)))
            busy[-1].send(request)
        while busy:
            for one in _answered(busy):
                answer = one.receive()
                try:
                    one.send(next(todo))
                except StopIteration:
                    busy.remove(one)
                yield answer


def _answered(children: Sequence[Child[Request, Answer]]) -> list[Child[Request, Answer]]:
    """Returns those of which there is something to receive, as soon as there is of one."""
    ready = wait([one._pipe for one in children])
    return [one for one in children if one._pipe in ready]


def _calls(function: Callable[..., Answer], arguments: tuple[object, ...]) -> Callable[[None], Answer]:
    return lambda _: function(*arguments)


def serve() -> None:
    """Serves the parent process, whose id is this child's first word, through its standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    die_with_parent(int(sys.argv[1]))
    pipe, what = Connection(os.dup(0)), sys.argv[2]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # libraries print
    try:
        prepare, arguments = _request(pipe)
        reply = prepare(*arguments)
        while True:
            pipe.send(reply(_request(pipe)))
    except HimapError as problem:
        pipe.send(problem)
    except MemoryError:
        pipe.send(HimapError(f"the machine has too little memory for {what}"))
    except Exception as problem:  # a bug: told as what it is, where it can be mended
        traceback.print_exc()
        details = " ".join(f"{type(problem).__name__}: {problem}".split())
        pipe.send(HimapError(f"the process that was {what} failed", details, "its traceback is above"))


def _request(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionError):
        os._exit(1)  # the parent has left
