"""The models one can name: where each lies, and its config.json as far as a plan needs it (no network, no weights)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Alias:
    """A model by its short `name`; `source` is its Hugging Face id, or a folder."""

    name: str
    source: str

    @property
    def config(self) -> dict[str, Any]:
        """What a published model's config.json says, a release's vision tower's own as "vision_config"; nothing of a
        folder's."""
        file = _HERE / "published" / f"{self.name}.json"
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return found


_SOURCES = {
    "llava-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-13b": "llava-hf/llava-1.5-13b-hf",
    "llava-7b-original": "liuhaotian/llava-v1.5-7b",
    "llava-13b-original": "liuhaotian/llava-v1.5-13b",
    "llava-next-vicuna-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-next-vicuna-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
    "llava-next-mistral-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
    "llava-onevision-0.5b": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "llava-onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "internvl-v1-7b": "OpenGVLab/InternVL-Chat-ViT-6B-Vicuna-7B",
    "qwen-vl-chat": "Qwen/Qwen-VL-Chat",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
    "internvl3-1b": "OpenGVLab/InternVL3-1B-hf",
    "internvl3-2b": "OpenGVLab/InternVL3-2B-hf",
    "internvl3-8b": "OpenGVLab/InternVL3-8B-hf",
    "smolvlm2-256m": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    "smolvlm2-500m": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    "smolvlm2-2.2b": "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    "shapes": str(_HERE / "shapes"),
}
ALIASES = {name: Alias(name, source) for name, source in _SOURCES.items()}
