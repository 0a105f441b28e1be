"""`QWenLMHeadModel`: Qwen-VL and Qwen-VL-Chat as released in 2023 (arXiv 2308.12966), not Qwen2-VL.

What config.json leaves out is from the release's modeling_qwen.py, visual.py, tokenization_qwen.py and
qwen_generation_utils.py, none of which ever runs here.
"""

from collections.abc import Iterator
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Final

from himap_export.engines.image import ImagePreprocessing
from himap_export.exporter.config import QwenVl
from himap_export.exporter.families import tiktoken
from himap_export.exporter.family import Config, Family, Picture, PromptRules, VisionSpec, fixed_size, only, require
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    import torch

SYSTEM: Final = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
USER: Final = "<|im_start|>user\nPicture 1: <img><imgpad></img>\n{prompt}<|im_end|>\n"
TEMPLATE: Final = f"{SYSTEM}{USER}<|im_start|>assistant\n"
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


def decoder(config: Config) -> DecoderSpec:
    heads, head_dim = config["num_attention_heads"], config["kv_channels"]
    only("model type", config.get("model_type", "qwen"), "qwen")
    only("bias of linear layers (no_bias)", config.get("no_bias", True), True)
    only("part of a head that is rotated (rotary_pct)", config.get("rotary_pct", 1.0), 1.0)
    only("tied embedding", config.get("tie_word_embeddings", False), False)
    require(head_dim % 2 == 0, f"heads of {head_dim} cannot be rotated by halves")
    return DecoderSpec(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        ffn=config["intermediate_size"] // 2,  # config.json counts gate and up together
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        vocab=config["vocab_size"],
        norm_eps=config["layer_norm_epsilon"],
        rope_base=float(config.get("rotary_emb_base", 10000)),
        qkv_bias=True,
    )


def vision(config: Config, asked: Picture) -> VisionSpec:
    """One picture of one size; tokens are in the reading order of the queries' own grid, which the positions span."""
    from himap_export.exporter.families.qwen_vl_tower import CHANNELS, HEAD_DIM, queries

    visual = config["visual"]
    tokens, side, patch = queries(visual), visual["image_size"], visual["patch_size"]
    width, heads = visual["width"], visual["heads"]
    only("width of vision features", visual["output_dim"], config["hidden_size"])
    require(visual["output_dim"] % HEAD_DIM == 0, f"{visual['output_dim']} channels are no whole heads of {HEAD_DIM}")
    require(width % heads == 0, f"a vision tower of {width} channels has no {heads} equal heads")
    require(int(width * visual["mlp_ratio"]) > 0, f"mlp_ratio {visual['mlp_ratio']} leaves the tower no hidden layer")
    require(side % patch == 0, f"pictures of {side} pixels are no whole patches of {patch}")
    require(tokens == isqrt(tokens) ** 2, f"{tokens} queries are no square")
    return VisionSpec(fixed_size(asked, (side, side)), CHANNELS, tokens, (isqrt(tokens), isqrt(tokens)))


def module(config: Config, spec: VisionSpec, dtype: "torch.dtype") -> "torch.nn.Module":
    from himap_export.exporter.families.qwen_vl_tower import tower

    return tower(config["visual"], dtype)


def names(config: Config, role: str) -> Iterator[str]:
    """The release's one layout."""
    if role.startswith("visual.attn_pool.attn.") and role.split(".")[3] in ("q_proj", "k_proj", "v_proj"):
        _, _, _, part, kind = role.split(".")
        rows = _third("qkv".index(part[0]), config["visual"]["output_dim"])
        yield f"transformer.visual.attn_pool.attn.in_proj_{kind}{rows}"
    elif role.startswith("visual."):
        yield f"transformer.{role}"
    elif role in _OUTSIDE:
        yield _OUTSIDE[role]
    else:
        _, index, rest = role.split(".", 2)
        place, _, kind = rest.rpartition(".")
        if place in _LAYER:
            yield f"transformer.h.{index}.{_LAYER[place]}.{kind}"
        else:  # self_attn.q_proj, k_proj, v_proj
            rows = _third("qkv".index(place.removeprefix("self_attn.")[0]), _projected(config))
            yield f"transformer.h.{index}.attn.c_attn.{kind}{rows}"


def _projected(config: Config) -> int:
    """How wide each of query, key and value is, all heads together."""
    return int(config["kv_channels"] * config["num_attention_heads"])


def _third(which: int, size: int) -> str:
    return f"[{which * size}:{(which + 1) * size}]"


def prompt(config: Config) -> PromptRules:
    """The release's chat of one turn; it ends at whichever of its three markers comes first.

    A vocabulary too small to hold the markers before <img>, as in tests, has none: <img> itself, which no answer
    holds, stands in. Past `seq_length` tokens the release changes its rotary base and scales its queries, by the
    length: positions end there.
    """
    start = config["visual"]["image_start_id"]
    marks = (END_OF_TEXT, IM_START, IM_END) if start + END_OF_TEXT >= 0 else (0,)
    grows = config.get("use_dynamic_ntk", True) or config.get("use_logn_attn", True)
    return PromptRules(
        image_token=start + 2,
        image_text="<imgpad>",
        template=TEMPLATE,
        positions=config["seq_length"] if grows else config["max_position_embeddings"],
        eos=tuple(start + mark for mark in reversed(marks)),
        stop=tuple(start + mark for mark in reversed(marks)),
        pad=start + marks[0],
        between=(start, start + 1),
    )


def image(config: Config, spec: VisionSpec) -> ImagePreprocessing:
    """Stretched to a square, as the release does; CLIP's colours."""
    return ImagePreprocessing(resize=spec.size, crop=None)


def tokenizer(folder: Path, rules: PromptRules) -> bytes | None:
    """From qwen.tiktoken; HimapError if it is damaged, or is not the model's: <img> would have another id."""
    return tiktoken.tokenizer_json(folder / "qwen.tiktoken", {"<imgpad>": rules.image_token})


FAMILY = Family(
    "QWenLMHeadModel", decoder, vision, module, names, prompt, image, tokenizer, own_image=True, schema=QwenVl
)
