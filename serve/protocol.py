"""uvicorn's HTTP/1.1 over h11, with OpenAI's error objects for what is no HTTP, and without clients that hold on to a
connection and neither send nor read."""

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from himap_export.serve.errors import ApiError, unavailable

MAX_CONNECTIONS = 512
SENDING_S = 15.0  # to send a request's headers, or the rest of a body that was refused
LINGER_S = 2.0
READING_S = 30.0  # in which a client must take something of what waits for it
STATUS = {431: "the headers are too large", 501: "the transfer-encoding is not implemented"}


class Lingering:
    """A transport that first hears a client out, for LINGER_S, where it is closed in the middle of a request: with
    bytes that nobody has read, TCP would take the answer back."""

    def __init__(self, transport: asyncio.Transport, speaks: Callable[[], bool]) -> None:
        self._transport, self._speaks, self._lingers = transport, speaks, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Tells whether nothing more is answered."""
        return self._lingers or self._transport.is_closing()

    def close(self) -> None:
        """Closes, now or when the client has closed."""
        if self._lingers or not self._speaks() or self._transport.is_closing():
            self._transport.close()
            return
        self._lingers = True
        self._transport.write_eof()
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(LINGER_S, self._transport.close)


class Protocol(H11Protocol):
    """One connection. What a client is waited for is one timer each way."""

    _idle_since = 0.0  # by the loop's clock
    _sending: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Takes a connection. For one too many the one that has asked for nothing the longest goes; if all have, the
        new one is told so."""
        speaks = Lingering(transport, lambda: self.conn.their_state in (h11.SEND_BODY, h11.ERROR))
        super().connection_made(speaks)  # type: ignore[arg-type]
        transport.set_write_buffer_limits(0)  # so that `pause_writing` tells of every client that does not read
        self._idle_since = self.loop.time()
        self._watch_sending()
        if len(self.connections) > MAX_CONNECTIONS:
            idle = [other for other in self.connections if isinstance(other, Protocol) and other.idle]
            if len(idle) > 1:
                min(idle, key=lambda other: other._idle_since).transport.abort()
            else:
                self._refuse(unavailable(f"there are {MAX_CONNECTIONS} connections already", "too_many_connections"))

    @property
    def idle(self) -> bool:
        """Whether it waits for the headers of a request."""
        return self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete)

    def data_received(self, data: bytes) -> None:
        """Reads, and watches how long it takes."""
        if self.transport.is_closing():
            return  # to somebody who has been answered
        super().data_received(data)
        self._watch_sending()

    def eof_received(self) -> None:
        """Says to one who stopped in the middle of a request that it is not whole; the connection closes."""
        if not self.transport.is_closing() and (self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]):
            self.conn.receive_data(b"")
            self.handle_events()

    def on_response_complete(self) -> None:
        """Waits for the next request."""
        self._idle_since = self.loop.time()
        super().on_response_complete()
        self._watch_sending()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._sending, self._reading):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Gives a client that does not read READING_S to begin."""
        super().pause_writing()
        self._watch_reading(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answers what h11 refuses, which is the exception that is being handled."""
        problem = sys.exc_info()[1]
        status = getattr(problem, "error_status_hint", 400)
        self._refuse(ApiError(status, STATUS.get(status, f"not HTTP: {problem}"), code=_code(status)))

    def _watch_sending(self) -> None:
        """Runs the clock while this side can do nothing but wait for more of a request."""
        theirs, ours = self.conn.their_state, self.conn.our_state
        begun = theirs is h11.IDLE and (self.cycle is None or bool(self.conn.trailing_data[0]))
        if not (begun or (theirs is h11.SEND_BODY and ours in (h11.DONE, h11.MUST_CLOSE))):
            if self._sending is not None:
                self._sending.cancel()
            self._sending = None
        elif self._sending is None:
            self._sending = self.loop.call_later(SENDING_S, self._too_slow)

    def _too_slow(self) -> None:
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(ApiError(408, f"the headers did not come within {SENDING_S:g} s"))
        else:
            self.transport.abort()

    def _watch_reading(self, waiting: int) -> None:
        def look() -> None:
            left = self.transport.get_write_buffer_size()
            if left < waiting:
                self._watch_reading(left)
            else:
                self.transport.abort()

        self._reading = self.loop.call_later(READING_S, look)

    def _refuse(self, error: ApiError) -> None:
        """Answers in place of the application, if nobody has begun to, and closes."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content, headers = error.content(), {**error.headers, "connection": "close"}
            fields: list[Any] = [("content-type", "application/json"), ("content-length", str(len(content)))]
            for event in (
                h11.Response(status_code=error.status, headers=fields + list(headers.items())),
                h11.Data(data=content),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def _code(status: int) -> str | None:
    return None if status in STATUS else "invalid_http"
