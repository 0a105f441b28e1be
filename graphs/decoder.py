"""One LLaMA-family decoder layer in native ONNX operators.

Hidden states are [B*S,D] so that every projection is one Gemm over the checkpoint's [out,in] weights; attention works
on [B,H,S,E]. Weight names are those of Hugging Face's `LlamaModel`, passed through `names` by whoever knows the
checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from himap_export.graphs.build import Frame, dim
from himap_export.graphs.ports import WeightRef
from himap_export.graphs.quantization import linear
from himap_export.graphs.spec import DecoderSpec

Names = Callable[[str], WeightRef]


@dataclass(frozen=True)
class Rotary:
    """cos and sin, [B,S,E/2] each, in the dtype of the model."""

    cos: ir.Value
    sin: ir.Value


@dataclass(frozen=True)
class Attended:
    """What a layer attends with: `query` [B,H,S,E], `key` [B,G,S,E], both rotated, and `value` [B,G,S,E].

    `raw_query` and `raw_key` are what is rotated: behind their norms, where the model has them.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    raw_query: ir.Value
    raw_key: ir.Value


Attention = Callable[[ir.Value, ir.Value, ir.Value], ir.Value]  # of rotated query, rotated key, value: [B,H,S,E]


def rotary(f: Frame, spec: DecoderSpec, position: ir.Value) -> Rotary:
    """Angles position * base^(-2i/E) in fp32, as Hugging Face's LlamaRotaryEmbedding; `position` [B,S] int64.

    M-RoPE (arXiv 2409.12191): `position` is [B,S,3], time, row and column, and frequency i turns by the one that
    `spec.rope_axes` names.
    """
    op = f.op
    exponent = np.arange(0, spec.head_dim, 2, dtype=np.float32) / np.float32(spec.head_dim)
    frequency = 1 / np.float32(spec.rope_base) ** exponent
    turned = op.Gather(position, list(spec.rope_axes), axis=2) if spec.rope_axes else op.Unsqueeze(position, [2])
    angle = op.Mul(op.Cast(turned, to=ir.DataType.FLOAT), op.Constant(value=ir.tensor(frequency)))
    return Rotary(op.Cast(op.Cos(angle), to=f.dtype), op.Cast(op.Sin(angle), to=f.dtype))


class Decoder:
    """The layers of one decoder, seen by a graph of `batch` samples of `tokens` tokens."""

    def __init__(self, f: Frame, spec: DecoderSpec, names: Names, batch: int, tokens: int) -> None:
        self.f, self.op, self.spec, self.names = f, f.op, spec, names
        self.batch, self.tokens = batch, tokens

    def layer(self, i: int, x: ir.Value, rope: Rotary, attend: Attention) -> tuple[ir.Value, Attended]:
        """Returns x + attention, then x + feed-forward, of [B*S,D] as [B*S,D], and what it attended with."""
        op, spec, p = self.op, self.spec, f"layers.{i}."
        n = self.norm(x, p + "input_layernorm")
        q, k, v = (
            self.by_head(self.linear(n, f"{p}self_attn.{which}_proj", heads * spec.head_dim, spec.qkv_bias))
            for which, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads))
        )
        if spec.qk_norm:
            q, k = self.norm(q, p + "self_attn.q_norm"), self.norm(k, p + "self_attn.k_norm")
        q, k, v = (op.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k, v))
        a = Attended(self.rotate(q, rope), self.rotate(k, rope), v, raw_query=q, raw_key=k)
        out = self.merge(attend(a.query, a.key, v))
        x = op.Add(x, self.linear(out, p + "self_attn.o_proj", spec.hidden, spec.out_bias))
        n = self.norm(x, p + "post_attention_layernorm")
        gate = self.linear(n, p + "mlp.gate_proj", spec.ffn, spec.mlp_bias)
        up = self.linear(n, p + "mlp.up_proj", spec.ffn, spec.mlp_bias)
        return op.Add(x, self.linear(op.Mul(op.Swish(gate), up), p + "mlp.down_proj", spec.hidden, spec.mlp_bias)), a

    def prefill_attention(self, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """Attends causally over the stage's own tokens. No mask: padding lies behind every real token."""
        return self.op.Attention(q, k, v, is_causal=1)

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """Normalises by the RMS over the last axis."""
        weight = self.f.weight(self.names(name + ".weight"), dim(x, -1))
        return self.op.RMSNormalization(x, weight, axis=-1, epsilon=self.spec.norm_eps)

    def linear(self, x: ir.Value, name: str, out: int, bias: bool) -> ir.Value:
        """Projects [B*S,in] to [B*S,out]. A bias is added behind a reshape: TensorRT copies one that enters the
        Gemm."""
        y = linear(self.f, x, self.names(name + ".weight"), out)
        if bias:
            by_sample = self.op.Reshape(y, [self.batch, self.tokens, out])
            y = self.op.Add(by_sample, self.f.weight(self.names(name + ".bias"), out))
            y = self.op.Reshape(y, [self.batch * self.tokens, out])
        return y

    def by_head(self, x: ir.Value) -> ir.Value:
        """Reshapes [B*S,heads*E] to [B,S,heads,E]."""
        return self.op.Reshape(x, [self.batch, self.tokens, -1, self.spec.head_dim])

    def merge(self, x: ir.Value) -> ir.Value:
        """Reshapes [B,H,S,E] to [B*S,H*E]."""
        by_token = self.op.Transpose(x, perm=[0, 2, 1, 3])
        return self.op.Reshape(by_token, [self.batch * self.tokens, self.spec.heads * self.spec.head_dim])

    def rotate(self, x: ir.Value, rope: Rotary) -> ir.Value:
        return self.op.RotaryEmbedding(x, rope.cos, rope.sin)
