"""Short films made for tests: each frame one grey that says its number, its upper left quarter red."""

import io
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

import av
import numpy as np
from PIL import Image


def filmed(
    frames: int = 20, form: str = "mp4", codec: str = "libx264", *, rate: int = 10, size: tuple[int, int] = (48, 64),
    **options: str,
) -> bytes:  # fmt: skip
    """A film of so many frames of `size` (height, width), `rate` a second; frame i is of the grey `grey(i)`."""
    height, width = size
    pictures = np.full((frames, height, width, 3), grey(np.arange(frames))[:, None, None, None], np.uint8)
    pictures[:, : height // 2, : width // 2] = (255, 0, 0)
    return film_of(pictures, form, codec, rate=rate, **options)


def film_of(
    pictures: Sequence[np.ndarray] | np.ndarray, form: str = "mp4", codec: str = "libx264", *, rate: int = 10,
    times: Sequence[int] | None = None, **options: str,
) -> bytes:  # fmt: skip
    """A film of pictures [n,height,width,3] of bytes; `times`: at which tick, of `rate` a second, each is shown."""
    with NamedTemporaryFile() as file, av.open(file.name, "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": "0"} if codec == "libx264" else {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i if times is None else times[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        container.close()
        return Path(file.name).read_bytes()


def grey(number: np.ndarray) -> np.ndarray:
    """The grey of frame `number`, of at most 50."""
    return 5 * number


def number(picture: Image.Image) -> int:
    """Which frame of `filmed` the picture is, by its lower right corner."""
    return round(picture.getpixel((picture.width - 3, picture.height - 3))[1] / 5)


def sound() -> bytes:
    """An mp4 of a second of silence, without pictures."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()
