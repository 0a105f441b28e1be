"""`QWenLMHeadModel`: Qwen-VL and Qwen-VL-Chat as released in 2023 (arXiv 2308.12966), not Qwen2-VL.

What config.json leaves out is from the release's modeling_qwen.py, visual.py, tokenization_qwen.py and
qwen_generation_utils.py, none of which ever runs here.
"""

import re
from collections.abc import Iterator
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Final

from himap_export.engines.image import ImagePreprocessing
from himap_export.exporter import config as schemas
from himap_export.exporter.checks import require, require_even_heads, require_model_type, require_supported
from himap_export.exporter.families import tiktoken
from himap_export.exporter.family import Family, ImageOptions, PromptRules, VisionSpec
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    import torch

SYSTEM: Final = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
USER: Final = "<|im_start|>user\n{}{{prompt}}<|im_end|>\n<|im_start|>assistant\n"
# Ids are told from the one that config.json holds, of <img>: the specials stand in one order behind the merged tokens.
END_OF_TEXT, IM_START, IM_END = -214, -213, -212
# Checkpoint names by what a decoder role ends with; query, key and value are rows of one tensor.
_LAYER: Final = {
    "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2", "self_attn.o_proj": "attn.c_proj",
    "mlp.gate_proj": "mlp.w2", "mlp.up_proj": "mlp.w1", "mlp.down_proj": "mlp.c_proj",
}  # fmt: skip
_OUTSIDE: Final = {
    "embed_tokens.weight": "transformer.wte.weight",
    "norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}


class QwenVl(Family[schemas.QwenVl]):
    """Qwen-VL and Qwen-VL-Chat."""

    architecture = "QWenLMHeadModel"
    schema = schemas.QwenVl
    own_image = True

    def decoder(self) -> DecoderSpec:
        config = self.config
        require_model_type("model type", self.fields, "qwen")
        require_supported("bias of linear layers (no_bias)", config.no_bias, True)
        require_supported("part of a head that is rotated (rotary_pct)", config.rotary_pct, 1.0)
        require_supported("tied embedding", self.tied, False)
        require_even_heads(config.kv_channels)
        return DecoderSpec(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            ffn=config.intermediate_size // 2,  # config.json counts gate and up together
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            head_dim=config.kv_channels,
            vocab=config.vocab_size,
            norm_eps=config.layer_norm_epsilon,
            rope_base=config.rotary_emb_base,
            qkv_bias=True,
        )

    def vision(self, asked: ImageOptions) -> VisionSpec:
        """Returns one image of one size; tokens are in the reading order of the queries' own grid, which the positions
        span."""
        from himap_export.exporter.families.qwen_vl_tower import CHANNELS, HEAD_DIM

        visual = self.config.visual
        tokens, side, width, hidden = visual.n_queries, visual.image_size, visual.width, visual.output_dim
        require_supported("width of vision features", hidden, self.config.hidden_size)
        require(hidden % HEAD_DIM == 0, f"{hidden} channels are no whole heads of {HEAD_DIM}")
        require(width % visual.heads == 0, f"a vision tower of {width} channels has no {visual.heads} equal heads")
        require(int(width * visual.mlp_ratio) > 0, f"mlp_ratio {visual.mlp_ratio} leaves the tower no hidden layer")
        require(side % visual.patch_size == 0, f"images of {side} pixels are no whole patches of {visual.patch_size}")
        require(tokens == isqrt(tokens) ** 2, f"{tokens} queries are no square")
        asked.require_whole()
        asked.require_still()
        return VisionSpec(asked.fixed((side, side)), CHANNELS, tokens, (isqrt(tokens), isqrt(tokens)))

    def module(self, spec: VisionSpec, dtype: "torch.dtype") -> "torch.nn.Module":
        from himap_export.exporter.families.qwen_vl_tower import tower

        return tower(self.config.visual, dtype)

    def names(self, role: str) -> Iterator[str]:
        """Yields the name in the release's one layout."""
        kind = role.rpartition(".")[2]
        if role.startswith("visual.") and _fused(role):
            yield f"transformer.visual.attn_pool.attn.in_proj_{kind}"
        elif role.startswith("visual."):
            yield f"transformer.{role}"
        elif role in _OUTSIDE:
            yield _OUTSIDE[role]
        else:
            _, index, rest = role.split(".", 2)
            place = "attn.c_attn" if _fused(role) else _LAYER[rest.rpartition(".")[0]]
            yield f"transformer.h.{index}.{place}.{kind}"

    def rows(self, role: str) -> tuple[int, int] | None:
        """Returns a third of a fused projection for query, key and value each."""
        if (part := _fused(role)) is None:
            return None
        vision, width = role.startswith("visual."), self.config.kv_channels * self.config.num_attention_heads
        size, nth = self.config.visual.output_dim if vision else width, "qkv".index(part)
        return nth * size, (nth + 1) * size

    def prompt(self) -> PromptRules:
        """Returns the release's chat of one turn; it ends at whichever of its three markers comes first.

        A vocabulary too small to hold the markers before <img>, as in tests, has none: <img> itself, which no answer
        holds, stands in. Past `seq_length` tokens the release changes its rotary base and scales its queries, by the
        length: positions end there.
        """
        config, start = self.config, self.config.visual.image_start_id
        held = (IM_END, IM_START, END_OF_TEXT) if start + END_OF_TEXT >= 0 else (0,)
        marks = tuple(start + mark for mark in held)
        grows = config.use_dynamic_ntk or config.use_logn_attn
        return PromptRules(
            image_token=start + 2,
            image_text="<imgpad>",
            template=SYSTEM + USER.format("{pictures}"),
            lead="Picture {n}: <img><imgpad></img>\n",
            turn="<|im_end|>\n" + USER.format(""),
            positions=config.seq_length if grows else config.max_position_embeddings,
            eos=marks,
            stop=marks,
            pad=marks[-1],
            between=(start, start + 1),
        )

    def image(self, spec: VisionSpec) -> ImagePreprocessing:
        """Returns how to stretch to a square, as the release does; CLIP's colours."""
        return ImagePreprocessing(resize=spec.size, crop=None)

    def tokenizer(self, folder: Path) -> bytes | None:
        """Returns one from qwen.tiktoken; HimapError if it is damaged, or is not the model's: <img> would have another
        id."""
        return tiktoken.tokenizer_json(folder / "qwen.tiktoken", {"<imgpad>": self.prompt().image_token})


def _fused(role: str) -> str | None:
    """q, k or v, if `role` is of a projection that the release stores with the two others."""
    found = re.search(r"(?:self_attn|attn_pool\.attn)\.([qkv])_proj\.", role)
    return found[1] if found else None
