"""The models one can name: where each lies, and its config.json as far as a plan needs it (no network, no weights)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Alias:
    """A published model: its Hugging Face id or folder, and what its config.json says."""

    source: str
    config: Config = field(default_factory=dict)


def _text(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> Config:
    return {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "hidden_act": "silu", **more,
    }  # fmt: skip


_CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336,
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip


def _llava(hidden: int, ffn: int, layers: int, heads: int) -> Config:
    more: Config = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "pad_token_id": 32001}
    return {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 32000,
        "text_config": _text(hidden, ffn, layers, heads, heads, 32064, **more), "vision_config": _CLIP,
    }  # fmt: skip


def _llava_original(hidden: int, ffn: int, layers: int, heads: int, tower: str, select: int, **more: Any) -> Config:
    """Fields as in the release's config.json; "vision_config" is the tower's own."""
    text = _text(hidden, ffn, layers, heads, heads, 32000, rms_norm_eps=1e-5)
    return {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", **text, "rope_scaling": None,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
        "torch_dtype": "float16", "mm_vision_tower": tower, "mm_vision_select_layer": select,
        "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad", **more,
    }  # fmt: skip


_INTERN_VIT_6B = {
    "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "hidden_size": 3200,
    "num_attention_heads": 25, "num_hidden_layers": 48, "intermediate_size": 12800, "image_size": 224,
    "patch_size": 14, "num_channels": 3, "qkv_bias": False, "qk_normalization": True, "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}  # fmt: skip

_QWEN_VL = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "vocab_size": 151936, "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "kv_channels": 128, "intermediate_size": 22016,
    "seq_length": 2048, "max_position_embeddings": 8192, "layer_norm_epsilon": 1e-6, "no_bias": True,
    "use_dynamic_ntk": True, "use_logn_attn": True, "bf16": True, "rotary_emb_base": 10000, "rotary_pct": 1.0,
    "tie_word_embeddings": False,
    "visual": {
        "heads": 16, "image_size": 448, "image_start_id": 151857, "layers": 48, "mlp_ratio": 4.9231,
        "output_dim": 4096, "patch_size": 14, "width": 1664,
    },
}  # fmt: skip


def _qwen2_5_vl(tied: bool, *sizes: int) -> Config:
    more: Config = {"rms_norm_eps": 1e-6, "rope_theta": 1e6}
    more |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    more |= {"max_position_embeddings": 128000, "use_sliding_window": False}
    vision = {
        "model_type": "qwen2_5_vl", "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
        "num_heads": 16, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": sizes[0],
    }  # fmt: skip
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", **_text(*sizes, **more),
        "image_token_id": 151655, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "eos_token_id": 151645, "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "vision_config": vision,
    }  # fmt: skip


def _qwen3_vl(tied: bool, tower: tuple[int, int, int], deepstack: list[int], *sizes: int) -> Config:
    depth, hidden, ffn = tower
    rope = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
    more: Config = {"model_type": "qwen3_vl_text", "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 5e6}
    more |= {"rope_scaling": rope, "attention_bias": False, "max_position_embeddings": 262144}
    vision = {
        "model_type": "qwen3_vl", "depth": depth, "hidden_size": hidden, "intermediate_size": ffn, "num_heads": 16,
        "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "num_position_embeddings": 2304, "hidden_act": "gelu_pytorch_tanh", "out_hidden_size": sizes[0],
        "deepstack_visual_indexes": deepstack,
    }  # fmt: skip
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "image_token_id": 151655,
        "vision_start_token_id": 151652, "vision_end_token_id": 151653, "eos_token_id": 151645,
        "tie_word_embeddings": tied, "dtype": "bfloat16", "text_config": _text(*sizes, **more), "vision_config": vision,
    }  # fmt: skip


def _internvl3(*sizes: int) -> Config:
    more: Config = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768}
    vision = {
        "model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
        "hidden_act": "gelu", "layer_norm_eps": 1e-6, "norm_type": "layer_norm", "use_qk_norm": False,
    }  # fmt: skip
    return {
        "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", "image_token_id": 151667,
        "image_seq_length": 256, "downsample_ratio": 0.5, "vision_feature_layer": -1, "eos_token_id": 151645,
        "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu", "tie_word_embeddings": False,
        "dtype": "bfloat16", "text_config": _text(*sizes, **more), "vision_config": vision,
    }  # fmt: skip


_CLIP_NAME, _SMALL, _DEEP = "openai/clip-vit-large-patch14-336", (24, 1024, 4096), [5, 11, 17]
ALIASES = {
    "llava-7b": Alias("llava-hf/llava-1.5-7b-hf", _llava(4096, 11008, 32, 32)),
    "llava-13b": Alias("llava-hf/llava-1.5-13b-hf", _llava(5120, 13824, 40, 40)),
    "llava-7b-original": Alias(
        "liuhaotian/llava-v1.5-7b",
        _llava_original(4096, 11008, 32, 32, _CLIP_NAME, -2, vision_config=_CLIP, max_position_embeddings=4096),
    ),
    "llava-13b-original": Alias(
        "liuhaotian/llava-v1.5-13b",
        _llava_original(5120, 13824, 40, 40, _CLIP_NAME, -2, vision_config=_CLIP, max_position_embeddings=4096),
    ),
    "internvl-v1-7b": Alias(
        "OpenGVLab/InternVL-Chat-ViT-6B-Vicuna-7B",
        _llava_original(
            4096,
            11008,
            32,
            32,
            "OpenGVLab/InternViT-6B-224px",
            -4,
            vision_config=_INTERN_VIT_6B,
            max_position_embeddings=2048,
        ),
    ),
    "qwen-vl-chat": Alias("Qwen/Qwen-VL-Chat", _QWEN_VL),
    "qwen2.5-vl-3b": Alias("Qwen/Qwen2.5-VL-3B-Instruct", _qwen2_5_vl(True, 2048, 11008, 36, 16, 2, 151936)),
    "qwen2.5-vl-7b": Alias("Qwen/Qwen2.5-VL-7B-Instruct", _qwen2_5_vl(False, 3584, 18944, 28, 28, 4, 152064)),
    "qwen3-vl-2b": Alias("Qwen/Qwen3-VL-2B-Instruct", _qwen3_vl(True, _SMALL, _DEEP, 2048, 6144, 28, 16, 8, 151936)),
    "qwen3-vl-4b": Alias("Qwen/Qwen3-VL-4B-Instruct", _qwen3_vl(True, _SMALL, _DEEP, 2560, 9728, 36, 32, 8, 151936)),
    "qwen3-vl-8b": Alias(
        "Qwen/Qwen3-VL-8B-Instruct", _qwen3_vl(False, (27, 1152, 4304), [8, 16, 24], 4096, 12288, 36, 32, 8, 151936)
    ),
    "internvl3-1b": Alias("OpenGVLab/InternVL3-1B-hf", _internvl3(896, 4864, 24, 14, 2, 151674)),
    "internvl3-2b": Alias("OpenGVLab/InternVL3-2B-hf", _internvl3(1536, 8960, 28, 12, 2, 151674)),
    "internvl3-8b": Alias("OpenGVLab/InternVL3-8B-hf", _internvl3(3584, 18944, 28, 28, 4, 151674)),
    "shapes": Alias(str(Path(__file__).parent / "shapes")),
}
