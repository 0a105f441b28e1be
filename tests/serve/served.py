"""A real server on loopback, in a thread of its own, and what it is asked."""

import base64
import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from commands import QUESTIONS_64
from fakes import FakeService

from himap_export.serve.app import Options, make_app
from himap_export.serve.http import Server, listen
from himap_export.serve.logs import RequestLog
from himap_export.serve.metrics import Metrics
from himap_export.serve.service import Service

LETTER, QUESTION = QUESTIONS_64.parent / "letter.png", "which letter is in the yellow box?"
KEY = "sk-of-the-tests"
JSON = {"content-type": "application/json"}


@dataclass
class Served:
    """A server: where it listens, and what it wrote into its log."""

    port: int
    service: Any
    stream: io.StringIO

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content of one request over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, sent, {**JSON, "authorization": f"Bearer {KEY}", **(headers or {})})
        answered = connection.getresponse()
        content = answered.read()
        connection.close()
        return answered.status, {name.lower(): value for name, value in answered.getheaders()}, content

    def chat(self, body: Any, **headers: str) -> tuple[int, dict[str, str], Any]:
        """The same of a question, with the JSON of its answer."""
        status, found, content = self.ask("POST", "/v1/chat/completions", body, headers)
        return status, found, json.loads(content)

    def raw(self, sent: bytes, half_closed: bool = False) -> bytes:
        """Whatever comes back for bytes, until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(sent)
            if half_closed:
                connection.shutdown(socket.SHUT_WR)
            came = b""
            while part := connection.recv(65536):
                came += part
            return came

    def lines(self) -> list[dict[str, Any]]:
        """What it logged."""
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


@contextmanager
def served(service: Service | FakeService, **options: Any) -> Iterator[Served]:
    """A server over an open service."""
    stream, place = io.StringIO(), listen("127.0.0.1", 0)
    real = cast(Service, service)
    app = make_app(real, Options(metrics=Metrics(real), log=RequestLog(stream, log_prompts=True), **options))
    server = Server(app)
    thread = threading.Thread(target=server.run, args=([place],), name="http")
    thread.start()
    try:
        yield Served(place.getsockname()[1], service, stream)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"


def data_uri(content: bytes = b"", kind: str = "png") -> str:
    """The letter's picture, if none is given."""
    return f"data:image/{kind};base64,{base64.b64encode(content or LETTER.read_bytes()).decode()}"


def question(text: str = QUESTION, url: str = "", model: str = "shapes", **more: Any) -> dict[str, Any]:
    """The body of a request."""
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url or data_uri()}}]
    return {"model": model, "messages": [{"role": "user", "content": parts}], **more}
