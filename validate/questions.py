"""What a bundle is judged on: the user's inputs, or prompts drawn from a seed."""

from pathlib import Path

import numpy as np

from himap_export.engines.answer import load_question
from himap_export.engines.arrays import Inputs, load_inputs
from himap_export.engines.bundle import Bundle


def user_inputs(
    bundle: Bundle, arrays: Path | None, image: Path | None, prompt: str | None, checkpoint: Path
) -> Inputs | None:
    """The prompts the user gave, as arrays or as an image and a question; None if neither."""
    if arrays is not None:
        return load_inputs(arrays)
    if image is not None and prompt is not None:
        return load_question(bundle, image, prompt, checkpoint).arrays
    return None


def drawn_inputs(bundle: Bundle, prompts: int, seed: int, fill: bool = False) -> Inputs:
    """Random pixels and text around one run of V0 image tokens, right-padded.

    Text lengths vary up to the budget, which `fill` exhausts; ids avoid the image, end and padding tokens.
    """
    m, rng = bundle.manifest, np.random.default_rng(seed)
    special = {m.model.image_token, m.model.pad_token, *m.model.eos_tokens}
    words = np.array([i for i in range(m.decoder.vocab) if i not in special])
    visual, budget, slots = bundle.budget.visual[0], bundle.budget.text, bundle.budget.total[0]
    ids, mask = np.full((prompts, slots), m.model.pad_token, np.int64), np.zeros((prompts, slots), np.int64)
    for row in range(prompts):
        text = budget if fill else int(rng.integers(min(4, budget), budget + 1))
        system = int(rng.integers(0, text))
        around = rng.choice(words, text)
        sample = np.concatenate([around[:system], np.full(visual, m.model.image_token), around[system:]])
        ids[row, : len(sample)], mask[row, : len(sample)] = sample, 1
    shape = bundle.graph("vision").inputs["pixel_values"].shape
    return Inputs(ids, rng.standard_normal((prompts, *shape[1:]), dtype=np.float32), mask)
