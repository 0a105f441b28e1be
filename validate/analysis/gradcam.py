"""Which patches speak for an answer: Grad-CAM of every decoder layer and every vision layer (arXiv 2406.06579).

    F [V,D] a layer's output at the image's patches,   G = dy/dF,   y the logit of the answer's first token
    w = mean over patches of ReLU(G),   heat = ReLU(mean over channels of w * F), divided by its largest value

as the authors' `demo_smooth_grad_threshold.py` has it; the classic Grad-CAM averages G without the ReLU. Smoothed, the
heat is the mean over noisy copies of the image.

A pass without gradients keeps what enters each decoder layer; then one layer at a time is run again with its graph and
freed, so that no two layers' attention maps are alive together. The tower, small beside the decoder, keeps its graph.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from himap_export.validate.analysis.attention import Prompt, prompts
from himap_export.validate.analysis.sample import Sample
from himap_export.validate.progress import Count, silent
from himap_export.validate.reference.reference import Reference

Heat = NDArray[np.float32]


@dataclass(frozen=True)
class Cams:
    """Heat in [0,1] over the patch grid [h,w], by layer; 0 everywhere where no patch speaks for the answer.

    `vision` has the tower's layers up to the one whose output the projector reads: the others have no part in y.
    """

    decoder: Heat  # [L,h,w]
    vision: Heat  # [Lv,h,w]; Lv is 0 for towers whose patches do not lie as the image tokens do


def grad_cams(
    reference: Reference, sample: Sample, smooth: int = 0, noise: float = 0.1, seed: int = 0, progress: Count = silent
) -> Cams:
    """Returns the heat maps of one sample; with `smooth` n > 0, their mean over n copies of its pixels.

    The copies carry Gaussian noise of `noise` times the pixels' range, drawn by `seed`.
    """
    random, pixels = np.random.default_rng(seed), sample.pixel_values
    deviation = noise * float(np.ptp(pixels))
    copies = [
        replace(sample, pixel_values=pixels + deviation * random.standard_normal(pixels.shape, np.float32))
        for _ in range(smooth)
    ]
    with prompts(reference, copies or [sample], progress) as each:
        found = [_cams(reference, prompt) for prompt in each]
    decoder, vision = (np.mean([part[i] for part in found], axis=0) for i in (0, 1))
    return Cams(_unit(decoder), _unit(vision))


def heat_of(features: Tensor, gradient: Tensor, side: tuple[int, int]) -> Heat:
    """Returns heat [h,w], not yet divided by anything, of features and gradient [V,D]; a class token in front is left
    out."""
    patches = side[0] * side[1]
    weight = gradient[-patches:].double().relu().mean(0)
    heat = (features[-patches:].double() * weight).mean(1).relu().reshape(side)
    return heat.float().cpu().numpy()


def _unit(heat: Heat) -> Heat:
    """Each map divided by its largest value; one of zeros stays."""
    largest = heat.max(axis=(1, 2), keepdims=True)
    unit: Heat = np.divide(heat, largest, out=np.zeros_like(heat), where=largest > 0)
    return unit


def _cams(reference: Reference, prompt: Prompt) -> tuple[Heat, Heat]:
    side = reference.adapter.grid((prompt.sample.pixel_values.shape[2], prompt.sample.pixel_values.shape[3]))
    image = torch.from_numpy(np.flatnonzero(prompt.spans.image)).to(prompt.embeds.device)
    states = prompt.states()
    with torch.enable_grad():
        last = states[-1].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(prompt.logits(last)[prompt.sample.label], last)
    decoder = []
    for layer in reversed(range(prompt.layers)):
        decoder.append(heat_of(states.pop()[0, image], gradient[0, image], side))
        with torch.enable_grad():
            hidden = states[-1].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(prompt.run(layer, hidden), hidden, gradient)
    vision = _tower(reference, prompt.sample, gradient[0, image], side)
    return np.stack(decoder[::-1]), vision


def _tower(reference: Reference, sample: Sample, gradient: Tensor, side: tuple[int, int]) -> Heat:
    """Heat [Lv,h,w] of the tower's layers, from the gradient [V,D] of the image's features."""
    if not reference.adapter.vision_layers:
        return np.zeros((0, *side), np.float32)
    outputs: list[Tensor] = []

    def keep(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in reference.adapter.vision_layers]
    try:
        with torch.enable_grad():
            pixels = torch.as_tensor(sample.pixel_values).to(reference.device, reference.dtype).requires_grad_()
            features = reference.adapter.see(pixels).features
            gradients = torch.autograd.grad(features, outputs, gradient, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = [(f[0].detach(), g[0]) for f, g in zip(outputs, gradients, strict=True) if g is not None]
    return np.stack([heat_of(f, g, side) for f, g in pairs])
