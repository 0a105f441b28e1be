"""The models one can name: where each lies, and its config.json as far as a plan needs it (no network, no weights)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Alias:
    """A published model: its Hugging Face id or folder, and what its config.json says."""

    source: str
    config: dict[str, Any] = field(default_factory=dict)


def _llava(hidden: int, ffn: int, layers: int, heads: int) -> dict[str, Any]:
    text = {"model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": 32064, "rms_norm_eps": 1e-5}
    text |= {"max_position_embeddings": 4096, "pad_token_id": 32001}
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": 32000}
    return config | {"text_config": text, "vision_config": vision}


ALIASES = {
    "llava-7b": Alias("llava-hf/llava-1.5-7b-hf", _llava(4096, 11008, 32, 32)),
    "llava-13b": Alias("llava-hf/llava-1.5-13b-hf", _llava(5120, 13824, 40, 40)),
    "shapes": Alias(str(Path(__file__).parent / "shapes")),
}
