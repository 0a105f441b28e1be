"""What training computes of the `shapes` model: the features of parts of scenes, and many questions behind one image.

It says the same as Hugging Face's modules, whose weights it reads, in a form that a CPU trains fast: the image goes
through the decoder once, and the texts of all its questions behind it in one row, each blind to the others.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, apply_rotary_pos_emb

Keys = tuple[Tensor, Tensor]  # and values, [B,G,N,E] each
Layer = Callable[..., tuple[Tensor, Keys]]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention [B,H,N,E] under an additive `mask`, in three steps: the fused kernel's way back takes longer on a
    CPU."""
    with torch.autocast("cpu", enabled=False):
        q, k, v = (x.to(torch.bfloat16) for x in (query, key, value))
        return ((q * scale) @ k.transpose(2, 3) + mask).softmax(-1) @ v


def _tower_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """`attend` as Hugging Face's layers call it."""
    return attend(query, key, value, query.new_zeros((), dtype=torch.bfloat16), scaling).transpose(1, 2), None


def decoder_layer(layer: LlamaDecoderLayer, x: Tensor, turn: Keys, mask: Tensor, past: Keys | None = None) -> Any:
    """x [B,N,D] after `layer`, and its keys and values, under an additive `mask` [B or 1,1,N,P+N], behind a `past` of P
    tokens; `turn`: cos and sin of the rotary embedding."""
    attention, mlp = layer.self_attn, layer.mlp

    def norm(x: Tensor, by: LlamaRMSNorm) -> Tensor:
        return functional.rms_norm(x, by.weight.shape, by.weight, by.variance_epsilon)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, attention.head_dim)).transpose(1, 2)

    n = norm(x, layer.input_layernorm)
    q, k, v = (heads(project(n)) for project in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *(part.to(q.dtype) for part in turn))
    keys = (k, v) if past is None else tuple(torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
    groups = q.shape[1] // k.shape[1]
    out = attend(q, *(x.repeat_interleave(groups, 1) for x in keys), mask, attention.scaling)
    x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
    n = norm(x, layer.post_attention_layernorm)
    return x + mlp.down_proj(functional.silu(mlp.gate_proj(n)) * mlp.up_proj(n)), (k, v)


@dataclass(frozen=True)
class Forward:
    """The way of a batch through `model`; `layer` is `decoder_layer`, compiled or not."""

    model: LlavaForConditionalGeneration
    layer: Layer

    @classmethod
    def of(cls, model: LlavaForConditionalGeneration, compiled: bool) -> "Forward":
        tower = model.model.vision_tower
        AttentionInterface.register("three-steps", _tower_attention)
        tower.config._attn_implementation = "three-steps"
        if compiled:
            for layer in tower.encoder.layers:
                layer.compile(dynamic=True)
        return cls(model, torch.compile(decoder_layer, dynamic=True) if compiled else decoder_layer)

    def features(self, pixels: Tensor, places: Tensor) -> Tensor:
        """[B,P,D] of `pixels` [B,3,H,W], whose P patches lie at `places` [B,P] in the whole: LLaVA's tower to its last
        layer but one, and its projector."""
        embeddings, tower = self.model.model.vision_tower.embeddings, self.model.model.vision_tower
        size = embeddings.patch_size
        side = pixels.shape[-1] // size
        cut = pixels.unflatten(3, (side, size)).unflatten(2, (side, size)).permute(0, 2, 4, 1, 3, 5)
        patches = functional.linear(cut.flatten(3).flatten(1, 2), embeddings.patch_embedding.weight.flatten(1))
        hidden = torch.cat([embeddings.class_embedding.expand(len(pixels), 1, -1), patches], 1)
        hidden = tower.pre_layrnorm(hidden + embeddings.position_embedding(functional.pad(places + 1, (1, 0))))
        for layer in tower.encoder.layers[:-1]:
            hidden = layer(hidden, attention_mask=None)
        found: Tensor = self.model.model.multi_modal_projector(hidden[:, 1:])
        return found

    def texts(self, prompt: Tensor, at: Tensor, texts: Tensor, owner: Tensor, first: int) -> Tensor:
        """Normed states [B,N,D] of `texts` [B,N], of which `owner` [B,N] says whose each token is, all numbered from
        `first` behind a `prompt` [B,P,D] at the positions `at` [B,P]."""
        language = self.model.model.language_model
        seen, nth = _blind(owner)
        before = prompt.shape[1]
        masks = torch.ones(1, before, before).tril() > 0, functional.pad(seen, (before, 0), value=True)
        causal, blind = (torch.where(mask, 0.0, -1e9)[:, None].to(torch.bfloat16) for mask in masks)
        turns = [language.rotary_emb(prompt, position_ids=positions) for positions in (at, first + nth)]
        hidden = language.embed_tokens(texts)
        for layer in language.layers:
            prompt, keys = self.layer(layer, prompt, turns[0], causal)
            hidden, _ = self.layer(layer, hidden, turns[1], blind, keys)
        normed: Tensor = language.norm(hidden)
        return normed


def _blind(owner: Tensor) -> tuple[Tensor, Tensor]:
    """Which tokens see which, bool [B,N,N], and each one's place [B,N] in its text."""
    step = torch.arange(owner.shape[1])
    seen = (owner[:, :, None] == owner[:, None]) & (step[:, None] >= step)
    return seen, seen.sum(-1) - 1
