"""The baselines' scores, random and uniform, which look at nothing that the model computed."""

from collections.abc import Sequence

import onnx_ir as ir
from onnxscript import OpBuilder

from himap_export.graphs.scoring import ScoringContext
from himap_export.graphs.spec import IMAGE, PRIMES

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
ROUNDS = 3  # two pass every test that three pass, one fails


def random_score(s: ScoringContext) -> ir.Value:
    """Draws a number in [0, 2^22), exact in fp32, from the request's seed, the cut's layer and the position.

    The seed is mixed by the layer, and the position by what became of the seed: integers only and none beyond 2^22, so
    that every runtime draws the same numbers, even one that divides integers as fp32 (OpenVINO's CPU). Each step of a
    round can be undone, for residues have one cube root: no two positions score the same.
    """
    assert s.seed is not None  # stages give it to this criterion
    x, y = _mixed(s.op, s.position, _mixed(s.op, s.seed, (s.layer, s.layer)))
    return s.op.Cast(s.op.Add(s.op.Mul(x, 2048), y), to=FLOAT)


def _mixed(op: OpBuilder, z: ir.Value, keys: Sequence[ir.Value | int]) -> Sequence[ir.Value]:
    """Returns x = z + keys[0] and y = z + keys[1], residues of PRIMES, after rounds of x^3 + y + keys[0] for x, then
    y^3 + x + keys[1] for y."""
    own, other = (op.Mod(op.Add(z, key), prime) for key, prime in zip(keys, PRIMES, strict=True))
    for key, prime in [*zip(keys, PRIMES, strict=True)] * ROUNDS:
        cube = op.Mul(op.Mod(op.Mul(own, own), prime), own)
        own, other = other, op.Mod(op.Add(op.Add(cube, other), key), prime)
    return own, other


def uniform_score(s: ScoringContext) -> ir.Value:
    """Scores 1 for V' of the V tokens in even steps: the n-th one if floor((n+1) V' / V) > floor(n V' / V), else 0."""
    op = s.op
    nth = op.CumSum(op.Cast(op.Equal(s.token_type, IMAGE), to=INT64), 1)
    after = op.Div(op.Mul(nth, s.keep), s.visual)
    before = op.Div(op.Mul(op.Max(op.Sub(nth, 1), 0), s.keep), s.visual)
    return op.Cast(op.Greater(after, before), to=FLOAT)
