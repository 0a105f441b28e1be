"""Where a server goes for a picture that a stranger named, and where it never does.

Sites are real ones on loopback; which of its addresses count as public, and what names resolve to, is said by the test.
"""

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sites import PIXELS, PNG, Site, chunked, fetched, ok, redirect, refused, serve

from himap_export.serve import fetch
from himap_export.serve.fetch import is_public
from himap_export.serve.pictures import PictureLimits, picture

OPEN, CLOSED = "127.0.0.1", "127.0.0.2"  # the one counts as public here, the other does not


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.0.9", "192.0.2.1", "192.88.99.1", "198.18.0.1", "203.0.113.9", "224.0.0.1"),
        *("239.255.255.250", "240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8"),
        *("::127.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "100::1"),
        *("2001::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::1", "2002:808:808::1", "3fff::1", "5f00::1"),
        *("fc00::1", "fd12::1", "fe80::1", "fe80::1%1", "2600::1%1", "fec0::1", "ff02::1", "ff0e::1"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "172.15.0.1", "172.32.0.1", "2606:4700::1", "2a00::1"])
def test_public_addresses(address: str) -> None:
    assert is_public(ip_address(address))


def test_names_resolve_to_addresses() -> None:
    found = asyncio.run(fetch.resolve("localhost", 80))
    assert found and all(address.is_loopback for address in found)
    assert asyncio.run(fetch.resolve("2130706433", 80)) == [ip_address("127.0.0.1")]  # as libc reads it


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """What names resolve to: look-up by look-up, the last of them from then on."""
    table = {"pictures.test": [[OPEN]], "inner.test": [[CLOSED]], "other.test": [[OPEN]], "none.test": [[]]}
    table |= {"mixed.test": [[OPEN, CLOSED]], "rebound.test": [[OPEN], [CLOSED]], "127.0.0.1": [["127.0.0.1"]]}

    async def resolve(host: str, port: int) -> list[fetch.Address]:
        answers = table[host]
        return [ip_address(each) for each in (answers.pop(0) if len(answers) > 1 else answers[0])]

    monkeypatch.setattr(fetch, "resolve", resolve)
    monkeypatch.setattr(fetch, "is_public", lambda address: str(address) == OPEN)
    for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    return table


@pytest.fixture
def site(names: dict[str, list[list[str]]]) -> Iterator[Site]:
    started = Site()
    with serve(started, OPEN) as server:
        yield started
        server.shutdown()


def test_pictures_of_an_allowed_host(site: Site) -> None:
    site.pages = {
        "/length.png?size=1": ok(PNG, f"Content-Length: {len(PNG)}", "Content-Type: text/html"),
        "/closed.png": ok(PNG),
        "/chunked.png": chunked(PNG),
        "/hinted.png": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + ok(PNG, "Content-Encoding: identity"),
        "/": ok(PNG),
    }
    for path in (*site.pages, "#part", "/closed.png#part"):
        np.testing.assert_array_equal(np.asarray(fetched(site.url(path), site.limits())), PIXELS)
    first = site.asked[0].split("\n")
    assert first[0] == "GET /length.png?size=1 HTTP/1.1"
    assert {"Host: pictures.test:%d" % site.port, "Accept-Encoding: identity"} <= set(first)  # noqa: UP031
    assert fetched(site.url("/", host="PICTURES.test"), site.limits("Pictures.Test")).size == (8, 6)


CANNOT, REFUSED = "image_url cannot be fetched", "image_url is refused: it is not on an allowed public host"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (b"", CANNOT),
        (b"HTTP/1.1 200", CANNOT),
        (b"SSH-2.0-OpenSSH_9.2 secret\r\n\r\n", CANNOT),
        (b"HTTP/1.1 404 Secret\r\n\r\nsecret", f"{CANNOT}: its host answered with status 404"),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", f"{CANNOT}: its host answered with status 304"),
        (b"HTTP/1.1 302 Found\r\n\r\n", f"{CANNOT}: its host answered with status 302"),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n" + PNG, CANNOT),
        (ok(PNG[:50], f"Content-Length: {len(PNG)}"), CANNOT),
        (ok(b"zz\r\nsecret", "Transfer-Encoding: chunked"), CANNOT),
        (ok(PNG, "Content-Encoding: gzip"), f"{CANNOT}: its host sends it compressed, unasked"),
        (ok(PNG, "Content-Length: -1"), CANNOT),
        (ok(PNG, "Content-Length: 1", "Content-Length: 2"), CANNOT),
        (ok(PNG, f"Content-Length: {'9' * 5000}"), CANNOT),
        (ok(PNG, f"X-Flood: {'a' * 100_000}"), CANNOT),
        (ok(b"", "Content-Length: 20000"), "image_url is too large: at most 10000 bytes are read"),
        (ok(bytes(10_001)), "image_url is too large: at most 10000 bytes are read"),
        (chunked(bytes(10_001)), "image_url is too large: at most 10000 bytes are read"),
        (ok(b"secret"), "not an image that is PNG, JPEG, WEBP, GIF: image_url"),
        (ok(PNG[:90]), "image is damaged: image_url"),
        (b"slow", "image_url took longer than 0.5 s to fetch"),
    ],
)
def test_bad_answers(site: Site, page: bytes, message: str) -> None:
    site.pages["/"] = page
    told = refused(site.url("/"), site.limits(max_bytes=10**4, seconds=0.5 if page == b"slow" else 10.0))
    assert told.startswith(message) and "ecret" not in told


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://other.test:{port}/", REFUSED),
        ("http://pictures.test/", REFUSED),  # its port was not allowed
        ("http://pictures.test:22/", REFUSED),
        ("http://pictures.test:0/", REFUSED),
        ("http://pictures.test.:{port}/", REFUSED),
        ("http://x.pictures.test:{port}/", REFUSED),
        ("http://user@pictures.test:{port}/", REFUSED),
        ("http://user:key@pictures.test:{port}/", REFUSED),
        ("http://@pictures.test:{port}/", REFUSED),
        ("http://pictures.test:{port}@127.0.0.1/", REFUSED),
        ("http://127.0.0.1:{port}/", REFUSED),
        ("http://2130706433:{port}/", REFUSED),
        ("http://0x7f.1:{port}/", REFUSED),
        ("http://[::1]:{port}/", REFUSED),
        ("http://[::ffff:127.0.0.1]:{port}/", REFUSED),
        ("http://localhost:{port}/", REFUSED),
        ("http://169.254.169.254/latest/meta-data/", REFUSED),
        ("http://pictures%2etest:{port}/", REFUSED),
        ("http:pictures.test:{port}/", REFUSED),
        ("http:///picture.png", REFUSED),
        ("http://pictures.test:port/", "image_url is no URL"),
        ("http://pictures.test:99999/", "image_url is no URL"),
        ("http://[::1/", "image_url is no URL"),
        ("http://pictures.test:{port}\\@other.test/", "image_url is no URL"),
        ("http://pictures.test:{port}/a b", "image_url is no URL"),
        ("http://pictures.test:{port}/\r\nX-Injected: 1", "image_url is no URL"),
        ("http://pict\tures.test:{port}/", "image_url is no URL"),
        ("http://pictures\u3002test:{port}/", "image_url is no URL"),
        (" http://pictures.test:{port}/", "image_url is no URL"),
        ("http://pictures.test:{port}/" + "a" * 9000, "image_url is no URL"),
        ("", "image_url is no URL"),
        ("file:///etc/passwd", "image_url is neither a data URI nor an http(s) URL"),
        ("/etc/passwd", "image_url is neither"),
        ("letter.png", "image_url is neither"),
        ("ftp://pictures.test:{port}/", "image_url is neither"),
        ("gopher://pictures.test:{port}/", "image_url is neither"),
        ("//pictures.test:{port}/", "image_url is neither"),
        ("blob:http://pictures.test:{port}/", "image_url is neither"),
    ],
)
def test_urls_that_are_never_connected_to(site: Site, url: str, message: str) -> None:
    site.pages["/"] = ok(PNG)
    assert refused(url.format(port=site.port), site.limits()).startswith(message)
    assert site.asked == []


def test_no_host_is_allowed_unless_it_is_named(site: Site) -> None:
    site.pages["/"] = ok(PNG)
    assert refused(site.url("/"), PictureLimits()).startswith(REFUSED)
    assert refused("http://pictures.test:80/", PictureLimits(hosts=("other.test",))).startswith(REFUSED)
    assert site.asked == []


def test_private_addresses_are_refused_in_the_words_of_hosts_not_allowed(site: Site) -> None:
    """Of an allowed host, too, and if one of several is private; nothing is connected to, whether it listens or not."""
    hosts = ("pictures.test", "inner.test", "mixed.test", "none.test")
    site.pages["/"] = ok(PNG)
    inner = Site()
    with serve(inner, CLOSED, port=site.port) as server:
        inner.pages["/"] = ok(PNG)
        told = {refused(site.url("/", host), site.limits(*hosts)) for host in (*hosts[1:], "unheard.test")}
        server.shutdown()
    told |= {refused(site.url("/", host), site.limits(*hosts)) for host in hosts[1:]}
    assert len(told) == 1 and told.pop().startswith(REFUSED)
    assert site.asked == [] and inner.asked == []


def test_a_name_is_resolved_once_for_a_connection(site: Site, names: dict[str, list[list[str]]]) -> None:
    """Rebinding: what the name answers the second time is never connected to."""
    inner = Site()
    site.pages["/"] = inner.pages["/"] = ok(PNG)
    with serve(inner, CLOSED, port=site.port) as server:
        assert fetched(site.url("/", "rebound.test"), site.limits("rebound.test")).size == (8, 6)
        assert names["rebound.test"] == [[CLOSED]]  # asked once
        assert refused(site.url("/", "rebound.test"), site.limits("rebound.test")).startswith(REFUSED)
        server.shutdown()
    assert len(site.asked) == 1 and inner.asked == []


def test_the_next_address_is_tried(site: Site, names: dict[str, list[list[str]]], monkeypatch: Any) -> None:
    monkeypatch.setattr(fetch, "is_public", lambda address: address.is_loopback)
    site.pages["/"], names["mixed.test"] = ok(PNG), [["127.0.0.3", OPEN]]
    assert fetched(site.url("/", "mixed.test"), site.limits("mixed.test")).size == (8, 6)
    assert refused(site.url("/", "inner.test"), site.limits("inner.test")) == CANNOT  # allowed, and nobody there


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_within_allowed_hosts(site: Site, status: int) -> None:
    site.pages = {
        "/a": redirect("/b?c=d", status),
        "/b?c=d": redirect(site.url("/c", "other.test"), status),
        "/c": redirect("d.png", status),
        "/d.png": ok(PNG),
    }
    assert fetched(site.url("/a"), site.limits("pictures.test", "other.test")).size == (8, 6)
    assert [asked.split()[1] for asked in site.asked] == list(site.pages)
    assert f"Host: other.test:{site.port}" in site.asked[2]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://other.test:{port}/ok", REFUSED),
        ("http://inner.test:{port}/ok", REFUSED),  # allowed, and private
        ("http://127.0.0.1:{port}/ok", REFUSED),
        ("http://169.254.169.254/", REFUSED),
        ("//localhost:{port}/ok", REFUSED),
        ("http://user@pictures.test:{port}/ok", REFUSED),
        ("https://pictures.test/ok", REFUSED),
        ("file:///etc/passwd", "image_url is neither a data URI nor an http(s) URL"),
        ("data:image/png;base64,AAAA", "image_url is neither"),
        ("http://[::1/", "image_url redirects to no URL"),
        ("/\xe9 b", "image_url is no URL"),
        ("/again", "image_url redirects more than 3 times"),
    ],
)
def test_redirects_are_checked_again(site: Site, location: str, message: str) -> None:
    site.pages["/again"] = redirect(location.format(port=site.port))
    site.pages["/ok"] = ok(PNG)
    told = refused(site.url("/again"), site.limits("pictures.test", "inner.test"))
    assert told.startswith(message)
    assert {asked.split()[1] for asked in site.asked} == {"/again"}
    assert len(site.asked) == (4 if "more than" in message else 1)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, to make a certificate")
def test_https_checks_the_name(names: dict[str, list[list[str]]], tmp_path: Path, monkeypatch: Any) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=x")
    named = ("-addext", "subjectAltName=DNS:pictures.test", "-keyout", key, "-out", certificate)
    subprocess.run(["openssl", "req", "-x509", *kind, *named], check=True, capture_output=True)
    context, secure = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), Site()
    context.load_cert_chain(certificate, key)
    context.sni_callback = lambda _, name, __: secure.names.append(name)
    secure.pages["/"] = ok(PNG)
    with serve(secure, OPEN, context) as server:
        url, both = secure.url("/", scheme="https"), secure.limits("pictures.test", "other.test")
        assert refused(url, both) == f"{CANNOT}: its certificate is not trusted"  # its maker is nobody
        monkeypatch.setattr(fetch, "trust", lambda: ssl.create_default_context(cafile=str(certificate)))
        assert fetched(url, both).size == (8, 6)
        wrong = secure.url("/", "other.test", "https")
        assert refused(wrong, both) == f"{CANNOT}: its certificate is not trusted"  # it is another's
        assert refused(secure.url("/"), both).startswith(CANNOT)  # plain HTTP
        server.shutdown()
    assert secure.names == ["pictures.test", "pictures.test", "other.test"] and len(secure.asked) == 1


def test_certificates_are_checked_by_default() -> None:
    context = fetch.trust()
    assert context.check_hostname and context.verify_mode == ssl.CERT_REQUIRED


def test_many_at_once_and_cancelled(site: Site) -> None:
    """A client that goes away stops its fetch; others' go on."""
    site.pages |= {"/": ok(PNG), "/slow": b"slow"}

    async def all_of_them() -> list[Image.Image]:
        slow = asyncio.create_task(picture(site.url("/slow"), site.limits()))
        found = await asyncio.gather(*(picture(site.url("/"), site.limits()) for _ in range(20)))
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        return found

    assert [image.size for image in asyncio.run(all_of_them())] == [(8, 6)] * 20
