"""`LlavaLlamaForCausalLM`: LLaVA's original layout, of LLaVA-1.5 (CLIP) and of InternVL-Chat 1.0 (InternViT-6B).

As haotian-liu/LLaVA writes it (llava/model/llava_arch.py), and OpenGVLab/InternVL's copy of it, internvl_chat_llava.
Where the vision tower's tensors lie in a checkpoint of their own, its config.json is "vision_config" of ours.
"""

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from msgspec import UNSET
from msgspec.structs import replace

from himap_export.engines.documents import typed
from himap_export.engines.image import IMAGENET_MEAN, IMAGENET_STD, ImagePreprocessing, clip_preprocessing, mean_color
from himap_export.exporter import config as schemas
from himap_export.exporter.checks import require, require_supported, require_tower
from himap_export.exporter.families import intern_vit, sentencepiece
from himap_export.exporter.families.constants import on_meta
from himap_export.exporter.family import Family, ImageOptions, PromptRules, VisionSpec, llama_decoder, make_config
from himap_export.graphs.spec import DecoderSpec

if TYPE_CHECKING:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
TEMPLATE = SYSTEM + "USER: {pictures}{prompt} ASSISTANT:"
TURN = "</s>USER: {prompt} ASSISTANT:"  # its end is told, where pieces of llava/conversation.py meet


class LlavaOriginal(Family[schemas.LlavaOriginal]):
    """LLaVA-1.5 and InternVL-Chat 1.0 as released."""

    architecture = "LlavaLlamaForCausalLM"
    schema = schemas.LlavaOriginal
    model_type = "llava"
    own_image = True

    @cached_property
    def text(self) -> "LlamaConfig":
        """transformers' configuration of the decoder."""
        from transformers import LlamaConfig

        known = schemas.Text.__struct_fields__
        return make_config(LlamaConfig, {name: value for name, value in self.fields.items() if name in known})

    @cached_property
    def tower_config(self) -> "schemas.InternVit6B | CLIPVisionConfig":
        """The vision tower's configuration; HimapError (usage) for a tower that `module` does not follow."""
        from transformers import CLIPVisionConfig

        found = self.fields.get("vision_config", {})
        require_supported("vision tower", found.get("model_type"), "clip", "clip_vision_model", intern_vit.MODEL_TYPE)
        if found["model_type"] == intern_vit.MODEL_TYPE:
            return intern_vit.read_tower(found)
        clip = make_config(CLIPVisionConfig, found.get("vision_config", found))  # beside a text encoder's: openai's
        require_tower(clip.hidden_size, clip.num_attention_heads, clip.hidden_act)
        return clip

    @property
    def intern(self) -> schemas.InternVit6B | None:
        """The vision tower's configuration, if it is an InternViT-6B."""
        return self.tower_config if isinstance(self.tower_config, schemas.InternVit6B) else None

    @property
    def side(self) -> int:
        """Pixels of an image's side. InternViT was trained at 224; its authors' code chooses by the tower's name."""
        if self.intern:
            return 448 if "448" in (self.tower() or "") else 336
        return self.tower_config.image_size

    @property
    def layers(self) -> int:
        """How many of the tower's layers are read: state 0 is the embeddings', and one state is wanted."""
        select, depth = self.config.mm_vision_select_layer, self.tower_config.num_hidden_layers
        require(-depth - 1 <= select <= depth, f"mm_vision_select_layer {select} of a vision tower of {depth} layers")
        return select % (depth + 1)

    def tower(self) -> str | None:
        found = self.config.vision_tower if self.config.mm_vision_tower is UNSET else self.config.mm_vision_tower
        return None if found is UNSET else found

    def with_tower(self, config: Mapping[str, Any], where: str) -> Self:
        if self.config.vision_config is not UNSET:
            return self
        return type(self)(replace(self.config, vision_config=typed(config, schemas.ReleasedTower, where)))

    def decoder(self) -> DecoderSpec:
        return llama_decoder(self.text)

    def vision(self, asked: ImageOptions) -> VisionSpec:
        config, tower, side, _ = self.config, self.tower_config, self.side, self.layers
        self._projector_depth()
        feature, width = config.mm_vision_select_feature, self.fields.get("mm_hidden_size", tower.hidden_size)
        require_supported("mm_vision_select_feature", feature, "patch", "cls_patch")
        require_supported("image_aspect_ratio", config.image_aspect_ratio, None, "square", "pad")
        require_supported("mm_patch_merge_type", config.mm_patch_merge_type, "flat")
        require_supported("mm_hidden_size", width, tower.hidden_size)
        asked.require_whole()
        asked.require_still()
        patches = side // tower.patch_size
        tokens = patches * patches + (feature == "cls_patch")
        return VisionSpec(asked.fixed((side, side)), tower.num_channels, tokens, (patches, patches))

    def names(self, role: str) -> Iterator[str]:
        """Yields the checkpoint's names, then for the tower those of a checkpoint of its own."""
        if role.startswith("vision_tower."):
            rest = role.removeprefix("vision_tower.").removeprefix("vision_model.")
            variants = (rest,) if self.intern else (f"vision_model.{rest}", rest)
            for prefix in ("model.vision_tower.vision_tower.", ""):
                yield from (prefix + variant for variant in variants)
        else:
            yield role if role == "lm_head.weight" else f"model.{role}"

    def prompt(self) -> PromptRules:
        require_supported("mm_use_im_start_end", self.config.mm_use_im_start_end, False)
        eos = self.fields.get("eos_token_id", 2)
        return PromptRules(
            image_token=-200,
            image_text="<image>",
            template=TEMPLATE,
            lead="<image>\n",
            turn=TURN,
            positions=self.text.max_position_embeddings,
            eos=tuple(eos) if isinstance(eos, list) else (eos,),
            pad=self.fields.get("pad_token_id"),
        )

    def image(self, spec: VisionSpec) -> ImagePreprocessing:
        how = clip_preprocessing(spec.size[0])
        if self.intern:
            how = replace(how, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        return replace(how, pad_color=mean_color(how.mean)) if self.config.image_aspect_ratio == "pad" else how

    def tokenizer(self, folder: Path) -> bytes | None:
        return sentencepiece.tokenizer_json(folder, self.prompt().image_text)

    def _projector_depth(self) -> int | None:
        """Returns the linear layers of the projector's MLP; None for one linear layer by itself, 0 for no projector."""
        kind, width, hidden = self.config.mm_projector_type, self.tower_config.hidden_size, self.config.hidden_size
        if kind == "identity":
            require_supported("width of the vision tower under an identity projector", width, hidden)
            return 0
        depth = re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind)
        if depth is None:
            require_supported("mm_projector_type", kind, "linear", "mlp2x_gelu", "mlpNx_gelu", "identity")
        return int(depth[1]) if depth else None

    def _projector(self) -> "torch.nn.Module":
        """Returns [...,width] to [...,D], as build_vision_projector in llava/model/multimodal_projector/builder.py."""
        from torch import nn

        depth, width, hidden = self._projector_depth(), self.tower_config.hidden_size, self.config.hidden_size
        if depth == 0:
            return nn.Identity()
        if depth is None:
            return nn.Linear(width, hidden)
        deeper = (layer for _ in range(depth - 1) for layer in (nn.GELU(), nn.Linear(hidden, hidden)))
        return nn.Sequential(nn.Linear(width, hidden), *deeper)

    def _vision_tower(self) -> "torch.nn.Module":
        """Returns the tower up to the layer whose states are selected: pixels to states [B,1+N,width]."""
        config = self.tower_config
        if isinstance(config, schemas.InternVit6B):
            return intern_vit.intern_vit(config, self.side, self.layers)
        from transformers import CLIPVisionConfig, CLIPVisionModel

        needed = {**config.to_dict(), "num_hidden_layers": self.layers}
        made: torch.nn.Module = CLIPVisionModel(CLIPVisionConfig(**needed, attn_implementation="sdpa"))
        return made

    def module(self, spec: VisionSpec, dtype: "torch.dtype") -> "torch.nn.Module":
        """Returns the tower and the projector."""
        import torch

        family, patches = self, spec.grid[0]
        whole = spec.tokens > patches**2

        class Vision(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.vision_tower, self.mm_projector = family._vision_tower(), family._projector()

            def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
                seen = self.vision_tower(pixel_values)
                states = seen if family.intern else seen.last_hidden_state  # of CLIP: before its last norm
                features: torch.Tensor = self.mm_projector(states if whole else states[:, 1:])
                return features

        if self.intern:
            return on_meta(Vision, dtype, intern_vit.constants(self.intern, self.side), "vision_tower")
        return on_meta(Vision, dtype, {"position_ids": np.arange(patches**2 + 1)[None]}, "vision_tower.embeddings")
