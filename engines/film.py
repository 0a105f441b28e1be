"""A film as frames: which of them a bundle sees, and how they are read from a file with PyAV (extra `video`).

Frames are chosen by the rules of Hugging Face's video processors (transformers 5.23), and counted and timed as its PyAV
reader does: by the stream's own count and average rate, whatever the rate at each frame. Two things differ from there:
where a header does not say how many frames there are, they are counted; and a film that was filmed on its side is
turned upright.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import numpy as np
from msgspec import Meta, Struct
from PIL import Image

from himap_export.engines.documents import open_file
from himap_export.engines.extras import required
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import MOST_FRAMES

Sampling = Literal["arange", "linspace", "rounded"]
MAX_TOTAL = 2_000_000  # frames of a film: 9 hours at 60 a second
MAX_PIXELS = 2**26  # of a frame: 8K has half of them
MAX_HELD = 2**30  # pixels of all sampled frames: 3 GB
MAX_SECONDS = 600.0  # of decoding
# Containers that hold their own pictures; playlists, which name files and addresses, are none of them.
CONTAINERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "ogg", "asf", "gif")
# (a, b, c, d) of a display matrix, by their signs, which takes pixel (x, y) to (a*x + c*y, b*x + d*y).
TURNS = {
    (1, 0, 0, 1): None,
    (0, 0, 0, 0): None,  # nothing is said
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # which Pillow counts anticlockwise
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


class Film(Struct, frozen=True):
    """How a film becomes `frames` pictures, all of it static.

    `steps`: steps of time that have tokens of their own; `frames / steps` frames become one. `sampling` names the rule
    by which frames are chosen (`frame_indices`). `fps`: how many frames a second the model's own processor samples.
    `rope_per_second`: by how much M-RoPE's time grows in a second; 0 if each step is a picture of its own to it.
    """

    frames: Annotated[int, Meta(ge=1, le=MOST_FRAMES)]
    steps: Annotated[int, Meta(ge=1, le=MOST_FRAMES)]
    sampling: Sampling
    fps: Annotated[float, Meta(gt=0, le=1000)]
    rope_per_second: Annotated[float, Meta(ge=0, le=1000)] = 0.0


@dataclass(frozen=True)
class Frames:
    """Frames of a film: `pictures`, RGB and upright, and at which of its `seconds` each was.

    The film lasts `duration` seconds and has `total` frames, `fps` a second.
    """

    pictures: tuple[Image.Image, ...]
    seconds: tuple[float, ...]
    duration: float
    fps: float
    total: int

    def step_seconds(self, steps: int) -> tuple[float, ...]:
        """Returns the time of each of `steps` steps, in seconds: the mean of its frames' times."""
        each = len(self.seconds) // steps
        return tuple(sum(self.seconds[i * each : (i + 1) * each]) / each for i in range(steps))


def read_film(path: Path, film: Film) -> Frames:
    """Returns the frames that `film` asks for of the film in `path`.

    HimapError (usage) as `decode_film`, or if there is no such file; (missing) if PyAV is not installed.
    """
    with open_file(path, "film") as file:
        return decode_film(file, film, str(path))


def decode_film(file: BinaryIO, film: Film, where: str, most_seconds: float = MAX_SECONDS) -> Frames:
    """Returns the frames that `film` asks for of the film in `file`, found at `where`; no others are held.

    Every frame up to the last one asked for is decoded, in `most_seconds` seconds. HimapError (usage) if it takes
    longer, is no film, is damaged or cut off, or has too few or too many frames or pixels; (missing) without PyAV.
    """
    av, until = required("av"), time.monotonic() + most_seconds
    try:
        with _opened(av, file, where) as video:
            total, fps = video.frames, float(video.average_rate or 0)
            if total == 0:
                total = sum(1 for _ in _decoded(video, where, until))
        _require_usual(where, total, fps)
        indices = frame_indices(film, total, fps, where)
        with _opened(av, file, where) as video:
            _require_room(where, video.width * video.height, len(indices))
            pictures = tuple(_chosen(video, indices, where, until))
    except HimapError:
        raise
    except Exception as problem:  # PyAV raises OSError, ValueError, EOFError, .. by FFmpeg's error, and its own
        raise HimapError("film is damaged", where, _reason(problem), code=Exit.USAGE) from None
    if len(pictures) < len(indices):
        found = f"frame {indices[len(pictures)]} of {total} cannot be decoded"
        raise HimapError("film is cut off", f"{where}: {found}", code=Exit.USAGE)
    seconds = tuple(index / fps for index in indices)
    return Frames(pictures, seconds, duration=total / fps, fps=fps, total=total)


def frame_indices(film: Film, total: int, fps: float, where: str = "the film") -> tuple[int, ...]:
    """Returns which of `total` frames, `fps` a second, `film` asks for, as Hugging Face's `sample_frames` says.

    "arange": at even steps from the first on (`default_sample_indices_fn`, Qwen2VLVideoProcessor); "rounded": from the
    first to the last, rounded (Qwen3VLVideoProcessor); "linspace": the same rounded down, without the first and last
    second of a long film (SmolVLMVideoProcessor, at least `film.fps` of them a second). HimapError (usage) if the film
    has too few.
    """
    count, first, last = film.frames, 0, total - 1
    if film.sampling == "linspace" and total / fps - 2 > count * max(film.fps, count * fps / total):
        trimmed = int(fps), min(int(total - fps), total - 1)
        first, last = trimmed if trimmed[0] < trimmed[1] else (first, last)
    if film.sampling == "arange":
        found = [i * total // count for i in range(count)]
    else:
        even = np.linspace(first, last, count)
        found = [int(i) for i in (even.round() if film.sampling == "rounded" else even)]
    if len(set(found)) < count:
        details = f"{where} has {last - first + 1} frames to choose from, and {count} are asked for"
        raise HimapError("film is too short", details, code=Exit.USAGE)
    return tuple(found)


@contextmanager
def _opened(av: Any, file: BinaryIO, where: str) -> Iterator[Any]:
    """Yields the first video stream of `file`, from its beginning."""
    file.seek(0)
    try:
        container = av.open(file, options={"format_whitelist": ",".join(CONTAINERS)}, metadata_errors="replace")
    except Exception as problem:
        details = f"a whole {', '.join(CONTAINERS)} file is needed"
        raise HimapError(
            f"not a film that can be read: {where}", f"{_reason(problem)}; {details}", code=Exit.USAGE
        ) from None
    with container:
        if not container.streams.video:
            raise HimapError("film has no pictures", f"{where} has no video stream", code=Exit.USAGE)
        video = container.streams.video[0]
        _require_room(where, video.width * video.height, 1)
        video.thread_type = "AUTO"
        video.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # of frames whose sizes the header does not say
        yield video


def _decoded(video: Any, where: str, until: float) -> Iterator[Any]:
    """Yields the frames of `video` one by one, until the clock says `until`."""
    for n, frame in enumerate(video.container.decode(video)):
        if time.monotonic() > until or n >= MAX_TOTAL:
            raise HimapError("film is too long", f"{where}: {n} frames were decoded, and it goes on", code=Exit.USAGE)
        yield frame


def _chosen(video: Any, indices: tuple[int, ...], where: str, until: float) -> Iterator[Image.Image]:
    """Yields the frames of `video` at `indices`, which rise, as far as there are any."""
    wanted = iter(indices)
    index = next(wanted)
    for n, frame in enumerate(_decoded(video, where, until)):
        if n == index:
            _require_room(where, frame.width * frame.height, len(indices))
            yield _upright(frame, where)
            index = next(wanted, -1)
            if index < 0:
                return


def _upright(frame: Any, where: str) -> Image.Image:
    """Returns the frame in RGB, turned as its display matrix says."""
    found, picture = frame.side_data.get("DISPLAYMATRIX"), frame.to_image()
    if found is None:
        return picture  # type: ignore[no-any-return]
    matrix = np.frombuffer(bytes(found), np.int32)  # 3 x 3, row by row
    signs = tuple(int(np.sign(matrix[i])) for i in (0, 1, 3, 4))
    if signs not in TURNS:
        raise HimapError("film is turned askew", f"{where} is not turned by quarters", code=Exit.USAGE)
    turn = TURNS[signs]
    return picture if turn is None else picture.transpose(turn)  # type: ignore[no-any-return]


def _require_usual(where: str, total: int, fps: float) -> None:
    """Raises HimapError (usage) for numbers that no film has."""
    if not (math.isfinite(fps) and 0 < fps <= 1e6):
        raise HimapError("film is damaged", f"{where} has {fps:g} frames a second", code=Exit.USAGE)
    if not 0 < total <= MAX_TOTAL:
        details = f"{where} has {total} frames, at most {MAX_TOTAL} are read" if total > 0 else f"{where} has no frames"
        raise HimapError("film is too long" if total > 0 else "film is empty", details, code=Exit.USAGE)


def _require_room(where: str, pixels: int, frames: int) -> None:
    """Raises HimapError (usage) if so many `frames` of so many `pixels` are too many."""
    if pixels > MAX_PIXELS or pixels * frames > MAX_HELD:
        most = min(MAX_PIXELS, MAX_HELD // frames)
        details = f"{where}: {frames} frames of {pixels} pixels, at most {most} each"
        raise HimapError("film has too many pixels", details, code=Exit.USAGE)


def _reason(problem: Exception) -> str:
    """Returns what went wrong, in a line: FFmpeg's words without its numbers."""
    words = getattr(problem, "strerror", None) or str(problem)
    return words.splitlines()[0] if words else type(problem).__name__
