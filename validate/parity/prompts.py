"""What a bundle is judged on: the user's inputs, or prompts drawn from a seed."""

import math

import numpy as np
import numpy.typing as npt

from himap_export.engines.arrays import Inputs
from himap_export.engines.bundle import RunSpec
from himap_export.graphs.errors import Exit, HimapError

MOST_BYTES = 2**32  # of drawn prompts: a few hundred at the sizes of published models


def drawn_inputs(run: RunSpec, prompts: int, seed: int, fill: bool = False) -> Inputs:
    """Returns random pixels and text around the image tokens of as many pictures as `run` is for, or of a film, each
    behind some text, right-padded.

    Text lengths vary up to the budget, which `fill` exhausts; ids avoid the image, end and padding tokens. HimapError
    (usage) for prompts that take more than MOST_BYTES, or a budget that has no text to draw.
    """
    m, rng = run.manifest, np.random.default_rng(seed)
    image, many = _written(run), run.budget.images
    placeholders = [id for id in (m.model.image.token, m.model.image.film) if id is not None]
    special = [*image.tolist(), *placeholders, m.model.pad_token, *m.model.eos_tokens]
    words = np.setdiff1d(np.arange(m.decoder.vocab), special)
    budget, slots = run.budget.text, run.budget.total[0]
    budget -= many * len(image) - run.budget.visual[0]  # what must stand around the images is text
    if budget < 1 or not len(words):
        summary = f"no prompt can be drawn for {run.bundle.folder}"
        raise HimapError(summary, f"{budget} text tokens of {len(words)} words", "give `load_inputs`", Exit.USAGE)
    shape = prompts * many * run.image.tiles, 3, *run.image.view
    if (size := 4 * math.prod(shape) + 16 * prompts * slots) > MOST_BYTES:
        summary, details = f"{prompts} prompts are too many", f"they take {size} bytes, at most {MOST_BYTES} are drawn"
        raise HimapError(summary, details, "give fewer `prompts`", Exit.USAGE)
    ids, mask = np.full((prompts, slots), m.model.pad_token, np.int64), np.zeros((prompts, slots), np.int64)
    for row in range(prompts):
        text = budget if fill else int(rng.integers(min(4, budget), budget + 1))
        places = np.sort(rng.integers(0, text, many))
        around = np.split(rng.choice(words, text), places)
        sample = np.concatenate([part for words_before in around[:-1] for part in (words_before, image)] + [around[-1]])
        ids[row, : len(sample)], mask[row, : len(sample)] = sample, 1
    seconds = (1.0,) * prompts if run.image.film else ()
    return Inputs(ids, rng.standard_normal(shape, dtype=np.float32), mask, seconds)


def _written(run: RunSpec) -> npt.NDArray[np.int64]:
    """Returns the ids of one picture's or film's image tokens, with a word between those that text stands between."""
    image, segments = run.manifest.model.image, run.image.expansion.segments
    word = run.manifest.model.pad_token
    parts = [image.write(segment.tokens, run.image.film is not None) for segment in segments]
    return np.concatenate([np.append(part, word) for part in parts])[:-1] if len(parts) > 1 else parts[0]
