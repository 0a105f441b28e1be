"""What an answer loses where attention to the image is blocked, window of layers by window of layers.

    image-to-text    instruction rows may not see image columns
    image-to-image   image rows may not see image columns
    random           the baseline: as many rows as there are instruction rows, drawn among image and instruction
                     rows, may not see image columns

A row that would see nothing keeps itself; without a system token before the image, the authors' code makes it NaN.
Source: the authors' `src/HiMAP/validate/attn_disruption.py`, `disruption_forward.py`. There the mask that all layers
share is changed in place, so their disruption lasts from its layer to the last one; ours lasts for its window.

Whatever its window, a disrupted run starts from the undisturbed hidden states that enter the window's first layer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.analysis.attention import Prompt, prompts
from himap_export.validate.analysis.sample import SampleSet, Spans
from himap_export.validate.progress import Count, silent
from himap_export.validate.reference.reference import Reference

KINDS = ("image-to-text", "image-to-image", "random")
TOP = 5  # tokens whose sets are compared


@dataclass(frozen=True)
class Disruption:
    """How much of the answer survives a disruption of the layers [first, first + width)."""

    kind: str  # one of KINDS
    first: int
    width: int
    label_consistency: float  # share of samples whose greedy first token stays the same
    score_consistency: float  # mean Jaccard index of the sets of the 5 likeliest first tokens
    samples: int


def disruption(
    reference: Reference,
    samples: SampleSet,
    firsts: Sequence[int] | None = None,
    width: int = 1,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
    progress: Count = silent,
) -> tuple[Disruption, ...]:
    """Returns every kind at every first layer (`None`: all at which the window fits). `seed` draws the rows of
    "random".

    HimapError if a window does not lie within the layers, or there is no such kind.
    """
    firsts = range(reference.layers - width + 1) if firsts is None else firsts
    if width < 1 or not firsts or min(firsts) < 0 or max(firsts) + width > reference.layers:
        found = f"windows of {width} at {', '.join(map(str, firsts)) or 'no layer'}"
        raise HimapError("windows must lie within the layers", found, f"there are {reference.layers}", Exit.USAGE)
    if unknown := set(kinds) - set(KINDS):
        raise HimapError("no such disruption", ", ".join(sorted(unknown)), f"one of {', '.join(KINDS)}", Exit.USAGE)
    kept: dict[tuple[str, int], list[tuple[bool, float]]] = {case: [] for case in product(kinds, firsts)}
    with torch.no_grad(), prompts(reference, samples, progress) as each:
        for index, prompt in enumerate(each):
            states = prompt.states()
            plain = prompt.logits(states[-1])
            for kind, first in kept:
                allowed = allowed_by(kind, prompt.spans, np.random.default_rng((seed, index, first)))
                logits = _disturbed(prompt, states[first], first=first, width=width, allowed=allowed)
                kept[kind, first].append(agreement(plain, logits))
    means = ((*case, *np.mean(pairs, axis=0).tolist()) for case, pairs in kept.items())
    return tuple(
        Disruption(kind, first, width=width, label_consistency=label, score_consistency=score, samples=len(samples))
        for kind, first, label, score in means
    )


def allowed_by(kind: str, spans: Spans, random: np.random.Generator) -> NDArray[np.bool_]:
    """Returns [S,S]: may row i see column j under this disruption. It is causal, and no row is without a column."""
    candidates, count = np.flatnonzero(spans.image | spans.instruction), int(spans.instruction.sum())
    drawn = np.isin(np.arange(len(spans.image)), random.choice(candidates, count, replace=False))
    rows = {"image-to-text": spans.instruction, "image-to-image": spans.image, "random": drawn}[kind]
    allowed = np.tri(len(rows), dtype=bool) & ~np.outer(rows, spans.image)
    allowed[np.diag_indices_from(allowed)] |= ~allowed.any(1)
    return allowed


def agreement(plain: Tensor, disturbed: Tensor) -> tuple[bool, float]:
    """Compares two logits [W]: is the likeliest token the same; the Jaccard index of the sets of the 5 likeliest."""
    before, after = (logits.topk(TOP).indices.tolist() for logits in (plain, disturbed))
    return before[0] == after[0], len({*before} & {*after}) / len({*before, *after})


def bias_ratio(results: Sequence[Disruption]) -> Mapping[int, float | None]:
    """Returns D = log(E_vv / E_vt) by first layer, where E is 1 - score consistency of image-to-image, of
    image-to-text.

    Above 0 the image talks more to itself than to the text. None where one of the two changes nothing.
    """
    error = {(result.kind, result.first): 1 - result.score_consistency for result in results}
    both = [first for kind, first in error if kind == "image-to-image" and ("image-to-text", first) in error]
    ratios: dict[int, float | None] = {}
    for first in both:
        visual, text = error["image-to-image", first], error["image-to-text", first]
        ratios[first] = math.log(visual / text) if visual > 0 and text > 0 else None
    return ratios


def _disturbed(prompt: Prompt, hidden: Tensor, first: int, width: int, allowed: NDArray[np.bool_]) -> Tensor:
    """Logits [W] of `hidden` [1,S,D], which enters layer `first`, with the window's attention `allowed` [S,S] only."""
    window = torch.from_numpy(allowed).to(hidden.device)
    for layer in range(first, prompt.layers):
        hidden = prompt.run(layer, hidden, window if layer < first + width else None)
    return prompt.logits(hidden)
