"""Films become frames: chosen and read as by Hugging Face's own code, and every bad file is one clear line."""

import io
import itertools
import struct
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from films import film_of, filmed, number, sound
from PIL import Image
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, read_video_pyav

from himap_export.engines import film as films
from himap_export.engines.film import MAX_PIXELS, Film, Sampling, decode_film, frame_indices, read_film
from himap_export.graphs.errors import Exit, HimapError

EIGHT = Film(8, 4, "arange", 2.0)
COUNTS, TOTALS = (1, 2, 3, 4, 7, 8, 16, 30, 32, 64), (*range(1, 130), 240, 299, 300, 1799, 1800, 9000, 100_000)


def film_by(sampling: Sampling, frames: int, fps: float = 1.0) -> Film:
    return Film(frames, frames, sampling, fps)


def test_steps_as_hugging_faces_default_and_qwen2_vl(monkeypatch: pytest.MonkeyPatch) -> None:
    qwen = qwen2_vl_processor(monkeypatch)
    for total, frames in itertools.product(TOTALS, COUNTS):
        if frames <= total:
            about = VideoMetadata(total, fps=30.0, duration=total / 30)
            found = frame_indices(film_by("arange", frames), total, 30.0)
            assert list(found) == default_sample_indices_fn(about, num_frames=frames).tolist()
            if frames % 2 == 0:
                asked = SimpleNamespace(temporal_patch_size=2, min_frames=4, max_frames=768, fps=None)
                # Its floats may give one more, which is the film's end.
                assert list(found) == qwen.sample_frames(asked, about, num_frames=frames).tolist()[:frames]


def qwen2_vl_processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class, whose module asks for torchvision, of which `sample_frames` uses nothing."""
    for parts in itertools.accumulate(("torchvision", "transforms", "v2", "functional"), lambda a, b: f"{a}.{b}"):
        monkeypatch.setitem(sys.modules, parts, ModuleType(parts))
    name = "transformers.models.qwen2_vl.video_processing_qwen2_vl"
    monkeypatch.delitem(sys.modules, name, raising=False)
    found = import_module(name)
    del sys.modules[name]
    return found.Qwen2VLVideoProcessor


def test_rounded_as_qwen3_vl() -> None:
    for total, frames in itertools.product(TOTALS, COUNTS):
        if frames <= total:
            wanted = Qwen3VLVideoProcessor.sample_frames(
                SimpleNamespace(fps=None), VideoMetadata(total), num_frames=frames
            )
            assert list(frame_indices(film_by("rounded", frames), total, 30.0)) == wanted.tolist()


@pytest.mark.parametrize("fps", [0.4, 1.0, 5.0, 23.976, 25.0, 59.94])
def test_linspace_as_smolvlm(fps: float) -> None:
    """Where its own rate gives fewer frames, at the rate that gives as many."""
    trimmed = 0
    for total, frames in itertools.product(TOTALS, COUNTS):
        about = VideoMetadata(total, fps=fps, duration=total / fps)
        rate = max(1.0, frames / about.duration)
        wanted = SmolVLMVideoProcessor.sample_frames(SimpleNamespace(), about, num_frames=frames, fps=rate).tolist()
        trimmed += wanted[0] > 0
        if len(wanted) == frames:
            assert list(frame_indices(film_by("linspace", frames), total, fps)) == wanted
        else:
            with pytest.raises(HimapError, match="too short"):
                frame_indices(film_by("linspace", frames), total, fps)
    assert trimmed > 30 or fps == 0.4


@pytest.mark.parametrize("sampling", ["arange", "rounded", "linspace"])
def test_too_few_frames_are_told(sampling: Sampling) -> None:
    with pytest.raises(HimapError, match=r"7 frames .* 8 are asked for") as caught:
        frame_indices(film_by(sampling, 8), 7, 30.0)
    assert caught.value.code == Exit.USAGE


FORMS = [("mp4", "libx264"), ("mp4", "mpeg4"), ("avi", "mpeg4"), ("matroska", "libx264"), ("mpegts", "mpeg2video")]


@pytest.mark.parametrize(("form", "codec"), FORMS)
def test_frames_are_those_that_transformers_reads(tmp_path: Path, form: str, codec: str) -> None:
    """Its PyAV reader, where the header says how many frames there are; sides of odd length."""
    file = tmp_path / "film"
    file.write_bytes(filmed(23, form, codec, size=(50, 66)))
    found = read_film(file, EIGHT)
    wanted = [0, 2, 5, 8, 11, 14, 17, 20]
    assert [number(picture) for picture in found.pictures] == wanted
    assert (found.total, found.fps, found.duration) == (23, 10.0, 2.3)
    assert found.seconds == tuple(index / 10 for index in wanted)
    assert found.step_seconds(4) == tuple((wanted[i] / 10 + wanted[i + 1] / 10) / 2 for i in (0, 2, 4, 6))
    if form in ("mp4", "avi"):
        theirs, about = read_video_pyav(str(file), lambda metadata: np.array(wanted))
        np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in found.pictures]), theirs)
        assert (about.total_num_frames, about.fps, about.duration) == (23, 10.0, 2.3)
        assert about.timestamps == list(found.seconds)


def test_a_gif_is_a_film(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (40, 30), (5 * i, 5 * i, 5 * i)) for i in range(12)]
    pictures[0].save(tmp_path / "film.gif", save_all=True, append_images=pictures[1:], duration=100)
    found = read_film(tmp_path / "film.gif", Film(4, 4, "rounded", 2.0))
    assert [number(picture) for picture in found.pictures] == [0, 4, 7, 11] and found.total == 12


def test_frames_at_uneven_times_are_counted_not_timed() -> None:
    """As Hugging Face does it: by the frame's number and the stream's average rate."""
    pictures = [np.full((48, 64, 3), 5 * i, np.uint8) for i in range(20)]
    data = film_of(pictures, times=[*range(10), *range(20, 120, 10)])
    found = decode_film(io.BytesIO(data), EIGHT, "film")
    assert [number(picture) for picture in found.pictures] == [0, 2, 5, 7, 10, 12, 15, 17]
    assert found.total == 20 and found.fps < 2.5
    assert found.seconds[4] == pytest.approx(10 / found.fps)


def turned(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """The mp4 with another display matrix in its track's header."""
    start = data.index(b"tkhd") + 44
    matrix = (a * 65536, b * 65536, 0, c * 65536, d * 65536, 0, 0, 0, 1 << 30)
    return data[:start] + struct.pack(">9i", *matrix) + data[start + 36 :]


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [
        ((1, 0, 0, 1), "upper left"),
        ((0, 1, -1, 0), "upper right"),  # a quarter clockwise, as a telephone held upright says
        ((-1, 0, 0, -1), "lower right"),
        ((0, -1, 1, 0), "lower left"),
        ((-1, 0, 0, 1), "upper right"),
        ((1, 0, 0, -1), "lower left"),
        ((0, 1, 1, 0), "upper left"),
        ((0, -1, -1, 0), "lower right"),
    ],
)
def test_frames_stand_upright(matrix: tuple[int, int, int, int], corner: str) -> None:
    found = decode_film(io.BytesIO(turned(filmed(2), *matrix)), Film(1, 1, "arange", 2.0), "film")
    (picture,) = found.pictures
    assert picture.size == ((64, 48) if matrix[0] else (48, 64))
    x, y = 3 if "left" in corner else picture.width - 4, 3 if "upper" in corner else picture.height - 4
    red = picture.getpixel((x, y))
    assert isinstance(red, tuple) and red[0] > 200 and max(red[1:]) < 40
    assert sum(np.asarray(picture)[:, :, 0].ravel() > 128) <= 48 * 64 / 4 + 120


def test_a_film_turned_askew_is_refused() -> None:
    with pytest.raises(HimapError, match="askew"):
        decode_film(io.BytesIO(turned(filmed(2), 1, 1, -1, 1)), Film(1, 1, "arange", 2.0), "film")


def refused(data: bytes, film: Film = EIGHT, seconds: float = 60.0) -> HimapError:
    with pytest.raises(HimapError) as caught:
        decode_film(io.BytesIO(data), film, "clip", seconds)
    told = str(caught.value)
    assert caught.value.code == Exit.USAGE and "clip" in told and "Errno" not in told
    assert len(told) < 300 and told.count("\n") <= 1
    return caught.value


def picture_file() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48)).save(file, "PNG")
    return file.getvalue()


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9.0,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "not a film"),
        (b"hello" * 300, "not a film"),
        (bytes(5000), "not a film"),
        (picture_file(), "not a film"),
        (PLAYLIST, "not a film"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a film"),
        (filmed(12)[:-300], "not a film"),  # the index is at its end
    ],
)
def test_what_is_no_film(data: bytes, told: str) -> None:
    assert told in str(refused(data))


def test_a_film_without_pictures() -> None:
    assert "no video stream" in str(refused(sound()))


def test_a_film_that_is_too_short() -> None:
    assert "5 frames to choose from, and 8 are asked for" in str(refused(filmed(5)))
    assert "5 frames to choose from, and 8 are asked for" in str(refused(filmed(5, "matroska")))


def test_a_film_whose_end_is_missing() -> None:
    """Its index comes first, so that it opens."""
    data = filmed(40, movflags="faststart", size=(96, 128))
    assert [number(p) for p in decode_film(io.BytesIO(data), EIGHT, "").pictures] == list(range(0, 40, 5))
    assert "cut off" in str(refused(data[: data.index(b"mdat") + 1500]))


@pytest.mark.parametrize(("count", "told"), [(2**31 - 1, "2147483647 frames, at most"), (9000, "cut off"), (4, "4 fr")])
def test_a_header_with_a_wrong_count(count: int, told: str) -> None:
    """It is believed, as by Hugging Face's reader, until a frame is missing."""
    data = filmed(20, "avi", "mpeg4")
    start = data.index(b"strh") + 40
    assert struct.unpack("<I", data[start : start + 4]) == (20,)
    assert told in str(refused(data[:start] + struct.pack("<I", count) + data[start + 4 :]))


def test_a_film_that_takes_too_long() -> None:
    assert "too long" in str(refused(filmed(20), seconds=0.0))


def test_pictures_that_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(films, "MAX_HELD", 8 * 48 * 64 - 1)
    told = str(refused(filmed(20)))
    assert "8 frames of 3072 pixels, at most 3071 each" in told
    monkeypatch.setattr(films, "MAX_PIXELS", 3000)
    assert "1 frames of 3072 pixels, at most 3000 each" in str(refused(filmed(20)))
    assert MAX_PIXELS > 7680 * 4320


def test_more_frames_than_any_film_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(films, "MAX_TOTAL", 15)
    assert "20 frames, at most 15" in str(refused(filmed(20)))
    assert "15 frames were decoded, and it goes on" in str(refused(filmed(20, "matroska")))


def test_no_such_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.mp4", tmp_path):
        with pytest.raises(HimapError, match="cannot read film"):
            read_film(path, EIGHT)


def test_pyav_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(HimapError, match="video") as caught:
        decode_film(io.BytesIO(b"any"), EIGHT, "film")
    assert caught.value.code == Exit.MISSING


@pytest.mark.parametrize("form", ["mp4", "matroska", "avi", "mpegts"])
def test_damaged_films_are_read_or_refused_in_a_line(form: str) -> None:
    """Cut off at many places, and with bytes changed at many places: frames, or one line."""
    options = {"movflags": "faststart"} if form == "mp4" else {}
    data = filmed(20, form, "mpeg4" if form != "mpegts" else "mpeg2video", **options)
    random, told = np.random.default_rng(0), set()
    for case in range(60):
        broken = bytearray(data)
        if case % 2:
            for place in random.integers(0, len(data), 1 + case // 4):
                broken[place] = random.integers(256)
        else:
            broken = broken[: random.integers(len(data))]
        try:
            found = decode_film(io.BytesIO(bytes(broken)), EIGHT, "clip", 20.0)
        except HimapError as problem:
            assert problem.code == Exit.USAGE
            told.add(str(problem).split(":")[0])
        else:
            assert len(found.pictures) == 8 and all(picture.mode == "RGB" for picture in found.pictures)
    assert told


def test_film_is_a_bounded_type() -> None:
    for wrong in ({"frames": 0}, {"frames": 10**6}, {"steps": 0}, {"sampling": "all"}, {"fps": 0.0}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({**msgspec.to_builtins(EIGHT), **wrong}, Film, strict=True)
