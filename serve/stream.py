"""One answer as OpenAI's objects: whole, or as server-sent events while it comes."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from himap_export.serve.errors import LEFT, ApiError, as_api_error, unavailable
from himap_export.serve.kept import describe_kept, image_tokens_kept
from himap_export.serve.messages import Began, Ended, Event, Piece, Question
from himap_export.serve.schema import Style

DONE = b"data: [DONE]\n\n"
SSE_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


class Events:
    """The events of one question, brought from the engines' thread to the event loop that this is made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue = asyncio.Queue[Event]()  # bounded by the answer's budget of tokens

    def deliver(self, event: Event) -> None:
        """Takes an event on any thread, and never waits."""
        with suppress(RuntimeError):  # the loop has ended, and with it whoever would hear
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            event = await self._queue.get()
            yield event
            if isinstance(event, Ended):
                return


@dataclass
class Answer:
    """What has come of the answer to `question`, and how OpenAI's API says it."""

    question: Question
    style: Style
    created: int = field(default_factory=lambda: int(time.time()))
    began: Began | None = None
    first: float | None = None
    ended: Ended | None = None
    texts: list[str] = field(default_factory=list)

    def take(self, event: Event) -> None:
        """Adds what came."""
        match event:
            case Began():
                self.began = event
            case Piece():
                self.first = event.at if self.first is None else self.first
                self.texts.append(event.text)
            case Ended():
                self.ended = event

    @property
    def problem(self) -> ApiError | None:
        """Why it ended other than an answer does; None where it did not."""
        if self.ended is None or self.ended.reason in ("stop", "length"):
            return None
        if self.ended.problem is not None:
            return as_api_error(self.ended.problem, "messages")
        if self.ended.reason == "error":
            return ApiError(500, "the engines failed", code="engine_error")
        if self.ended.reason == "timeout":
            return unavailable("the answer was not ready in the time that the server gives it", "timeout")
        return unavailable("the answer was cancelled: the server stops", "cancelled")

    def whole(self) -> dict[str, Any]:
        """Returns the chat.completion."""
        message = {"role": "assistant", "content": "".join(self.texts), "refusal": None}
        document = self._head("chat.completion") | {"choices": [self._choice("message", message)]}
        return document | {"usage": self.usage()} | self._himap(self._kept() | self._timing())

    def begin(self) -> bytes:
        """Returns the first chunk, which says who speaks, and what the cuts kept."""
        return self._chunk(self._choice("delta", {"role": "assistant", "content": ""}), self._kept())

    def next(self, text: str) -> bytes:
        """Returns the chunk of a piece."""
        return self._chunk(self._choice("delta", {"content": text}), {})

    def end(self) -> bytes:
        """Returns the last chunks: why it ended and, if it was asked for, the usage; timing is in the very last."""
        if not self.style.usage:
            return self._chunk(self._choice("delta", {}), self._timing()) + DONE
        usage = self._head("chat.completion.chunk") | {"choices": [], "usage": self.usage()}
        last = self._chunk(self._choice("delta", {}), {})
        return last + _event(usage | self._himap(self._timing())) + DONE

    def usage(self) -> dict[str, Any]:
        """Returns how many tokens went in and came out; of the image tokens, how many each stage saw."""
        prompt, tokens = self.question.prompt_tokens, self.ended.tokens if self.ended else 0
        counts = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
        return counts | {"image_tokens_kept": dict(image_tokens_kept(self.question.request))}

    def seconds(self) -> dict[str, float | None]:
        """Returns how long it waited, prefilled, took until its first token and from there to its last."""
        began, ended, asked = self.began, self.ended, self.question.asked
        return {
            "queue_s": round(began.queue_s, 6) if began else None,
            "prefill_s": round(began.prefill_s, 6) if began else None,
            "first_token_s": None if self.first is None else round(self.first - asked, 6),
            "decode_s": round(ended.decode_s, 6) if ended else None,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.question.id, "object": kind, "created": self.created, "model": self.question.model}

    def _choice(self, name: str, said: dict[str, Any]) -> dict[str, Any]:
        reason = self.ended.reason if self.ended else None
        return {"index": 0, name: said, "logprobs": None, "finish_reason": reason}

    def _chunk(self, choice: dict[str, Any], himap: dict[str, Any]) -> bytes:
        usage = {"usage": None} if self.style.usage else {}
        return _event(self._head("chat.completion.chunk") | {"choices": [choice]} | usage | self._himap(himap))

    def _kept(self) -> dict[str, Any]:
        if not self.style.kept or self.began is None:
            return {}
        return describe_kept(self.question.request, self.began.kept).document()

    def _timing(self) -> dict[str, Any]:
        return {"timing": self.seconds()} if self.style.timing else {}

    def _himap(self, said: dict[str, Any]) -> dict[str, Any]:
        return {"himap": said} if said else {}


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


class AnswerResponse:
    """Sends an answer that is on its way. A client that leaves cancels it at once, whatever it had asked for.

    `ended` is told the HTTP status when all is over.
    """

    def __init__(
        self, answer: Answer, events: Events, cancel: Callable[[], None], ended: Callable[[Answer, int], None]
    ) -> None:
        self._answer, self._events, self._cancel, self._ended = answer, events, cancel, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = asyncio.create_task(_disconnected(receive))
        left.add_done_callback(lambda task: None if task.cancelled() else self._cancel())
        status = LEFT
        try:
            told = await (self._stream if self._answer.style.stream else self._whole)(scope, receive, send)
            status = LEFT if left.done() and self._answer.problem is not None else told
        finally:
            left.cancel()
            self._cancel()  # does nothing to one that has ended
            self._ended(self._answer, status)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> int:
        async for event in self._events:
            self._answer.take(event)
        if problem := self._answer.problem:
            return await _refused(problem, (scope, receive, send))
        content = msgspec.json.encode(self._answer.whole())
        await Response(content, media_type="application/json")(scope, receive, send)
        return 200

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> int:
        """The status is sent with the first event, when it is certain."""
        answer, status = self._answer, 0
        async for event in self._events:
            answer.take(event)
            if problem := answer.problem:
                if not status:
                    return await _refused(problem, (scope, receive, send))
                await send(_body(_event(problem.document()), more=False))
                return problem.status
            if not status:
                status = 200
                await send({"type": "http.response.start", "status": status, "headers": SSE_HEADERS})
                await send(_body(answer.begin()))
            if isinstance(event, Piece) and event.text:
                await send(_body(answer.next(event.text)))
        await send(_body(answer.end(), more=False))
        return status


async def _refused(problem: ApiError, to: tuple[Scope, Receive, Send]) -> int:
    response = Response(problem.content(), problem.status, problem.headers, "application/json")
    await response(*to)
    return problem.status


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has left, or has its response."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _body(content: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}
