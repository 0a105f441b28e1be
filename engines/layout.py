"""From the ids of a batch to what the prefix stage reads: right-padded, every token's type named, budgets checked."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from himap_export.engines.documents import Id
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import TokenBudget
from himap_export.graphs.spec import IMAGE, INSTRUCTION, PADDING, SYSTEM

Integers = npt.NDArray[np.int64]
Grid = tuple[int, int]  # rows and columns of an image's tokens


class ImageTokens(Struct, frozen=True, forbid_unknown_fields=True):
    """What stands for image tokens in `input_ids`: the id `token`, or `film` for those of a film, if they have one of
    their own; or, if `between` is set, whatever ids stand between these two."""

    token: Id
    between: tuple[Id, Id] | None = None
    film: Id | None = None

    def find(self, ids: Integers) -> npt.NDArray[np.bool_]:
        """Returns which of `ids`, [S] or [B,S], are image tokens."""
        found: npt.NDArray[np.bool_] = ids == self.token
        if self.film is not None:
            found |= ids == self.film
        if self.between is not None:
            start, end = self.between
            opened = np.cumsum(ids == start, axis=-1) - np.cumsum(ids == end, axis=-1)
            found = (opened > 0) & (ids != start)
        return found

    def write(self, count: int, film: bool = False) -> Integers:
        """Returns the ids of an image of `count` tokens, or of a `film`'s, with what must stand around them."""
        tokens = np.full(count, self.film if film and self.film is not None else self.token, np.int64)
        return tokens if self.between is None else np.array([self.between[0], *tokens, self.between[1]], np.int64)


@dataclass(frozen=True)
class PromptLayout:
    """`input_ids`, `position_ids`, `token_type` [B,S0] int64; `lengths` [B]: real tokens of each sample; `images` [B]:
    how many pictures it holds.

    `rope_position_ids` [B,S0,3]: what M-RoPE turns by, time, row and column; the token generated at position p turns
    by p + `rope_shift` [B] in all three.
    """

    input_ids: Integers
    position_ids: Integers
    token_type: Integers
    lengths: Integers
    images: Integers
    rope_position_ids: Integers
    rope_shift: Integers


def lay_out(
    input_ids: Integers,
    attention_mask: Integers | None,
    image: ImageTokens,
    vocab: int,
    budget: TokenBudget,
    grid: Grid | None = None,
    steps: Sequence[float] = (),
) -> PromptLayout:
    """Returns any batch [b,S] of b <= B prompts, padded on either side, as the static stages read it.

    Positions count a sample's real tokens from 0. For M-RoPE, `grid` is how a picture's tokens lie, and `steps` [b] (1)
    by how much time goes on between two steps of a sample's film. Missing samples repeat the last one. HimapError
    (usage) if a prompt does not hold the image tokens of as many pictures as the budget is for, or holds more other
    tokens than the text budget. Where nothing is cut, fewer pictures do: their tokens' slots are padding, which no real
    token sees.
    """
    batch, slots = budget.batch, budget.total[0]
    ids, token_types = np.zeros((batch, slots), np.int64), np.full((batch, slots), PADDING, np.int64)
    lengths, images = np.zeros(batch, np.int64), np.zeros(batch, np.int64)
    places = np.zeros((batch, slots, 3), np.int64)
    mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
    for row in range(batch):
        source = min(row, len(input_ids) - 1)
        sample = input_ids[source][mask[source] != 0]
        is_image = image.find(sample)
        images[row] = _count(is_image, source, image, budget)
        check_words(sample[~is_image], vocab, row)
        sample = np.where(is_image, 0, sample)  # its row of the embedding, if it has one, is never used
        lengths[row] = len(sample)
        token_types[row, : len(sample)] = _token_types(is_image)
        ids[row, : len(sample)] = sample
        places[row, : len(sample)] = rope_places(is_image, grid, steps[source] if len(steps) else 1.0)
    positions = np.tile(np.arange(slots), (batch, 1))
    shift = np.array([p[: max(n, 1)].max() + 1 - n for p, n in zip(places, lengths, strict=True)], np.int64)
    return PromptLayout(
        ids, positions, token_type=token_types, lengths=lengths, images=images, rope_position_ids=places,
        rope_shift=shift,
    )  # fmt: skip


def check_words(words: Integers, vocab: int, row: int = 0) -> None:
    """Raises HimapError (usage) for ids [n] of prompt `row` that the vocabulary does not have."""
    if len(words) and not 0 <= words.min() <= words.max() < vocab:
        outside = words[(words < 0) | (words >= vocab)][0]
        raise HimapError(f"prompt {row} holds token {outside}", f"the vocabulary has {vocab}", code=Exit.USAGE)


def rope_places(is_image: npt.NDArray[np.bool_], grid: Grid | None, step: float = 1.0) -> Integers:
    """Returns time, row and column [S,3] of each token, as M-RoPE counts them (arXiv 2409.12191; transformers'
    `get_rope_index`): all three rise with the text. Image tokens side by side are one picture at one time, at their
    rows and columns of the `grid`, or a film, whose time goes on by `step`, rounded down, from one grid to the next;
    the text behind goes on after the longer side of the grid. Without a `grid` an image is text."""
    found = np.repeat(np.arange(len(is_image))[:, None], 3, axis=1)
    if grid is None or not is_image.any():
        return found
    (rows, columns), here = grid, 0
    for run in np.split(np.arange(len(is_image)), np.flatnonzero(np.diff(is_image)) + 1):
        nth = np.arange(len(run))
        if not is_image[run[0]]:
            found[run] = here + nth[:, None]
            here += len(run)
            continue
        time = (np.float32(step) * (nth // (rows * columns)).astype(np.float32)).astype(np.int64)  # in fp32, as there
        found[run] = here + np.stack([time, nth // columns % rows, nth % columns], axis=1)
        here += max(rows, columns)
    return found


def how_many(images: int) -> str:
    """Returns "one image", or "5 images"."""
    return "one image" if images == 1 else f"{images} images"


def count_images(input_ids: Integers, mask: Integers | None, image: ImageTokens, tokens: int) -> Integers:
    """Counts the pictures of `tokens` = V tokens each in prompts [b,S]: [b]."""
    return count_image_tokens(input_ids, mask, image) // tokens


def count_image_tokens(input_ids: Integers, mask: Integers | None, image: ImageTokens) -> Integers:
    """Counts the image tokens in prompts [b,S]: [b]."""
    found = image.find(input_ids)
    counted: Integers = (found if mask is None else found & (mask != 0)).sum(axis=1)
    return counted


def text_tokens(input_ids: Integers, attention_mask: Integers | None, image: ImageTokens) -> int:
    """Counts the longest prompt's tokens that are not of the image: what a text budget has to hold."""
    words = ~image.find(input_ids)
    return int((words if attention_mask is None else words & (attention_mask != 0)).sum(axis=1).max())


def _token_types(is_image: npt.NDArray[np.bool_]) -> Integers:
    token_types = np.full(len(is_image), SYSTEM, np.int64)
    token_types[np.flatnonzero(is_image)[-1] + 1 :] = INSTRUCTION
    token_types[is_image] = IMAGE
    return token_types


def _count(is_image: npt.NDArray[np.bool_], row: int, image: ImageTokens, budget: TokenBudget) -> int:
    """Returns how many pictures a prompt holds; HimapError (usage) for one that the budget is not for."""
    images, visual = int(is_image.sum()), budget.visual[0]
    text, each = len(is_image) - images, visual // budget.images
    if images == 0:
        hint = f"expand the image placeholder to {visual} tokens of id {image.token}"
        raise HimapError(f"prompt {row} holds no image token", hint=hint, code=Exit.USAGE)
    if images != visual and (images % each or images > visual or budget.prunes):
        several = f", {how_many(images // each)}" if images % each == 0 else ""
        wanted = how_many(budget.images)
        details, hint = f"the variant is for {wanted} of {each}", f"give exactly {wanted}"
        raise HimapError(f"prompt {row} holds {images} image tokens{several}", details, hint, Exit.USAGE)
    if not text and not budget.visual[-1]:
        details = f"the plan drops all {visual} image tokens"
        raise HimapError(f"prompt {row} has no text", details, "ask something", Exit.USAGE)
    if text > budget.text:
        hint = f"shorten it, or export with `text_budget` {text}"
        raise HimapError(f"prompt {row} has {text} text tokens", f"the budget is {budget.text}", hint, Exit.USAGE)
    return images // each
