"""Where the answer looks: how the attention of the answer's row divides over the prompt, layer by layer.

lambda_sys, lambda_img, lambda_usr of arXiv 2406.06579, equations 4-6: the attention probabilities of the row that
produces the answer, averaged over the heads and summed over the system, image and user (instruction) tokens. That row
is the prompt's last; it may see every token, so the three sum to 1.
"""

from dataclasses import dataclass

import torch

from himap_export.validate.analysis.attention import Prompt, prompts
from himap_export.validate.analysis.sample import SampleSet
from himap_export.validate.progress import Count, silent
from himap_export.validate.reference.reference import Reference


@dataclass(frozen=True)
class LayerShares:
    """lambda_sys, lambda_img and lambda_usr of one layer; they sum to 1 up to the rounding of the model's dtype."""

    system: float
    image: float
    user: float


def shares(reference: Reference, samples: SampleSet, progress: Count = silent) -> list[tuple[LayerShares, ...]]:
    """Returns, for each sample, the shares in each of the L layers."""
    with prompts(reference, samples, progress) as each:
        return [_shares(prompt) for prompt in each]


@torch.no_grad()
def _shares(prompt: Prompt) -> tuple[LayerShares, ...]:
    hidden, found = prompt.embeds, []
    for layer in range(prompt.layers):
        hidden, attention = prompt.run_with_map(layer, hidden)
        row = attention[0, :, -1].double().mean(0).cpu().numpy()
        spans = (prompt.spans.system, prompt.spans.image, prompt.spans.instruction)
        found.append(LayerShares(*(float(row[span].sum()) for span in spans)))
    return tuple(found)
