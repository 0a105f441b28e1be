"""The importance scores: what ranks image tokens at a cut, one function per criterion, by name."""

from collections.abc import Callable

import onnx_ir as ir

from himap_export.graphs.attention_scores import (
    boundary_score,
    debiased_instruction_score,
    image_score,
    instruction_score,
    last_score,
)
from himap_export.graphs.baseline_scores import random_score, uniform_score
from himap_export.graphs.build import dim
from himap_export.graphs.dart import dart_score
from himap_export.graphs.errors import Exit, HimapError, suggestion
from himap_export.graphs.hawk import hawk_score
from himap_export.graphs.plan import PruningPlan
from himap_export.graphs.scoring import Score, ScoringContext
from himap_export.graphs.selectors import find_selector
from himap_export.graphs.spec import IMAGE, DecoderSpec
from himap_export.graphs.state_scores import key_norm_score, variation_score

SCORES: dict[str, Score] = {
    "instruction": instruction_score,
    "image": image_score,
    "last": last_score,
    "boundary": boundary_score,
    "random": random_score,
    "uniform": uniform_score,
    "key-norm": key_norm_score,
    "v2drop": variation_score,
    "instruction-debiased": debiased_instruction_score,
    "hawk": hawk_score,
    "dart": dart_score,
}
# How many coefficients a cut may have for a criterion of ours, where that is not none.
COEFFICIENTS: dict[str, Callable[[DecoderSpec], tuple[int, ...]]] = {
    "instruction-debiased": lambda spec: (1,),
    "hawk": lambda spec: (0, spec.heads),
}


def score_of(criterion: str) -> Score:
    """Returns what builds `criterion` into a graph. HimapError (usage) for one that there is not, or as
    `find_selector`."""
    if criterion in SCORES:
        return SCORES[criterion]
    found = find_selector(criterion)
    if found is None:
        details = f"known: {', '.join(SCORES)}{suggestion(criterion, SCORES)}"
        hint = "one of your own is registered before it is used, or offered by a package"
        raise HimapError(f"unknown criterion {criterion}", details, hint, Exit.USAGE)
    return found.score


def require_scores(plan: PruningPlan, spec: DecoderSpec) -> None:
    """Raises HimapError as `score_of` if a criterion of the plan cannot be built into a graph, and (usage) if it is
    ours and takes another number of coefficients."""
    for cut in plan.cuts:
        score_of(cut.criterion)
        counts = COEFFICIENTS[cut.criterion](spec) if cut.criterion in COEFFICIENTS else (0,)
        if cut.criterion in SCORES and len(cut.coefficients) not in counts:
            summary = f"the cut at layer {cut.layer} has {len(cut.coefficients)} coefficients for {cut.criterion}"
            hint = "himap-analyze fits them and writes a plan" if counts[-1] else "leave them out"
            raise HimapError(summary, f"it takes {' or '.join(map(str, counts))}", hint, Exit.USAGE)


def importance(criterion: str, s: ScoringContext) -> ir.Value:
    """Returns [B,S] fp32: image tokens' score by `criterion`; +inf for others, which always stay.

    HimapError (usage) as `score_of`, or if a criterion of one's own returns anything but [B,S] fp32."""
    score, wanted = score_of(criterion)(s), tuple(dim(s.token_type, axis) for axis in (0, 1))
    if tuple(score.shape or wanted) != wanted or score.dtype not in (None, ir.DataType.FLOAT):
        details = f"{score.dtype} {score.shape}, not FLOAT {list(wanted)}, batch and tokens"
        raise HimapError(f"the criterion {criterion} scores in another shape", details, code=Exit.USAGE)
    return s.op.Where(s.op.Equal(s.token_type, IMAGE), score, float("inf"))
