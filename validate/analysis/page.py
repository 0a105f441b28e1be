"""An analysis as people read it: the curves, the Grad-CAMs, and where to cut."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import sqrt
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np

from himap_export.validate.analysis.disruption import KINDS, bias_ratio
from himap_export.validate.analysis.flow import Flow
from himap_export.validate.analysis.saliency import LayerFlow
from himap_export.validate.analysis.sample import average
from himap_export.validate.report.charts import Datum, lines
from himap_export.validate.report.columns import aligned
from himap_export.validate.report.page import Block, Command, Facts, Figure, Gallery, Page, Picture, Section, Table, png

LAYER = "decoder layer (from 0)"
SPREAD = "lines are means over questions, bands run from the 10th to the 90th percentile."
PLOTS = (
    "saliency-shares", "saliency-visual", "attention-shares", "label-consistency", "score-consistency", "bias-ratio",
)  # fmt: skip
Layer = TypeVar("Layer")


def report_files(cams: int) -> tuple[str, ...]:
    """Returns the names of all files that the report of an analysis with up to `cams` Grad-CAMs may hold."""
    seen = (f"cam-{n}-{part}" for n in range(1, cams + 1) for part in ("decoder", "tower"))
    return "report.html", "report.json", *(f"{name}.png" for name in (*PLOTS, *seen))


def flow_json(flow: Flow) -> dict[str, Any]:
    """Means by layer, every disruption, and the advice."""
    return {
        "questions": len(flow.flows),
        "saliency": [asdict(layer) for layer in average(flow.flows)],
        "attention_shares": [asdict(layer) for layer in average(flow.shares)],
        "disruption": [asdict(d) for d in flow.disruptions],
        "bias_ratio": {str(first): ratio for first, ratio in bias_ratio(flow.disruptions).items()},
        "recommendation": asdict(flow.advice),
    }


def flow_lines(flow: Flow) -> list[str]:
    """Returns one row per layer, then the advice."""
    return [*aligned([_HEAD, *_rows(flow)]), "", _note(flow), "", *flow.advice.reasons]


_HEAD = ("layer", "saliency image", "S_vv / S_vt", "attention to image", *KINDS, "D")


def _rows(flow: Flow) -> list[tuple[str, ...]]:
    kept = {(d.kind, d.first): d.label_consistency for d in flow.disruptions}
    ratios, found = bias_ratio(flow.disruptions), []
    for layer, (saliency, look) in enumerate(zip(average(flow.flows), average(flow.shares), strict=True)):
        told = [f"{kept[kind, layer]:.0%}" if (kind, layer) in kept else "" for kind in KINDS]
        balance = saliency.visual_to_visual / saliency.visual_to_text if saliency.visual_to_text else float("inf")
        bias = "" if (ratio := ratios.get(layer)) is None else f"{ratio:+.2f}"
        found.append((f"{layer}", f"{saliency.image:.1%}", f"{balance:.2g}", f"{look.image:.1%}", *told, bias))
    return found


def _note(flow: Flow) -> str:
    width = flow.disruptions[0].width
    window = f"{width} layer{'s' * (width > 1)} from this one on"
    return f"{', '.join(KINDS)}: answers that stay the same when this attention is blocked in {window}"


def flow_page(flow: Flow, model: str, dtype: str, made: tuple[Block, ...]) -> Page:
    """Returns saliency, attention, disruption, Grad-CAM, advice: one section each; `made`: what made it."""
    advice: list[Block] = ["\n\n".join(flow.advice.reasons)]
    if flow.advice.k1 is not None and flow.advice.k2 is not None:
        cuts = f"--k1 {flow.advice.k1} --k2 {flow.advice.k2}"
        advice.append(Command(f"himap-export {model} {cuts} --out bundle/"))
        advice.append("`himap-tune` measures what plans around these cuts cost in accuracy and gain in time.")
    k1, k2 = (("none" if k is None else f"{k}") for k in (flow.advice.k1, flow.advice.k2))
    trust = "the curves show the pattern" if flow.advice.confident else "the curves do not show the pattern clearly"
    facts = Facts((
        ("questions", f"{len(flow.flows)}", f"of {flow.image_tokens} image tokens each"),
        ("first cut K1", k1, trust),
        ("second cut K2", k2, f"of {flow.layers} layers"),
    ))  # fmt: skip
    sections = (
        Section("Where to cut", (facts, *advice, Table("layers", _HEAD, tuple(_rows(flow)), _note(flow)))),
        Section("Saliency: what the answer's loss depends on", _saliency(flow)),
        Section("Attention: where the answer looks", _attention(flow)),
        Section("Disruption: what the answer survives", _disruption(flow)),
        *([Section("Grad-CAM: which patches speak for the answer", _cams(flow))] if flow.seen else []),
        Section("How this was made", (_METHOD, *made)),
    )
    return Page(f"Information flow in {model}", f"PyTorch reference in {dtype}", sections)


_METHOD = (
    "Saliency and disruption follow HiMAP (arXiv 2503.13108) and its authors' code; attention shares and Grad-CAM "
    "follow arXiv 2406.06579. Each is computed on Hugging Face's own modules, a layer at a time."
)


def _saliency(flow: Flow) -> tuple[Block, ...]:
    shares = [d for name in ("system", "image", "instruction") for d in _curve(name, flow.flows, attrgetter(name))]
    both = [
        *_curve("image to image, S_vv", flow.flows, lambda f: f.visual_to_visual / _visual(f)),
        *_curve("image to instruction, S_vt", flow.flows, lambda f: f.visual_to_text / _visual(f)),
    ]
    told = "A token's share of saliency, by kind of token"
    title = "What leaves the image: to other image tokens, or to the instruction"
    return (
        _lines("saliency-shares", told, how=SPREAD, data=shares, unit="share per token"),
        _lines("saliency-visual", title, how=SPREAD, data=both, unit="share of the image's saliency"),
    )


def _visual(f: LayerFlow) -> float:
    return (f.visual_to_visual + f.visual_to_text) or 1.0


def _attention(flow: Flow) -> tuple[Block, ...]:
    found = [d for name in ("system", "image", "user") for d in _curve(name, flow.shares, attrgetter(name))]
    title = "The answer token's attention, by kind of token"
    return (_lines("attention-shares", title, how=SPREAD, data=found, unit="share of attention"),)


def _disruption(flow: Flow) -> tuple[Block, ...]:
    width = flow.disruptions[0].width
    window = f"when attention is blocked in {'one layer' if width == 1 else f'{width} layers from here on'}"
    label, score = f"Answers that stay the same, {window}", f"Overlap of the five likeliest tokens, {window}"
    questions = f"{len(flow.flows)} questions"
    low = "where a line falls, the answer needs that attention, if it falls lower than random's. Bands:"
    ratios = bias_ratio(flow.disruptions)
    bias = [Datum("D", layer, ratios.get(layer)) for layer in range(flow.layers)]
    title = "Above 0 the image talks to itself, below 0 to the text"
    how = "E is 1 - score consistency. There is no point where blocking one of the two changes nothing."
    return (
        _lines(
            "label-consistency", label, how=f"{low} 95 % for a share of {questions}.",
            data=_kept(flow, "label_consistency"), unit="share of questions",
        ),
        _lines(
            "score-consistency", score, how=f"{low} at least 95 %, of the mean over {questions}.",
            data=_kept(flow, "score_consistency"), unit="Jaccard index",
        ),
        _lines("bias-ratio", title, how=how, data=bias, unit="D = log(E_vv / E_vt)"),
    )  # fmt: skip


def _kept(flow: Flow, field: str) -> list[Datum]:
    """Returns `field` of every disruption, with 1.96 standard errors to both sides, inside [0, 1]."""
    found = []
    for d in flow.disruptions:
        share: float = getattr(d, field)  # of a mean in [0, 1] the error of a share is an upper bound
        half = 1.96 * sqrt(share * (1 - share) / d.samples)
        found.append(Datum(d.kind, d.first, y=share, low=max(0.0, share - half), high=min(1.0, share + half)))
    return found


def _cams(flow: Flow) -> tuple[Block, ...]:
    pictures = [
        Picture(f"cam-{n}-{part}", png(image, 1600), f"{seen.question} - {seen.answer} ({part})")
        for n, seen in enumerate(flow.seen, 1)
        for part, image in seen.sheets.items()
    ]
    return (Gallery(tuple(pictures), "Heat is relative to the largest value of its layer.", wide=True),)


def _curve(name: str, samples: Sequence[Sequence[Layer]], value: Callable[[Layer], float]) -> list[Datum]:
    """Returns the mean over samples, by layer, with the 10th and 90th percentile."""
    values = np.array([[value(layer) for layer in layers] for layers in samples])
    low, high = np.percentile(values, (10, 90), axis=0)
    found = zip(values.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)
    return [Datum(name, layer, *numbers) for layer, numbers in enumerate(found)]


def _lines(name: str, title: str, how: str, data: Sequence[Datum], unit: str) -> Figure:
    return lines(name, title, how=how, data=data, x_label=LAYER, y_label=unit)
