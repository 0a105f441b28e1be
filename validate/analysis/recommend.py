"""Where to cut, and why, from the curves of an analysis (arXiv 2503.13108, section 3).

HiMAP's reading of them: in shallow layers the image speaks to the instruction, and blocking that changes answers; then
image tokens gather what they know among themselves; in deep layers neither matters any more. So the first cut may come
where blocking image-to-text attention stops mattering, the second where blocking image-to-image attention stops, too.
"Stops mattering" is told by the baseline: blocking as many random rows changes that many answers anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass

SLACK = 0.02  # of answers, above what the random baseline changes: less than that is noise at a few hundred questions
MATTERS = 0.05  # a phase in which blocking changes fewer answers than this never existed


@dataclass(frozen=True)
class Curves:
    """By layer l of L: the share of answers that blocking one kind of attention in l changes, and the saliency that
    goes from image tokens to others and to the instruction (in any unit); averages over the same questions."""

    text_changes: tuple[float, ...]  # image-to-text
    image_changes: tuple[float, ...]  # image-to-image
    random_changes: tuple[float, ...]  # the baseline
    visual_to_visual: tuple[float, ...]
    visual_to_text: tuple[float, ...]


@dataclass(frozen=True)
class Recommendation:
    """The cuts, or None where the curves give no ground for one; `confident` if they show HiMAP's pattern."""

    k1: int | None
    k2: int | None
    reasons: tuple[str, ...]
    confident: bool


def recommend(curves: Curves) -> Recommendation:
    """Recommends K1, the first layer from which on image-to-text attention matters no more than chance, and K2, the
    same for both."""
    layers = len(curves.text_changes)
    text, image = (_last(changes, curves.random_changes) for changes in (curves.text_changes, curves.image_changes))
    reasons = [
        _told("image-to-text", curves.text_changes, text),
        _told("image-to-image", curves.image_changes, image),
        _flow(curves),
    ]
    k1 = max(text + 1, 1)
    k2 = max(image + 1, k1 + 1)
    if k1 > layers - 2:
        reasons.append(f"The instruction reads the image up to layer {text} of {layers}: no layer is left to gain by.")
        return Recommendation(None, None, tuple(reasons), False)
    if k2 > layers - 1:
        reasons.append(f"Image tokens inform each other up to layer {image}: a second cut has no layer left.")
        return Recommendation(k1, None, tuple(reasons), False)
    phases = max(curves.text_changes) > MATTERS and max(curves.image_changes) > MATTERS
    pattern = phases and text <= image
    if not phases:
        reasons.append("Blocking one of the two hardly changes answers in any layer: the cuts are as good as others.")
    elif not pattern:
        reasons.append("The instruction reads the image longer than image tokens inform each other: not HiMAP's order.")
    reasons.append(f"So cut at K1 = {k1} and K2 = {k2}; himap-tune tells what that costs on your questions.")
    return Recommendation(k1, k2, tuple(reasons), pattern)


def _last(changes: Sequence[float], baseline: Sequence[float]) -> int:
    """The last layer in which blocking changes more answers than the baseline does; -1 if there is none."""
    return max((layer for layer, (c, r) in enumerate(zip(changes, baseline, strict=True)) if c > r + SLACK), default=-1)


def _told(kind: str, changes: Sequence[float], last: int) -> str:
    peak = max(range(len(changes)), key=lambda layer: changes[layer])
    most = f"Blocking {kind} attention changes {changes[peak]:.0%} of answers in layer {peak}"
    if last == -1:
        return f"{most}, and nowhere more than blocking random rows does."
    if last == len(changes) - 1:
        return f"{most}, and still {changes[last]:.0%} in the last layer."
    after = max(changes[last + 1 :])
    return f"{most}; from layer {last + 1} on at most {after:.0%}, no more than blocking random rows does."


def _flow(curves: Curves) -> str:
    pairs = zip(curves.visual_to_visual, curves.visual_to_text, strict=True)
    inward = [layer for layer, (vv, vt) in enumerate(pairs) if vv > vt]
    if not inward:
        return "In every layer more saliency goes from the image to the instruction than to other image tokens."
    return f"More saliency goes from image to image than to the instruction in {_ranges(inward)}."


def _ranges(layers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "layers 0-2, 5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    runs_text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"layer{'s' * (len(layers) > 1)} {runs_text}"
