"""DART (arXiv 2502.11494): tokens that are least like a few pivots, taken greedily, pivot after pivot.

Four pivots are image tokens, four are text behind the image, each those whose rotated keys are longest (L1). In the
order of their places every pivot takes its share of the image tokens that are still free, those whose hidden states lie
farthest from its own (cosine, behind the model's final norm). Image pivots stay themselves.
"""

import onnx_ir as ir

from himap_export.graphs.build import dim
from himap_export.graphs.scoring import ScoringContext, positions_of
from himap_export.graphs.spec import IMAGE, INSTRUCTION

FLOAT = ir.DataType.FLOAT
PIVOTS = 4  # of each kind: the authors' `pivot_image_token`, `pivot_text_token`
PIVOT, NEVER = 2.0, -4.0  # beyond any margin between two cosines


def dart_score(s: ScoringContext) -> ir.Value:
    """Scores 2 for an image pivot; else how much farther a token lies from the pivot that it is nearest to being taken
    by than the last token that this pivot takes: 0 and more for those taken, less for others.

    So the V' best are those taken, and tokens that nearly tie score nearly the same. A text pivot that is missing, in
    prompts with fewer than four tokens behind the image, takes the first tokens that are free.
    """
    op, tokens = s.op, dim(s.token_type, 1)
    image = op.Equal(s.token_type, IMAGE)
    length = op.ReduceSum(op.Abs(op.Cast(s.key, to=FLOAT)), [1, 3], keepdims=0)
    own = _longest(s, length, image, min(PIVOTS, max(s.keep, 1)))
    shares = _shares(s.keep - PIVOTS)
    marks = op.Equal(op.Unsqueeze(own, [2]), list(range(tokens)))  # [B,4,S]
    pivot = op.Greater(op.ReduceMax(op.Cast(marks, to=FLOAT), [1], keepdims=0), 0.0)
    score = op.Where(pivot, PIVOT, NEVER)
    if not shares:
        return score
    text = _longest(s, length, op.Equal(s.token_type, INSTRUCTION), PIVOTS)
    for far, share in zip(_distances(s, op.Concat(own, text, axis=1), len(shares)), shares, strict=True):
        free = op.And(image, op.Less(score, 0.0))
        distance = op.Where(free, far, NEVER)
        taken, _ = op.TopK(distance, [share], axis=1, _outputs=2)
        score = op.Max(score, op.Sub(distance, op.ReduceMin(taken, [1], keepdims=1)))
    return score


def _shares(left: int) -> list[int]:
    """Returns how many tokens each pivot takes of `left`: as many each, the first ones one more where it is uneven;
    those that take none are left out."""
    each, more = divmod(max(left, 0), 2 * PIVOTS)
    return [each + (n < more) for n in range(2 * PIVOTS if each else more)]


def _longest(s: ScoringContext, length: ir.Value, of: ir.Value, count: int) -> ir.Value:
    """Returns the places [B,count], ascending, of the longest keys among tokens `of` [B,S]; S for missing ones."""
    among = s.op.Where(of, length, -1.0)
    best, _ = s.op.TopK(among, [count], axis=1, _outputs=2)
    long = s.op.GreaterOrEqual(among, s.op.ReduceMin(best, [1], keepdims=1))
    return positions_of(s.op, s.op.And(of, long), dim(s.token_type, 1), count)


def _distances(s: ScoringContext, pivots: ir.Value, count: int) -> list[ir.Value]:
    """Returns minus the cosines of all tokens' hidden states with the first `count` of `pivots` [B,8]: [B,S] each;
    for a missing one minus the tokens' positions, in 2^20ths."""
    op, tokens = s.op, dim(s.token_type, 1)
    x = op.Cast(s.normed, to=FLOAT)
    unit = op.Div(x, op.Max(op.Sqrt(op.ReduceSum(op.Mul(x, x), [2], keepdims=1)), 1e-8))
    rows = op.GatherND(unit, op.Unsqueeze(op.Min(pivots, tokens - 1), [2]), batch_dims=1)
    cosines = op.MatMul(rows, op.Transpose(unit, perm=[0, 2, 1]))
    first = op.Unsqueeze(op.Mul(op.Cast(s.position, to=FLOAT), 2.0**-20), [1])
    cosines = op.Where(op.Unsqueeze(op.Less(pivots, tokens), [2]), cosines, first)
    return [op.Neg(op.Gather(cosines, n, axis=1)) for n in range(count)]
