"""Which attention an answer depends on, and how the answer's own divides over the prompt, layer by layer.

Saliency is a Taylor expansion (arXiv 2503.13108, section 3):

    I_l = mean over heads of |A_l * dL/dA_l|,   A_l the attention probabilities of layer l,
                                                L the cross entropy of the answer's first token

The authors (`src/HiMAP/analysis/saliency_scivqa.py`, `atten_adapter.py`) multiply A_l by a map of ones, whose gradient
therefore is A_l * dL/dA_l already, and then by A_l once more: they record A_l^2 * dL/dA_l. This is the paper's I_l.

Plain autograd would hold every layer's [H,S,S] maps at once. Here a pass without gradients keeps what enters each
layer, [S,D]; then, from the last layer to the first, one layer at a time is run again with its graph, gives its I_l and
the gradient of what entered it, and is freed. The numbers are those of plain autograd.

Shares are lambda_sys, lambda_img, lambda_usr of arXiv 2406.06579, equations 4-6: the attention probabilities of the row
that produces the answer, the prompt's last, averaged over the heads and summed over system, image and user
(instruction) tokens. That row may see every token, so the three sum to 1.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from himap_export.graphs.errors import HimapError
from himap_export.validate.analysis.attention import Prompt, prompts
from himap_export.validate.analysis.sample import SampleSet, Spans
from himap_export.validate.progress import Count, silent
from himap_export.validate.reference.reference import Reference


@dataclass(frozen=True)
class LayerFlow:
    """Saliency of one layer, as `get_props` of the authors sums it up.

    `system`, `image`, `instruction`: saliency of the rows of these tokens, a token (0 if there is none), divided by the
    sum of the three. `visual_to_visual` (S_vv): sum over image rows and image columns; `visual_to_text` (S_vt): over
    instruction rows and image columns; both in units of the loss, nats.
    """

    system: float
    image: float
    instruction: float
    visual_to_visual: float
    visual_to_text: float


@dataclass(frozen=True)
class LayerShares:
    """lambda_sys, lambda_img and lambda_usr of one layer; they sum to 1 up to the rounding of the model's dtype."""

    system: float
    image: float
    user: float


def saliency(reference: Reference, samples: SampleSet, progress: Count = silent) -> list[tuple[LayerFlow, ...]]:
    """Returns, for each sample, the flow in each of the L layers. HimapError if a loss depends on no attention."""
    with prompts(reference, samples, progress) as each:
        return [_flows(prompt) for prompt in each]


def shares(reference: Reference, samples: SampleSet, progress: Count = silent) -> list[tuple[LayerShares, ...]]:
    """Returns, for each sample, the answer's attention shares in each of the L layers."""
    with prompts(reference, samples, progress) as each:
        return [_shares(prompt) for prompt in each]


def flow_of(saliency: NDArray[np.float64], spans: Spans) -> LayerFlow:
    """Returns the flow in a layer of saliency [S,S]. HimapError if it is 0 everywhere: then nothing has a share in
    it."""
    kinds = (spans.system, spans.image, spans.instruction)
    shares = [float(saliency[kind].sum()) / max(int(kind.sum()), 1) for kind in kinds]
    if not sum(shares) > 0:
        raise HimapError("the loss of a prompt depends on no attention", "its gradient is 0", "is it computed in fp16?")
    system, image, instruction = (share / sum(shares) for share in shares)
    inward, outward = (float(saliency[np.ix_(to, spans.image)].sum()) for to in kinds[1:])
    return LayerFlow(system, image, instruction=instruction, visual_to_visual=inward, visual_to_text=outward)


def _flows(prompt: Prompt) -> tuple[LayerFlow, ...]:
    """Back from the loss, one layer's graph at a time."""
    states = prompt.states()
    gradient, scale = _loss_gradient(prompt, states.pop())
    flows = []
    while states:
        with torch.enable_grad():
            hidden = states.pop().detach().requires_grad_()
            output, attention = prompt.run_with_map(len(states), hidden)
            to_hidden, to_attention = torch.autograd.grad(output, (hidden, attention), gradient)
        found = (attention.detach().float() * to_attention).abs_().mean(1)[0].double() * scale
        flows.append(flow_of(found.cpu().numpy(), prompt.spans))
        del output, attention, to_attention  # before the next layer's are made
        gradient, more = _unit(to_hidden)
        scale *= more
    return tuple(reversed(flows))


@torch.no_grad()
def _shares(prompt: Prompt) -> tuple[LayerShares, ...]:
    hidden, found = prompt.embeds, []
    for layer in range(prompt.layers):
        hidden, attention = prompt.run_with_map(layer, hidden)
        row = attention[0, :, -1].double().mean(0).cpu().numpy()
        spans = (prompt.spans.system, prompt.spans.image, prompt.spans.instruction)
        found.append(LayerShares(*(float(row[span].sum()) for span in spans)))
    return tuple(found)


def _loss_gradient(prompt: Prompt, hidden: Tensor) -> tuple[Tensor, float]:
    """dL/d`hidden`, `hidden` [1,S,D] being what the last layer passed on, divided by a scale; and the scale."""
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        logits = prompt.logits(hidden)
        exact = logits.detach().float().requires_grad_()
        loss = cross_entropy(exact, torch.tensor(prompt.sample.label, device=exact.device))
        to_logits, scale = _unit(torch.autograd.grad(loss, exact)[0])
        to_hidden, more = _unit(torch.autograd.grad(logits, hidden, to_logits.to(logits.dtype))[0])
    return to_hidden, scale * more


def _unit(gradient: Tensor) -> tuple[Tensor, float]:
    """`gradient` / s and s, a power of two (nothing is rounded) that brings its largest entry into [0.5, 1).

    An answer the model is sure of has gradients too small for fp16, and by the chain rule a factor can wait.
    """
    scale = math.ldexp(1.0, math.frexp(float(gradient.abs().max()))[1])
    return (gradient.double() / scale).to(gradient.dtype), scale
