"""Documents from elsewhere become typed values, or one line of refusal."""

import os
from pathlib import Path
from typing import Annotated

import pytest
from msgspec import Meta, Struct

from himap_export.engines.documents import parse_json, read_file, read_json, typed
from himap_export.graphs.errors import Exit, HimapError


class Layer(Struct, frozen=True, forbid_unknown_fields=True):
    width: Annotated[int, Meta(ge=1, le=9)]
    scale: float = 1.0
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "is not JSON"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": {"b": 1, "b": 2}}', "it holds 'b' twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\\udc80"}', "not valid UTF-8"),
        (b"\xff\xfe", "not valid UTF-8"),
        (b"1" * 5000, "is not JSON"),
    ],
)
def test_what_is_no_json(text: bytes, words: str) -> None:
    with pytest.raises(HimapError, match=words) as caught:
        parse_json(text, "the plan")
    assert caught.value.code == Exit.USAGE and str(caught.value).startswith("the plan")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"width": "3"}, "Expected int, got str - at $.width"),
        ({"width": True}, "Expected int, got bool - at $.width"),
        ({"width": 3.5}, "Expected int, got float"),
        ({"width": 0}, "Expected int >= 1 - at $.width"),
        ({"width": 10**30}, "width"),
        ({"width": 3, "scale": "x"}, "at $.scale"),
        ({"width": 3, "names": ["a", 1]}, "at $.names[1]"),
        ({"width": 3, "depth": 1}, "unknown field depth"),
        ({}, "missing required field width"),
        ([], "Expected object, got array"),
    ],
)
def test_what_is_of_another_type(value: object, words: str) -> None:
    with pytest.raises(HimapError) as caught:
        typed(value, Layer, "the plan", Exit.FAILURE)
    assert words in str(caught.value) and caught.value.code == Exit.FAILURE


def test_many_keys_take_no_time(tmp_path: Path) -> None:
    """Counting each of them again took hours."""
    text = "{" + ",".join(f'"{n}": 0' for n in range(200_000)) + ', "7": 0}'
    with pytest.raises(HimapError, match="holds '7' twice"):
        parse_json(text.encode(), "the plan")


def test_what_is_well(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"width": 3, "scale": 2, "names": ["\\u00e6"]}')
    assert read_json(tmp_path / "a.json", Layer, "plan") == Layer(3, 2.0, ("æ",))


def test_files_of_odd_kinds(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "long").write_bytes(bytes(11))
    for path, words in (
        (tmp_path / "pipe", "it is not a plain file"),
        (tmp_path, "Is a directory"),
        (Path("/dev/zero"), "it is not a plain file"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path / "none", "No such file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "a\0b", "null byte"),
        (tmp_path / "long", "11 bytes, at most 10 are read"),
    ):
        with pytest.raises(HimapError, match="plan") as caught:
            read_file(path, "plan", 10)
        assert words in str(caught.value)
