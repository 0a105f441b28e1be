"""Scores of image tokens by the attention that they receive.

HiMAP's two (arXiv 2503.13108, section 4; authors' `himap.py`), FastV's and truncation's are softmax attention of the
layer before the cut, averaged over heads and summed over some rows; they differ only in the rows. They are computed in
fp32 beside the fused attention, and only for those rows: probabilities accumulated in fp16 flip kept tokens.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
from onnxscript import OpBuilder

from himap_export.graphs.build import dim
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.scoring import ScoringContext, positions_of
from himap_export.graphs.spec import IMAGE, INSTRUCTION, PADDING, Block, image_blocks

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64
STEEPEST = 60.0  # e^60 is 1e26: fp32 still tells its scores apart


def instruction_score(s: ScoringContext) -> ir.Value:
    """Scores as HiMAP's first criterion: what image tokens receive from the text behind the image.

    All T rows that are not image are computed; those before the image and padding weigh nothing.
    """
    rows = positions_of(s.op, s.op.Not(s.op.Equal(s.token_type, IMAGE)), dim(s.token_type, 1), s.text)
    return _attention(s, rows, _is(s, rows, INSTRUCTION))


def debiased_instruction_score(s: ScoringContext) -> ir.Value:
    """Scores as attention debiasing (arXiv 2508.17807) has HiMAP's first criterion: without the trend that attention
    grows exp(b) times from one position to the next. The slope b is the cut's coefficient, fitted to a model once.

    HimapError (usage) for a slope that fp32 cannot follow over so many tokens.
    """
    op, (slope,) = s.op, s.coefficients
    if abs(slope) * (s.visual + s.text) > STEEPEST:
        details = f"over {s.visual + s.text} tokens attention would grow {np.exp(STEEPEST):.0e} times and more"
        raise HimapError(f"the slope {slope:g} is no trend of attention", details, "fit it again", Exit.USAGE)
    first = op.ReduceMin(op.Where(op.Equal(s.token_type, IMAGE), s.position, 2**30), [1], keepdims=1)
    places = op.Cast(op.Sub(s.position, first), to=FLOAT)
    return op.Mul(instruction_score(s), op.Exp(op.Mul(places, -slope)))


def image_score(s: ScoringContext) -> ir.Value:
    """Scores as HiMAP's second criterion: what the V image tokens receive from one another."""
    rows = positions_of(s.op, s.op.Equal(s.token_type, IMAGE), dim(s.token_type, 1), s.visual)
    weight = s.op.Constant(value=ir.tensor(np.ones((1, 1, 1, s.visual), np.float32)))
    return _attention(s, rows, weight, blocks=image_blocks(s.visual, s.text))


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


def _is(s: ScoringContext, rows: ir.Value, token_type: int) -> ir.Value:
    """Returns 1 for the `rows` [B,R] of that type, else 0: [B,1,1,R] fp32."""
    same = s.op.Equal(s.op.GatherElements(s.token_type, rows, axis=1), token_type)
    return s.op.Unsqueeze(s.op.Cast(same, to=FLOAT), [1, 2])


def _attention(s: ScoringContext, rows: ir.Value, weight: ir.Value, blocks: Sequence[Block] = ()) -> ir.Value:
    """Returns mean over heads of sum over `rows` [B,R] of weight [B,1,1,R] * softmax(q k^T / sqrt(E)) [B,H,R,S].

    Computed in `blocks` of the rows, each over the tokens that it sees; of none, all at once.
    """
    op, batch, tokens = s.op, dim(rows, 0), dim(s.query, 2)
    by_token = op.Transpose(s.query, perm=[0, 2, 1, 3])
    picked = op.Transpose(op.GatherND(by_token, op.Unsqueeze(rows, [2]), batch_dims=1), perm=[0, 2, 1, 3])
    q32 = op.Mul(op.Cast(picked, to=FLOAT), s.spec.head_dim**-0.5)
    k32 = op.Cast(s.key, to=FLOAT)
    seen_from = op.Unsqueeze(op.GatherElements(s.position, rows, axis=1), [2])
    visible = op.LessOrEqual(op.Unsqueeze(s.position, [1]), seen_from)
    causal = op.Unsqueeze(op.Where(visible, 0.0, float("-inf")), [1])
    received = []
    for start, stop, seen in blocks or [(0, dim(rows, 1), tokens)]:
        part = partial(_part, op, start=start, stop=stop)
        # Heads that share a key stand together, so GQA is one batched product per group: [B,G,(H/G)*R,E] x [B,G,E,S].
        q = op.Reshape(part(q32, 2), [batch, s.spec.kv_heads, -1, s.spec.head_dim])
        k = op.Transpose(_part(op, k32, 2, start=0, stop=seen), perm=[0, 1, 3, 2])
        logits = op.Reshape(op.MatMul(q, k), [batch, s.spec.heads, stop - start, seen])
        probability = op.Softmax(op.Add(logits, _part(op, part(causal, 2), 3, start=0, stop=seen)), axis=-1)
        score = op.ReduceMean(op.MatMul(part(weight, 3), probability), [1], keepdims=0)
        score = op.Reshape(score, [batch, seen])
        received.append(op.Pad(score, [0, 0, 0, tokens - seen]) if seen < tokens else score)
    return received[0] if len(received) == 1 else op.Sum(*received)


def _part(op: OpBuilder, x: ir.Value, axis: int, *, start: int, stop: int) -> ir.Value:
    """Returns `x` from `start` to `stop` along `axis`: x itself if that is all of it."""
    return x if (start, stop) == (0, dim(x, axis)) else op.Slice(x, [start], [stop], [axis])
