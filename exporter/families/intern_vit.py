"""InternViT-6B (arXiv 2312.14238, section 3.2) at one static size, its weights by their original names.

Letters of this file: B batch, N patches, D hidden, H heads, E head dim.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.documents import typed
from himap_export.exporter.checks import require, require_supported, require_tower
from himap_export.exporter.config import InternVit6B
from himap_export.exporter.families.resize import interpolation, resized
from himap_export.exporter.family import Config

if TYPE_CHECKING:
    import torch

MODEL_TYPE = "intern_vit_6b"


def read_tower(config: Config) -> InternVit6B:
    """Returns the tower's own configuration; HimapError (usage) for one that `intern_vit` does not follow."""
    tower = typed(config, InternVit6B, "the vision tower's config.json")
    require(tower.patch_size <= tower.image_size, "the vision tower's patches are larger than its images")
    require_tower(tower.hidden_size, tower.num_attention_heads, tower.hidden_act)
    require_supported("activation of the vision tower", tower.hidden_act, "gelu")
    require_supported("norm of the vision tower", tower.norm_type, "rms_norm")
    return tower


def intern_vit(tower: InternVit6B, side: int, layers: int) -> "torch.nn.Module":
    """Returns the tower's first `layers` layers, from pixels [B,3,side,side] to states [B,1+N,D], class token first.

    Make it by `on_meta`, with its `constants`.
    """
    import torch

    learned, patches = tower.image_size // tower.patch_size, side // tower.patch_size

    class InternVit(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings: Any = _embeddings(tower, learned)
            self.encoder: Any = torch.nn.Module()
            self.encoder.layers = torch.nn.ModuleList(_layer(tower) for _ in range(layers))

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            e, batch = self.embeddings, pixel_values.shape[0]
            x: torch.Tensor = e.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
            positions = e.position_embedding
            if learned != patches:
                placed = resized(positions[0, 1:], self.get_buffer("resize"))
                positions = torch.cat([positions[:, :1], placed[None]], dim=1)
            x = torch.cat([e.class_embedding.expand(batch, -1, -1), x], dim=1) + positions
            for layer in self.encoder.layers:
                x = layer(x)
            return x

    return InternVit()


def constants(tower: InternVit6B, side: int) -> dict[str, npt.NDArray[np.float32]]:
    """Returns what the module's meta buffers hold, by their names: how positions are resized, which stays in fp32."""
    learned, patches = tower.image_size // tower.patch_size, side // tower.patch_size
    return {} if learned == patches else {"resize": interpolation(learned, patches)}


def _embeddings(tower: InternVit6B, learned: int) -> "torch.nn.Module":
    import torch
    from torch.nn import Parameter

    hidden, patch = tower.hidden_size, tower.patch_size
    made = torch.nn.Module()
    made.class_embedding = Parameter(torch.empty(1, 1, hidden))
    made.patch_embedding = torch.nn.Conv2d(tower.num_channels, hidden, patch, patch)
    made.position_embedding = Parameter(torch.empty(1, 1 + learned * learned, hidden))
    return made


def _layer(tower: InternVit6B) -> "torch.nn.Module":
    """Returns pre-norm attention and MLP, each scaled per channel before it is added: [B,1+N,D] to the same."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    hidden, heads, eps = tower.hidden_size, tower.num_attention_heads, tower.layer_norm_eps
    normed = tower.qk_normalization

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(hidden, 3 * hidden, bias=tower.qkv_bias)
            self.proj = nn.Linear(hidden, hidden)
            if normed:
                self.q_norm, self.k_norm = nn.RMSNorm(hidden, eps), nn.RMSNorm(hidden, eps)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            qkv = self.qkv(x)
            # `chunk` would become a sequence in ONNX.
            q, k, v = qkv[..., :hidden], qkv[..., hidden : 2 * hidden], qkv[..., 2 * hidden :]
            if normed:  # over all heads together
                q, k = self.q_norm(q), self.k_norm(k)
            q, k, v = (y.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for y in (q, k, v))
            seen = F.scaled_dot_product_attention(q, k, v)
            found: torch.Tensor = self.proj(seen.transpose(1, 2).reshape(x.shape))
            return found

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(hidden, eps), nn.RMSNorm(hidden, eps)
            self.attn = Attention()
            self.mlp: Any = nn.Module()
            self.mlp.fc1 = nn.Linear(hidden, tower.intermediate_size)
            self.mlp.fc2 = nn.Linear(tower.intermediate_size, hidden)
            self.ls1, self.ls2 = nn.Parameter(torch.empty(hidden)), nn.Parameter(torch.empty(hidden))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.ls1 * self.attn(self.norm1(x))
            made: torch.Tensor = x + self.ls2 * self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))
            return made

    return Layer()
