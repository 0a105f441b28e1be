"""The bytes behind an http(s) URL that a stranger named, if it leads to an allowed host on the public internet.

A server that fetches what strangers name can be turned against the network it stands in. So a host must be allowed by
name; it is resolved once, *every* address it has must be public, and the connection goes to an address that was
checked: a second look-up could answer otherwise. Redirects go through the same. What is not allowed, and what is but
lies on no public address, is refused in the same words, before anything is connected to.
"""

import asyncio
import functools
import re
import socket
import ssl
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urljoin, urlsplit

import h11

from himap_export.graphs.errors import Exit, HimapError

Address = IPv4Address | IPv6Address

WHERE = "image_url"  # what messages call it: a URI may be megabytes long, and is the client's own
MAX_URL = 8192  # characters
MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
PORTS = {"http": 80, "https": 443}
# Global by the registries, but ways to or through somewhere else: relays of 6to4, protocol assignments.
NEVER_V4 = tuple(map(IPv4Network, ("192.88.99.0/24", "192.0.0.0/24")))
UNICAST_V6 = IPv6Network("2000::/3")  # leaves out IPv4-mapped, IPv4-compatible and NAT64 addresses
NEVER_V6 = tuple(map(IPv6Network, ("2001::/23", "2002::/16", "3fff::/20")))  # Teredo and the like, 6to4, documentation


async def fetch(url: str, hosts: tuple[str, ...], *, max_bytes: int, seconds: float) -> bytes:
    """Returns what lies behind a URL, or behind up to MAX_REDIRECTS redirects, all to `hosts` ("host" at the scheme's
    own port, or "host:port").

    HimapError (usage) if it is not allowed, cannot be fetched, has more than `max_bytes` or takes longer than
    `seconds`; its words hold nothing of what lies on an address that is not public.
    """
    try:
        async with asyncio.timeout(seconds):
            for _ in range(1 + MAX_REDIRECTS):
                answer = await _get(_target(url, hosts), max_bytes)
                if isinstance(answer, bytes):
                    return answer
                url = _joined(url, answer)
    except TimeoutError:
        raise HimapError(f"{WHERE} took longer than {seconds:g} s to fetch", code=Exit.USAGE) from None
    raise HimapError(f"{WHERE} redirects more than {MAX_REDIRECTS} times", code=Exit.USAGE)


def is_public(address: Address) -> bool:
    """Returns whether an address is a plain one of the internet: neither private, loopback, link-local, multicast nor
    reserved, and no other address in disguise."""
    if isinstance(address, IPv4Address):
        strange = address.is_multicast or address.is_reserved or any(address in network for network in NEVER_V4)
        return address.is_global and not strange
    strange = address.scope_id is not None or any(address in network for network in NEVER_V6)
    return address.is_global and address in UNICAST_V6 and not strange


async def resolve(host: str, port: int) -> list[Address]:
    """Returns all addresses of a host, in the system's order. OSError or UnicodeError if it has none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ip_address(place[0]) for *_, place in found]


@functools.cache
def trust() -> ssl.SSLContext:
    """Returns what https certificates are checked by: the system's authorities, and the host's name."""
    return ssl.create_default_context()


@dataclass(frozen=True)
class _Target:
    """One allowed place; `host` as names and certificates have it, without brackets."""

    scheme: str
    host: str
    port: int
    authority: str  # the Host header
    path: str


def _target(url: str, hosts: tuple[str, ...]) -> _Target:
    """What a URL names, if it is allowed. HimapError (usage)."""
    # Before urlsplit, which drops line ends and takes a backslash for part of a name.
    if len(url) > MAX_URL or not re.fullmatch(r"[!-\[\]-~]+", url):
        details = f"printable ASCII without spaces and backslashes, at most {MAX_URL} characters"
        raise HimapError(f"{WHERE} is no URL", details, code=Exit.USAGE)
    try:
        parts = urlsplit(url)
        port = PORTS.get(parts.scheme, 0) if parts.port is None else parts.port
    except ValueError:
        raise HimapError(f"{WHERE} is no URL", code=Exit.USAGE) from None
    if parts.scheme not in PORTS:
        raise HimapError(f"{WHERE} is neither a data URI nor an http(s) URL", code=Exit.USAGE)
    host = parts.hostname or ""
    name = f"[{host}]" if ":" in host else host
    own_port, allowed = port == PORTS[parts.scheme], {allowed.lower() for allowed in hosts}
    if "@" in parts.netloc or not (f"{name}:{port}" in allowed or (own_port and name in allowed)):
        raise _refused()
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _Target(parts.scheme, host, port, authority=name if own_port else f"{name}:{port}", path=path)


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError:
        raise HimapError(f"{WHERE} redirects to no URL", code=Exit.USAGE) from None


async def _get(target: _Target, max_bytes: int) -> bytes | str:
    """The body at a target, or where it redirects to."""
    writer = None
    try:
        addresses = await resolve(target.host, target.port)
        if not addresses or not all(map(is_public, addresses)):
            raise _refused()
        reader, writer = await _connect(addresses, target)
        return await _exchange(reader, writer, target, max_bytes)
    except (OSError, UnicodeError, h11.RemoteProtocolError) as problem:
        told = "its certificate is not trusted" if isinstance(problem, ssl.SSLCertVerificationError) else ""
        raise HimapError(f"{WHERE} cannot be fetched", told, code=Exit.USAGE) from None
    finally:
        if writer is not None:
            writer.transport.abort()  # a peer that does not say goodbye must not hold us


async def _connect(addresses: list[Address], target: _Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the first of the addresses that takes one; OSError of the last if none does."""
    secure = target.scheme == "https"
    context, name = (trust(), target.host) if secure else (None, None)
    problem = OSError()
    for address in addresses:
        try:
            return await asyncio.open_connection(
                str(address), target.port, flags=socket.AI_NUMERICHOST, ssl=context, server_hostname=name
            )
        except OSError as refused:
            problem = refused
    raise problem


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: _Target, max_bytes: int
) -> bytes | str:
    """One request and its answer; the body's bytes are counted as they come, whatever its length was said to be."""
    peer = h11.Connection(h11.CLIENT)
    headers = {
        "Host": target.authority, "User-Agent": "himap-serve", "Accept": "image/*", "Accept-Encoding": "identity",
        "Connection": "close",
    }  # fmt: skip
    request = h11.Request(method="GET", target=target.path, headers=list(headers.items()))
    writer.write((peer.send(request) or b"") + (peer.send(h11.EndOfMessage()) or b""))
    body = bytearray()
    while True:
        event = peer.next_event()
        if event is h11.NEED_DATA:
            peer.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Response):
            if location := _checked(event, max_bytes):
                return location
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > max_bytes:
                raise too_large(max_bytes)
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)


def _checked(response: h11.Response, max_bytes: int) -> str:
    """Where a response redirects to, or "" if it brings the picture. HimapError (usage) if it does neither."""
    headers = {name: value.decode("latin-1") for name, value in response.headers}
    if response.status_code in REDIRECTS and (location := headers.get(b"location")):
        return location
    if response.status_code != 200:
        status = f"its host answered with status {response.status_code}"
        raise HimapError(f"{WHERE} cannot be fetched", status, code=Exit.USAGE)
    if headers.get(b"content-encoding", "identity").lower() != "identity":
        raise HimapError(f"{WHERE} cannot be fetched", "its host sends it compressed, unasked", code=Exit.USAGE)
    if int(headers.get(b"content-length", "0")) > max_bytes:
        raise too_large(max_bytes)
    return ""


def _refused() -> HimapError:
    hint = "send the picture as a data URI"
    return HimapError(f"{WHERE} is refused", "it is not on an allowed public host", hint, Exit.USAGE)


def too_large(max_bytes: int) -> HimapError:
    """Returns what is raised for a picture of more bytes than are read."""
    return HimapError(f"{WHERE} is too large", f"at most {max_bytes} bytes are read", code=Exit.USAGE)
