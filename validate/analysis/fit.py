"""What some selectors weigh with, fitted to a model once: the trend of its attention, the worth of its heads.

Attention debiasing (arXiv 2508.17807) divides the instruction's attention to an image token by the trend of its place,
an exponential. HAWK (arXiv 2604.07812) weighs each head by how many answers go wrong without it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from himap_export.validate.analysis.attention import Prompt, prompts
from himap_export.validate.analysis.sample import SampleSet
from himap_export.validate.progress import Count
from himap_export.validate.reference.reference import Reference
from himap_export.validate.report.columns import aligned


@dataclass(frozen=True)
class Fitted:
    """`slopes[l]`: the instruction's attention to image tokens in layer l grows exp(slope) times from one position to
    the next. `right`: the share of right answers; `without[h]`: the same without head h of layer 0."""

    slopes: tuple[float, ...]
    right: float
    without: tuple[float, ...]

    @property
    def heads(self) -> tuple[float, ...]:
        """Weights of the heads that add up to 1: answers lost without each; none if none loses any."""
        lost = np.maximum(self.right - np.array(self.without), 0)
        return tuple((lost / lost.sum()).tolist()) if lost.sum() else ()

    def toml(self, k1: int, k2: int) -> str:
        """Returns two plans: HiMAP's cuts at `k1` and `k2`, the first one debiased; and HAWK's."""
        weights = ", ".join(f"{weight:.6g}" for weight in self.heads)
        return (
            f'[himap-debiased]\ncuts = [\n    {{layer = {k1}, criterion = "instruction-debiased", remove = 0.5, '
            f"coefficients = [{self.slopes[k1 - 1]:.6g}]}},\n"
            f'    {{layer = {k2}, criterion = "image", remove = 0.75}},\n]\n\n'
            f'[hawk]\ncuts = [{{layer = 1, criterion = "hawk", remove = 0.8, coefficients = [{weights}]}}]\n'
        )


def fit(reference: Reference, samples: SampleSet, progress: Count) -> Fitted:
    """Returns what selectors weigh with in this model, over `samples`, whose images have one number of tokens."""
    totals: list[NDArray[np.float64]] = []
    right, heads = 0, int(reference.decoder.config.num_attention_heads)
    without, places = np.zeros(heads), np.zeros(0, np.int64)
    with torch.no_grad(), prompts(reference, samples, progress) as each:
        for prompt in each:
            image = np.flatnonzero(prompt.spans.image)
            places, received = image - image[0], _received(prompt)
            totals = [a + b for a, b in zip(totals, received, strict=True)] if totals else received
            right += _answer(prompt, prompt.run(0, prompt.embeds))
            without += [_answer(prompt, _without(reference, prompt, head)) for head in range(heads)]
    slopes = tuple(slope_of(places, total / len(samples)) for total in totals)
    return Fitted(slopes, right / len(samples), tuple((without / len(samples)).tolist()))


def slope_of(places: NDArray[np.int64], attention: NDArray[np.float64]) -> float:
    """Returns b of the trend a exp(b x) through the mean `attention` [V] of tokens at `places` [V]: least squares of
    its logarithm."""
    return float(np.polyfit(places, np.log(np.maximum(attention, np.finfo(np.float32).tiny)), 1)[0])


def fitted_lines(found: Fitted) -> list[str]:
    """Returns the slopes, layer by layer, and each head's loss and weight."""
    slopes = [("layer", "slope a token"), *((f"{n}", f"{slope:+.5f}") for n, slope in enumerate(found.slopes))]
    weights = found.heads or (None,) * len(found.without)
    rows = [
        (f"{head}", f"{without:.1%}", "-" if weight is None else f"{weight:.3f}")
        for head, (without, weight) in enumerate(zip(found.without, weights, strict=True))
    ]
    told = f"{found.right:.1%} are right with all heads"
    if not found.heads:
        told += "; no head's loss loses any: all weigh the same"
    return [*aligned(slopes), "", *aligned([("head of layer 0", "right without", "weight"), *rows]), told]


def _received(prompt: Prompt) -> list[NDArray[np.float64]]:
    """What the image tokens receive from the instruction, by layer: [V], mean over heads."""
    hidden, found = prompt.embeds, []
    spans = prompt.spans
    for layer in range(prompt.layers):
        hidden, attention = prompt.run_with_map(layer, hidden)
        mean = attention[0].double().mean(0).cpu().numpy()
        found.append(mean[np.ix_(spans.instruction, spans.image)].sum(0))
    return found


def _answer(prompt: Prompt, hidden: Tensor) -> bool:
    """Whether the answer is right that follows from `hidden` [1,S,D] behind layer 0."""
    for layer in range(1, prompt.layers):
        hidden = prompt.run(layer, hidden)
    return int(prompt.logits(hidden).argmax()) == prompt.sample.label


def _without(reference: Reference, prompt: Prompt, head: int) -> Tensor:
    """The hidden states [1,S,D] behind layer 0 if what its `head` adds is 0."""
    attention = reference.decoder.layers[0].self_attn
    own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)

    def silence(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heard = inputs[0].clone()
        heard[..., own] = 0
        return heard, *inputs[1:]

    hook = attention.o_proj.register_forward_pre_hook(silence)
    try:
        return prompt.run(0, prompt.embeds)
    finally:
        hook.remove()
