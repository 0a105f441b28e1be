"""Pictures from strangers: what a data URI may be, how large, and which hosts may be named."""

import asyncio
import base64
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from sites import PIXELS, PNG, fetched, file, refused

from himap_export.graphs.errors import Exit, HimapError
from himap_export.serve.errors import ApiError
from himap_export.serve.pictures import SIDE_BY_SIDE, PictureLimits, pictures


def uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize(("kind", "how"), [("PNG", {}), ("WEBP", {"lossless": True})])
@pytest.mark.parametrize("declared", ["image/png", "image/webp", "IMAGE/JPG", "image/jpeg", "image/gif"])
def test_data_uri_is_what_it_decodes_to(declared: str, kind: str, how: dict[str, bool]) -> None:
    image = fetched(uri(file(kind, **how), declared), PictureLimits())
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


def test_first_frame_and_upright() -> None:
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    moving = fetched(uri(file("GIF", frames[0], save_all=True, append_images=frames[1:]), "image/gif"), PictureLimits())
    assert moving.size == (4, 3) and moving.getpixel((0, 0)) == (255, 0, 0)
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    assert fetched(uri(file(exif=turned)), PictureLimits()).size == (6, 8)


LONG = base64.b64encode(PNG).decode()
DAMAGED, NO_PICTURE = "the base64 of image_url is damaged", "image_url is no picture as base64"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("data:image/png;base64,", "not an image that is PNG, JPEG, WEBP, GIF: image_url"),
        ("data:image/png;base64,aGVsbG8=", "not an image that is PNG"),
        (f"data:image/png;base64,{LONG[:-1]}", DAMAGED),
        (f"data:image/png;base64,{LONG[:40]}\n{LONG[40:]}", DAMAGED),
        (f"data:image/png;base64, {LONG}", DAMAGED),
        (f"data:image/png;base64,{LONG}=", DAMAGED),
        (f"data:image/png;base64,{LONG}AAAA", DAMAGED),
        (f"data:image/png;base64,{LONG.replace('+', '-').replace('/', '_')}-_", DAMAGED),
        ("data:image/png;base64,\u00e9\U0001f600", DAMAGED),
        ("data:image/png;base64,%89PNG", DAMAGED),
        (f"data:image/png,{LONG}", NO_PICTURE),
        (f"data:image/svg+xml;base64,{LONG}", NO_PICTURE),
        (f"data:text/html;base64,{LONG}", NO_PICTURE),
        (f"data:image/png;charset=utf-8;base64,{LONG}", NO_PICTURE),
        ("data:", NO_PICTURE),
        (uri(PNG[:90]), "image is damaged: image_url"),
        (uri(file("TIFF")), "not an image that is PNG"),
        (uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not an image that is PNG"),  # runs ghostscript
    ],
)
def test_bad_data_uris(url: str, message: str) -> None:
    assert refused(url, PictureLimits()).startswith(message)


def test_limits_of_bytes_and_pixels() -> None:
    assert fetched(uri(PNG), PictureLimits(max_bytes=len(PNG), max_pixels=48)).size == (8, 6)
    told = refused(uri(PNG), PictureLimits(max_bytes=len(PNG) - 1))
    assert told == f"image_url is too large: at most {len(PNG) - 1} bytes are read"
    assert "too large" in refused(uri(bytes(10**6)), PictureLimits(max_bytes=1000))
    told = refused(uri(PNG), PictureLimits(max_pixels=47))
    assert told == "image has too many pixels: image_url (8 x 6 pixels, at most 47)"
    for bomb in bombs():  # kilobytes that become 50 million pixels
        assert len(bomb) < 10_000
        assert "image has too many pixels: image_url (10000 x 5000 pixels" in refused(uri(bomb), PictureLimits())


def read(urls: list[str], limits: PictureLimits) -> list[Image.Image]:
    """The pictures of a request whose fields are called 0, 1, .."""
    return asyncio.run(pictures({str(n): url for n, url in enumerate(urls)}, limits))


def test_pictures_of_a_request_come_in_their_order() -> None:
    found = read([uri(file("PNG", Image.new("RGB", (n + 1, 9 - n)))) for n in range(9)], PictureLimits(together=9))
    assert [image.size for image in found] == [(n + 1, 9 - n) for n in range(9)]


def test_pictures_of_a_request_have_limits_together() -> None:
    size = len(uri(PNG)) * 3 // 4
    for limits, what in ((PictureLimits(max_pixels=48), "pixels"), (PictureLimits(max_bytes=size), "bytes")):
        assert len(read([uri(PNG)] * 2, limits)) == 2
        with pytest.raises(ApiError, match=f"the pictures of the request have too many {what} together") as refused:
            read([uri(PNG)] * 3, limits)
        assert (refused.value.status, refused.value.code) == (400, "invalid_image")


def test_a_bad_picture_of_a_request_is_named_and_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = list[str]()

    async def stuck(url: str, *_: object, **__: object) -> bytes:
        begun.append(url)
        await asyncio.sleep(60)
        return b""

    monkeypatch.setattr("himap_export.serve.pictures.fetch", stuck)
    with pytest.raises(ApiError, match=NO_PICTURE) as refused:
        read(["https://a.test/1", "data:", *[f"https://a.test/{n}" for n in range(2, 9)]], PictureLimits())
    assert refused.value.param == "1" and len(begun) <= SIDE_BY_SIDE


def bombs() -> Iterator[bytes]:
    """Files of 10000 x 5000 pixels: one whole, two whose headers claim them around a frame of 8 x 6."""
    yield file("PNG", Image.new("1", (10000, 5000)))
    frame = Image.fromarray(PIXELS)
    webp, gif = bytearray(file("WEBP", frame, save_all=True, append_images=[frame.rotate(180)])), bytearray(file("GIF"))
    place = webp.index(b"VP8X") + 12
    webp[place : place + 6] = (9999).to_bytes(3, "little") + (4999).to_bytes(3, "little")
    gif[6:10] = (10000).to_bytes(2, "little") + (5000).to_bytes(2, "little")
    yield from (bytes(webp), bytes(gif))


@pytest.mark.parametrize(
    "host", ["https://a.test", "*.a.test", "a.test/", "a.test:0", "a b", "", "a\n", "::1", "é.test"]
)
def test_hosts_that_cannot_be_allowed(host: str) -> None:
    with pytest.raises(HimapError, match="is neither a host nor host:port") as caught:
        PictureLimits(hosts=(host,))
    assert caught.value.code == Exit.USAGE and "\n" not in str(caught.value)
