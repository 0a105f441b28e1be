"""The importance scores: what ranks image tokens at a cut, one function per criterion.

HiMAP's two (arXiv 2503.13108, section 4; authors' `himap.py`), FastV's and truncation's are softmax attention of the
layer before the cut, averaged over heads and summed over some rows; they differ only in the rows. They are computed in
fp32 beside the fused attention, and only for those rows: probabilities accumulated in fp16 flip kept tokens. The
baselines, random and uniform, look at no attention at all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from himap_export.graphs.build import dim
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import Criterion, PruningPlan
from himap_export.graphs.spec import IMAGE, INSTRUCTION, PADDING, PRIME, DecoderSpec

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


@dataclass(frozen=True)
class ScoringContext:
    """What a criterion may look at, at the end of layer `layer` - 1.

    query [B,H,S,E], key [B,G,S,E]: rotated; token_type, position [B,S] int64; `seed` [B,1] int64, for random alone; of
    S tokens `visual` = V are image tokens, of which `keep` = V' will stay, and `text` = T are not.
    """

    op: OpBuilder
    spec: DecoderSpec
    query: ir.Value
    key: ir.Value
    token_type: ir.Value
    position: ir.Value
    seed: ir.Value | None
    layer: int
    visual: int
    keep: int
    text: int


def instruction_score(s: ScoringContext) -> ir.Value:
    """Scores as HiMAP's first criterion: what image tokens receive from the text behind the image.

    All T rows that are not image are computed; those before the image and padding weigh nothing.
    """
    rows = positions_of(s.op, s.op.Not(s.op.Equal(s.token_type, IMAGE)), dim(s.token_type, 1), s.text)
    return _attention(s, rows, _is(s, rows, INSTRUCTION))


def image_score(s: ScoringContext) -> ir.Value:
    """Scores as HiMAP's second criterion: what the V image tokens receive from one another."""
    rows = positions_of(s.op, s.op.Equal(s.token_type, IMAGE), dim(s.token_type, 1), s.visual)
    return _attention(s, rows, s.op.Constant(value=ir.tensor(np.ones((1, 1, 1, s.visual), np.float32))))


def last_score(s: ScoringContext) -> ir.Value:
    """Scores as FastV (arXiv 2403.06764): what image tokens receive from the last token of the prompt."""
    real = s.op.Cast(s.op.Not(s.op.Equal(s.token_type, PADDING)), to=INT64)
    rows = s.op.Sub(s.op.ReduceSum(real, [1], keepdims=1), 1)
    return _attention(s, rows, s.op.Constant(value=ir.tensor(np.ones((1, 1, 1, 1), np.float32))))


def boundary_score(s: ScoringContext) -> ir.Value:
    """Scores as truncation (arXiv 2406.06579, eqs. 7-11): what image tokens receive from position Nsys + Nimg, the
    first text behind the image; 0 if there is none."""
    tokens = dim(s.token_type, 1)
    first = positions_of(s.op, s.op.Equal(s.token_type, INSTRUCTION), tokens, 1)
    rows = s.op.Min(first, tokens - 1)
    return _attention(s, rows, _is(s, rows, INSTRUCTION))


def random_score(s: ScoringContext) -> ir.Value:
    """Draws a number in [0, 2^24), exact in fp32, from the request's seed, the cut's layer and the position.

    Three rounds of x -> x^5 + c modulo PRIME: integers only, so that every runtime draws the same numbers. Each product
    and each sum is of residues and reduced at once: OpenVINO's CPU code has no integers of more than 32 bits.
    """
    op = s.op

    def times(a: ir.Value, b: ir.Value | int) -> ir.Value:
        return op.Mod(op.Mul(a, b), PRIME)

    def plus(a: ir.Value, b: ir.Value | int) -> ir.Value:
        return op.Mod(op.Add(a, b), PRIME)

    def fifth(x: ir.Value) -> ir.Value:
        return times(times(square := times(x, x), square), x)

    x = plus(times(op.Mod(s.seed, PRIME), 48271), plus(times(s.position, 16807), s.layer * 69621 + 1))
    x = plus(fifth(plus(fifth(x), 1013904223)), 374761393)
    x = op.Add(op.Mod(fifth(x), 2**24), 668265263 % 2**24)
    return op.Cast(op.Mod(x, 2**24), to=FLOAT)


def uniform_score(s: ScoringContext) -> ir.Value:
    """Scores 1 for V' of the V tokens in even steps: the n-th one if floor((n+1) V' / V) > floor(n V' / V), else 0."""
    op = s.op
    nth = op.CumSum(op.Cast(op.Equal(s.token_type, IMAGE), to=INT64), 1)
    after = op.Div(op.Mul(nth, s.keep), s.visual)
    before = op.Div(op.Mul(op.Max(op.Sub(nth, 1), 0), s.keep), s.visual)
    return op.Cast(op.Greater(after, before), to=FLOAT)


Score = Callable[[ScoringContext], ir.Value]
# Each gives [B,S] fp32: of the image tokens those that score highest stay; what it says of others is not looked at.
SCORES: dict[str, Score] = {
    "instruction": instruction_score,
    "image": image_score,
    "last": last_score,
    "boundary": boundary_score,
    "random": random_score,
    "uniform": uniform_score,
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


def positions_of(op: OpBuilder, flags: ir.Value, tokens: int, count: int) -> ir.Value:
    """Returns indices [B,count], ascending, of the first `count` true `flags` [B,tokens]; `tokens` for missing ones."""
    order = op.Where(flags, list(range(tokens)), tokens)
    index, _ = op.TopK(order, [count], axis=1, largest=0, sorted=1, _outputs=2)
    return index


def _is(s: ScoringContext, rows: ir.Value, token_type: int) -> ir.Value:
    """Returns 1 for the `rows` [B,R] of that type, else 0: [B,1,1,R] fp32."""
    same = s.op.Equal(s.op.GatherElements(s.token_type, rows, axis=1), token_type)
    return s.op.Unsqueeze(s.op.Cast(same, to=FLOAT), [1, 2])


def _attention(s: ScoringContext, rows: ir.Value, weight: ir.Value) -> ir.Value:
    """Returns mean over heads of sum over `rows` [B,R] of weight [B,1,1,R] * softmax(q k^T / sqrt(E)) [B,H,R,S]."""
    op, batch, count = s.op, dim(rows, 0), dim(rows, 1)
    tokens, groups, e = dim(s.query, 2), s.spec.kv_heads, s.spec.head_dim
    by_token = op.Transpose(s.query, perm=[0, 2, 1, 3])
    picked = op.Transpose(op.GatherND(by_token, op.Unsqueeze(rows, [2]), batch_dims=1), perm=[0, 2, 1, 3])
    # Heads that share a key stand together, so GQA is one batched product per group: [B,G,(H/G)*R,E] x [B,G,E,S].
    q32 = op.Reshape(op.Cast(picked, to=FLOAT), [batch, groups, -1, e])
    k32 = op.Transpose(op.Cast(s.key, to=FLOAT), perm=[0, 1, 3, 2])
    logits = op.Reshape(op.MatMul(op.Mul(q32, e**-0.5), k32), [batch, s.spec.heads, count, tokens])
    seen_from = op.Unsqueeze(op.GatherElements(s.position, rows, axis=1), [2])
    visible = op.LessOrEqual(op.Unsqueeze(s.position, [1]), seen_from)
    causal = op.Unsqueeze(op.Where(visible, 0.0, float("-inf")), [1])
    probability = op.Softmax(op.Add(logits, causal), axis=-1)
    return op.Reshape(op.ReduceMean(op.MatMul(weight, probability), [1], keepdims=0), [batch, tokens])
