"""HAWK (arXiv 2604.07812): how well the instruction's queries meet an image token's key, head by head, unrotated."""

import numpy as np
import onnx_ir as ir

from himap_export.graphs.build import dim
from himap_export.graphs.scoring import ScoringContext
from himap_export.graphs.spec import IMAGE, INSTRUCTION

FLOAT = ir.DataType.FLOAT


def hawk_score(s: ScoringContext) -> ir.Value:
    """Scores as HAWK (eqs. 4-7): sum over heads of weight * q k^T / sqrt(E), both before rotation, averaged over the
    text behind the image, at length 1 in each head over the image tokens.

    The H weights are the cut's coefficients; all are equal where there are none. A mean of products with one key is the
    product with the mean query: one row a head.
    """
    op, spec = s.op, s.spec
    batch, tokens = dim(s.token_type, 0), dim(s.token_type, 1)
    rows = op.Cast(op.Equal(s.token_type, INSTRUCTION), to=FLOAT)
    count = op.Max(op.ReduceSum(rows, [1], keepdims=1), 1.0)
    share = op.Unsqueeze(op.Div(rows, count), [1, 2])
    query = op.Mul(op.MatMul(share, op.Cast(s.raw_query, to=FLOAT)), spec.head_dim**-0.5)  # [B,H,1,E]
    query = op.Reshape(query, [batch, spec.kv_heads, -1, spec.head_dim])
    key = op.Transpose(op.Cast(s.raw_key, to=FLOAT), perm=[0, 1, 3, 2])
    met = op.Reshape(op.MatMul(query, key), [batch, spec.heads, tokens])
    met = op.Where(op.Unsqueeze(op.Equal(s.token_type, IMAGE), [1]), met, 0.0)
    length = op.Sqrt(op.ReduceSum(op.Mul(met, met), [2], keepdims=1))
    weights = np.array(s.coefficients or [1 / spec.heads] * spec.heads, np.float32).reshape(1, -1, 1)
    weighed = op.Mul(op.Div(met, op.Max(length, 1e-12)), op.Constant(value=ir.tensor(weights)))
    return op.ReduceSum(weighed, [1], keepdims=0)
