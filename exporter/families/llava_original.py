"""`LlavaLlamaForCausalLM`: LLaVA's original layout, of LLaVA-1.5 (CLIP) and of InternVL-Chat 1.0 (InternViT-6B).

As haotian-liu/LLaVA writes it (llava/model/llava_arch.py), and OpenGVLab/InternVL's copy of it, internvl_chat_llava.
Where the vision tower's tensors lie in a checkpoint of their own, its config.json is "vision_config" of ours.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace

from himap_export.engines.image import IMAGENET_MEAN, IMAGENET_STD, ImagePreprocessing, clip_preprocessing, mean_color
from himap_export.exporter.config import LlavaOriginal
from himap_export.exporter.families import intern_vit
from himap_export.exporter.families.constants import hold
from himap_export.exporter.families.sentencepiece import tokenizer
from himap_export.exporter.family import (
    Config,
    Family,
    Picture,
    PromptRules,
    VisionSpec,
    built,
    check_tower,
    fixed_size,
    only,
    require,
    text_spec,
)
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    import torch

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
TEMPLATE = SYSTEM + "USER: <image>\n{prompt} ASSISTANT:"


def decoder(config: Config) -> DecoderSpec:
    from transformers import LlamaConfig

    return text_spec(built(LlamaConfig, {k: v for k, v in config.items() if k != "vision_config"}))


def tower(config: Config) -> str | None:
    """The Hugging Face id or folder of the checkpoint that holds the vision tower."""
    named: str | None = config.get("mm_vision_tower", config.get("vision_tower"))
    return named


def _is_intern(config: Config) -> bool:
    return config.get("vision_config", {}).get("model_type") == intern_vit.MODEL_TYPE  # type: ignore[no-any-return]


def _tower(config: Config) -> tuple[Config, bool, int]:
    """The vision tower's own configuration, whether it is an InternViT-6B, and the side of its pictures in pixels.

    HimapError (usage) for one that `module` does not follow."""
    found: Config = config.get("vision_config", {})
    kind = found.get("model_type")
    only("vision tower", kind, "clip", "clip_vision_model", intern_vit.MODEL_TYPE)
    if not _is_intern(config):
        from transformers import CLIPVisionConfig

        found = found.get("vision_config", found)  # of a CLIP with its text encoder, as openai's
        full = built(CLIPVisionConfig, found)
        check_tower(full.hidden_size, full.num_attention_heads, full.hidden_act)
        return full.to_dict(), False, full.image_size
    intern_vit.check(found)
    # Trained at 224 px; its authors' CLIPVisionTower chooses by the tower's name.
    return found, True, 448 if "448" in (tower(config) or "") else 336


def _layers(config: Config, depth: int) -> int:
    """How many of the tower's `depth` layers are read: state 0 is the embeddings', and one state is wanted."""
    select: int = config.get("mm_vision_select_layer", -2)
    require(-depth - 1 <= select <= depth, f"mm_vision_select_layer {select} of a vision tower of {depth} layers")
    return select % (depth + 1)


def vision(config: Config, asked: Picture) -> VisionSpec:
    found, _, side = _tower(config)
    _layers(config, found["num_hidden_layers"])
    _projector_depth(config, found["hidden_size"])
    feature = config.get("mm_vision_select_feature", "patch")
    only("mm_vision_select_feature", feature, "patch", "cls_patch")
    only("image_aspect_ratio", config.get("image_aspect_ratio"), None, "square", "pad")
    only("mm_patch_merge_type", config.get("mm_patch_merge_type", "flat"), "flat")
    only("mm_hidden_size", config.get("mm_hidden_size", found["hidden_size"]), found["hidden_size"])
    patches = side // found["patch_size"]
    size = fixed_size(asked, (side, side))
    tokens = patches * patches + (feature == "cls_patch")
    return VisionSpec(size, found.get("num_channels", 3), tokens, (patches, patches))


def names(config: Config, role: str) -> Iterator[str]:
    """The checkpoint's names, then for the tower those of a checkpoint of its own."""
    if role.startswith("vision_tower."):
        rest = role.removeprefix("vision_tower.").removeprefix("vision_model.")
        variants = (rest,) if _is_intern(config) else (f"vision_model.{rest}", rest)
        for prefix in ("model.vision_tower.vision_tower.", ""):
            yield from (prefix + variant for variant in variants)
    else:
        yield role if role == "lm_head.weight" else f"model.{role}"


def prompt(config: Config) -> PromptRules:
    only("mm_use_im_start_end", config.get("mm_use_im_start_end", False), False)
    eos = config.get("eos_token_id", 2)
    return PromptRules(
        image_token=-200,
        image_text="<image>",
        template=TEMPLATE,
        positions=config.get("max_position_embeddings", 2048),
        eos=tuple(eos) if isinstance(eos, list | tuple) else (eos,),
        pad=config.get("pad_token_id"),
    )


def image(config: Config, spec: VisionSpec) -> ImagePreprocessing:
    how = clip_preprocessing(spec.size[0])
    if _is_intern(config):
        how = replace(how, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    if config.get("image_aspect_ratio") != "pad":
        return how
    return replace(how, pad_color=mean_color(how.mean))


def _projector_depth(config: Config, width: int) -> int | None:
    """Linear layers of the projector's MLP; None for one linear layer by itself, 0 for no projector."""
    kind = config.get("mm_projector_type", "linear")
    if kind == "identity":
        only("width of the vision tower under an identity projector", width, config["hidden_size"])
        return 0
    depth = re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind)
    if depth is None:
        only("mm_projector_type", kind, "linear", "mlp2x_gelu", "mlpNx_gelu", "identity")
    return int(depth[1]) if depth else None


def _projector(config: Config, width: int) -> "torch.nn.Module":
    """[...,width] to [...,D], as build_vision_projector in llava/model/multimodal_projector/builder.py."""
    from torch import nn

    depth, hidden = _projector_depth(config, width), config["hidden_size"]
    if depth == 0:
        return nn.Identity()
    if depth is None:
        return nn.Linear(width, hidden)
    deeper = (layer for _ in range(depth - 1) for layer in (nn.GELU(), nn.Linear(hidden, hidden)))
    return nn.Sequential(nn.Linear(width, hidden), *deeper)


def module(config: Config, spec: VisionSpec, dtype: "torch.dtype") -> "torch.nn.Module":
    """The tower up to the layer whose states are selected, and the projector."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    found, intern, side = _tower(config)
    layers = _layers(config, found["num_hidden_layers"])
    whole = spec.tokens > spec.grid[0] * spec.grid[1]

    class Vision(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if intern:
                self.vision_tower = intern_vit.intern_vit(found, side, layers)
            else:
                needed = CLIPVisionConfig(**{**found, "num_hidden_layers": layers}, attn_implementation="sdpa")
                self.vision_tower = CLIPVisionModel(needed)
            self.mm_projector = _projector(config, found["hidden_size"])

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            seen = self.vision_tower(pixel_values)
            states = seen if intern else seen.last_hidden_state  # of CLIP: before its last norm
            features: torch.Tensor = self.mm_projector(states if whole else states[:, 1:])
            return features

    with torch.device("meta"):
        made = Vision().to(dtype).eval()
    if intern:
        hold(made, intern_vit.constants(found, side), "vision_tower")
    else:
        places = np.arange((side // found["patch_size"]) ** 2 + 1)[None]
        made.constants = {"vision_tower.embeddings.position_ids": places}  # type: ignore[assignment]
    return made


FAMILY = Family(
    "LlavaLlamaForCausalLM", decoder, vision, module, names, prompt, image, tokenizer=tokenizer, tower=tower,
    own_image=True, model_type="llava", schema=LlavaOriginal,
)  # fmt: skip
