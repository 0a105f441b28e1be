"""How the soak's clients behave, well and badly, and what becomes of each request."""

import asyncio
import contextlib
import json
import random
import socket
from dataclasses import dataclass, replace
from typing import Any, Literal

from serve_soak_asks import Malformed, Truth

PATIENCE_S = 120  # in which every request must have ended
READ_S = 1.0  # between a slow reader's chunks
STALL_S, LEAVES_S = 4.0, 0.5  # until a reader that stopped leaves; one that leaves in the middle, at most
Kind = Literal["right", "wrong", "error", "left", "lost"]


@dataclass(frozen=True)
class Outcome:
    """What became of a request: a right answer or a wrong one, an error object with its status, left by its client, or
    lost: neither an answer nor an error object came. `why` tells of wrong and lost ones."""

    behaviour: str
    kind: Kind
    status: int = 0
    why: str = ""


@dataclass(frozen=True)
class Received:
    """An HTTP response: its status, its body as far as it came, and whether that is whole."""

    status: int
    content: bytes
    whole: bool


def received(raw: bytes) -> Received:
    """Returns what a response says; status 0 if there is none."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    if not first.startswith("HTTP/1.1 "):
        return Received(0, raw, False)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    status, content, whole = int(first.split()[1]), b"", False
    if headers.get("transfer-encoding") != "chunked":
        return Received(status, rest, len(rest) == int(headers.get("content-length", "-1")))
    while b"\r\n" in rest:
        size, _, rest = rest.partition(b"\r\n")
        count = int(size, 16)
        content, rest, whole = content + rest[:count], rest[count + 2 :], count == 0
    return Received(status, content, whole)


def judged(behaviour: str, raw: bytes, truth: Truth, stream: bool) -> Outcome:
    """Returns what an answer that was waited for has become."""
    got = received(raw)
    try:
        if got.status != 200 or not got.whole:
            return refused(behaviour, got)
        text, reason, tokens = _streamed(got.content) if stream else _whole(json.loads(got.content))
    except (ValueError, KeyError, IndexError, TypeError) as problem:
        return Outcome(behaviour, "lost", got.status, f"{problem!r}: {got.content[:200]!r}")
    found = Truth(text, tokens, reason)
    return Outcome(behaviour, "right" if found == truth else "wrong", 200, f"{found} is not {truth}")


def refused(behaviour: str, got: Received, expected: int | None = None) -> Outcome:
    """Returns the outcome of a response that is no answer: it must be an error object, with the status `expected`."""
    try:
        error = json.loads(got.content)["error"]
        proper = got.whole and {"message", "type", "param", "code"} == set(error) and got.status >= 400
    except (ValueError, KeyError, TypeError):
        proper = False
    if proper and expected in (None, got.status):
        return Outcome(behaviour, "error", got.status)
    return Outcome(behaviour, "lost", got.status, f"expected {expected}: {got.content[:200]!r}")


def left(behaviour: str, raw: bytes, truth: Truth) -> Outcome:
    """Returns the outcome of a stream that its client left: what had come must begin the right answer."""
    got, texts = received(raw), list[str]()
    for line in got.content.split(b"\n\n")[:-1]:
        with contextlib.suppress(ValueError, KeyError, IndexError):
            texts.append(json.loads(line.removeprefix(b"data: "))["choices"][0]["delta"].get("content") or "")
    if truth.text.startswith("".join(texts)):
        return Outcome(behaviour, "left", got.status)
    return Outcome(behaviour, "wrong", got.status, f"{''.join(texts)!r} does not begin {truth.text!r}")


def _whole(document: Any) -> tuple[str, str, int]:
    choice = document["choices"][0]
    return choice["message"]["content"], choice["finish_reason"], document["usage"]["completion_tokens"]


def _streamed(content: bytes) -> tuple[str, str, int]:
    *events, done, rest = content.split(b"\n\n")
    if done != b"data: [DONE]" or rest:
        raise ValueError("the stream does not end with [DONE]")
    *chunks, usage = (json.loads(event.removeprefix(b"data: ")) for event in events)
    choices = [chunk["choices"][0] for chunk in chunks]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return text, choices[-1]["finish_reason"], usage["usage"]["completion_tokens"]


@dataclass(frozen=True)
class Door:
    """Where requests are sent."""

    port: int

    async def wait(self, request: bytes) -> bytes:
        """Returns the response, as much as comes: a server may answer, and close, before it has read all."""
        loop, raw = asyncio.get_running_loop(), bytearray()
        with socket.socket() as place:
            place.setblocking(False)
            await loop.sock_connect(place, ("127.0.0.1", self.port))
            with contextlib.suppress(ConnectionError):
                await loop.sock_sendall(place, request)
            with contextlib.suppress(ConnectionError):
                while chunk := await loop.sock_recv(place, 2**16):
                    raw += chunk
        return bytes(raw)

    async def leave(self, request: bytes, draw: random.Random) -> bytes:
        """Leaves in the middle of the request, of the wait or of the answer; returns what had come."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        raw = bytearray()
        try:
            when = draw.choice(("request", "waiting", "answer", "answer"))
            writer.write(request[: draw.randrange(len(request))] if when == "request" else request)
            if when == "answer":
                raw += await reader.read(4096)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(draw.random() ** 2 * LEAVES_S):
                    while chunk := await reader.read(4096):
                        raw += chunk
        finally:
            writer.transport.abort() if draw.random() < 0.5 else writer.close()
        return bytes(raw)

    async def crawl(self, request: bytes) -> bytes:
        """Reads a little once a second, through a small window; returns the whole response."""
        loop, raw = asyncio.get_running_loop(), bytearray()
        with self._narrow() as place:
            await loop.sock_connect(place, ("127.0.0.1", self.port))
            await loop.sock_sendall(place, request)
            while chunk := await loop.sock_recv(place, 512):
                raw += chunk
                await asyncio.sleep(READ_S)
        return bytes(raw)

    async def stall(self, request: bytes) -> bytes:
        """Reads once, then nothing more, and leaves."""
        loop = asyncio.get_running_loop()
        with self._narrow() as place:
            await loop.sock_connect(place, ("127.0.0.1", self.port))
            await loop.sock_sendall(place, request)
            raw = await loop.sock_recv(place, 256)
            await asyncio.sleep(STALL_S)
        return raw

    def _narrow(self) -> socket.socket:
        place = socket.socket()
        place.setblocking(False)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        return place


async def send_malformed(door: Door, wrong: Malformed) -> Outcome:
    """Sends what is wrong and judges what comes back."""
    outcome = refused("malformed", received(await door.wait(wrong.content)), wrong.status)
    return replace(outcome, why=f"{wrong.name}: {outcome.why}")
