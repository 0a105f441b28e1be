"""Qwen-VL (2023) out of Hugging Face's own modules: Qwen2's decoder, CLIP's encoder layers, torch's attention.

Qwen's first decoder is Qwen2's with query, key and value fused, up to `seq_length` tokens; its tower is CLIP's layers
without class token. Only the order of the operations around the modules is written here, after the release's visual.py.
"""

import json
from collections.abc import Iterator
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPVisionConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

Tensors = dict[str, Tensor]
VISUAL = "transformer.visual."
# Qwen's names inside a layer, and Qwen2's.
LAYER = {
    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip
# The tower's inside a block, and CLIP's.
BLOCK = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip


class Tower(nn.Module):
    """ViT and resampler: pixels [n,3,H,W] to features [n,256,D]."""

    attn_pool: Any

    def __init__(self, visual: dict[str, Any], attention: Literal["eager", "sdpa"]) -> None:
        super().__init__()
        width, hidden, queries = visual["width"], visual["output_dim"], visual.get("n_queries", 256)
        clip = CLIPVisionConfig(
            hidden_size=width, num_attention_heads=visual["heads"], intermediate_size=int(width * visual["mlp_ratio"]),
            hidden_act="gelu", layer_norm_eps=1e-6, attn_implementation=attention,
        )  # fmt: skip
        self.eager = attention == "eager"
        self.conv1 = nn.Conv2d(3, width, visual["patch_size"], visual["patch_size"], bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(256, width))
        self.ln_pre = nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList(CLIPEncoderLayer(clip) for _ in range(visual["layers"]))
        self.attn_pool = nn.Module()
        self.attn_pool.pos_embed = nn.Parameter(torch.empty(queries, hidden))
        self.attn_pool.query = nn.Parameter(torch.empty(queries, hidden))
        self.attn_pool.kv_proj = nn.Identity() if width == hidden else nn.Linear(width, hidden, bias=False)
        self.attn_pool.ln_q = nn.LayerNorm(hidden, eps=1e-6)
        self.attn_pool.ln_kv = nn.LayerNorm(hidden, eps=1e-6)
        self.attn_pool.attn = nn.MultiheadAttention(hidden, hidden // 128, batch_first=True)
        self.ln_post = nn.LayerNorm(hidden, eps=1e-6)
        self.proj = nn.Parameter(torch.empty(hidden, hidden))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels)
        size = patches.shape[-2:]
        x = self.ln_pre(patches.flatten(2).transpose(1, 2) + resized(self.positional_embedding, size))
        for block in self.blocks:
            x = block(x, attention_mask=None)
        pool = self.attn_pool
        x = pool.ln_kv(pool.kv_proj(x))
        asked = (pool.ln_q(pool.query) + pool.pos_embed).expand(len(x), -1, -1)
        pooled, _ = pool.attn(asked, x + resized(pool.pos_embed, size), x, need_weights=self.eager)
        features: Tensor = self.ln_post(pooled) @ self.proj
        return features


def resized(learned: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the positions [m*m,C] of a square resized to `size` (rows, columns), in reading order:
    [rows*columns,C]."""
    side = isqrt(len(learned))
    if size == (side, side):
        return learned
    grid = learned.float().T.reshape(1, -1, side, side)
    return F.interpolate(grid, size, mode="bicubic", align_corners=False).flatten(2)[0].T.to(learned.dtype)


class QwenVL(nn.Module):
    """`causal`: the decoder; `stop_tokens` and `pad_token` as the release's chat has them."""

    def __init__(self, config: dict[str, Any], causal: Qwen2ForCausalLM, tower: Tower) -> None:
        super().__init__()
        self.causal, self.tower = causal, tower
        self.image_start = int(config["visual"]["image_start_id"])
        # <|endoftext|>, <|im_start|>, <|im_end|>, 205 extras, 6 tags of grounding, <img>.
        end_of_text = self.image_start - 6 - 205 - 3
        known = (end_of_text + 2, end_of_text + 1, end_of_text)
        self.stop_tokens: tuple[int, ...] = known if end_of_text >= 0 else (self.image_start,)
        self.pad_token = self.stop_tokens[-1]

    def image_features(self, pixels: Tensor) -> Tensor:
        """Pixels [n,3,H,W] to features [n,256,D], both in the model's dtype."""
        features: Tensor = self.tower(pixels.to(self.tower.proj.dtype))
        return features

    def is_image(self, ids: Tensor) -> Tensor:
        """Returns where of `ids` [S] stands an image token, strictly between <img> and </img>: bool [S]."""
        opened, closed = (torch.cumsum(ids == self.image_start + end, 0) for end in (0, 1))
        return (opened > closed) & (ids != self.image_start)


def load(
    folder: Path, dtype: torch.dtype, attn_implementation: str, vision_attention: Literal["eager", "sdpa"] = "sdpa"
) -> QwenVL:
    """Returns the release in `folder` (config.json and safetensors), in eval mode, on the CPU, in `dtype`.

    `attn_implementation` is any name that transformers knows, for the decoder. ValueError if the checkpoint lacks a
    tensor, has one that no module takes or of another shape, or if its config.json is not of this architecture.
    """
    config = json.loads((folder / "config.json").read_text())
    if config.get("architectures") != ["QWenLMHeadModel"] or not config["no_bias"] or config["rotary_pct"] != 1:
        raise ValueError(f"{folder} is no Qwen-VL: {config.get('architectures')}")
    decoder: Tensors = {}
    vision: Tensors = {}
    for name, tensor in stored(folder):
        if name.startswith(VISUAL):
            vision.update(_vision(name.removeprefix(VISUAL), tensor.to(dtype), config["visual"]))
        else:
            decoder.update(_decoder(name, tensor.to(dtype)))
    with torch.device("meta"):
        causal = Qwen2ForCausalLM(_qwen2(config, attn_implementation)).eval()
        tower = Tower(config["visual"], vision_attention).eval()
    causal.model.rotary_emb = Qwen2RotaryEmbedding(causal.config)  # the one thing that is computed, not stored
    for module, tensors in ((causal, decoder), (tower, vision)):
        try:
            module.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as problem:
            raise ValueError(f"{folder} is not what its config.json says: {problem}") from None
    return QwenVL(config, causal, tower).requires_grad_(False).eval()


def _qwen2(config: dict[str, Any], attention: str) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=config["vocab_size"], hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"] // 2, num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"], num_key_value_heads=config["num_attention_heads"],
        head_dim=config["kv_channels"], rms_norm_eps=config["layer_norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": float(config["rotary_emb_base"])},
        max_position_embeddings=config["seq_length"], tie_word_embeddings=False, use_sliding_window=False,
        attn_implementation=attention,
    )  # fmt: skip


def stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Returns every tensor of the checkpoint; ValueError if the folder holds none, or one of them twice."""
    seen: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # no mapping
                if name in seen:
                    raise ValueError(f"{folder} holds {name} twice")
                seen.add(name)
                yield name, tensors.get_tensor(name)
    if not seen:
        raise ValueError(f"{folder} holds no safetensors")


def _decoder(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Qwen2's tensors that one of Qwen's is; an unknown one keeps its name, which then is unexpected."""
    outside = {"transformer.wte.weight": "model.embed_tokens.weight", "transformer.ln_f.weight": "model.norm.weight"}
    if not name.startswith("transformer.h."):
        yield outside.get(name, name), tensor
        return
    index, _, rest = name.removeprefix("transformer.h.").partition(".")
    place, _, kind = rest.rpartition(".")
    if place == "attn.c_attn":
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            yield f"model.layers.{index}.self_attn.{part}_proj.{kind}", rows
    else:
        yield f"model.layers.{index}.{LAYER.get(place, place)}.{kind}", tensor


def _vision(name: str, tensor: Tensor, visual: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """`Tower`'s tensors that one of the release's visual.* is."""
    if not name.startswith("transformer.resblocks."):
        yield name, tensor
        return
    index, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
    place, _, kind = rest.rpartition(".")
    if place == "attn.in_proj":  # query, key and value of one head, then of the next
        by_head = tensor.reshape(visual["heads"], 3, -1, *tensor.shape[1:])
        for which, part in enumerate("qkv"):
            yield f"blocks.{index}.self_attn.{part}_proj.{kind}", by_head[:, which].flatten(0, 1)
    else:
        yield f"blocks.{index}.{BLOCK.get(place, place)}.{kind}", tensor
