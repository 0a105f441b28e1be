"""safetensors files: what their header may say, numbers that are none, and bf16."""

import json
import os
import signal
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from himap_export.engines import weight_file
from himap_export.engines.weight_file import (
    StoredTensor,
    as_numbers,
    as_stored,
    check_finite,
    find_tensor,
    map_tensors,
    read_header,
)
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import Rows

KINDS = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
CODES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}


def entry(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def written(file: Path, header: dict[str, Any] | bytes, data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def saved(file: Path, dtype: str, *tensors: Any) -> list[StoredTensor]:
    """Tensors "t0", "t1", .. of one type, one behind the other."""
    raw = [np.asarray(values).astype(KINDS[dtype]) for values in tensors]
    ends = np.cumsum([0, *(r.nbytes for r in raw)]).tolist()
    header = {f"t{n}": entry(CODES[dtype], r.shape, ends[n : n + 2]) for n, r in enumerate(raw)}
    return list(read_header(written(file, header, b"".join(r.tobytes() for r in raw))).values())


def library_reads(file: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """Types and shapes as the format's own library reads them; None if it refuses the file."""
    try:
        with safe_open(file, "numpy") as found:
            slices = {name: found.get_slice(name) for name in found.keys()}  # noqa: SIM118  # no mapping
            return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except SafetensorError:
        return None


@contextmanager
def bounded(seconds: int) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- headers ---

TWICE = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
GOOD: dict[str, tuple[Any, int]] = {
    "one": ({"a": entry()}, 16),
    "none": ({}, 0),
    "a scalar": ({"a": entry(shape=[], offsets=[0, 4])}, 4),
    "metadata": ({"__metadata__": {"format": "pt"}, "a": entry()}, 16),
    "no metadata": ({"__metadata__": None, "a": entry()}, 16),
    "another order": ({"b": entry(shape=[2], offsets=[8, 16]), "a": entry(shape=[2], offsets=[0, 8])}, 16),
    "nothing in front": ({"a": entry(), "b": entry(shape=[0, 7], offsets=[0, 0])}, 16),
    "nothing between": ({n: entry(shape=[k], offsets=o) for n, k, o in (("a", 2, [0, 8]), ("b", 0, [8, 8]))}, 8),
    "nothing behind": ({"a": entry(), "b": entry(shape=[0], offsets=[16, 16])}, 16),
    "nothing, but wide": ({"a": entry(shape=[0, 2**62], offsets=[0, 0])}, 0),
    "bytes": ({"a": entry("F8_E4M3", [16])}, 16),
    "half bytes": ({"a": entry("F4", [32])}, 16),
    "unsigned": ({"a": entry("U16", [8])}, 16),
    "a field more": ({"a": entry(note=1)}, 16),
    "a long name": ({"n" * 300: entry()}, 16),
    "an odd name": ({"\n/../\u202e\0": entry()}, 16),
    "no name": ({"": entry()}, 16),
    "spaces": (b' {"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}} \n', 16),
}
BAD: dict[str, tuple[Any, int]] = {
    "overlap": ({"a": entry(), "b": entry()}, 16),
    "overlap in part": ({"a": entry(shape=[3], offsets=[0, 12]), "b": entry(shape=[2], offsets=[8, 16])}, 16),
    "nothing inside": ({"a": entry(), "b": entry(shape=[0], offsets=[4, 4])}, 16),
    "a hole": ({"a": entry(shape=[1], offsets=[0, 4]), "b": entry(shape=[2], offsets=[8, 16])}, 16),
    "a hole in front": ({"a": entry(shape=[3], offsets=[4, 16])}, 16),
    "more behind": ({"a": entry()}, 20),
    "data of nobody": ({}, 16),
    "too short": ({"a": entry()}, 15),
    "backwards": ({"a": entry(shape=[-4], offsets=[16, 0])}, 16),
    "before the data": ({"a": entry(offsets=[-16, 0])}, 0),
    "three offsets": ({"a": entry(offsets=[0, 8, 16])}, 16),
    "fractional offsets": ({"a": entry(offsets=[0.0, 16.0])}, 16),
    "offsets in words": ({"a": entry(offsets=["0", "16"])}, 16),
    "fractional shape": ({"a": entry(shape=[4.0])}, 16),
    "yes for a shape": ({"a": entry(shape=[True, 4])}, 16),
    "a negative shape": ({"a": entry(shape=[-2, -2])}, 16),
    "words for a shape": ({"a": entry(shape="4")}, 16),
    "a wide nothing": ({"a": entry(shape=[0, 2**64], offsets=[0, 0])}, 0),
    "a huge shape": ({"a": entry(shape=[2**62, 2**62])}, 16),
    "another type": ({"a": entry("F31")}, 16),
    "a type of ours": ({"a": entry("fp32")}, 16),
    "a list for a type": ({"a": entry(["F32"])}, 16),  # type: ignore[arg-type]
    "no type": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, 16),
    "no tensor": ({"a": None}, 16),
    "metadata of numbers": ({"__metadata__": {"step": 7}, "a": entry()}, 16),
    "a list": (b"[]", 0),
    "a number": (b"7", 0),
    "nan": (b'{"a":NaN}', 0),
    "deep": (b'{"a":' + b"[" * 100_000, 0),
    "not text": (b'{"\xff":1}', 0),
    "half a letter": (b'{"\\ud800":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', 16),
    "cut": (b'{"a":{"dtype":', 0),
    "a name twice": (TWICE, 16),
    "a field twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]}}', 16),
    "dimensions without end": ({"a": entry(shape=[9] * 10_000)}, 16),
}


@pytest.mark.parametrize("kind", GOOD)
def test_what_the_formats_library_reads(tmp_path: Path, kind: str) -> None:
    header, size = GOOD[kind]
    file = written(tmp_path / "w.safetensors", header, bytes(size))
    library = library_reads(file)
    assert library is not None
    assert {name: t.shape for name, t in read_header(file).items()} == {name: s for name, (_, s) in library.items()}


@pytest.mark.parametrize("kind", BAD)
def test_what_it_refuses_is_damaged(tmp_path: Path, kind: str) -> None:
    header, size = BAD[kind]
    file = written(tmp_path / "w.safetensors", header, bytes(size))
    if kind not in ("a name twice",):  # of two entries it would silently take the last
        assert library_reads(file) is None
    with pytest.raises(HimapError, match=r"is not a readable safetensors file: .*truncated or corrupt") as caught:
        read_header(file)
    assert caught.value.code == Exit.FAILURE and len(str(caught.value)) < 1000


@pytest.mark.parametrize("length", [0, 7, 8, 9, 1 << 63])
def test_a_header_that_never_ends(tmp_path: Path, length: int) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"\xff" * length if length < 8 else struct.pack("<Q", length - 8))
    with pytest.raises(HimapError, match="its header should end within 0 bytes"):
        read_header(file)


@pytest.mark.parametrize("kind", ["pipe", "folder", "itself", "device", "nothing"])
def test_what_is_no_file_is_one_line_and_never_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w.safetensors"
    make = {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "itself": lambda: path.symlink_to(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "nothing": lambda: None,
    }
    make[kind]()
    with bounded(20), pytest.raises(HimapError, match=r"cannot read safetensors file .*w\.safetensors") as caught:
        read_header(path)
    assert caught.value.code == Exit.FAILURE


TENSORS = {
    "model.embed.weight": entry("F16", [3, 4], [0, 24]),
    "model.bias": entry("F32", [2], [24, 32]),
    "none": entry("BF16", [0, 5], [32, 32]),
    "step": entry("I64", [1], [32, 40]),
}
HEADER = json.dumps({"__metadata__": {"format": "pt"}, **TENSORS}).encode()
ODD = (  # in the place of any value of the header
    None, True, -1, 0, 1, 2, 24, 40, 2**63, 2**64, 0.0, 4.0, -0.5, 1e400, "", "a", "4", "\ud800", [], [0], [2, 0],
    [0, 24], [24, 32], [8, 3], [-1, 40], [[2]], {}, {"a": 1}, TENSORS["none"], "F32", "F16", "BF16", "F8_E4M3", "F4",
)  # fmt: skip


@st.composite
def spoiled_bytes(draw: st.DrawFn) -> bytes:
    """The header's text with a few bytes put in, taken out, or changed."""
    text = bytearray(HEADER)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text) - 1))
        text[at : at + draw(st.integers(0, 2))] = draw(st.sampled_from([b"", b"0", b"1", b'"', b"[", b"}", b"-", b"e"]))
    return bytes(text).replace(b"-0", b"0")  # a whole number in Python's eyes, none in those of the library


@st.composite
def spoiled_values(draw: st.DrawFn) -> bytes:
    """The header with one value, at any depth, exchanged for another, or gone."""
    header = json.loads(HEADER)
    place: Any = header
    while True:
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
            continue
        if draw(st.integers(0, 4)):
            place[key] = draw(st.sampled_from(ODD))
        else:
            del place[key]
        return json.dumps(header).encode()


@given(text=st.one_of(spoiled_bytes(), spoiled_values()), size=st.sampled_from([40, 40, 40, 39, 41, 32, 0]))
def test_a_spoiled_header_is_read_as_the_library_reads_it_or_refused(
    tmp_path_factory: pytest.TempPathFactory, text: bytes, size: int
) -> None:
    file = written(tmp_path_factory.getbasetemp() / "spoiled.safetensors", text, bytes(range(size)))
    try:
        found = read_header(file)
    except HimapError as problem:
        assert problem.code == Exit.FAILURE
        return
    library = library_reads(file)
    assert library is not None
    assert {name: t.shape for name, t in found.items()} == {name: shape for name, (_, shape) in library.items()}
    assert sum(t.nbytes for t in found.values()) == size
    for t in found.values():
        assert t.nbytes == 0 or 8 + len(text) <= t.offset <= t.offset + t.nbytes <= file.stat().st_size


def test_rows_beyond_reason_are_no_tensor(tmp_path: Path) -> None:
    (whole,) = saved(tmp_path / "w.safetensors", "fp16", np.arange(12).reshape(3, 4))
    stored = {"t0": whole}
    rows = find_tensor(stored, "some", Rows("t0", 1, 3))
    assert rows is not None and map_tensors([rows])["some"].tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert find_tensor(stored, "t0[1:3]") is None and find_tensor(stored, "some", Rows("t1", 1, 3)) is None
    rows = find_tensor(stored, "some", Rows("t0", 2, 9**12))
    assert rows is not None and rows.shape == (1, 4)  # what there is: a shape that does not fit
    rows = find_tensor(stored, "some", Rows("t0", 7, 9))
    assert rows is not None and rows.shape == (0, 4)
    (scalar,) = saved(tmp_path / "w.safetensors", "fp16", 1.0)
    rows = find_tensor({"t0": scalar}, "some", Rows("t0", 0, 1))
    assert rows is not None and rows.shape == ()  # there, and of a shape that no matrix has


def test_a_tensor_that_starts_anywhere_is_mapped(tmp_path: Path) -> None:
    """The format pads its header, but need not."""
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    )
    values = np.array([1.5, -2], np.float32)
    stored = read_header(written(tmp_path / "w.safetensors", header, b"\1" + values.tobytes()))
    assert map_tensors([stored["b"]])["b"].tolist() == values.tolist()
    check_finite([stored["b"]])


# --- numbers ---


def test_bf16_is_rounded_as_pytorch_does_and_nan_stays_nan() -> None:
    values = np.random.default_rng(0).integers(0, 1 << 32, (300, 500), np.uint32).view(np.float32)
    stored = as_stored(values, "bf16")
    assert stored.dtype == np.uint16 and stored.shape == values.shape
    back = as_numbers(stored, "bf16")
    np.testing.assert_array_equal(back, torch.from_numpy(values).bfloat16().float().numpy())
    np.testing.assert_array_equal(np.isnan(back), np.isnan(values))


def test_every_bf16_number_survives() -> None:
    words = np.arange(1 << 16, dtype=np.uint16)
    numbers = as_numbers(words, "bf16")
    finite = np.isfinite(numbers)
    np.testing.assert_array_equal(as_stored(numbers, "bf16")[finite], words[finite])
    assert np.isnan(as_numbers(as_stored(np.array([np.nan, -np.nan]), "bf16"), "bf16")).all()
    every_nan = np.array([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(as_numbers(as_stored(every_nan, "bf16"), "bf16")).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_what_is_no_number_is_said_in_numbers_not_in_warnings(dtype: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = as_numbers(as_stored(np.array([3.4e38, -3.4e38, np.nan]), dtype), dtype)
    assert made[:2].tolist() == [np.inf, -np.inf] and np.isnan(made[2])


def extremes(dtype: str) -> list[float]:
    info = ml_dtypes.finfo(KINDS[dtype])
    return [float(info.max), float(info.min), float(info.smallest_subnormal), -0.0, 0.0, 1.0]


@pytest.fixture(params=["whole", "in small pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in small pieces":
        monkeypatch.setattr(weight_file, "_PIECE", 16)
        monkeypatch.setattr(weight_file, "_BLOCK", 3)


@pytest.mark.parametrize("dtype", KINDS)
def test_finite_weights_pass(tmp_path: Path, pieces: None, dtype: str) -> None:
    check_finite(saved(tmp_path / "w.safetensors", dtype, extremes(dtype) * 10, np.zeros((0, 3)), 1.0))
    check_finite([])


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", KINDS)
def test_one_number_that_is_none_is_found_wherever_it_is(
    tmp_path: Path, pieces: None, dtype: str, value: float
) -> None:
    for at in (0, 17, 59):
        values = np.array(extremes(dtype) * 10)
        values[at] = value
        tensors = saved(tmp_path / "w.safetensors", dtype, extremes(dtype), values)
        with pytest.raises(HimapError, match="tensor t1 is not finite: 1 value is NaN or infinite") as caught:
            check_finite(tensors)
        assert caught.value.code == Exit.FAILURE
    check_finite(tensors[:1])


def test_all_of_them_are_counted(tmp_path: Path, pieces: None) -> None:
    spoiled = [np.nan] * 20 + [1.0] * 20
    tensors = saved(tmp_path / "w.safetensors", "bf16", spoiled, [1.0], spoiled, [np.inf])
    with pytest.raises(HimapError, match=r"tensor t0 is not finite: 20 values are .*, 2 more tensors too"):
        check_finite(tensors)


@pytest.mark.parametrize(("code", "size"), [("I64", 8), ("BOOL", 1), ("F64", 8), ("F8_E4M3", 1), ("U8", 1), ("I16", 2)])
def test_a_weight_is_a_float(tmp_path: Path, code: str, size: int) -> None:
    stored = read_header(written(tmp_path / "w.safetensors", {"a": entry(code, [2], [0, 2 * size])}, bytes(2 * size)))
    for use in (check_finite, map_tensors):
        with pytest.raises(HimapError, match=r"tensor a is no weight .*expected fp16, bf16, fp32") as caught:
            use(stored.values())
        assert caught.value.code == Exit.USAGE
