"""Ranking each picture's tokens by themselves: a cut then keeps exactly as many of every picture.

The top-k gather ranks all tokens of a prompt at once. So what it is given here are no scores but verdicts, 1 or 0,
which are settled picture by picture, by the gather's own rule: of equals the lowest index, NaN last.
"""

import onnx_ir as ir
from onnxscript import OpBuilder

from himap_export.graphs.build import dim
from himap_export.graphs.scoring import positions_of
from himap_export.graphs.spec import IMAGE

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def per_image(op: OpBuilder, score: ir.Value, token_type: ir.Value, *, images: int, visual: int, keep: int) -> ir.Value:
    """Returns [B,S] fp32: 1 for the image tokens that are among the `keep` / `images` best of their own picture, 0 for
    the others, +inf for tokens that are of none.

    score [B,S] fp32; token_type [B,S] int64, of which `visual` = V in each row are image tokens, V / `images` of each
    picture, in its order.
    """
    batch, each, best = dim(score, 0), visual // images, keep // images
    is_image = op.Equal(token_type, IMAGE)
    rows = positions_of(op, is_image, dim(score, 1), visual)
    rank = op.GatherElements(op.Where(op.IsNaN(score), float("-inf"), score), rows, axis=1)
    own = op.Reshape(rank, [batch, images, each])
    values, _ = op.TopK(own, [best], axis=2, _outputs=2)
    threshold = op.ReduceMin(values, [2], keepdims=1)
    above, equal = op.Greater(own, threshold), op.Equal(own, threshold)
    room = op.Sub(best, op.ReduceSum(op.Cast(above, to=INT64), [2], keepdims=1))
    fits = op.And(equal, op.LessOrEqual(op.CumSum(op.Cast(equal, to=INT64), 2), room))
    kept = op.Reshape(op.Cast(op.Or(above, fits), to=FLOAT), [batch, visual])
    nth = op.Max(op.Sub(op.CumSum(op.Cast(is_image, to=INT64), 1), 1), 0)
    return op.Where(is_image, op.GatherElements(kept, nth, axis=1), float("inf"))
