"""From the ids of a batch to what the prefix stage reads: right-padded, every token's kind named, budgets checked."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import TokenBudget
from himap_export.graphs.spec import IMAGE, INSTRUCTION, PADDING, SYSTEM

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PromptLayout:
    """`input_ids`, `position_ids`, `token_kind` [B,S0] int64; `lengths` [B]: real tokens of each sample."""

    input_ids: Integers
    position_ids: Integers
    token_kind: Integers
    lengths: Integers


def lay_out(
    input_ids: Integers, attention_mask: Integers | None, image_token: int, vocab: int, budget: TokenBudget
) -> PromptLayout:
    """Any batch [b,S] of b <= B prompts, padded on either side, as the static stages want it.

    Positions count a sample's real tokens from 0. Missing samples repeat the last one. HimapError (usage) if a prompt
    does not hold exactly V0 image tokens, or holds more other tokens than the text budget.
    """
    batch, slots = budget.batch, budget.total[0]
    ids, kinds = np.zeros((batch, slots), np.int64), np.full((batch, slots), PADDING, np.int64)
    lengths = np.zeros(batch, np.int64)
    mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
    for row in range(batch):
        source = min(row, len(input_ids) - 1)
        sample = input_ids[source][mask[source] != 0]
        _check(sample, source, image_token, budget)
        words = sample[sample != image_token]
        if len(words) and not 0 <= words.min() <= words.max() < vocab:
            outside = words[(words < 0) | (words >= vocab)][0]
            raise HimapError(f"prompt {row} holds token {outside}", f"the vocabulary has {vocab}", code=Exit.USAGE)
        kind = _kinds(sample, image_token)
        sample = np.where(kind == IMAGE, 0, sample)  # its row of the embedding, if it has one, is never used
        lengths[row] = len(sample)
        kinds[row, : len(sample)] = kind
        ids[row, : len(sample)] = sample
    return PromptLayout(ids, np.tile(np.arange(slots), (batch, 1)), kinds, lengths)


def text_tokens(input_ids: Integers, attention_mask: Integers | None, image_token: int) -> int:
    """The longest prompt's tokens that are not of the image: what a text budget has to hold."""
    words = input_ids != image_token
    return int((words if attention_mask is None else words & (attention_mask != 0)).sum(axis=1).max())


def _kinds(sample: Integers, image_token: int) -> Integers:
    images = np.flatnonzero(sample == image_token)
    kinds = np.full(len(sample), SYSTEM, np.int64)
    kinds[images[-1] + 1 :] = INSTRUCTION
    kinds[images] = IMAGE
    return kinds


def _check(sample: Integers, row: int, image_token: int, budget: TokenBudget) -> None:
    images, visual = int((sample == image_token).sum()), budget.visual[0]
    text = len(sample) - images
    if images == 0:
        hint = f"expand the image placeholder to {visual} tokens of id {image_token}"
        raise HimapError(f"prompt {row} holds no image token", hint=hint, code=Exit.USAGE)
    if images != visual:
        details = f"the bundle was exported for {visual}"
        raise HimapError(f"prompt {row} holds {images} image tokens", details, "give exactly one image", Exit.USAGE)
    if not text and not budget.visual[-1]:
        details = f"the plan drops all {visual} image tokens"
        raise HimapError(f"prompt {row} has no text", details, "ask something", Exit.USAGE)
    if text > budget.text:
        hint = f"shorten it, or export with --text-budget {text}"
        raise HimapError(f"prompt {row} has {text} text tokens", f"the budget is {budget.text}", hint, Exit.USAGE)
