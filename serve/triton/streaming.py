"""The decoupled model: answers stream, and one instance answers as many questions at a time as it has slots.

`execute` hands its requests to the service and returns at once. The engines' thread puts what it has to say into an
outbox, and another thread sends it: a word with Triton's own process takes a part of a millisecond.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.serve.messages import Ended, Event, Piece
from himap_export.serve.triton.models import (
    POLL_S,
    log_bug,
    open_service,
    questions,
    refused,
    tokens_kept,
    unfinished,
)
from himap_export.serve.triton.tensors import Output, backend, response


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Returns when the engines have answered; an error here is Triton's reason not to be ready."""
        self._service = open_service(args)
        self._outbox = Outbox()

    def execute(self, requests: list[Any]) -> None:
        """Takes requests in. Their responses come later, through their senders."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                (question,) = questions(self._service, request)
                reply = Reply(request, sender, tokens_kept(question))
                reply.cancel = self._service.submit(question, partial(self._outbox.put, reply))
                self._outbox.expect(reply)
            except Exception as problem:  # a bad request is no reason to stop
                sender.send(refused(problem), flags=backend().TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        """Ends what is under way, and both threads."""
        self._service.close()
        self._outbox.close()


@dataclass(eq=False)
class Reply:
    """One request's answer, on its way. `tokens_kept` [stages] are of its image."""

    request: Any
    sender: Any
    tokens_kept: npt.NDArray[np.int32]
    cancel: Callable[[], None] = lambda: None
    ended: bool = False


class Outbox:
    """Sends events in the order in which they came, and looks whether whoever they are for still wants them."""

    def __init__(self) -> None:
        self._events = queue.SimpleQueue[Callable[[], None]]()
        self._open, self._lock, self._closed = list[Reply](), threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def expect(self, reply: Reply) -> None:
        """Begins to look whether a reply, of which nothing may come for a while, is still wanted."""
        with self._lock:
            self._open.append(reply)

    def put(self, reply: Reply, event: Event) -> None:
        """Takes an event; returns at once."""
        self._events.put(partial(self._send, reply, event))

    def close(self) -> None:
        """Returns when everything has been sent."""
        self._events.put(self._end)
        self._thread.join()

    def _run(self) -> None:
        look = time.monotonic() + POLL_S
        while not self._closed:
            with suppress(queue.Empty):
                self._do(self._events.get(timeout=POLL_S))
            if time.monotonic() >= look:
                self._do(self._look)
                look = time.monotonic() + POLL_S

    def _do(self, what: Callable[[], None]) -> None:
        """Does something of which a failure must not hold up the others' answers."""
        try:
            what()
        except Exception as problem:
            log_bug(problem)

    def _end(self) -> None:
        self._closed = True

    def _look(self) -> None:
        """Cancels what waits and is no longer wanted."""
        with self._lock:
            self._open = [reply for reply in self._open if not reply.ended]
            waiting = list(self._open)
        for reply in waiting:
            if reply.request.is_cancelled():
                reply.cancel()

    def _send(self, reply: Reply, event: Event) -> None:
        match event:
            case Piece():
                if reply.request.is_cancelled():
                    reply.cancel()
                elif event.text:
                    reply.sender.send(response({"TEXT": [event.text]}, (1,)))
            case Ended():
                reply.ended = True
                last = unfinished(event)
                if event.reason == "cancelled":
                    backend().Logger.log_info(
                        f"request {reply.request.request_id()!r} cancelled: {event.tokens} tokens"
                    )
                if last is None:
                    outputs: dict[str, Output] = {"TEXT": [""], "FINISH_REASON": [event.reason]}
                    outputs["IMAGE_TOKENS_KEPT"] = reply.tokens_kept
                    last = response(outputs, (1,))
                reply.sender.send(last, flags=backend().TRITONSERVER_RESPONSE_COMPLETE_FINAL)
