"""The two importance scores of HiMAP (arXiv 2503.13108, section 4; authors' `himap.py`).

Both are softmax attention of the layer before the cut, averaged over heads and summed over some rows: the instruction's
text rows for the first cut, the kept image rows for the second. They are computed in fp32 beside the fused attention,
and only for those rows: probabilities accumulated in fp16 flip kept tokens.
"""

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from himap_export.graphs.build import dim
from himap_export.graphs.spec import IMAGE, INSTRUCTION, DecoderSpec


def positions_of(op: OpBuilder, flags: ir.Value, tokens: int, count: int) -> ir.Value:
    """Ascending indices [B,count] of the `count` true ones in `flags` [B,tokens]."""
    order = op.Where(flags, list(range(tokens)), tokens)
    index, _ = op.TopK(order, [count], axis=1, largest=0, sorted=1, _outputs=2)
    return index


def instruction_score(
    op: OpBuilder, spec: DecoderSpec, q: ir.Value, k: ir.Value, kind: ir.Value, position: ir.Value, text: int
) -> ir.Value:
    """First cut: attention that image tokens get from the instruction, [B,S] fp32, +inf for tokens that are not image.

    q [B,H,S,E], k [B,G,S,E]: layer K1-1's rotated queries and keys; kind, position [B,S] int64. All `text` = T rows
    that are not image are computed; those before the image and padding weigh nothing.
    """
    tokens = dim(q, 2)
    rows = positions_of(op, op.Not(op.Equal(kind, IMAGE)), tokens, text)
    weight = op.Cast(op.Equal(op.GatherElements(kind, rows, axis=1), INSTRUCTION), to=ir.DataType.FLOAT)
    return _score(op, spec, q, k, kind, position, rows, op.Unsqueeze(weight, [1, 2]))


def image_score(
    op: OpBuilder, spec: DecoderSpec, q: ir.Value, k: ir.Value, kind: ir.Value, position: ir.Value, visual: int
) -> ir.Value:
    """Second cut: attention that the `visual` = V1 kept image tokens get from one another, [B,S] fp32, else +inf."""
    tokens = dim(q, 2)
    rows = positions_of(op, op.Equal(kind, IMAGE), tokens, visual)
    return _score(
        op, spec, q, k, kind, position, rows, op.Constant(value=ir.tensor(np.ones((1, 1, 1, visual), np.float32)))
    )


def _score(
    op: OpBuilder,
    spec: DecoderSpec,
    q: ir.Value,
    k: ir.Value,
    kind: ir.Value,
    position: ir.Value,
    rows: ir.Value,
    weight: ir.Value,
) -> ir.Value:
    """mean over heads of sum over `rows` [B,R] of weight [B,1,1,R] * softmax(q k^T / sqrt(E)) [B,H,R,S]."""
    batch, count = dim(rows, 0), dim(rows, 1)
    tokens, groups, e = dim(q, 2), spec.kv_heads, spec.head_dim
    by_token = op.Transpose(q, perm=[0, 2, 1, 3])
    picked = op.Transpose(op.GatherND(by_token, op.Unsqueeze(rows, [2]), batch_dims=1), perm=[0, 2, 1, 3])
    # Heads that share a key stand together, so GQA is one batched product per group: [B,G,(H/G)*R,E] x [B,G,E,S].
    q32 = op.Reshape(op.Cast(picked, to=ir.DataType.FLOAT), [batch, groups, -1, e])
    k32 = op.Transpose(op.Cast(k, to=ir.DataType.FLOAT), perm=[0, 1, 3, 2])
    logits = op.Reshape(op.MatMul(op.Mul(q32, e**-0.5), k32), [batch, spec.heads, count, tokens])
    visible = op.LessOrEqual(op.Unsqueeze(position, [1]), op.Unsqueeze(op.GatherElements(position, rows, axis=1), [2]))
    causal = op.Unsqueeze(op.Where(visible, 0.0, float("-inf")), [1])
    probability = op.Softmax(op.Add(logits, causal), axis=-1)
    received = op.Reshape(op.ReduceMean(op.MatMul(weight, probability), [1], keepdims=0), [batch, tokens])
    return op.Where(op.Equal(kind, IMAGE), received, float("inf"))
