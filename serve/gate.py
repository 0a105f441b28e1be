"""What every request passes before it reaches its route: an id, text that is text, a key, and how much it may send."""

import asyncio
import hmac
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from urllib.parse import unquote_to_bytes
from uuid import uuid4

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from himap_export.serve.errors import LEFT, ApiError
from himap_export.serve.logs import RequestLog

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
MAX_HEADERS, MAX_HEADER_BYTES = 100, 32 * 1024


class Gate:
    """ASGI middleware. It answers each ApiError that is raised behind it, and a bug as one, with its id."""

    def __init__(self, app: ASGIApp, keys: Sequence[str] = (), log: RequestLog | None = None) -> None:
        self._app, self._keys, self._log = app, [b"Bearer " + key.encode() for key in keys], log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict[bytes, bytes](scope["headers"])
        request_id, begun = _request_id(headers), False
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            self._write(scope, LEFT, "the client left before it had sent its request")
        except ApiError as error:
            self._write(scope, error.status, error.message, code=error.code, param=error.param)
            await _answer(error, (scope, receive, send_with_id))
        except Exception as problem:
            self._write(scope, 500, f"{type(problem).__name__}: {problem}", traceback=traceback.format_exc())
            if begun:
                raise  # the connection is closed: the client sees that the answer is cut
            bug = ApiError(500, f"an error of the server's own, in its log under {request_id}")
            await _answer(bug, (scope, receive, send_with_id))

    def _check(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        fields = scope["headers"]
        if len(fields) > MAX_HEADERS or sum(len(n) + len(v) for n, v in fields) > MAX_HEADER_BYTES:
            raise ApiError(431, f"more than {MAX_HEADERS} headers, or {MAX_HEADER_BYTES} bytes of them")
        try:
            unquote_to_bytes(scope.get("raw_path", b"")).decode()
            for _, value in fields:
                value.decode()
        except UnicodeDecodeError:
            raise ApiError(400, "the path or a header is not valid UTF-8", code="invalid_utf8") from None
        if self._keys and scope["path"].startswith("/v1"):
            given = headers.get(b"authorization", b"")
            if not sum(hmac.compare_digest(given, key) for key in self._keys):  # with all, whichever it is
                text = "the Authorization header bears no key of this server's: expected Bearer and a key"
                raise ApiError(401, text, headers={"www-authenticate": "Bearer"})

    def _write(self, scope: Scope, status: int, message: str, **more: object) -> None:
        if self._log is not None:
            where = {"method": scope["method"][:20], "path": scope["path"][:200]}
            client, request_id = (scope.get("client") or [None])[0], scope["state"]["request_id"]
            self._log.write(
                "refused", request_id=request_id, client=client, status=status, message=message, **where, **more
            )


class Intake:
    """How bodies are read: JSON of at most `max_bytes`, within `seconds`, and all at a time of at most `held_bytes`."""

    def __init__(self, max_bytes: int, held_bytes: int, seconds: float) -> None:
        self.max_bytes, self.held_bytes, self.seconds, self.held = max_bytes, held_bytes, seconds, 0

    @contextmanager
    def holding(self) -> Iterator["Held"]:
        """Yields what reads one body, which counts until this ends."""
        held = Held(self)
        try:
            yield held
        finally:
            self.held -= held.size


class Held:
    """One body that is being read, or used."""

    def __init__(self, intake: Intake) -> None:
        self._intake, self.size = intake, 0

    async def body(self, request: Request) -> bytes:
        """Returns the body. ApiError (408, 413, 415, 429) for one that does not come in time, is too large, is not
        plain JSON, or is one too many."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        coding = request.headers.get("content-encoding", "identity").strip().lower()
        if kind != "application/json" or coding != "identity":
            raise ApiError(415, "expected the content-type application/json, and no content-encoding")
        if int(request.headers.get("content-length", "0")) > self._intake.max_bytes:  # h11 has checked that it is one
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._intake.seconds):
                async for chunk in request.stream():
                    self._count(len(chunk))
                    body += chunk
        except TimeoutError:
            text = f"the body did not come within {self._intake.seconds:g} s"
            raise ApiError(408, text, headers={"connection": "close"}) from None
        return bytes(body)

    def _count(self, size: int) -> None:
        self.size += size
        self._intake.held += size
        if self.size > self._intake.max_bytes:
            raise self._too_large()
        if self._intake.held > self._intake.held_bytes:
            raise ApiError(429, "the server holds too many requests", headers={"retry-after": "1"})

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._intake.max_bytes} bytes")


def _request_id(headers: Mapping[bytes, bytes]) -> str:
    """The client's own, if it is one that can stand in a log."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if REQUEST_ID.fullmatch(given) else uuid4().hex


async def _answer(error: ApiError, to: tuple[Scope, Receive, Send]) -> None:
    await Response(error.content(), error.status, error.headers, "application/json")(*to)
