"""A command that ends when it is asked to: a parent process that waits for the one that works.

Python runs signal handlers between its own instructions, so nothing that happens inside a library for a minute (an
engine that opens, a tensor that is hashed) can be interrupted in the process itself. The parent passes signals on, and
kills a child that has not ended GRACE seconds later (or later still, if it has said so), clearing away what it had
announced.
"""

import ctypes
import math
import mmap
import os
import select
import shutil
import signal
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from himap_export.graphs.errors import Exit

GRACE = 0.7  # seconds
AT_ONCE = 0.5  # seconds in which signals are one: a terminal sends its own to both processes
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_BOARD = 64 * 1024
_HALF = _BOARD // 2
_SECONDS = struct.Struct("d")
# Shared with the parent: what goes if this process is killed, then what an interrupted one leaves; at the very end, how
# long that may take beyond GRACE.
_board: mmap.mmap | None = None
_left = ""


def supervise(name: str, interrupted: str) -> None:
    """Returns in a child process, which is the command from here on; the parent ends as the child does.

    A child that dies of a signal (no memory, a crash in a library) is one line and exit code 1; one that was asked to
    end and does not is killed: `interrupted` says what is left, exit code 130.
    """
    global _board
    _board = mmap.mmap(-1, _BOARD)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        die_with_parent(parent)
        return
    _wait(child, name, interrupted)


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent, `parent` by its id, dies; at once if it is dead already."""
    with suppress(AttributeError, OSError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(int(Exit.FAILURE))


@contextmanager
def announced(folder: Path, *parents: Path) -> Iterator[None]:
    """Tells the parent process of a folder that must go, with empty `parents`, if this process is killed meanwhile."""
    if _board is None:
        yield
        return
    content = b"\0".join(os.fsencode(p) for p in (folder, *parents))
    if len(content) + 2 < _HALF:
        _board[: len(content) + 2] = content + b"\0\0"
    try:
        yield
    finally:
        _board[:1] = b"\0"


def leaves(state: str) -> None:
    """Says what the command leaves from here on if it is interrupted; "" for what commands of its kind leave."""
    global _left
    _left = state
    if _board is not None:
        content = state.encode("utf-8", "replace")[: _HALF - _SECONDS.size - 1]
        _board[_HALF : _HALF + len(content) + 1] = content + b"\0"


def ends_within(seconds: float) -> None:
    """Says how much longer than GRACE the command may take to end what it has begun, when it is asked to; a second
    signal gives it GRACE alone."""
    if _board is not None:
        _SECONDS.pack_into(_board, _BOARD - _SECONDS.size, seconds)


def left() -> str:
    """Returns what `leaves` said last, in this process or in the child."""
    return _left if _board is None else _board[_HALF:].split(b"\0")[0].decode()


class _Patience:
    """Until when the child may go on, by `time.monotonic`: as it said itself, after a second signal GRACE."""

    until, _first = math.inf, math.inf

    def asked(self, now: float) -> None:
        if self._first == math.inf:
            assert _board is not None
            self._first = now
            self.until = now + GRACE + _SECONDS.unpack_from(_board, _BOARD - _SECONDS.size)[0]
        elif now > self._first + AT_ONCE:
            self.until = min(self.until, now + GRACE)


def _wait(child: int, name: str, interrupted: str) -> NoReturn:
    """Passes signals on until the child has ended, then ends in its way."""
    patience = _Patience()

    def pass_on(number: int, _: object) -> None:
        patience.asked(time.monotonic())
        with suppress(ProcessLookupError):
            os.kill(child, number)

    ready, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sent, pass_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    killed = False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > patience.until:
            killed = True
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        wait = None if patience.until == math.inf else max(0.0, patience.until - time.monotonic())
        if select.select([ready], [], [], wait)[0]:
            os.read(ready, 4096)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        _clear()
    if killed:
        _end(f"{name}: interrupted, {left() or interrupted}", Exit.INTERRUPTED)
    if code < 0:
        reason = "the machine may have too little memory" if -code == signal.SIGKILL else "a library crashed"
        _end(f"{name}: error: killed by {signal.Signals(-code).name} ({reason})", Exit.FAILURE)
    os._exit(code)


def _clear() -> None:
    """Removes what the child had announced; what a bundle may still need back is left to the next export."""
    assert _board is not None
    if _board[:1] == b"\0":
        return
    folder, *parents = (Path(os.fsdecode(part)) for part in _board[:].split(b"\0\0")[0].split(b"\0"))
    if (folder / "old").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    for parent in parents:
        with suppress(OSError):
            parent.rmdir()


def _end(line: str, code: Exit) -> NoReturn:
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    os._exit(int(code))
