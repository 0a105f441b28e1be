"""A server from its socket to its last answer: it listens, opens the engines, and drains when it is asked to end."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

from himap_export.engines.supervisor import AT_ONCE, ends_within
from himap_export.graphs.errors import Exit, HimapError
from himap_export.serve.gate import MAX_HEADER_BYTES
from himap_export.serve.logs import RequestLog
from himap_export.serve.protocol import MAX_CONNECTIONS, Protocol
from himap_export.serve.service import Service

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CUT_S = 0.3  # for clients to be told that their answers are cut; below the parent's GRACE
KEEP_ALIVE_S = 30
LOOK_S = 1.0  # between two looks at the engines


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens; port 0 takes any that is free. HimapError if it cannot be had."""
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(place[:2], family=family, backlog=MAX_CONNECTIONS)
    except (OSError, UnicodeError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        hint = "choose another `host` or `port`; port 0 takes any that is free"
        raise HimapError(f"cannot listen on {host}:{port}", reason, hint) from None


@dataclass(frozen=True)
class Serving:
    """What is served, and how it ends: `drain_s` for answers that are on their way; `ready` is called once."""

    service: Service
    app: ASGIApp
    log: RequestLog
    drain_s: float
    ready: Callable[[], None]

    def run(self, place: socket.socket) -> None:
        """Serves at `place` until a signal says to end.

        The first has it drain; a second, or `drain_s`, cuts what is left. HimapError (interrupted) then, (failure) if
        the engines end by themselves, and as `Service.open`.
        """
        asyncio.run(self._run(place))

    async def _run(self, place: socket.socket) -> None:
        asked, server = _Signals(), Server(self.app)
        serving = asyncio.create_task(server.serve([place]))
        opening = _in_thread(self.service.open)
        await _first(None, opening, asked.once)
        if opening.done():
            await opening
            ends_within(self.drain_s + CUT_S)
            self.ready()
            await _first(None, asked.once, serving, asyncio.create_task(self._failed()))
        failed = not asked.once.done()
        self.log.write("failed" if failed else "draining")
        whole = opening.done() and not failed and await self._drained(asked)
        server.should_exit, server.force_exit = True, not whole
        await _first(self.drain_s if whole else CUT_S, serving, asked.twice)
        server.force_exit = True
        await _first(CUT_S, _in_thread(self.service.close))
        if failed:
            raise HimapError("the engines answer no more", hint="what happened is told above")
        if not whole:
            raise HimapError("stopped before every answer had ended", code=Exit.INTERRUPTED)

    async def _failed(self) -> None:
        """Returns when the engines have ended or hang: whoever runs this server may start it again."""
        while self.service.ready:
            await asyncio.sleep(LOOK_S)

    async def _drained(self, asked: "_Signals") -> bool:
        """Whether all that had been taken in has ended by itself."""
        drained = _in_thread(self.service.drain)
        await _first(self.drain_s, drained, asked.twice)
        if not drained.done():
            await _first(CUT_S, _in_thread(self.service.close))
            return False
        await drained
        return True


class _Signals:
    """`once`, `twice`: futures that are done when this process has been asked to end so many times."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.once, self.twice, self._first = self._loop.create_future(), self._loop.create_future(), 0.0
        for sent in SIGNALS:
            self._loop.add_signal_handler(sent, self._asked)

    def _asked(self) -> None:
        if not self.once.done():
            self.once.set_result(None)
            self._first = self._loop.time()
        elif not self.twice.done() and self._loop.time() > self._first + AT_ONCE:
            self.twice.set_result(None)


class Server(uvicorn.Server):
    """uvicorn's, which leaves signals to us."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            uvicorn.Config(
                app, http=Protocol, ws="none", lifespan="off", log_config=None, access_log=False,
                proxy_headers=False, server_header=False, timeout_keep_alive=KEEP_ALIVE_S, backlog=MAX_CONNECTIONS,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            )
        )  # fmt: skip

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Yields, and catches nothing."""
        yield


class LoggedWarnings(logging.Handler):
    """Writes what libraries log as lines of ours."""

    def __init__(self, log: RequestLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line."""
        self._log.write("warning", logger=record.name, message=self.format(record))


def _in_thread(work: Callable[[], None]) -> "asyncio.Future[None]":
    """Runs `work` in a thread that the process does not wait for at its end."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def finish(problem: BaseException | None) -> None:
        if problem is None:
            done.set_result(None)
        else:
            done.set_exception(problem)

    def run() -> None:
        problem: BaseException | None = None
        try:
            work()
        except BaseException as raised:
            problem = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(finish, problem)

    threading.Thread(target=run, daemon=True, name=work.__name__).start()
    return done


async def _first(seconds: float | None, *futures: "asyncio.Future[None]") -> None:
    """Waits until one of them is done, at most so many seconds."""
    await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
