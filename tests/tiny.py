"""Tiny random LLaVA checkpoints and inputs for tests: made in well under a second, the same ones every time.

    folder = tmp_path / "model"
    tiny = make_llava(folder, TINY["gqa2"], seed=3, sharded=True)
    inputs = make_inputs(tiny, text_lengths=[9, 4], system_lengths=[5, 2], seed=1)

The weights are scaled so that attention is peaked and importance scores lie well apart: with Hugging Face's own
initialisation all tokens look alike, rankings hang on the last bits, and no pruning mistake would change the logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

PAD, BOS, EOS = 0, 1, 2


@dataclass(frozen=True)
class Tiny:
    """Sizes and variations of one checkpoint. The defaults have the shape of `fixtures/himap-tiny`."""

    seed: int = 0
    layers: int = 10
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 16
    ffn: int = 128
    vocab: int = 256
    image_size: int = 56
    patch_size: int = 14
    vision_layers: int = 3
    vision_hidden: int = 32
    vision_feature_layer: int = -2
    image_token: int = 255
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    sharded: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def image_tokens(self) -> int:
        """V, the tokens of one image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class Inputs:
    """Prompts padded on the right. Every image placeholder is there, one per image token."""

    input_ids: NDArray[np.int64]  # [B,S]
    attention_mask: NDArray[np.int64]  # [B,S] 1 real, 0 padding
    pixel_values: NDArray[np.float32]  # [B,3,H,W]
    seconds: tuple[float, ...] = ()  # [B] between two steps of a film

    def sample(self, index: int) -> "Inputs":
        """One prompt alone, without padding: B is 1."""
        length = int(self.attention_mask[index].sum())
        one = slice(index, index + 1)
        return Inputs(self.input_ids[one, :length], self.attention_mask[one, :length], self.pixel_values[one])

    def left_padded(self) -> "Inputs":
        """The same prompts with the padding in front, as Hugging Face's `generate` wants them."""
        shifts = self.attention_mask.shape[1] - self.attention_mask.sum(1)
        ids, mask = (
            np.stack([np.roll(row, shift) for row, shift in zip(rows, shifts, strict=True)])
            for rows in (self.input_ids, self.attention_mask)
        )
        return replace(self, input_ids=ids, attention_mask=mask)


# Named so that a parametrised test says which one failed. Query heads per kv head: 1, 2, 4; the rest varies with them.
TINY: Mapping[str, Tiny] = {
    "mha": Tiny(),
    "gqa2": Tiny(seed=1, layers=6, hidden=48, heads=4, kv_heads=2, head_dim=16, ffn=96, rope_theta=5e5),  # 4*16 > 48
    "mqa4": Tiny(seed=2, layers=6, kv_heads=1, image_size=84, vocab=320, image_token=300),  # 36 image tokens
    "biased": Tiny(seed=3, layers=6, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-6, vision_feature_layer=-1),
    "tied": Tiny(seed=4, layers=6, heads=2, kv_heads=1, head_dim=32, tie_word_embeddings=True),
    "sharded": Tiny(seed=5, layers=6, heads=8, kv_heads=2, head_dim=8, image_size=42, sharded=True),  # 9 image tokens
    "half": Tiny(seed=6, layers=6, kv_heads=2, dtype=torch.float16),
}


def make_llava(folder: Path, tiny: Tiny = TINY["mha"], **changes: Any) -> Tiny:
    """Save the checkpoint of `tiny`, with `changes` to its fields, in the layout of a Hugging Face release."""
    tiny = replace(tiny, **changes)
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=tiny.hidden,
            intermediate_size=tiny.ffn,
            num_hidden_layers=tiny.layers,
            num_attention_heads=tiny.heads,
            num_key_value_heads=tiny.kv_heads,
            head_dim=tiny.head_dim,
            vocab_size=tiny.vocab,
            max_position_embeddings=2048,
            rms_norm_eps=tiny.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": tiny.rope_theta},
            attention_bias=tiny.attention_bias,
            mlp_bias=tiny.mlp_bias,
            tie_word_embeddings=tiny.tie_word_embeddings,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=tiny.vision_hidden,
            intermediate_size=2 * tiny.vision_hidden,
            num_hidden_layers=tiny.vision_layers,
            num_attention_heads=4,
            image_size=tiny.image_size,
            patch_size=tiny.patch_size,
            projection_dim=tiny.vision_hidden,
        ),
        image_token_index=tiny.image_token,
        image_seq_length=tiny.image_tokens,
        vision_feature_layer=tiny.vision_feature_layer,
        tie_word_embeddings=tiny.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    randomise(model, tiny.seed, tiny.tie_word_embeddings)
    size = sum(weight.numel() * weight.element_size() for weight in model.state_dict().values())
    shard = size // 3 if tiny.sharded else size + 1
    model.to(tiny.dtype).save_pretrained(folder, max_shard_size=shard)
    return tiny


def randomise(model: torch.nn.Module, seed: int, tied: bool) -> None:
    """Weights of himap-tiny's scale, whatever the sizes; norms and biases too, so that none can be forgotten unseen."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if "embed_tokens" in name:
            # A tied head multiplies by it again: at full scale every answer would repeat the last prompt token.
            value = noise * (0.3 if tied else 1.0)
        elif weight.ndim == 1:
            value = 0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            # Queries and keys of spread 2.4 give logits of spread 2.4**2 (1/sqrt(E) cancels the sum): peaked softmax.
            gain = 2.4 if "q_proj" in name or "k_proj" in name else 0.64
            value = gain * noise / weight[0].numel() ** 0.5
        weight.data.copy_(value)


def make_inputs(
    tiny: Tiny,
    text_lengths: Sequence[int] = (9,),
    system_lengths: Sequence[int] = (5,),
    seed: int = 0,
    image_runs: int = 1,
) -> Inputs:
    """Prompts of `system_lengths[i]` tokens (the first is BOS), one image, `text_lengths[i]` tokens.

    `image_runs` > 1 breaks the image into that many runs with a text token between two of them.
    """
    if len(text_lengths) != len(system_lengths):
        raise ValueError(f"{len(text_lengths)} text lengths, {len(system_lengths)} system lengths")
    random = np.random.default_rng(seed)
    words = np.setdiff1d(np.arange(EOS + 1, tiny.vocab), [tiny.image_token])
    rows = []
    for text, system in zip(text_lengths, system_lengths, strict=True):
        image = np.full(tiny.image_tokens, tiny.image_token)
        breaks = np.arange(1, image_runs) * tiny.image_tokens // image_runs
        image = np.insert(image, breaks, random.choice(words, image_runs - 1))
        row = np.concatenate([random.choice(words, system), image, random.choice(words, text)])
        if system:
            row[0] = BOS
        rows.append(row)
    ids = np.full((len(rows), max(map(len, rows))), PAD, np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    pixels = random.standard_normal((len(rows), 3, tiny.image_size, tiny.image_size), np.float32)
    return Inputs(ids, mask, pixels)
