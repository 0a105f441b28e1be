"""Qwen-VL's eyes (arXiv 2308.12966, section 2.1) at one static size: OpenCLIP's ViT-bigG and the resampler behind it.

Parameters carry the release's names, but for the resampler's fused input projection: its three parts are apart, rows of
the stored tensor, so that no engine cuts them out at every inference. Letters of this file: B batch, N patches, V image
tokens (the resampler's queries), C width of the tower, D hidden of the decoder, H heads, E head dim.
"""

from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from himap_export.exporter.config import Visual
from himap_export.exporter.families.constants import on_meta
from himap_export.exporter.families.resize import interpolation, resized

EPS = 1e-6  # of every LayerNorm
CHANNELS = 3
HEAD_DIM = 128  # of the resampler; config.json does not say
POSITIONS = 256  # learned by the tower, a square; config.json does not say


class Attention(nn.Module):
    """Self-attention [B,N,C]; the fused projection holds query, key and value of one head after the other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fused = self.in_proj(x).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        # Taken by index: chunk and split become ONNX sequences, which TensorRT has not.
        seen = F.scaled_dot_product_attention(fused[0], fused[1], fused[2])
        found: torch.Tensor = self.out_proj(seen.transpose(1, 2).flatten(2))
        return found


class Block(nn.Module):
    """Pre-norm attention and MLP: [B,N,C] to the same."""

    mlp: Any  # a bare Module, for its parameters' names, as below

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width, EPS), nn.LayerNorm(width, EPS)
        self.attn, self.mlp = Attention(width, heads), nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, ffn), nn.Linear(ffn, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        found: torch.Tensor = x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))
        return found


class Resampler(nn.Module):
    """V learned queries look at the patches once: [B,N,C] to [B,V,D]; both sides know their places."""

    attn: Any

    def __init__(self, visual: Visual) -> None:
        super().__init__()
        width, hidden, count = visual.width, visual.output_dim, visual.n_queries
        self.heads = hidden // HEAD_DIM
        self.pos_embed = nn.Parameter(torch.empty(count, hidden))
        self.query = nn.Parameter(torch.empty(count, hidden))
        self.kv_proj = nn.Identity() if width == hidden else nn.Linear(width, hidden, bias=False)
        self.ln_q, self.ln_kv = nn.LayerNorm(hidden, EPS), nn.LayerNorm(hidden, EPS)
        self.attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self.attn, name, nn.Linear(hidden, hidden))

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        attn, values = self.attn, self.ln_kv(self.kv_proj(x))
        asked = attn.q_proj(self.ln_q(self.query) + self.pos_embed).expand(x.shape[0], -1, -1)
        parts = (asked, attn.k_proj(values + places), attn.v_proj(values))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        found: torch.Tensor = attn.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return found


class Tower(nn.Module):
    """Pixels [B,3,S,S] to image features [B,V,D]."""

    transformer: Any

    def __init__(self, visual: Visual) -> None:
        super().__init__()
        width, hidden, patch = visual.width, visual.output_dim, visual.patch_size
        blocks = [Block(width, visual.heads, int(width * visual.mlp_ratio)) for _ in range(visual.layers)]
        self.conv1 = nn.Conv2d(CHANNELS, width, patch, patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(POSITIONS, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width, EPS), nn.LayerNorm(hidden, EPS)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(blocks)
        self.attn_pool = Resampler(visual)
        self.proj = nn.Parameter(torch.empty(hidden, hidden))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        x = self.ln_pre(patches + resized(self.positional_embedding, getattr(self, "patch_resize", None)))
        for block in self.transformer.resblocks:
            x = block(x)
        pooled = self.attn_pool(x, resized(self.attn_pool.pos_embed, getattr(self, "key_resize", None)))
        features: torch.Tensor = self.ln_post(pooled) @ self.proj
        return features


class Vision(nn.Module):
    """The tower under the name it has in the release."""

    def __init__(self, visual: Visual) -> None:
        super().__init__()
        self.visual = Tower(visual)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.visual(pixel_values)
        return features


def tower(visual: Visual, dtype: torch.dtype) -> nn.Module:
    """Returns config.json's "visual" as a module on the meta device; what its buffers hold is in its `constants`."""
    side = visual.image_size // visual.patch_size
    # Resizing is done in fp32, as the release does, whatever the model's dtype.
    sides = {"patch_resize": isqrt(POSITIONS), "key_resize": isqrt(visual.n_queries)}
    resizing = {name: interpolation(old, side) for name, old in sides.items() if old != side}
    return on_meta(lambda: Vision(visual), dtype, resizing, "visual")
