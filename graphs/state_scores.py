"""Scores of image tokens by what a layer computes of each, without attention."""

import onnx_ir as ir

from himap_export.graphs.scoring import ScoringContext

FLOAT = ir.DataType.FLOAT


def key_norm_score(s: ScoringContext) -> ir.Value:
    """Scores as ViTCoP (arXiv 2601.17818) in its decoder: by the L2 norm of the key, averaged over heads; small ones
    stay, as keys that draw attention are short (arXiv 2406.11430)."""
    mean = s.op.ReduceMean(s.op.Cast(s.key, to=FLOAT), [1], keepdims=0)
    return s.op.Neg(s.op.ReduceL2(mean, [2], keepdims=0))


def variation_score(s: ScoringContext) -> ir.Value:
    """Scores as V2Drop (arXiv 2509.01552): by how far, in L2, the layer moves a token; those that move most stay."""
    moved = s.op.Sub(s.op.Cast(s.hidden, to=FLOAT), s.op.Cast(s.previous, to=FLOAT))
    return s.op.ReduceL2(moved, [2], keepdims=0)
