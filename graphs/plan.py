"""Where tokens are cut and how many survive (HiMAP, arXiv 2503.13108, section 4; authors' `himap.py`)."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from himap_export.graphs.errors import Exit, HimapError


@dataclass(frozen=True)
class PruningPlan:
    """Two cuts of the image tokens, by attention of layers `k1 - 1` and `k2 - 1` (layers count from 0).

    Layers `0..k1-1` see all tokens, `k1..k2-1` those kept by the first cut, `k2..` those kept by the second.
    `r1` is the fraction of image tokens *removed* at k1; `r2` the fraction removed of what k1 left.
    """

    k1: int = 2
    k2: int = 8
    r1: float = 0.5
    r2: float = 0.75

    def check(self, layers: int) -> Self:
        """The plan itself, if a decoder of `layers` layers can follow it; else HimapError (usage)."""
        for name, ratio in (("r1", self.r1), ("r2", self.r2)):
            if not 0 <= ratio < 1:
                raise _bad(f"--{name} {ratio} is outside [0, 1)", "it is the fraction of image tokens to remove")
        if self.k1 < 1:
            raise _bad(f"--k1 {self.k1} is below 1", "the layer before the first cut ranks the tokens")
        if self.k2 <= self.k1:
            raise _bad(f"--k2 {self.k2} is not above --k1 {self.k1}", "the second cut comes after the first")
        if self.k2 >= layers:
            raise _bad(
                f"--k2 {self.k2} is past the last layer", f"the model has {layers} layers: use at most {layers - 1}"
            )
        return self

    def kept(self, image_tokens: int) -> tuple[int, int, int]:
        """[V0, V1, V2]: image tokens alive in the three stages. Removed counts are floor(R * n)."""
        first = image_tokens - math.floor(self.r1 * image_tokens)
        return image_tokens, first, first - math.floor(self.r2 * first)


def align(visual: tuple[int, int, int], text: int, multiple: int) -> tuple[int, int, int]:
    """[V0, V1, V2] with more image tokens kept, so that each stage behind a cut holds a multiple of `multiple` tokens.

    V0 is the image's own. A stage never holds more image tokens than the one before it; HimapError (usage) if a cut
    that removed tokens would then remove none.
    """
    if multiple < 1:
        raise _bad(f"--align {multiple} is below 1", "give the tile height of the matrix products, such as 64")
    found = [visual[0]]
    for before, after in pairwise(visual):
        if before == after:
            found.append(found[-1])
            continue
        kept = math.ceil((after + text) / multiple) * multiple - text
        if kept >= found[-1]:
            raise _bad(
                f"--align {multiple} undoes a cut", f"{after} of {before} image tokens should stay: align to less"
            )
        found.append(kept)
    return found[0], found[1], found[2]


def _bad(summary: str, hint: str) -> HimapError:
    return HimapError(summary, hint=hint, code=Exit.USAGE)


# The authors' settings: question answering (`eval_scivqa.sh`) and captioning.
TASKS = {"qa": PruningPlan(2, 8, 0.5, 0.75), "caption": PruningPlan(2, 15, 0.5, 0.5)}


@dataclass(frozen=True)
class TokenBudget:
    """Static token counts of the three stages.

    `visual` = [V0, V1, V2] image tokens, `text` = T slots for all other tokens (padding included), `new` = tokens that
    may be generated. Stage i holds S_i = V_i + T tokens and a KV cache of C_i = S_i + new.
    """

    visual: tuple[int, int, int]
    text: int
    new: int
    batch: int = 1

    def __post_init__(self) -> None:
        for name, value in (("--text-budget", self.text), ("--max-new-tokens", self.new), ("--batch", self.batch)):
            if value < 1:
                raise _bad(f"{name} {value} is below 1", "give a positive number of tokens or samples")

    @property
    def total(self) -> tuple[int, int, int]:
        """[S0, S1, S2]."""
        v0, v1, v2 = self.visual
        return v0 + self.text, v1 + self.text, v2 + self.text

    @property
    def capacity(self) -> tuple[int, int, int]:
        """[C0, C1, C2]."""
        s0, s1, s2 = self.total
        return s0 + self.new, s1 + self.new, s2 + self.new
