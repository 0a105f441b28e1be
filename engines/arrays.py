"""Arrays in and arrays out of himap-run as .npz files, pickles never."""

import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.documents import open_file
from himap_export.engines.files import write_file
from himap_export.graphs.errors import Exit, HimapError

NAMES = (
    "input_ids", "pixel_values", "pixel_values_videos", "attention_mask", "image_grid_thw", "video_grid_thw",
    "second_per_grid_ts",
)  # fmt: skip
OPTIONAL = ("attention_mask", "second_per_grid_ts")
MOST_SECONDS = 1e6  # between two steps: twelve days


@dataclass(frozen=True)
class Inputs:
    """`input_ids` [b,S] int64, placeholders expanded; `pixel_values` [n,3,H,W], the tiles of all pictures, or a film's
    frames, in the order of the prompts; `attention_mask` [b,S]; `seconds` [b] between two steps of each film, or
    none."""

    input_ids: npt.NDArray[np.int64]
    pixel_values: npt.NDArray[np.float32]
    attention_mask: npt.NDArray[np.int64] | None = None
    seconds: tuple[float, ...] = ()

    @property
    def view(self) -> tuple[int, int]:
        """(height, width) of each tile or frame."""
        return self.pixel_values.shape[2], self.pixel_values.shape[3]

    def batches(self, size: int, tiles: Sequence[int]) -> Iterator["Inputs"]:
        """Yields the prompts with their pixels, `size` at a time; `tiles` [b]: how many are each prompt's. What is too
        many comes with the last, so that it is noticed."""
        ends = [0, *accumulate(tiles)]
        for at in range(0, len(self.input_ids), size):
            rows, stop = slice(at, at + size), None if at + size >= len(tiles) else ends[at + size]
            mask = None if self.attention_mask is None else self.attention_mask[rows]
            yield Inputs(self.input_ids[rows], self.pixel_values[ends[at] : stop], mask, self.seconds[rows])


def load_inputs(file: Path) -> Inputs:
    """Reads an .npz; HimapError (usage) if it is none, or as `as_inputs`."""
    return as_inputs(_read(file), str(file))


def as_inputs(arrays: Mapping[str, npt.NDArray[Any]], where: str = "the inputs") -> Inputs:
    """Returns `arrays` by the names in NAMES as inputs. HimapError (usage) if one is missing, of the wrong kind or
    shape, or holds no number; it says `where`.

    As Hugging Face's processors give them: tiles of pictures may have an axis of their own, as frames of films in
    `pixel_values_videos` do; patches with their `image_grid_thw` or `video_grid_thw` become images and frames again.
    """
    arrays = _as_pictures(where, dict(arrays))
    for name, rank, kinds in (("input_ids", 2, "i"), ("pixel_values", 4, "f"), ("attention_mask", 2, "ib")):
        _check(where, arrays, name=name, rank=rank, kinds=kinds)
    _check(where, arrays, name="second_per_grid_ts", rank=1, kinds="f")
    ids, mask = arrays["input_ids"].astype(np.int64), arrays.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        details = f"{list(mask.shape)}, input_ids are {list(ids.shape)}"
        raise HimapError(f"attention_mask in {where} has another shape", details, code=Exit.USAGE)
    if ids.size == 0:
        raise HimapError(f"{where} holds no prompt", code=Exit.USAGE)
    with np.errstate(over="ignore"):  # what fp32 cannot hold becomes infinite, and is refused with the rest
        pixels = arrays["pixel_values"].astype(np.float32)
    if not pixels.size:
        raise HimapError(f"{where} holds no image", code=Exit.USAGE)
    if not np.isfinite(pixels).all():
        details = f"{int((~np.isfinite(pixels)).sum())} of {pixels.size} are NaN, infinite or beyond fp32"
        raise HimapError(f"pixel_values in {where} are not numbers", details, code=Exit.USAGE)
    seconds = arrays.get("second_per_grid_ts", np.zeros(0))
    if len(seconds) not in (0, len(ids)) or not np.all((seconds >= 0) & (seconds < MOST_SECONDS)):
        details = f"expected one below {MOST_SECONDS:g} for each of {len(ids)} prompts"
        raise HimapError(f"second_per_grid_ts in {where} are no seconds between steps", details, code=Exit.USAGE)
    found = None if mask is None else (mask != 0).astype(np.int64)
    return Inputs(ids, pixels, found, tuple(seconds.astype(float).tolist()))


def _as_pictures(where: str, arrays: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Returns the arrays with all pictures' tiles, or all frames of films, as `pixel_values` [n,3,H,W]."""
    for name, grids in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        if name in arrays and grids in arrays and arrays[name].ndim == 2:
            _check(where, arrays, name=grids, rank=2, kinds="i")
            _check(where, arrays, name=name, rank=2, kinds="f")
            arrays[name] = pictures_of_patches(where, arrays[name], arrays[grids], film=grids == "video_grid_thw")
        if name in arrays and arrays[name].ndim == 5:
            arrays[name] = arrays[name].reshape(-1, *arrays[name].shape[2:])
    if "pixel_values_videos" not in arrays:
        return arrays
    if "pixel_values" in arrays:
        raise HimapError(f"{where} holds images and films", "a prompt holds either", code=Exit.USAGE)
    return {**arrays, "pixel_values": arrays.pop("pixel_values_videos")}


def _read(file: Path) -> dict[str, npt.NDArray[Any]]:
    """Returns the arrays that are inputs; of others not a byte is read."""
    most = memory_bytes() // 4
    with open_file(file, "inputs") as f:
        try:
            with zipfile.ZipFile(f) as archive:
                held = [name.removesuffix(".npy") for name in archive.namelist()]
                if twice := [name for name in NAMES if held.count(name) > 1]:
                    raise ValueError(f"it holds {twice[0]} twice")
                return {name: _array(archive, name, most) for name in NAMES if name in held}
        except Exception as problem:  # headers are Python literals; members may be encrypted, compressed by anything
            raise HimapError(f"{file} is not a readable .npz", str(problem), code=Exit.USAGE) from None


def _array(archive: zipfile.ZipFile, name: str, most: int) -> npt.NDArray[Any]:
    """Returns one member, whose header must say no more than there is, and no more than `most` bytes."""
    size = archive.getinfo(f"{name}.npy").file_size
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    needed = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or needed > size:
        raise ValueError(f"{name} is not an array of numbers of the size that its header says")
    if needed > most:
        raise ValueError(f"{name} takes {needed / 1e9:.1f} GB, a quarter of this machine's memory is {most / 1e9:.1f}")
    with archive.open(f"{name}.npy") as member:
        found: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
        return found


def memory_bytes() -> int:
    """Returns the machine's physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def pictures_of_patches(
    where: str, patches: npt.NDArray[Any], grids: npt.NDArray[Any], film: bool = False
) -> npt.NDArray[Any]:
    """Returns images [n,3,H,W], or all frames of films, of patches [N,3*2*p*p] in the order of Qwen2VLImageProcessor:
    blocks of 2 x 2 patches that will be merged, each patch in two frames, which are equal in a picture. HimapError
    (usage) for films among pictures, or different sizes."""
    side, sizes = math.isqrt(patches.shape[1] // 6), {tuple(grid) for grid in grids.tolist()}
    steps, rows, columns = next((size for size in sizes if len(size) == 3), (0, 0, 0))
    whole_blocks = rows % 2 == columns % 2 == 0 and min(rows, columns, side, steps) > 0
    expected = (len(grids) * steps * rows * columns, 6 * side * side)
    if len(sizes) != 1 or not (steps == 1 or film) or not whole_blocks or patches.shape != expected:
        details = f"pixels {list(patches.shape)} for the grids {str(grids.tolist())[:80]}"
        hint = "all of one size, 2 x 2 patches merged"
        name = "video_grid_thw" if film else "image_grid_thw"
        raise HimapError(f"{name} in {where} does not fit its pixels", details, hint, Exit.USAGE)
    # [step, block row, block column, row in block, column in block, channel, frame, y, x]
    blocks = patches.reshape(-1, rows // 2, columns // 2, 2, 2, 3, 2, side, side).transpose(0, 6, 5, 1, 3, 7, 2, 4, 8)
    found: npt.NDArray[Any] = blocks.reshape(-1, 2, 3, rows * side, columns * side)
    return found.reshape(-1, *found.shape[2:]) if film else found[:, 0]


def _check(where: str, arrays: Mapping[str, npt.NDArray[Any]], *, name: str, rank: int, kinds: str) -> None:
    found = arrays.get(name)
    if found is None:
        if name in OPTIONAL:
            return
        raise HimapError(f"{where} holds no {name}", f"it holds {', '.join(arrays) or 'nothing else'}", code=Exit.USAGE)
    if found.ndim != rank or found.dtype.kind not in kinds:
        expected = f"expected {rank} dimensions of {'integers' if 'i' in kinds else 'floats'}"
        raise HimapError(f"{name} in {where} is {found.dtype}{list(found.shape)}", expected, code=Exit.USAGE)


def save_outputs(file: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Writes an .npz under exactly this name, whole or not at all."""
    write_file(file, lambda f: np.savez(f, allow_pickle=False, **arrays))
