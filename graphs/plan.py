"""Where tokens are cut, by what they are ranked, and how many survive.

A plan is a list of cuts. HiMAP's two (arXiv 2503.13108, section 4; authors' `himap.py`) are the default; the other
policies are the methods it is compared with, and the baselines without which no comparison counts.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Literal, Self

from msgspec import Meta, Struct
from msgspec.structs import replace

from himap_export.graphs.errors import Exit, HimapError

Visual = tuple[int, ...]  # [V0, V1, ..]: image tokens alive in each stage
# Of a file that says how many: the longest contexts are a million tokens, and every slot of a budget is memory.
Tokens = Annotated[int, Meta(ge=0, le=2**20)]
MOST_CUTS = 64  # a cut opens a stage, and a stage has a layer
# Among which image tokens a cut ranks: all of the prompt's (the papers'), or each picture's by themselves.
Quota = Literal["prompt", "per-image"]
MOST_IMAGES = 256  # in a prompt: of the fewest tokens that a picture has, they fill most contexts
MOST_FRAMES = 1024  # seen of a film
# The name of what ranks image tokens at a cut; `graphs/importance.py` says how, one function each, and takes new ones.
Criterion = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]{0,63}\Z")]
# What was fitted to a model for a criterion: a trend's slope, weights of heads. Bounds keep out NaN and infinity.
Coefficients = Annotated[tuple[Annotated[float, Meta(ge=-1e6, le=1e6)], ...], Meta(max_length=2**12)]


class Cut(Struct, frozen=True, forbid_unknown_fields=True):
    """Layers `layer` and later (from 0) see only the image tokens that this cut keeps.

    `criterion` ranks them by the layer before. Either `remove`, the fraction of the image tokens still alive that leave
    (removed count: floor(R * n)), or `keep`, the number that stay. `coefficients`: what the criterion weighs with.
    """

    layer: Annotated[int, Meta(ge=0, le=1024)]
    criterion: Criterion
    remove: Annotated[float, Meta(ge=0, lt=1)] | None = None
    keep: Tokens | None = None
    coefficients: Coefficients = ()

    def kept(self, alive: int) -> int:
        """Returns V' of V `alive` image tokens; HimapError (usage) if more are to be kept than there are."""
        if self.keep is None:
            return alive - math.floor((self.remove or 0) * alive)
        if self.keep > alive:
            summary = f"the cut at layer {self.layer} keeps {self.keep} image tokens"
            raise HimapError(summary, f"only {alive} reach it", "keep fewer", Exit.USAGE)
        return self.keep


class PruningPlan(Struct, frozen=True, forbid_unknown_fields=True):
    """The cuts, in the order of their layers; none: the unpruned model, in one stage.

    Layers `0..k1-1` see all tokens, `k1..k2-1` those kept by the first cut, and so on. A fraction is of what the cut
    before it left. `quota`: whether a cut ranks the tokens of all pictures of a prompt together, or keeps as many of
    each.
    """

    cuts: Annotated[tuple[Cut, ...], Meta(max_length=MOST_CUTS)] = ()
    quota: Quota = "prompt"

    @property
    def stages(self) -> tuple[str, ...]:
        """prefix, k1, k2, ..: the parts of prefill, each cut opening one."""
        return "prefix", *(f"k{n}" for n, _ in enumerate(self.cuts, 1))

    @property
    def policy(self) -> str:
        """The name in POLICIES of what the cuts do, or custom."""
        found = tuple(cut.criterion for cut in self.cuts)
        if len(set(found)) == 1 and found[0] not in PARTS:  # a policy of the criterion's own name, at any cuts
            return found[0]
        return next((name for name, criteria in POLICIES.items() if criteria == found), "custom")

    def ranked_by(self, criterion: Criterion) -> Self:
        """Returns the same cuts at equal FLOPs, all by another criterion: the baselines."""
        cuts = (replace(cut, criterion=criterion, coefficients=()) for cut in self.cuts)
        return replace(self, cuts=tuple(cuts))

    def check(self, layers: int) -> Self:
        """Returns the plan itself, if a decoder of `layers` layers can follow it; else HimapError (usage)."""
        for name, cut in zip(self.stages[1:], self.cuts, strict=True):
            _check_cut(name, cut, layers)
        for n, (before, after) in enumerate(pairwise(self.cuts), 1):
            if after.layer <= before.layer:
                summary = f"`k{n + 1}` {after.layer} is not above `k{n}` {before.layer}"
                raise _bad(summary, "cuts come in the order of their layers")
        return self

    def kept(self, image_tokens: int, images: int = 1) -> Visual:
        """Returns [V0, V1, ..]: image tokens alive in each stage, of a prompt of `images` pictures of `image_tokens`
        each. HimapError (usage) if a cut finds too few."""
        ranked = 1 if self.quota == "prompt" else images  # sets of tokens that are ranked by themselves
        found = [image_tokens * images // ranked]
        for cut in self.cuts:
            if not found[-1]:
                raise _bad(f"the cut at layer {cut.layer} finds no image token", "the cut before it keeps none")
            found.append(cut.kept(found[-1]))
        return tuple(n * ranked for n in found)


def _check_cut(name: str, cut: Cut, layers: int) -> None:
    if (cut.remove is None) == (cut.keep is None):
        raise _bad(f"the cut {name} needs either a fraction to remove or a number to keep", "give one of the two")
    if cut.remove is not None and not 0 <= cut.remove < 1:
        summary = f"`r{name[1:]}` {cut.remove} is outside [0, 1)"
        raise _bad(summary, "it is the fraction of image tokens to remove")
    if cut.keep is not None and cut.keep < 0:
        raise _bad(f"`keep` {cut.keep} is below 0", "it is the number of image tokens that stay")
    if not all(math.isfinite(number) for number in cut.coefficients):
        raise _bad(f"`coefficients` of the cut {name} are not finite", "fit them again")
    if cut.layer < 1:
        raise _bad(f"`{name}` {cut.layer} is below 1", "the layer before a cut ranks the tokens")
    if cut.layer >= layers:
        hint = f"the model has {layers} layers: use at most {layers - 1}"
        raise _bad(f"`{name}` {cut.layer} is past the last layer", hint)


def _bad(summary: str, hint: str) -> HimapError:
    return HimapError(summary, hint=hint, code=Exit.USAGE)


# himap: arXiv 2503.13108. fastv: arXiv 2403.06764. truncation: arXiv 2406.06579, eqs. 7-11. intra-visual: HiMAP's
# ablation, its second criterion also at the shallow cut. himap-debiased: arXiv 2508.17807. hawk: arXiv 2604.07812.
# dart: arXiv 2502.11494. random and uniform: the baselines, at any plan's cuts. At HiMAP's cuts, to compare:
# key-norm (arXiv 2601.17818; theirs are at 2 and 22), v2drop (arXiv 2509.01552; at 3, 16 and 22).
POLICIES: Mapping[str, tuple[Criterion, ...]] = {
    "himap": ("instruction", "image"),
    "fastv": ("last",),
    "truncation": ("boundary",),
    "intra-visual": ("image", "image"),
    "himap-debiased": ("instruction-debiased", "image"),
    "hawk": ("hawk",),
    "dart": ("dart",),
    "random": ("random", "random"),
    "uniform": ("uniform", "uniform"),
    "key-norm": ("key-norm", "key-norm"),
    "v2drop": ("v2drop", "v2drop"),
    "none": (),
}
# What ranks at some cut of a policy that has a name of its own; any other criterion is a policy by its own name.
PARTS = {criterion for name, criteria in POLICIES.items() for criterion in criteria if criterion != name}


def himap(k1: int, k2: int, r1: float, r2: float) -> PruningPlan:
    """Returns HiMAP's plan: `r1` is removed at layer `k1`, `r2` of the rest at layer `k2`."""
    return PruningPlan((Cut(k1, "instruction", r1), Cut(k2, "image", r2)))


# The authors' settings: question answering (`eval_scivqa.sh`) and captioning.
TASKS = {"qa": himap(2, 8, 0.5, 0.75), "caption": himap(2, 15, 0.5, 0.5)}


def align(visual: Visual, text: int, multiple: int) -> Visual:
    """Returns [V0, V1, ..] with more image tokens kept: each stage behind a cut holds a multiple of `multiple` tokens.

    V0 is the image's own. A stage never holds more image tokens than the one before it; HimapError (usage) if a cut
    that removed tokens would then remove none.
    """
    if multiple < 1:
        raise _bad(f"`align` {multiple} is below 1", "give the tile height of the matrix products, such as 64")
    found = [visual[0]]
    for before, after in pairwise(visual):
        if before == after:
            found.append(found[-1])
            continue
        kept = math.ceil((after + text) / multiple) * multiple - text
        if kept >= found[-1]:
            hint = f"{after} of {before} image tokens should stay: align to less"
            raise _bad(f"`align` {multiple} undoes a cut", hint)
        found.append(kept)
    return tuple(found)


class TokenBudget(Struct, frozen=True, forbid_unknown_fields=True):
    """Static token counts of the stages.

    `visual` = [V0, V1, ..] image tokens of `images` pictures (or of a film), `text` = T slots for all other tokens
    (padding included), `new` = tokens that may be generated. Stage i holds S_i = V_i + T tokens and a KV cache of C_i =
    S_i + new. `batch`: prompts that are answered together. `slots`: rows of a second decode graph, for prompts that
    come and go one by one; 0: none.
    """

    visual: Annotated[tuple[Tokens, ...], Meta(min_length=1, max_length=MOST_CUTS + 1)]
    text: Tokens
    new: Tokens
    batch: Annotated[int, Meta(le=4096)] = 1
    slots: Annotated[int, Meta(ge=0, le=4096)] = 0
    images: Annotated[int, Meta(ge=1, le=MOST_IMAGES)] = 1

    def __post_init__(self) -> None:
        for name, value in (("`text_budget`", self.text), ("`max_new_tokens`", self.new), ("`batch`", self.batch)):
            if value < 1:
                raise _bad(f"{name} {value} is below 1", "give a positive number of tokens or samples")
        if self.slots and self.batch > 1:
            raise _bad(f"`slots` need a `batch` of 1, not {self.batch}", "each prompt takes one slot, when one is free")

    @property
    def prunes(self) -> bool:
        """Whether a cut removes image tokens."""
        return self.visual[-1] < self.visual[0]

    @property
    def total(self) -> tuple[int, ...]:
        """[S0, S1, ..]."""
        return tuple(v + self.text for v in self.visual)

    @property
    def capacity(self) -> tuple[int, ...]:
        """[C0, C1, ..]."""
        return tuple(s + self.new for s in self.total)
