"""Web sites on loopback, a picture on them, and what a client is told of it."""

import asyncio
import io
import socketserver
import ssl
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image

from himap_export.graphs.errors import Exit, HimapError
from himap_export.serve.pictures import PictureLimits, picture

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def file(kind: str = "PNG", image: Image.Image | None = None, **how: Any) -> bytes:
    content = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(content, kind, **how)
    return content.getvalue()


PNG = file()


def fetched(url: str, limits: PictureLimits) -> Image.Image:
    return asyncio.run(picture(url, limits))


def refused(url: str, limits: PictureLimits) -> str:
    """What a client is told. One line, that says nothing of the URL."""
    with pytest.raises(HimapError) as caught:
        fetched(url, limits)
    assert caught.value.code == Exit.USAGE
    told = str(caught.value)
    assert "\n" not in told and len(told) < 250 and "base64,iVBOR" not in told
    assert len(url) < 10 or url not in told
    return told


@dataclass
class Site:
    """A server: by path the bytes that it answers, headers and all. `asked`: heads of requests; `names`: by SNI."""

    port: int = 0
    pages: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)

    def limits(self, *hosts: str, **limits: Any) -> PictureLimits:
        return PictureLimits(hosts=tuple(f"{host}:{self.port}" for host in hosts or ("pictures.test",)), **limits)

    def url(self, path: str, host: str = "pictures.test", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


def serve(site: Site, address: str, secure: ssl.SSLContext | None = None, port: int = 0) -> socketserver.TCPServer:
    """Starts a site, a thread for each connection; a page that is b"slow" comes a byte at a time, for ever."""
    over = threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            if secure is not None:
                self.request.settimeout(10)
                try:
                    self.request = secure.wrap_socket(self.request, server_side=True)
                except OSError:
                    return
                self.setup()
            lines = iter(self.rfile.readline, b"\r\n")
            head = [line.decode().strip() for line in lines if line]
            if not head:
                return
            site.asked.append("\n".join(head))
            page = site.pages[head[0].split()[1]]
            try:
                if page == b"slow":
                    self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
                    while not over.wait(0.02):
                        self.wfile.write(b"x")
                self.wfile.write(page)
            except OSError:
                pass  # who asked has gone

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address, daemon_threads, request_queue_size = True, True, 64

        def server_close(self) -> None:
            over.set()
            super().server_close()

    server = Server((address, port), Handler)
    site.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


def ok(body: bytes, *headers: str) -> bytes:
    return "\r\n".join(("HTTP/1.1 200 OK", *headers, "", "")).encode() + body


def chunked(body: bytes) -> bytes:
    parts = [body[i : i + 7] for i in range(0, len(body), 7)]
    lines = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return ok(lines + b"0\r\n\r\n", "Transfer-Encoding: chunked")


def redirect(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Elsewhere\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode("latin-1")
