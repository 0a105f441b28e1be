"""Which image tokens an answer kept, as its asker is told."""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from himap_export.engines.answer import Request
from himap_export.engines.drawing import picture_patches
from himap_export.engines.image import seen_box, tile_grid
from himap_export.engines.layout import Integers


class Patches(Struct, frozen=True):
    """Those of one picture that were alive in each stage behind a cut.

    The model's view is a grid of `rows` and `columns` of patches over the `box` (left, top, right, bottom; shares of
    the upright picture's sides, outside 0 to 1 where it is padded); `kept` gives by stage (k1, ..) the patches row *
    columns + column that stayed.
    """

    rows: int
    columns: int
    box: tuple[float, float, float, float]
    kept: Mapping[str, list[int]]


class Kept(Struct, frozen=True):
    """What was alive of `pictures`, in their order. `image_tokens`: how many of all of them each of `stages` has."""

    stages: tuple[str, ...]
    image_tokens: tuple[int, ...]
    pictures: tuple[Patches, ...]

    def document(self) -> dict[str, Any]:
        """Returns it as a client reads it: what is said of a single picture stands beside `stages`."""
        said: dict[str, Any] = msgspec.to_builtins(self)
        if len(self.pictures) == 1:
            (only,) = said.pop("pictures")
            said |= only
        return said


def image_tokens_kept(request: Request) -> dict[str, int]:
    """Returns how many image tokens each stage has: prefix, k1, .. It is the variant's, whatever the pictures; those of
    a prompt of fewer pictures than that, where nothing is cut."""
    budget, held = request.spec.budget, int(_image_tokens(request).sum())
    return {stage: min(held, most) for stage, most in zip(request.spec.plan.stages, budget.visual, strict=True)}


def describe_kept(request: Request, kept: Mapping[str, Integers]) -> Kept:
    """Returns what prefill kept of a request's pictures, given by cut (kept_k1, ..) as original positions [S_i]."""
    image, stages = request.spec.image, request.spec.plan.stages
    tokens = np.flatnonzero(_image_tokens(request)).reshape(len(request.sizes), image.tokens)
    pictures = []
    for size, own in zip(request.sizes, tokens, strict=True):
        patches = {s: picture_patches(np.isin(own, kept[f"kept_{s}"]), image, size) for s in stages[1:]}
        rows, columns = (n * each for n, each in zip(image.grid, tile_grid(size, image.preprocessing), strict=True))
        assert all(mask.shape == (rows, columns) for mask in patches.values())
        found = {stage: np.flatnonzero(mask).tolist() for stage, mask in patches.items()}
        pictures.append(Patches(rows, columns, seen_box(size, image.preprocessing), found))
    return Kept(stages, tuple(image_tokens_kept(request).values()), tuple(pictures))


def _image_tokens(request: Request) -> npt.NDArray[np.bool_]:
    """Which tokens [S] of its prompt are a picture's."""
    return request.spec.manifest.model.image.find(request.inputs.input_ids[0])
