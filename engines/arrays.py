"""The .npz doors of himap-run: arrays in, arrays out, pickles never."""

import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.graphs.errors import Exit, HimapError


@dataclass(frozen=True)
class Inputs:
    """`input_ids` [b,S] int64, placeholders expanded; `pixel_values` [b*tiles,3,H,W]; `attention_mask` [b,S]."""

    input_ids: npt.NDArray[np.int64]
    pixel_values: npt.NDArray[np.float32]
    attention_mask: npt.NDArray[np.int64] | None = None

    def batches(self, size: int) -> Iterator["Inputs"]:
        """The prompts with their images, `size` at a time."""
        tiles = len(self.pixel_values) // len(self.input_ids)
        for at in range(0, len(self.input_ids), size):
            rows, images = slice(at, at + size), slice(at * tiles, (at + size) * tiles)
            mask = None if self.attention_mask is None else self.attention_mask[rows]
            yield Inputs(self.input_ids[rows], self.pixel_values[images], mask)


def load_inputs(file: Path) -> Inputs:
    """Reads an .npz; HimapError (usage) if it is none, or an array is missing or of the wrong kind.

    Patches with their `image_grid_thw`, as Hugging Face's processors of Qwen's models give them, become pictures again.
    """
    try:
        with np.load(file, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
    except FileNotFoundError:
        raise HimapError(f"{file} does not exist", hint="--load-inputs takes an .npz file", code=Exit.USAGE) from None
    except (OSError, ValueError, zipfile.BadZipFile) as problem:
        raise HimapError(f"{file} is not a readable .npz", str(problem), code=Exit.USAGE) from None
    if "image_grid_thw" in arrays and "pixel_values" in arrays and arrays["pixel_values"].ndim == 2:
        arrays["pixel_values"] = _pictures(file, arrays["pixel_values"], arrays["image_grid_thw"])
    for name, rank, kind in (("input_ids", 2, "i"), ("pixel_values", 4, "f"), ("attention_mask", 2, "ib")):
        _check(file, arrays, name, rank, kind)
    ids, mask = arrays["input_ids"].astype(np.int64), arrays.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        details = f"{list(mask.shape)}, input_ids are {list(ids.shape)}"
        raise HimapError(f"attention_mask in {file} has another shape", details, code=Exit.USAGE)
    if len(ids) == 0:
        raise HimapError(f"{file} holds no prompt", code=Exit.USAGE)
    if not len(arrays["pixel_values"]) or len(arrays["pixel_values"]) % len(ids):
        details = f"{len(ids)} prompts, {len(arrays['pixel_values'])} images"
        raise HimapError(f"{file} does not hold one image per prompt", details, code=Exit.USAGE)
    return Inputs(ids, arrays["pixel_values"].astype(np.float32), None if mask is None else mask.astype(np.int64))


def _pictures(file: Path, patches: npt.NDArray[Any], grids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Pictures [n,3,H,W] from patches [N,3*2*p*p] in the order of Qwen2VLImageProcessor: blocks of 2 x 2 patches that
    will be merged, each patch in two equal frames. HimapError (usage) for films, or pictures of different sizes."""
    side, kinds = math.isqrt(patches.shape[1] // 6), {tuple(grid) for grid in np.atleast_2d(grids).tolist()}
    frames, rows, columns = next((kind for kind in kinds if len(kind) == 3), (0, 0, 0))
    even = rows % 2 == columns % 2 == 0
    if len(kinds) != 1 or frames != 1 or not even or patches.shape != (len(grids) * rows * columns, 6 * side * side):
        details = f"pixel_values {list(patches.shape)} for the grids {grids.tolist()}"
        hint = "one picture of one size per prompt, 2 x 2 patches merged"
        raise HimapError(f"image_grid_thw in {file} does not fit its pixel_values", details, hint, Exit.USAGE)
    blocks = patches.reshape(len(grids), rows // 2, columns // 2, 2, 2, 3, 2, side, side)[:, :, :, :, :, :, 0]
    found: npt.NDArray[Any] = blocks.transpose(0, 5, 1, 3, 6, 2, 4, 7)
    return found.reshape(len(grids), 3, rows * side, columns * side)


def _check(file: Path, arrays: Mapping[str, npt.NDArray[Any]], name: str, rank: int, kinds: str) -> None:
    found = arrays.get(name)
    if found is None:
        if name == "attention_mask":
            return
        raise HimapError(f"{file} holds no {name}", f"it holds {', '.join(arrays) or 'nothing'}", code=Exit.USAGE)
    if found.ndim != rank or found.dtype.kind not in kinds:
        expected = f"expected {rank} dimensions of {'integers' if 'i' in kinds else 'floats'}"
        raise HimapError(f"{name} in {file} is {found.dtype}{list(found.shape)}", expected, code=Exit.USAGE)


def save_outputs(file: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Writes an .npz under exactly this name, whole or not at all."""
    part = file.with_name(f".{file.name}.partial")
    try:
        with part.open("wb") as f:
            np.savez(f, allow_pickle=False, **arrays)
        part.replace(file)
    except OSError as problem:
        part.unlink(missing_ok=True)
        raise HimapError(f"cannot write {file}", problem.strerror or str(problem)) from None
