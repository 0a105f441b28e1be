"""What a bundle is judged on: the user's inputs, or prompts drawn from a seed."""

import math

import numpy as np

from himap_export.engines.arrays import Inputs
from himap_export.engines.bundle import RunSpec
from himap_export.graphs.errors import Exit, HimapError

MOST_BYTES = 2**32  # of drawn prompts: a few hundred at the sizes of published models


def drawn_inputs(run: RunSpec, prompts: int, seed: int, fill: bool = False) -> Inputs:
    """Returns random pixels and text around one run of V0 image tokens, right-padded.

    Text lengths vary up to the budget, which `fill` exhausts; ids avoid the image, end and padding tokens. HimapError
    (usage) for prompts that take more than MOST_BYTES, or a budget that has no text to draw.
    """
    m, rng = run.manifest, np.random.default_rng(seed)
    image = m.model.image.write(run.budget.visual[0])
    words = np.setdiff1d(np.arange(m.decoder.vocab), [*image.tolist(), m.model.pad_token, *m.model.eos_tokens])
    budget, slots = run.budget.text, run.budget.total[0]
    budget -= len(image) - run.budget.visual[0]  # what must stand around the image is text
    if budget < 1 or not len(words):
        summary = f"no prompt can be drawn for {run.bundle.folder}"
        raise HimapError(summary, f"{budget} text tokens of {len(words)} words", "give `load_inputs`", Exit.USAGE)
    shape = prompts * run.image.tiles, 3, *run.image.size
    if (size := 4 * math.prod(shape) + 16 * prompts * slots) > MOST_BYTES:
        summary, details = f"{prompts} prompts are too many", f"they take {size} bytes, at most {MOST_BYTES} are drawn"
        raise HimapError(summary, details, "give fewer `prompts`", Exit.USAGE)
    ids, mask = np.full((prompts, slots), m.model.pad_token, np.int64), np.zeros((prompts, slots), np.int64)
    for row in range(prompts):
        text = budget if fill else int(rng.integers(min(4, budget), budget + 1))
        system = int(rng.integers(0, text))
        around = rng.choice(words, text)
        sample = np.concatenate([around[:system], image, around[system:]])
        ids[row, : len(sample)], mask[row, : len(sample)] = sample, 1
    return Inputs(ids, rng.standard_normal(shape, dtype=np.float32), mask)
