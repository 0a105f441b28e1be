"""What nobody should send: each is an OpenAI error object with its status, and the server goes on answering."""

import gzip
import http.client
import io
import json
import socket
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from PIL import Image
from served import JSON, KEY, Served, data_uri, question

from himap_export.serve import protocol

Answer = tuple[int, Any]  # status and document
CHAT = "/v1/chat/completions"
HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n".encode()
BODY = json.dumps(question()).encode()
EXACTLY = f"content-length: {len(BODY)}\r\n".encode()


@dataclass(frozen=True)
class Bad:
    """One request, and what has to come back."""

    name: str
    send: Callable[[Served], Answer]
    status: int
    code: str
    param: str | None = None
    says: str = ""


def chat(content: bytes | dict[str, Any], **headers: str) -> Callable[[Served], Answer]:
    """A body for the chat."""
    return lambda door: door.chat(content, **{name.replace("_", "-"): value for name, value in headers.items()})[::2]


def changed(**fields: Any) -> Callable[[Served], Answer]:
    """A right question but for these fields; `...` leaves one out."""
    return chat({name: value for name, value in (question() | fields).items() if value is not ...})


def content(*parts: Any) -> Callable[[Served], Answer]:
    """A message of these parts."""
    return changed(messages=[{"role": "user", "content": list(parts)}])


def shown(url: str) -> Callable[[Served], Answer]:
    """A question about the picture behind a URL."""
    return chat(question(url=url))


def to(method: str, path: str, **headers: str) -> Callable[[Served], Answer]:
    """Another route."""

    def send(door: Served) -> Answer:
        status, _, content = door.ask(method, path, headers=headers)
        return status, json.loads(content)

    return send


def raw(sent: bytes, half_closed: bool = False) -> Callable[[Served], Answer]:
    """Bytes as they are; one answer comes back, and the connection closes."""

    def send(door: Served) -> Answer:
        head, _, content = door.raw(sent, half_closed).partition(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        assert lines[0].startswith("http/1.1 ") and "connection: close" in lines, head
        return int(lines[0].split()[1]), json.loads(content)

    return send


def picture(width: int, height: int, **how: Any) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG", **how)
    return file.getvalue()


def png_bomb() -> bytes:
    """Says that it is 60,000 pixels wide and high, in a few hundred bytes."""
    chunk = struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)
    head = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + chunk + struct.pack(">I", zlib.crc32(b"IHDR" + chunk))
    )
    data = zlib.compress(bytes(100_000))
    return head + struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))


TEXT = {"type": "text", "text": "what is it?"}
IMAGE = {"type": "image_url", "image_url": {"url": data_uri()}}
NOWHERE = {"type": "image_url", "image_url": {"url": "x"}}
MARKED = {"type": "text", "text": "what is <image>?"}
PART, URL = "messages[0].content", "messages[0].content[1].image_url.url"
SYSTEM = {"role": "system", "content": "be brief"}
USER = question()["messages"][0]

ROUTES = [
    Bad("no such path", to("GET", "/v1/nowhere"), 404, "unknown_url"),
    Bad("completions of old", to("POST", "/v1/completions"), 404, "unknown_url"),
    Bad("wrong method", to("GET", CHAT), 405, "method_not_allowed"),
    Bad("deleting a model", to("DELETE", "/v1/models/shapes"), 405, "method_not_allowed"),
    Bad("unknown model by its path", to("GET", "/v1/models/gpt"), 404, "model_not_found", "model"),
    Bad("no key", to("GET", "/v1/models", authorization=""), 401, "invalid_api_key"),
    Bad("a wrong key", to("GET", "/v1/models", authorization="Bearer sk-wrong"), 401, "invalid_api_key"),
    Bad("the beginning of a key", chat(BODY, authorization=f"Bearer {KEY[:-1]}"), 401, "invalid_api_key"),
    Bad("a key that is basic", to("GET", "/v1/models", authorization=f"Basic {KEY}"), 401, "invalid_api_key"),
    Bad("a path in bad UTF-8", to("GET", "/v1/%ff%fe"), 400, "invalid_utf8"),
    Bad("a path that climbs", to("GET", "/../../etc/passwd"), 404, "unknown_url"),
]
HTTP = [
    Bad("no HTTP", raw(b"\x16\x03\x01\x02\x00 hello\r\n\r\n"), 400, "invalid_http"),
    Bad("no headers' end", raw(b"GET / HTTP/1.1\r\nhost: x\r\n", half_closed=True), 400, "invalid_http"),
    Bad("no host", raw(b"GET /health HTTP/1.1\r\n\r\n"), 400, "invalid_http"),
    Bad("a header of 64 KB", raw(b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"a" * 65_536), 431, "headers_too_large"),
    Bad(
        "60 KB of small headers",
        to("GET", "/health", **{f"a{n}": "b" * 1000 for n in range(60)}),
        431,
        "headers_too_large",
    ),
    Bad("1,000 headers", to("GET", "/health", **{f"a{n}": "" for n in range(1000)}), 431, "headers_too_large"),
    Bad("bad UTF-8 in a header", to("GET", "/health", **{"x-name": "caf\xe9"}), 400, "invalid_utf8"),
    Bad("a null in a header", raw(HEAD + b"a: \0\r\n\r\n"), 400, "invalid_http"),
    Bad("a length that is none", raw(HEAD + b"content-length: many\r\n\r\n{}"), 400, "invalid_http"),
    Bad("a negative length", raw(HEAD + b"content-length: -1\r\n\r\n{}"), 400, "invalid_http"),
    Bad("two lengths", raw(HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}"), 400, "invalid_http"),
    Bad(
        "garbage for a chunk",
        raw(HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n"),
        400,
        "invalid_http",
    ),
    Bad("a coding that is none", raw(HEAD + b"transfer-encoding: magic\r\n\r\n{}"), 501, "not_implemented"),
    Bad("half a body", raw(HEAD + EXACTLY + b"\r\n" + BODY[:99], half_closed=True), 400, "invalid_http"),
    Bad("a body that never ends", raw(HEAD + EXACTLY + b"\r\n" + BODY[:99]), 408, "request_timeout"),
    Bad("a chunk that never ends", raw(HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n{"), 408, "request_timeout"),
    Bad("headers that never end", raw(b"GET / HTTP/1.1\r\nhost: x\r\na: b"), 408, "request_timeout"),
]
BODIES = [
    Bad("a form", chat(BODY, content_type="application/x-www-form-urlencoded"), 415, "unsupported_media_type"),
    Bad("plain text", chat(BODY, content_type="text/plain"), 415, "unsupported_media_type"),
    Bad("gzip", chat(gzip.compress(BODY), content_encoding="gzip"), 415, "unsupported_media_type"),
    Bad("a megabyte", chat(b" " * 2**20 + BODY), 413, "request_too_large"),
    Bad("no body", chat(b""), 400, "invalid_json"),
    Bad("half of JSON", chat(BODY[:-9]), 400, "invalid_json"),
    Bad("a list", chat(b"[]"), 400, "invalid_json"),
    Bad("bad UTF-8", chat(b'{"model": "\xff\xfe"}'), 400, "invalid_json"),
    Bad("half a character", chat(b'{"model": "\\ud800"}'), 400, "invalid_json"),
    Bad("deep JSON", chat(b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), 400, "invalid_json"),
    Bad("a number of 5,000 digits", chat(b'{"seed": ' + b"9" * 5000 + b"}"), 400, "invalid_json"),
    Bad("infinity", chat(b'{"temperature": 1e999}'), 400, "invalid_json"),
    Bad("NaN", chat(b'{"temperature": NaN}'), 400, "invalid_json"),
]
FIELDS = [
    Bad("no model", changed(model=...), 400, "missing_required_parameter", "model"),
    Bad("a number as model", changed(model=5), 400, "invalid_type", "model"),
    Bad("unknown model", changed(model="shapes:fastv"), 404, "model_not_found", "model"),
    Bad("unknown field", changed(temprature=1), 400, "unknown_parameter", "temprature", "did you mean temperature?"),
    Bad("unknown option", changed(stream=True, stream_options={"x": 1}), 400, "unknown_parameter", "stream_options.x"),
    Bad("two answers", changed(n=2), 400, "unsupported_value", "n"),
    Bad("true answers", changed(n=True), 400, "unsupported_value", "n"),
    Bad("logprobs", changed(logprobs=True), 400, "unsupported_value", "logprobs"),
    Bad("tools", changed(tools=[{"type": "function"}]), 400, "unsupported_value", "tools"),
    Bad("JSON mode", changed(response_format={"type": "json_object"}), 400, "unsupported_value", "response_format"),
    Bad("a penalty", changed(frequency_penalty=0.5), 400, "unsupported_value", "frequency_penalty"),
    Bad("hot", changed(temperature=2.1), 400, "invalid_value", "temperature"),
    Bad("a word as temperature", changed(temperature="hot"), 400, "invalid_type", "temperature"),
    Bad("top_p of nothing", changed(top_p=0), 400, "invalid_value", "top_p"),
    Bad("a negative seed", changed(seed=-1), 400, "invalid_value", "seed"),
    Bad("a huge seed", changed(seed=2**32), 400, "invalid_value", "seed"),
    Bad("no tokens", changed(max_tokens=0), 400, "invalid_value", "max_tokens"),
    Bad("more tokens than the budget", changed(max_tokens=13), 400, "invalid_value", "max_tokens", "at most 12 tokens"),
    Bad("10^40 tokens", changed(max_completion_tokens=10**40), 400, "invalid_value", "max_completion_tokens"),
    Bad("both limits", changed(max_tokens=1, max_completion_tokens=2), 400, "invalid_value", "max_completion_tokens"),
    Bad("an empty stop", changed(stop=["a", ""]), 400, "invalid_value", "stop"),
    Bad("five stops", changed(stop=list("abcde")), 400, "invalid_value", "stop"),
    Bad("a stop of numbers", changed(stop=[1]), 400, "invalid_type", "stop[0]"),
    Bad(
        "options without a stream",
        changed(stream_options={"include_usage": True}),
        400,
        "invalid_value",
        "stream_options",
    ),
    Bad("a word as stream", changed(stream="yes"), 400, "invalid_type", "stream"),
    Bad("an unknown extension", changed(himap={"k1": 3}), 400, "unknown_parameter", "himap.k1"),
]
MESSAGES = [
    Bad("no messages", changed(messages=[]), 400, "invalid_value", "messages", "0 messages: expected one message"),
    Bad("messages as text", changed(messages="hi"), 400, "invalid_type", "messages"),
    Bad("two messages", changed(messages=[USER, USER]), 400, "invalid_value", "messages"),
    Bad("a system's", changed(messages=[SYSTEM, USER]), 400, "unsupported_value", "messages[0].role"),
    Bad("a name", changed(messages=[USER | {"name": "a"}]), 400, "unknown_parameter", "messages[0].name"),
    Bad("null content", changed(messages=[USER | {"content": None}]), 400, "invalid_type", PART),
    Bad("no picture", content(TEXT), 400, "invalid_value", PART, "there is no picture: expected one message"),
    Bad("two pictures", content(TEXT, IMAGE, IMAGE), 400, "invalid_value", PART, "shapes takes no prompt of 2 images"),
    Bad("a thousand nowheres", content(TEXT, *[NOWHERE] * 1000), 400, "invalid_value", PART, "takes no prompt of 1000"),
    Bad("a marked place", content(IMAGE, TEXT, MARKED), 400, "invalid_value", f"{PART}[2].text", "contains <image>:"),
    Bad("no question", content(IMAGE), 400, "invalid_value", PART),
    Bad("audio", content(TEXT, {"type": "input_audio"}), 400, "invalid_value", f"{PART}[1].type", "expected text or"),
    Bad("null as a part", content(None), 400, "invalid_type", f"{PART}[0]"),
    Bad("a question too long", chat(question("what " * 60)), 400, "invalid_value", "messages", "the budget is 24"),
    Bad("300,000 words", chat(question("what " * 60_000)), 400, "string_above_max_length", PART),
    Bad(
        "detail", content(TEXT, {"type": "image_url", "image_url": {"url": data_uri(), "detail": "high"}}), 400,
        "invalid_value", f"{PART}[1].image_url.detail", 'only "auto"',
    ),
]  # fmt: skip
PICTURES = [
    Bad(name, shown(url), 400, "invalid_image", URL)
    for name, url in {
        "a local path": "/etc/passwd",
        "a file": "file:///etc/passwd",
        "no scheme": "letter.png",
        "an address of the cloud": "http://169.254.169.254/latest/meta-data",
        "this machine": "http://127.0.0.1:22/",
        "this machine by name": "http://localhost/a.png",
        "this machine in IPv6": "http://[::1]/a.png",
        "this machine as a number": "http://2130706433/",
        "this machine mapped": "http://[::ffff:127.0.0.1]/",
        "a host that is not allowed": "https://example.com/cat.png",
        "another scheme": "gopher://127.0.0.1:6379/_FLUSHALL",
        "a text": data_uri(b"no picture"),
        "base64 that is none": "data:image/png;base64,!!!!",
        "not base64": "data:image/png,abc",
        "another type": data_uri(kind="svg+xml"),
        "half a picture": data_uri(picture(500, 500)[:60]),
        "a bomb": data_uri(png_bomb()),
        "too large a file": data_uri(picture(1300, 1300, compress_level=0)),
        "too many pixels": data_uri(picture(8000, 8000)),
    }.items()
]
PICTURES += [Bad("long and thin", shown(data_uri(picture(30_000, 1))), 400, "invalid_value", "messages")]
ALL = [*ROUTES, *HTTP, *BODIES, *FIELDS, *MESSAGES, *PICTURES]


@pytest.mark.parametrize("bad", ALL, ids=lambda bad: bad.name)
def test_each_is_an_error_object(door: Served, bad: Bad, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "SENDING_S", 0.3)
    status, document = bad.send(door)
    error = document["error"]
    assert document == {
        "error": {"message": error["message"], "type": error["type"], "param": bad.param, "code": bad.code}
    }
    assert status == bad.status and bad.says in error["message"] and 0 < len(error["message"]) <= 1000
    assert error["type"] == ("server_error" if status == 500 else "invalid_request_error")
    assert "base64,iVBOR" not in error["message"]


def test_the_server_is_alive_and_right_afterwards(door: Served) -> None:
    assert len(ALL) >= 60
    status, headers, document = door.chat(question())
    assert status == 200 and headers["content-type"] == JSON["content-type"]
    assert document["choices"][0]["message"]["content"] == "C"
    assert door.service.load.running == door.service.load.waiting == 0


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: text/plain\r\n", 415),
        (b"POST /nowhere HTTP/1.1\r\nhost: x\r\nconnection: close\r\n", 404),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\na: " + b"a" * 70_000 + b"\r\n", 431),
    ],
)
def test_who_goes_on_sending_is_heard_out_and_gets_the_answer(door: Served, head: bytes, status: int) -> None:
    """Closed at once, with bytes that nobody has read, TCP would reset the connection, and the answer with it."""
    size = 8 << 20
    with socket.create_connection(("127.0.0.1", door.port), timeout=20) as connection:
        connection.sendall(head + b"authorization: Bearer " + KEY.encode() + b"\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(size >> 16):
            connection.sendall(bytes(1 << 16))
        answered = http.client.HTTPResponse(connection)
        answered.begin()
        assert answered.status == status and json.loads(answered.read())["error"]["message"]
        assert connection.recv(1) == b""
