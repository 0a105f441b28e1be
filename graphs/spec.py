"""What a LLaMA-family decoder is, as numbers."""

from itertools import pairwise
from typing import Annotated, Literal

from msgspec import Meta, Struct

from himap_export.graphs.plan import PruningPlan

Dtype = Literal["fp16", "bf16", "fp32"]

# `token_type` of a prompt's tokens: padding, text before the (last) image token, image, text after it.
PADDING, SYSTEM, IMAGE, INSTRUCTION = 0, 1, 2, 3

# What random scores are drawn modulo: 3 divides neither p - 1, so x^3 permutes the residues of both, and p^2 < 2^22.
PRIMES = (2039, 2027)
SEEDS = 2039 * 2027  # how many draw differently: a larger one draws as what it is modulo SEEDS

ROWS = 256  # of attention that are scored at once, about: of 16 heads over 4,000 tokens they are 64 MB
Block = tuple[int, int, int]

# As files may say it: several times what the largest published decoders have, and what a machine can still add up.
Layers = Annotated[int, Meta(ge=1, le=1024)]
Width = Annotated[int, Meta(ge=1, le=2**20)]
Heads = Annotated[int, Meta(ge=1, le=2**12)]


class DecoderSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A pre-norm decoder with rotary positions, grouped-query attention and a SwiGLU feed-forward.

    Letters as in the docs: L `layers`, D `hidden`, F `ffn`, H `heads`, G `kv_heads`, E `head_dim`, W `vocab`.
    `qk_norm`: each head's query and key are RMS-normalised before they are rotated (Qwen3). `rope_axes`: M-RoPE, for
    each of the E/2 frequencies the position it turns by: 0 time, 1 row, 2 column; empty: one position a token.
    `deepstack`: that many first layers are followed by an addition of vision features to the image tokens (Qwen3-VL).
    """

    layers: Layers
    hidden: Width
    ffn: Width
    heads: Heads
    kv_heads: Heads
    head_dim: Heads
    vocab: Annotated[int, Meta(ge=1, le=2**24)]
    norm_eps: Annotated[float, Meta(gt=0, le=1)] = 1e-5
    rope_base: Annotated[float, Meta(gt=0, le=1e18)] = 10000.0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope_axes: Annotated[tuple[Annotated[int, Meta(ge=0, le=2)], ...], Meta(max_length=2**11)] = ()
    deepstack: Annotated[int, Meta(ge=0, le=1024)] = 0


def stage_layers(plan: PruningPlan, layers: int) -> tuple[range, ...]:
    """Returns the layers of each stage: 0..k1-1, k1..k2-1, .."""
    edges = (0, *(cut.layer for cut in plan.cuts), layers)
    return tuple(range(a, b) for a, b in pairwise(edges))


def image_blocks(visual: int, text: int) -> tuple[Block, ...]:
    """Returns blocks of equal size of V image tokens as rows of an attention: (first, last + 1, tokens they see).

    In order, image token n has at most n others and `text` = T tokens before it: what lies behind a block's last row
    receives nothing from it. So the work is halved, and what a block makes stays in a CPU's caches.
    """
    count = max(1, round(visual / ROWS))
    edges = [visual * n // count for n in range(count + 1)]
    return tuple((start, stop, stop + text) for start, stop in pairwise(edges))
