"""LLaVA's original layout (`LlavaLlamaForCausalLM`) in Hugging Face's own modules.

The decoder is LlamaForCausalLM. The tower is CLIPVisionModel or, for InternViT-6B, InternVLVisionModel, whose RMSNorm,
normalised queries and keys and layer scales are that tower's. Both are built only up to the layer whose states the
projector reads. haotian-liu/LLaVA's llava/model/llava_arch.py and multimodal_{encoder,projector}/ tell what is joined
how; OpenGVLab/InternVL's internvl_chat_llava, a copy of it, adds InternViT-6B.
"""

import json
import os
import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, InternVLVisionConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

IMAGE = -200  # IMAGE_TOKEN_INDEX of llava/constants.py
_INSIDE = "model.vision_tower.vision_tower."  # where a release holds its tower itself
_PROJECTOR = "model.mm_projector."
_INTERN = {  # OpenGVLab's names -> Hugging Face's
    r"^embeddings\.class_embedding$": "embeddings.cls_token",
    r"^embeddings\.patch_embedding\.": "embeddings.patch_embeddings.projection.",
    r"^embeddings\.position_embedding$": "embeddings.position_embeddings",
    r"^encoder\.layers\.": "encoder.layer.",
    r"\.attn\.proj\.": ".attention.projection_layer.",
    r"\.attn\.": ".attention.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.ls([12])$": r".lambda_\1",
}


class LlavaOriginal(nn.Module):
    """`causal`: the decoder and its head. `tower` and `projector` make an image's features."""

    def __init__(self, config: Mapping[str, Any], causal: Any, tower: Any, projector: nn.Module) -> None:
        super().__init__()
        self.causal, self.tower, self.projector = causal, tower, projector
        eos, pad = config.get("eos_token_id", 2), config.get("pad_token_id")
        self.stop_tokens: tuple[int, ...] = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        self.pad_token: int = self.stop_tokens[0] if pad is None else pad
        feature = config.get("mm_vision_select_feature", "patch")
        if feature not in ("patch", "cls_patch"):
            raise ValueError(f"mm_vision_select_feature {feature!r} is neither patch nor cls_patch")
        self._first = 0 if feature == "cls_patch" else 1

    def image_features(self, pixels: Tensor) -> Tensor:
        """Returns the features [n,V,D] of normalised pixels [n,3,H,W]."""
        states = self.tower(pixels.to(self.tower.dtype)).last_hidden_state  # of the layer that is read
        features: Tensor = self.projector(states[:, self._first :])
        return features

    def is_image(self, ids: Tensor) -> Tensor:
        """Returns which of `ids` [S] stand for a feature of the image."""
        return ids == IMAGE


def load(
    folder: Path, dtype: torch.dtype, attn_implementation: str, vision_attention: str, vision_tower: Path | None = None
) -> LlavaOriginal:
    """Returns the release in `folder`, in `dtype`; the attentions of decoder and tower by names that transformers
    knows.

    `vision_tower`: the folder of the tower, if the release names one that is neither inside `folder` nor on the hub.
    ValueError if a tensor is missing or does not fit, or for a kind of tower or projector that is not LLaVA's; OSError
    if a folder or a file of weights is not there.
    """
    config = json.loads((folder / "config.json").read_text())
    text = LlamaConfig(**{name: value for name, value in config.items() if name != "model_type"})
    causal = _filled(LlamaForCausalLM, text, folder=folder, state=None, dtype=dtype, attention=attn_implementation)
    tensors = _names(folder)
    home = _tower_folder(folder, config) if vision_tower is None else vision_tower
    inside = {name.removeprefix(_INSIDE): file for name, file in tensors.items() if name.startswith(_INSIDE)}
    tower = _tower(
        config, home, files=inside or _names(home), prefix=_INSIDE if inside else "", dtype=dtype,
        attention=vision_attention,
    )  # fmt: skip
    projector = _projector(config, tower.config.hidden_size)
    found = {name.removeprefix(_PROJECTOR): file for name, file in tensors.items() if name.startswith(_PROJECTOR)}
    try:
        projector.load_state_dict(_read(found, _PROJECTOR))
    except RuntimeError as problem:  # names and shapes, all in one message
        raise ValueError(f"{folder} does not hold the projector: {problem}") from None
    return LlavaOriginal(config, causal, tower, projector.to(dtype)).eval()


def _filled(
    kind: Any, config: Any, folder: Path | None, state: Mapping[str, Tensor] | None, dtype: torch.dtype, attention: str
) -> Any:
    """`kind` with the weights of `folder` or of `state`; ValueError unless all are there."""
    model, report = kind.from_pretrained(
        folder, config=config, state_dict=state, dtype=dtype, attn_implementation=attention, local_files_only=True,
        use_safetensors=True, output_loading_info=True,
    )  # fmt: skip
    # Hugging Face only warns and goes on with random weights. Unexpected are those of the other parts.
    if problems := {name: found for name, found in report.items() if found and name != "unexpected_keys"}:
        raise ValueError(f"{folder or 'the vision tower'} does not hold the model's weights: {problems}")
    return model


def _names(folder: Path) -> dict[str, Path]:
    """The file of each tensor in the safetensors of `folder`."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    if not found:
        raise OSError(f"{folder} holds no safetensors")
    return found


def _read(files: Mapping[str, Path], prefix: str) -> dict[str, Tensor]:
    """The tensors `prefix` + name of all names in `files`, by these names."""
    state: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        with safe_open(file, "pt") as opened:
            state |= {name: opened.get_tensor(prefix + name) for name, home in files.items() if home == file}
    return state


def _tower_folder(folder: Path, config: Mapping[str, Any]) -> Path:
    """Where the tower's configuration lies: in the folder inside the checkpoint's that `mm_vision_tower` names, or on
    the hub. OSError if it is in neither: a checkpoint names no other folders of this machine."""
    named = config.get("mm_vision_tower", config.get("vision_tower"))
    if not isinstance(named, str):
        raise ValueError(f"{folder / 'config.json'} names no mm_vision_tower")
    home, path = os.path.realpath(folder), os.path.realpath(folder / named)
    if path != home and os.path.commonpath((home, path)) == home and Path(path).is_dir():
        return Path(path)
    reason = "give it with `vision_tower`"
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", named, re.ASCII):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(named, local_files_only=True, allow_patterns=["*.json", "*.safetensors"]))
        except Exception as problem:  # the hub's client raises its own errors for a bad id, an absent snapshot, ...
            reason = str(problem)
    raise OSError(f"the vision tower {named} is neither a folder in {folder} nor a fetched model: {reason}")


def _tower(
    config: Mapping[str, Any], home: Path, files: Mapping[str, Path], prefix: str, dtype: torch.dtype, attention: str
) -> Any:
    """The tower with no more layers than are read; its `last_hidden_state` is what the projector takes.

    `config` is the whole model's; the tower's is in `home`, its tensors are `prefix` + name in `files`.
    """
    vision = json.loads((home / "config.json").read_text())
    vision = vision.get("vision_config", vision)  # of CLIP with its text encoder
    intern = vision.get("model_type") == "intern_vit_6b"
    if not intern and vision.get("model_type") not in ("clip", "clip_vision_model"):
        raise ValueError(f"{home} is neither CLIP nor InternViT-6B but {vision.get('model_type')!r}")
    full = CLIPVisionConfig(**{name: value for name, value in vision.items() if name != "model_type"})
    select, depth = config.get("mm_vision_select_layer", -2), full.num_hidden_layers
    if not -depth - 1 <= select <= depth:
        raise ValueError(f"mm_vision_select_layer is {select}, the tower has {depth} layers")
    layers = range(depth + 1)[select]  # hidden state 0 goes into the first layer
    state = _read({name: file for name, file in files.items() if _is_read(name, layers)}, prefix)
    if intern:
        return _intern(config, vision, layers=layers, state=state, dtype=dtype, attention=attention)
    full.num_hidden_layers = layers
    state = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    # Normalises a state that nobody reads.
    state |= {f"post_layernorm.{name}": torch.ones(full.hidden_size) for name in ("weight", "bias")}
    return _filled(CLIPVisionModel, full, folder=None, state=state, dtype=dtype, attention=attention)


def _is_read(name: str, layers: int) -> bool:
    """Whether the tensor belongs to the patches or to one of the first `layers` layers of the tower."""
    found = re.match(r"(vision_model\.)?(embeddings|pre_layrnorm|encoder\.layers\.(?P<layer>\d+))\.", name)
    return found is not None and int(found["layer"] or -1) < layers


def _intern(
    config: Mapping[str, Any],
    vision: Mapping[str, Any],
    layers: int,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    attention: str,
) -> Any:
    """InternViT-6B: positions resized to the authors' picture size, queries, keys and values apart."""
    side = 448 if "448" in str(config.get("mm_vision_tower")) else 336  # multimodal_encoder/clip_encoder.py
    eps = vision.get("layer_norm_eps", 1e-6)
    full = InternVLVisionConfig(
        hidden_size=vision["hidden_size"], num_hidden_layers=layers, num_attention_heads=vision["num_attention_heads"],
        intermediate_size=vision["intermediate_size"], attention_bias=vision.get("qkv_bias", False),
        use_qk_norm=vision.get("qk_normalization", True), hidden_act=vision.get("hidden_act", "gelu"),
        norm_type=vision.get("norm_type", "rms_norm"), layer_norm_eps=eps, image_size=side,
        patch_size=vision["patch_size"],
    )  # fmt: skip
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in _INTERN.items():
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:
            parts = zip("qkv", tensor.chunk(3), strict=True)
            renamed |= {name.replace(".qkv.", f".{letter}_proj."): part.contiguous() for letter, part in parts}
        else:
            renamed[name] = tensor
    positions = "embeddings.position_embeddings"
    if positions in renamed:
        renamed[positions] = _resized(renamed[positions], side // vision["patch_size"])
    tower = _filled(InternVLVisionModel, full, folder=None, state=renamed, dtype=dtype, attention=attention)
    for module in tower.modules():  # those of queries and keys are made with Hugging Face's default
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = eps
    return tower


def _resized(positions: Tensor, side: int) -> Tensor:
    """Positions [1,1+n*n,D] for side*side patches, as `_get_pos_embed` of the authors' modeling_intern_vit.py."""
    n = isqrt(positions.shape[1] - 1)
    grid = positions[:, 1:].float().reshape(1, n, n, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], patches.flatten(2).transpose(1, 2).to(positions.dtype)), dim=1)


def _projector(config: Mapping[str, Any], width: int) -> nn.Module:
    """`build_vision_projector` of llava/model/multimodal_projector/builder.py, without weights."""
    kind, hidden = config.get("mm_projector_type", "linear"), config["hidden_size"]
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(width, hidden)
    depth = re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind)
    if depth is None:
        raise ValueError(f"unknown mm_projector_type {kind!r}")
    deeper = (layer for _ in range(int(depth[1]) - 1) for layer in (nn.GELU(), nn.Linear(hidden, hidden)))
    return nn.Sequential(nn.Linear(width, hidden), *deeper)
