"""The top-k gather as one Triton kernel: what graphs/gather.py says in standard operators, in a single launch."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives no types, and its kernels' arguments are of types that only its compiler knows.

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F800000)  # fp32's bits; larger ones are NaN


@triton.jit
def _keys(score, place, tokens: tl.constexpr):
    """int64 keys of one sequence's tokens at `place` [n]: unique, ascending in score, of equals the earlier is larger.

    A float's bits without the sign ascend as its magnitude does, so as a signed integer -0.0 equals 0.0. NaN becomes
    -inf. Keys are in 0 .. tokens * 2^32 - 1; -1 is no token.
    """
    exists = place < tokens
    bits = tl.load(score + place, exists, other=0.0).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    order = tl.where(bits < 0, -magnitude, magnitude)
    order = tl.where(magnitude > INFINITY, -INFINITY, order)
    return tl.where(exists, (order.to(tl.int64) + INFINITY) * tokens + (tokens - 1 - place), -1)


@triton.jit
def top_k_gather(
    x, score, position, token_type, y, kept_position, kept_type,
    tokens: tl.constexpr, keep: tl.constexpr, hidden: tl.constexpr,
    width: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Keeps `keep` = K of `tokens` = S, those of highest score, in their order; of equals the earlier, NaN last.

    x [B,S,D] fp16, bf16 or fp32; score [B,S] fp32; position, token_type [B,S] int64 -> y [B,K,D];
    kept_position, kept_type [B,K] int64. `width` >= S, `rows`, `columns` are powers of two.

    Program (i, b) moves what is kept of sequence b's tokens i * rows .. i * rows + rows - 1. Each program selects
    anew: the scores are a few KB that stay in the cache, and a second launch would cost more.
    """
    tl.static_assert(keep > 0 and keep <= tokens and tokens <= width)
    sequence = tl.program_id(1).to(tl.int64)
    score += sequence * tokens

    # The largest threshold that enough keys reach, bit by bit. Keys are unique, so exactly `keep` reach it; the
    # search ends as soon as that is so, long before the last bit unless scores are equal at the cut.
    place = tl.arange(0, width)
    key = _keys(score, place, tokens)
    threshold = tl.zeros((), tl.int64)
    bit = tl.full((), width << 31, tl.int64)
    count = tl.full((), tokens, tl.int32)
    while (count != keep) & (bit != 0):
        reached = tl.sum((key >= threshold + bit).to(tl.int32), 0)
        enough = reached >= keep
        threshold, count = tl.where(enough, threshold + bit, threshold), tl.where(enough, reached, count)
        bit = bit >> 1

    # A kept token goes behind all that are kept before it.
    first = tl.program_id(0) * rows
    before = tl.sum(((key >= threshold) & (place < first)).to(tl.int32), 0)
    mine = first + tl.arange(0, rows)
    kept = _keys(score, mine, tokens) >= threshold
    source = sequence * tokens + mine
    target = sequence * keep + before + tl.cumsum(kept.to(tl.int32), 0) - 1

    tl.store(kept_position + target, tl.load(position + source, kept), kept)
    tl.store(kept_type + target, tl.load(token_type + source, kept), kept)
    for start in range(0, hidden, columns):
        column = start + tl.arange(0, columns)
        inside = kept[:, None] & (column < hidden)[None, :]
        part = tl.load(x + source[:, None] * hidden + column[None, :], inside)
        tl.store(y + target[:, None] * hidden + column[None, :], part, inside)
