"""Arrays from elsewhere: no more is read than is needed, nothing larger than the machine, and only numbers."""

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from himap_export.engines.arrays import Inputs, load_inputs, memory_bytes
from himap_export.graphs.errors import Exit, HimapError

IDS, PIXELS = np.array([[1, 5, 5, 2]]), np.zeros((1, 3, 4, 4), np.float32)


def refused(file: Path, words: str) -> None:
    with pytest.raises(HimapError) as caught:
        load_inputs(file)
    assert caught.value.code == Exit.USAGE and words in str(caught.value)


def save(file: Path, **arrays: Any) -> Path:
    np.savez(file, **{"input_ids": IDS, "pixel_values": PIXELS, **arrays})
    return file


def member(shape: tuple[int, ...], data: bytes = b"", dtype: str = "<f4") -> bytes:
    """An .npy file whose header may lie."""
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(f, {"descr": dtype, "fortran_order": False, "shape": shape})
    return f.getvalue() + data


def archive(file: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members.items():
            z.writestr(f"{name}.npy", content)
    return file


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_pixels_are_numbers(tmp_path: Path, bad: float) -> None:
    pixels = PIXELS.astype(np.float64)
    pixels[0, 1, 2, 3] = bad
    refused(save(tmp_path / "in.npz", pixel_values=pixels), "1 of 48 are NaN, infinite or beyond fp32")


def test_only_inputs_are_read(tmp_path: Path) -> None:
    """What else an archive holds, bombs and pickles included, is nobody's business."""
    good = save(tmp_path / "in.npz", more=np.zeros(4), pickled=np.array([{}], object))
    assert load_inputs(good).input_ids.tolist() == IDS.tolist()
    with zipfile.ZipFile(good, "a", zipfile.ZIP_DEFLATED) as z:
        z.writestr("bomb.npy", member((1 << 40,), bytes(1 << 20)))
    assert load_inputs(good).pixel_values.shape == PIXELS.shape


def test_headers_that_lie(tmp_path: Path) -> None:
    file = tmp_path / "in.npz"
    refused(archive(file, input_ids=member((1, 1 << 40), bytes(64), "<i8"), pixel_values=b""), "its header says")
    refused(archive(file, input_ids=member((2**63, 2**63), b"", "<i8"), pixel_values=b""), "its header says")
    refused(archive(file, input_ids=b"\x93NUMPY\x01\x00\x08\x00((((((((", pixel_values=b""), "is not a readable .npz")
    refused(archive(file, input_ids=member((1,), b"x" * 8, "|O"), pixel_values=b""), "not an array of numbers")


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = archive(tmp_path / "in.npz", input_ids=member((1, 1 << 21), bytes(8 << 21), "<i8"), pixel_values=b"")
    assert file.stat().st_size < 50_000
    monkeypatch.setattr("himap_export.engines.arrays.memory_bytes", lambda: 32 << 20)
    refused(file, "a quarter of this machine's memory")
    assert memory_bytes() > 1 << 30  # this machine's own


@pytest.mark.parametrize(
    ("patches", "grid"),
    [
        (np.zeros((4, 0), np.float32), [[1, 2, 2]]),
        (np.zeros((4, 24), np.float32), [[[1, 2, 2]]]),
        (np.zeros((4, 24), np.float32), [[1.0, 2.0, 2.0]]),
        (np.zeros((4, 24), np.float32), [[1, -2, -2]]),
        (np.zeros((4, 24), np.float32), [[1, 2**40, 2**40]]),
        (np.zeros((0, 24), np.float32), [[1, 0, 0]]),
    ],
)
def test_grids_that_make_no_picture(tmp_path: Path, patches: Any, grid: Any) -> None:
    refused(save(tmp_path / "in.npz", pixel_values=patches, image_grid_thw=np.array(grid)), "image_grid_thw in")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_batches_take_the_pixels_of_their_prompts(size: int) -> None:
    """Of 2, 0, 1 and 3 tiles; all that belongs to a prompt goes with it, and pixels too many go with the last."""
    tiles, ids = (2, 0, 1, 3), np.arange(8).reshape(4, 2)
    for more in (0, 1):
        pixels = np.arange(6 + more, dtype=np.float32).reshape(-1, 1, 1, 1)
        whole = Inputs(ids, pixels, ids % 2, seconds=(0.5, 1.0, 1.5, 2.0))
        parts = list(whole.batches(size, tiles))
        assert [len(part.input_ids) for part in parts] == [min(size, 4 - at) for at in range(0, 4, size)]
        for n, part in enumerate(parts):
            rows = slice(n * size, (n + 1) * size)
            first, last = sum(tiles[: n * size]), sum(tiles[: (n + 1) * size]) + more * (part is parts[-1])
            assert part.pixel_values.ravel().tolist() == list(range(first, last))
            assert part.input_ids.tolist() == ids[rows].tolist() and part.seconds == whole.seconds[rows]
            assert part.attention_mask is not None and part.attention_mask.tolist() == (ids % 2)[rows].tolist()


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "loop", "", "x" * 300, "none"):
        refused(tmp_path / name, "cannot read inputs")
    refused(Path("/dev/zero"), "it is not a plain file")
    (tmp_path / "empty.npz").touch()
    refused(tmp_path / "empty.npz", "is not a readable .npz")
