"""Which image tokens an answer kept, as its asker is told."""

from collections.abc import Mapping
from math import prod

import numpy as np
from msgspec import Struct

from himap_export.engines.drawing import kept_patches
from himap_export.engines.image import seen_box, tile_grid
from himap_export.engines.layout import Integers
from himap_export.engines.session import Request


class Kept(Struct, frozen=True):
    """The patches that were alive in each stage behind a cut.

    `image_tokens`: how many each of `stages` has. The model's view is a grid of `rows` and `columns` of patches over
    the `box` (left, top, right, bottom; shares of the upright image's sides, outside 0 to 1 where it is padded); `kept`
    gives by stage (k1, ..) the patches row * columns + column that stayed.
    """

    stages: tuple[str, ...]
    image_tokens: tuple[int, ...]
    rows: int
    columns: int
    box: tuple[float, float, float, float]
    kept: Mapping[str, list[int]]


def image_tokens_kept(request: Request) -> dict[str, int]:
    """Returns how many image tokens each stage has: prefix, k1, .. It is the variant's, whatever the image."""
    return dict(zip(request.spec.plan.stages, request.spec.budget.visual, strict=True))


def describe_kept(request: Request, kept: Mapping[str, Integers]) -> Kept:
    """Returns what prefill kept of a request's image, given by cut (kept_k1, ..) as original positions [S_i]."""
    spec, processor = request.spec, request.processor
    assert processor is not None  # questions are made of an image and words
    tokens = np.flatnonzero(spec.manifest.model.image.find(request.inputs.input_ids[0]))
    tiles = tile_grid(request.sizes[0], processor.image)
    patches = {
        stage: kept_patches(np.isin(tokens, kept[f"kept_{stage}"]), spec.image.grid, tiles, spec.image.newline)
        for stage in spec.plan.stages[1:]
    }
    rows, columns = (count * tile for count, tile in zip(spec.image.grid, tiles, strict=True))
    assert all(prod(mask.shape) == rows * columns for mask in patches.values())
    found = {stage: np.flatnonzero(mask).tolist() for stage, mask in patches.items()}
    box = seen_box(request.sizes[0], processor.image)
    return Kept(spec.plan.stages, spec.budget.visual, rows=rows, columns=columns, box=box, kept=found)
