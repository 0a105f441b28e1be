"""The baselines' scores, random and uniform, which look at nothing that the model computed."""

import onnx_ir as ir

from himap_export.graphs.scoring import ScoringContext
from himap_export.graphs.spec import IMAGE, PRIME

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


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
