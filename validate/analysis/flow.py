"""Everything an analysis finds, in one pass over a data set."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from himap_export.engines.image import load_image
from himap_export.engines.questions import Example, expected
from himap_export.validate.accuracy.prompter import Prompter
from himap_export.validate.analysis.disruption import KINDS, Disruption, disruption
from himap_export.validate.analysis.gradcam import grad_cams
from himap_export.validate.analysis.overlay import overlay, strip
from himap_export.validate.analysis.recommend import Curves, Recommendation, recommend
from himap_export.validate.analysis.saliency import LayerFlow, LayerShares, saliency, shares
from himap_export.validate.analysis.sample import Sample, average
from himap_export.validate.progress import counted
from himap_export.validate.reference.reference import Reference


@dataclass(frozen=True)
class AnalysisOptions:
    """`width` layers disrupted together; Grad-CAM of the first `cams` questions, `smooth` noisy copies each."""

    width: int
    cams: int
    smooth: int
    seed: int


@dataclass(frozen=True)
class Samples:
    """Examples as samples, each made whenever it is looked at: the pixels of all would fill the memory."""

    prompter: Prompter
    examples: Sequence[Example]

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Sample]:
        return map(self.of, self.examples)

    def of(self, example: Example) -> Sample:
        """Returns the sample of one example. HimapError (usage) names its line."""
        arrays = self.prompter.arrays(example)
        return Sample(arrays.input_ids[0], arrays.pixel_values, self.prompter.label(example))


@dataclass(frozen=True)
class GradCamSheets:
    """One question's Grad-CAM over its image: contact sheets by name, of the decoder's layers and, where its patches
    lie as the image tokens do, of the tower's."""

    question: str
    answer: str
    sheets: dict[str, Image.Image]


@dataclass(frozen=True)
class Flow:
    """`flows[i][l]` and `shares[i][l]`: saliency and attention shares of sample i in layer l."""

    layers: int
    image_tokens: int
    flows: list[tuple[LayerFlow, ...]]
    shares: list[tuple[LayerShares, ...]]
    disruptions: tuple[Disruption, ...]
    seen: tuple[GradCamSheets, ...]
    advice: Recommendation


def analyze(reference: Reference, prompter: Prompter, examples: Sequence[Example], options: AnalysisOptions) -> Flow:
    """Returns saliency, attention shares, disruption and Grad-CAM of `examples`, and the cuts that follow from them."""
    samples = Samples(prompter, examples)
    for _ in samples:  # one that cannot be read is refused now, not behind hours of work
        pass
    with counted("disruption") as count:
        disrupted = disruption(reference, samples, width=options.width, seed=options.seed, progress=count)
    with counted("saliency") as count:
        flows = saliency(reference, samples, count)
    with counted("attention shares") as count:
        looks = shares(reference, samples, count)
    seen = tuple(
        _seen(reference, prompter, example=e, sample=samples.of(e), options=options) for e in examples[: options.cams]
    )
    advice = recommend(curves(flows, disrupted, reference.layers))
    tokens = int(reference.adapter.is_image(torch.as_tensor(samples.of(examples[0]).input_ids)).sum())
    return Flow(reference.layers, tokens, flows=flows, shares=looks, disruptions=disrupted, seen=seen, advice=advice)


def curves(flows: Sequence[Sequence[LayerFlow]], disruptions: Sequence[Disruption], layers: int) -> Curves:
    """Returns what a recommendation reads. Where a window does not fit, in the last layers, the last one that did
    stands."""
    changes = {}
    for kind in KINDS:
        found = {d.first: 1 - d.label_consistency for d in disruptions if d.kind == kind}
        changes[kind] = tuple(found[min(layer, max(found))] for layer in range(layers))
    means = average(flows)
    inward, outward = tuple(f.visual_to_visual for f in means), tuple(f.visual_to_text for f in means)
    text, image, chance = (changes[kind] for kind in ("image-to-text", "image-to-image", "random"))
    return Curves(text, image, random_changes=chance, visual_to_visual=inward, visual_to_text=outward)


def _seen(
    reference: Reference, prompter: Prompter, example: Example, sample: Sample, options: AnalysisOptions
) -> GradCamSheets:
    cams, image = grad_cams(reference, sample, options.smooth, seed=options.seed), load_image(example.image)
    sheets = {
        name: strip([(f"layer {n}", overlay(image, prompter.processor.image, heat)) for n, heat in enumerate(part)])
        for name, part in (("decoder", cams.decoder), ("tower", cams.vision))
        if len(part)
    }
    return GradCamSheets(example.question, expected(example), sheets)
