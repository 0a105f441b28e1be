"""Pictures as clients name them, data URIs and http(s) URLs of allowed hosts, within limits of size and time."""

import asyncio
import binascii
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from himap_export.engines.documents import MEGABYTE
from himap_export.engines.image import decode_image
from himap_export.graphs.errors import Exit, HimapError
from himap_export.serve.errors import as_api_error
from himap_export.serve.fetch import WHERE, fetch, too_large

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # of the last the first frame; rarer decoders stay closed to strangers
DATA_URI = re.compile(r"data:image/(?:png|jpe?g|webp|gif);base64,", re.IGNORECASE)
HOST = re.compile(r"(?:\[[0-9a-f:.]+\]|[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?)(?::[1-9][0-9]{0,4})?")
# A picture of 2^25 pixels takes up to a quarter of a gigabyte while it is decoded.
DECODERS = ThreadPoolExecutor(4, "himap-picture")
SIDE_BY_SIDE = 4  # pictures of one request that are fetched and decoded at a time


@dataclass(frozen=True)
class PictureLimits:
    """Of one picture: bytes of its file, pixels, and `seconds` to fetch it; all of one request have `together` times
    the bytes and pixels. `hosts` may be named in URLs, each a "host" (at the scheme's own port) or "host:port".
    HimapError (usage) for hosts that are neither."""

    max_bytes: int = 20 * MEGABYTE
    max_pixels: int = 2**25
    seconds: float = 10.0
    together: int = 2
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for host in self.hosts:
            if not HOST.fullmatch(host.lower()):
                found = f"{ascii(host)[:200]} is neither a host nor host:port"
                raise HimapError("unusable image host", found, "example.com or example.com:8443", Exit.USAGE)


async def pictures(urls: Mapping[str, str], limits: PictureLimits) -> list[Image.Image]:
    """Returns the pictures of one request in their order, SIDE_BY_SIDE of them read at a time; `urls` are given by the
    names of their fields. ApiError (400), which names the field, for the first that fails as `picture` does, or with
    which they are past `limits` together; the others are then given up."""
    left = Left(limits.together * limits.max_bytes, limits.together * limits.max_pixels)
    places = asyncio.Semaphore(SIDE_BY_SIDE)

    async def read(field: str, url: str) -> Image.Image:
        async with places:
            try:
                return await picture(url, limits, left)
            except HimapError as problem:
                raise as_api_error(problem, field, "invalid_image") from None

    try:
        async with asyncio.TaskGroup() as group:
            reading = [group.create_task(read(field, url)) for field, url in urls.items()]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in reading]


@dataclass
class Left:
    """The bytes and pixels that further pictures of a request may have. For one event loop."""

    bytes: int
    pixels: int

    def spend(self, size: int, pixels: int) -> None:
        """Takes a picture's off; HimapError (usage) if there are not so many."""
        self.bytes, self.pixels = self.bytes - size, self.pixels - pixels
        if min(self.bytes, self.pixels) < 0:
            what = "bytes" if self.bytes < 0 else "pixels"
            hint = "send fewer, or smaller ones"
            raise HimapError(f"the pictures of the request have too many {what} together", hint=hint, code=Exit.USAGE)


async def picture(url: str, limits: PictureLimits, left: Left | None = None) -> Image.Image:
    """Returns the picture of a data URI or an allowed http(s) URL, upright and RGB; decodes in a thread of its own.

    HimapError (usage) for anything else, for a picture past `limits`, past what is `left` or damaged, and if it cannot
    be fetched. Messages hold nothing of a data URI, and nothing of what lies on an address that is not public.
    """
    content: str | bytes = url
    if url[:5].lower() != "data:":
        content = await fetch(url, limits.hosts, max_bytes=limits.max_bytes, seconds=limits.seconds)
    size = len(content) if isinstance(content, bytes) else len(content) * 3 // 4
    if left is not None:
        left.spend(size, 0)
    image = await asyncio.get_running_loop().run_in_executor(DECODERS, _decode, content, limits)
    if left is not None:
        left.spend(0, image.width * image.height)
    return image


def _decode(content: str | bytes, limits: PictureLimits) -> Image.Image:
    """The picture of a file's bytes, or of a data URI."""
    if isinstance(content, str):
        content = _inline(content, limits.max_bytes)
    return decode_image(content, WHERE, FORMATS, limits.max_pixels)


def _inline(uri: str, max_bytes: int) -> bytes:
    header = DATA_URI.match(uri)
    if header is None:
        expected = "a data URI starts with data:image/png;base64, (or jpeg, webp, gif)"
        raise HimapError(f"{WHERE} is no picture as base64", expected, code=Exit.USAGE)
    if len(uri) - header.end() > (max_bytes + 2) // 3 * 4:
        raise too_large(max_bytes)
    try:
        content = binascii.a2b_base64(uri[header.end() :], strict_mode=True)
    except ValueError:  # binascii.Error is one; its words tell what was found
        raise HimapError(f"the base64 of {WHERE} is damaged", code=Exit.USAGE) from None
    if len(content) > max_bytes:
        raise too_large(max_bytes)
    return content
