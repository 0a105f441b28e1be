"""The importance scores: what ranks image tokens at a cut, one function per criterion, by name."""

import msgspec
import onnx_ir as ir

from himap_export.graphs.attention_scores import boundary_score, image_score, instruction_score, last_score
from himap_export.graphs.baseline_scores import random_score, uniform_score
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import Criterion, PruningPlan
from himap_export.graphs.scoring import Score, ScoringContext
from himap_export.graphs.spec import IMAGE
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
}


def register_score(criterion: str, score: Score) -> None:
    """Lets plans cut by `criterion`, a name of small letters, digits, _ and -.

    HimapError (usage) for any other name, or one that is taken."""
    try:
        msgspec.convert(criterion, Criterion)
    except msgspec.ValidationError:
        details = "a name is up to 64 small letters, digits, _ and -, a letter first"
        raise HimapError(f"{criterion[:80]!r} cannot name a criterion", details, code=Exit.USAGE) from None
    if SCORES.setdefault(criterion, score) is not score:
        raise HimapError(f"there is a criterion {criterion}", f"known: {', '.join(SCORES)}", code=Exit.USAGE)


def require_scores(plan: PruningPlan) -> None:
    """Raises HimapError (usage) if a criterion of the plan is not registered."""
    for cut in plan.cuts:
        if cut.criterion not in SCORES:
            details, hint = f"known: {', '.join(SCORES)}", "one of your own is registered before it is used"
            raise HimapError(f"unknown criterion {cut.criterion}", details, hint, Exit.USAGE)


def importance(criterion: str, s: ScoringContext) -> ir.Value:
    """Returns [B,S] fp32: image tokens' score by `criterion`, a key of SCORES; +inf for others, which always stay."""
    return s.op.Where(s.op.Equal(s.token_type, IMAGE), SCORES[criterion](s), float("inf"))
