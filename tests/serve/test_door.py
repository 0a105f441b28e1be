"""What real engines do not do on demand: a full queue, an error in the middle, clients that leave, or do not read."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from fakes import FakeService, Talk, queue_full
from served import KEY, Served, question, served

from himap_export.engines.bundle import Bundle
from himap_export.graphs.errors import Exit, HimapError
from himap_export.serve import protocol
from himap_export.serve.service import Draining

CHAT = "/v1/chat/completions"
FAILED = HimapError("the model gives no answer", "all logits are NaN")


@pytest.fixture
def fake(shapes: Bundle) -> Callable[..., Any]:
    """A server over a service that follows a script."""

    @contextmanager
    def door(script: Callable[[Talk], None] = hello, **options: Any) -> Iterator[Served]:
        with served(FakeService(shapes, script), **options) as server:
            yield server

    return door


def hello(talk: Talk) -> None:
    talk.begin()
    talk.say("Hel", "", "lo")
    talk.end()


def wait(talk: Talk) -> None:
    """Begins, and goes on until the client has left."""
    talk.begin()
    talk.say("Hel")
    assert talk.left.wait(20)


def asked(**more: Any) -> dict[str, Any]:
    return question(model="fake", **more)


def chunks(content: bytes) -> list[Any]:
    """What the events of a stream hold; its end as text."""
    events = [event.removeprefix(b"data: ") for event in content.split(b"\n\n")[:-1]]
    return [json.loads(event) if event.startswith(b"{") else event.decode() for event in events]


def connected(door: Served, **more: Any) -> socket.socket:
    """A connection on which a question was asked."""
    body = json.dumps(asked(**more)).encode()
    connection = socket.create_connection(("127.0.0.1", door.port), timeout=20)
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_the_fake_answers_as_the_real_one(fake: Callable[..., Any]) -> None:
    with fake() as door:
        assert door.chat(asked())[2]["choices"][0]["message"]["content"] == "Hello"
        streamed = chunks(door.ask("POST", CHAT, asked(stream=True))[2])
        assert [c["choices"][0]["delta"].get("content") for c in streamed[:-1]] == ["", "Hel", "lo", None]
        assert streamed[-1] == "[DONE]" and door.service.taken[0].id != door.service.taken[1].id
        assert door.service.taken[0].deadline == door.service.taken[0].asked + 300


def test_a_full_queue_says_when_to_come_again(fake: Callable[..., Any]) -> None:
    with fake() as door:
        door.service.refuses = queue_full(7)
        status, headers, document = door.chat(asked())
        assert status == 429 and headers["retry-after"] == "7" and document["error"]["code"] == "rate_limit_exceeded"
        client = openai.OpenAI(base_url=f"{door.url}/v1", api_key=KEY, max_retries=0)
        with pytest.raises(openai.RateLimitError, match="3 questions wait already"):
            client.chat.completions.create(**asked())
        assert b'himap_rejected_total{model_name="fake",reason="queue_full"} 2' in door.ask("GET", "/metrics")[2]
        door.service.refuses = None
        assert door.chat(asked())[0] == 200


def test_a_server_that_drains_says_so(fake: Callable[..., Any]) -> None:
    with fake() as door:
        assert door.ask("GET", "/health/ready")[0] == 200
        door.service.refuses = Draining("the server takes no questions now")  # since it was asked whether it is ready
        assert door.chat(asked())[0] == 503
        door.service.ready = False
        status, headers, document = door.chat(asked())
        assert status == 503 and int(headers["retry-after"]) > 0 and document["error"]["type"] == "server_error"
        status, _, content = door.ask("GET", "/health/ready")
        assert status == 503 and json.loads(content)["error"]["code"] == "service_unavailable"
        assert door.ask("GET", "/health")[0] == 200
        assert b'himap_rejected_total{model_name="fake",reason="draining"} 2' in door.ask("GET", "/metrics")[2]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_cancelled_at_once(fake: Callable[..., Any], stream: bool) -> None:
    with fake(wait) as door:
        connection = connected(door, stream=stream)
        if stream:
            while b"Hel" not in connection.recv(65536):
                pass
        while not door.service.taken:
            threading.Event().wait(0.01)
        assert not door.service.cancelled.is_set()
        connection.close()
        assert door.service.cancelled.wait(10)
    assert [(line["status"], line["finish_reason"]) for line in door.lines()] == [(499, "cancelled")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("reason", "problem", "status", "code"),
    [
        ("error", FAILED, 500, "engine_error"),
        ("error", HimapError("it does not fit", code=Exit.USAGE), 400, "invalid_value"),
        ("timeout", None, 503, "timeout"),
        ("cancelled", None, 503, "cancelled"),
    ],
)
def test_what_fails_before_a_first_token_has_its_status(
    fake: Callable[..., Any], stream: bool, reason: str, problem: HimapError | None, status: int, code: str
) -> None:
    with fake(lambda talk: talk.end(reason, problem)) as door:
        found, headers, document = door.chat(asked(stream=stream))
        assert (found, document["error"]["code"]) == (status, code)
        assert headers["content-type"] == "application/json" and ("retry-after" in headers) is (status == 503)


def test_an_error_in_the_middle_ends_the_stream_without_done(fake: Callable[..., Any]) -> None:
    def fail(talk: Talk) -> None:
        talk.begin()
        talk.say("Hel")
        talk.end("error", FAILED)

    with fake(fail) as door:
        status, _, content = door.ask("POST", CHAT, asked(stream=True))
        *said, last = chunks(content)
        assert status == 200 and said[-1]["choices"][0]["delta"] == {"content": "Hel"}
        assert last["error"]["code"] == "engine_error" and last["error"]["message"].startswith("the model gives no")
        client = openai.OpenAI(base_url=f"{door.url}/v1", api_key=KEY, max_retries=0)
        with pytest.raises(openai.APIError, match="the model gives no answer"):
            list(client.chat.completions.create(**asked(stream=True)))
        assert door.chat(asked())[0] == 500  # whole answers are not begun
    assert [line["status"] for line in door.lines()] == [500, 500, 500]


def test_a_client_that_does_not_read_blocks_nobody_and_is_cut(
    fake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "READING_S", 0.2)
    said = threading.Event()

    def shout(talk: Talk) -> None:
        talk.begin()
        talk.say(*["x" * 2**20] * 24)  # more than the kernel takes for it
        said.set()
        assert talk.left.wait(20)

    with fake(shout) as door:
        connection = connected(door, stream=True)
        assert said.wait(10), "the engines' thread waited"
        assert door.ask("GET", "/health")[0] == 200
        assert door.service.cancelled.wait(10)
        came = b""
        while part := connection.recv(2**20):
            came += part
        assert len(came) < 20 * 2**20 and not came.endswith(b"0\r\n\r\n")


def test_a_bug_is_an_error_object_with_its_traceback_in_the_log(
    fake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake() as door:
        monkeypatch.setattr(door.service, "prepare", lambda *_: 1 / 0)
        status, headers, document = door.chat(asked())
        assert status == 500 and document["error"]["code"] == "internal_error"
        assert headers["x-request-id"] in document["error"]["message"] and "division" not in str(document)
        line = door.lines()[-1]
        assert line["request_id"] == headers["x-request-id"] and "ZeroDivisionError" in line["traceback"]
        assert door.ask("GET", "/health")[0] == 200


def test_bodies_together_are_bounded(fake: Callable[..., Any]) -> None:
    with fake(held_bytes=100) as door:
        for _ in range(2):  # what was held is given back
            status, headers, document = door.chat(asked())
            assert status == 429 and headers["retry-after"] and document["error"]["type"] == "rate_limit_error"
        assert door.chat(b"{}")[0] == 400


def test_connections_are_bounded(fake: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(protocol, "SENDING_S", 0.4)
    with fake(wait) as door:
        oldest = socket.create_connection(("127.0.0.1", door.port), timeout=20)
        oldest.sendall(b"GET / HTTP/1.1\r\nx: ")  # as one does who wants to hold all of them
        busy = connected(door, stream=True)
        assert b"200" in busy.recv(20)
        young = socket.create_connection(("127.0.0.1", door.port), timeout=20)
        assert oldest.recv(1) == b""  # it goes for the young one
        assert young.recv(1) == b""  # this had sent nothing in time: nothing is said
        another = connected(door, stream=True)
        assert b"200" in another.recv(20)
        refused = door.raw(b"")  # those that are being answered stay
        assert refused.startswith(b"HTTP/1.1 503 ") and b'"code":"too_many_connections"' in refused
        busy.close()
        another.close()
        assert door.service.cancelled.wait(10)


def test_a_refused_body_is_read_to_its_end_and_the_connection_kept(fake: Callable[..., Any]) -> None:
    with fake() as door, socket.create_connection(("127.0.0.1", door.port), timeout=20) as connection:
        body = b"x" * 3_000_000
        head = f"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        connection.sendall(head + body + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        came = b""
        while part := connection.recv(65536):
            came += part
        assert came.startswith(b"HTTP/1.1 404 ") and b"HTTP/1.1 200 " in came and came.endswith(b'{"status":"ok"}')
