"""Hugging Face's own modules for one checkpoint, whatever its family: what `reference.py` runs layer by layer.

Where transformers knows the architecture, it loads the checkpoint. Releases that it does not know are put into its
modules by `legacy/`. Nothing here is shared with the rooms that are compared with it.

Shape letters as in reference.py; P image patches before they are merged, m the side of a merged block.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from himap_export.validate.reference.legacy import llava_original, qwen_vl


@dataclass(frozen=True)
class VisionFeatures:
    """What the tower makes of images: `features` [V,D] of all of them, one behind the other; `deepstack`: as many more
    features, added to the image tokens behind the first layers (Qwen3-VL)."""

    features: Tensor
    deepstack: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Media:
    """What pixels [n*tiles,3,H,W] are: `tiles` of pictures that Hugging Face's processor was given in a `size` (height,
    width; None: their own), or as many `frames` of films. `several`: more than one picture in a prompt."""

    size: tuple[int, int] | None = None
    tiles: int = 1
    frames: int = 0
    several: bool = False


@dataclass(frozen=True)
class ModelAdapter:
    """`whole` holds all parameters; `decoder` has embed_tokens, layers, norm, rotary_emb.

    `see`: pixels [n,3,H,W] to what the tower makes of them. `is_image`: which of ids [S] are image tokens.
    `rope_positions`: M-RoPE's [3,S] for ids [S] whose images are [H,W] pixels, or whose film's steps are so many
    seconds apart; None for models with one position a token.
    `grid`: rows and columns of the tokens of an image of [H,W] pixels. `vision_layers`: those of the tower whose
    patches lie as these tokens do, in front of them a class token if there is one.
    """

    whole: torch.nn.Module
    decoder: Any
    head: Callable[[Tensor], Tensor]
    see: Callable[[Tensor], VisionFeatures]
    is_image: Callable[[Tensor], Tensor]
    stop_tokens: tuple[int, ...]
    pad_token: int
    grid: Callable[[tuple[int, int]], tuple[int, int]]
    vision_layers: Sequence[torch.nn.Module] = ()
    rope_positions: Callable[[Tensor, tuple[int, int], float], Tensor] | None = None


def load_adapter(
    folder: Path,
    dtype: torch.dtype,
    *,
    decoder_attention: str,
    vision_attention: str,
    vision_tower: Path | None = None,
    media: Media,
) -> ModelAdapter:
    """Returns the checkpoint in `folder`, in `dtype`, which sees `media`; its tower, if the release has it apart, in
    `vision_tower` or where the release says. ValueError or OSError if a weight is missing or does not fit."""
    named = json.loads((folder / "config.json").read_text()).get("architectures") or [""]
    if named[0] == "LlavaLlamaForCausalLM":
        return _llava_original(
            folder, dtype, decoder_attention=decoder_attention, vision_attention=vision_attention,
            vision_tower=vision_tower,
        )  # fmt: skip
    if named[0] == "QWenLMHeadModel":
        return _qwen_vl(folder, dtype, decoder_attention, vision_attention)
    return _hugging_face(folder, dtype, decoder_attention, vision_attention, media=media)


def _hugging_face(
    folder: Path, dtype: torch.dtype, decoder_attention: str, vision_attention: str, *, media: Media
) -> ModelAdapter:
    if (folder / "adapter_config.json").exists():  # it names another model, which transformers would load in its place
        raise ValueError(f"{folder} holds an adapter: merge it into its model")
    loaded: tuple[Any, dict[str, Any]] = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype,
        attn_implementation={"": vision_attention, "vision_config": vision_attention, "text_config": decoder_attention},
        local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
    )  # fmt: skip
    model, report = loaded
    # Hugging Face only warns and goes on with random weights. Unexpected ones (old rotary tables) do no harm.
    if problems := {name: found for name, found in report.items() if found and name != "unexpected_keys"}:
        raise ValueError(f"{folder} does not hold the model's weights: {problems}")
    model.eval()
    stop = model.generation_config.eos_token_id
    stop_tokens = () if stop is None else (stop,) if isinstance(stop, int) else tuple(stop)
    pad = model.generation_config.pad_token_id
    kind, vision = model.config.model_type, model.config.vision_config
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    merge = getattr(vision, "spatial_merge_size", 1) * getattr(model.config, "scale_factor", 1)
    side = patch * round(merge / getattr(model.config, "downsample_ratio", 1))
    tower = getattr(model.model, "vision_tower", None)
    clip = getattr(tower, "vision_model", tower) if kind == "llava" else None
    return ModelAdapter(
        whole=model, decoder=getattr(model.model, "text_model", None) or model.model.language_model, head=model.lm_head,
        see=lambda pixels: _SEE.get(kind, _see)(model, pixels, media),
        is_image=lambda ids: ids == _image_token(model, media), stop_tokens=stop_tokens,
        pad_token=pad if pad is not None else next(iter(stop_tokens), 0),
        grid=lambda size: (size[0] // side, size[1] // side),
        vision_layers=() if clip is None else clip.encoder.layers,
        rope_positions=partial(_rope_positions, model, media) if kind in _TURNED else None,
    )  # fmt: skip


def _see(model: Any, pixels: Tensor, media: Media) -> VisionFeatures:
    """Towers that take pictures: LLaVA's, InternVL's."""
    found = model.model.get_image_features(pixel_values=pixels).pooler_output
    return VisionFeatures(torch.cat(list(found)).flatten(0, -2))


def _see_tiles(model: Any, pixels: Tensor, media: Media) -> VisionFeatures:
    """SmolVLM2's tower, told which pixels are no padding: all."""
    whole = torch.ones((1, len(pixels), *pixels.shape[2:]), dtype=torch.bool, device=pixels.device)
    found = model.model.get_image_features(pixel_values=pixels[None], pixel_attention_mask=whole).pooler_output
    return VisionFeatures(torch.cat(list(found)).flatten(0, -2))


def _image_token(model: Any, media: Media) -> int:
    """Returns the id of what stands for images in ids, or for a film's frames where they have one of their own."""
    config = model.config
    found: int = getattr(config, "video_token_id", config.image_token_id) if media.frames else config.image_token_id
    return found


def _see_anyres(model: Any, pixels: Tensor, media: Media) -> VisionFeatures:
    """Towers that take the tiles of pictures whose sizes are told: LLaVA-NeXT's, LLaVA-OneVision's."""
    given = pixels.reshape(-1, media.frames or media.tiles, *pixels.shape[1:])
    if media.frames:
        return VisionFeatures(model.model.get_video_features(given).pooler_output.flatten(0, 1))
    if media.size is None:
        raise ValueError("features of tiles depend on the size of the picture that they were cut from: tell it")
    sizes = torch.tensor([media.size] * len(given))
    # Hugging Face sees pictures that stand alone in a prompt otherwise; to it these stand in one prompt of many.
    several = {"batch_num_images": torch.tensor([len(given) + 1])} if media.several else {}
    found = model.model.get_image_features(pixel_values=given, image_sizes=sizes, **several).pooler_output
    return VisionFeatures(torch.cat(list(found)))


def _see_patches(model: Any, pixels: Tensor, media: Media) -> VisionFeatures:
    """Towers that take patches [P, 3*2*p*p], in the order of Qwen2VLVideoProcessor: step by step of time, m x m blocks
    that will be merged. Pixels are the frames of each film, or pictures, each twice."""
    frames, vision = media.frames, model.config.vision_config
    _, channels, height, width = pixels.shape
    p, m, pair = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    rows, columns = height // p, width // p
    film = pixels.reshape(-1, pair, *pixels.shape[1:]) if frames else pixels.unsqueeze(1).expand(-1, pair, -1, -1, -1)
    blocks = film.reshape(-1, pair, channels, rows // m, m, p, columns // m, m, p).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    steps = frames // pair if frames else 1
    grid = torch.tensor([[steps, rows, columns]] * (len(film) // steps), device=pixels.device)
    see = model.model.get_video_features if frames else model.model.get_image_features
    found = see(blocks.reshape(len(film) * rows * columns, -1), grid, return_dict=True)
    deepstack = getattr(found, "deepstack_features", None) or ()
    return VisionFeatures(torch.cat(list(found.pooler_output)), tuple(torch.cat(list(parts)) for parts in deepstack))


def _rope_positions(model: Any, media: Media, ids: Tensor, size: tuple[int, int], seconds: float) -> Tensor:
    """Hugging Face's own count of time, row and column; ids that stand side by side are of one image. A film's steps
    are `seconds` apart."""
    vision, shown = model.config.vision_config, ids == _image_token(model, media)
    grid = [media.frames // vision.temporal_patch_size or 1, size[0] // vision.patch_size, size[1] // vision.patch_size]
    kinds = shown.to(torch.int32) * (2 if media.frames else 1)
    if media.frames:
        more = {"video_grid_thw": torch.tensor([grid]), "second_per_grid_ts": torch.tensor([seconds])}
    else:
        images = int((kinds.diff() == 1).sum()) + int(kinds[0])
        more = {"image_grid_thw": torch.tensor([grid] * images)}
    given = {name: value.to(ids.device) for name, value in more.items()}
    positions, _ = model.model.get_rope_index(ids[None], mm_token_type_ids=kinds[None], **given)
    found: Tensor = positions[:, 0]
    return found


_TURNED = ("qwen2_5_vl", "qwen3_vl")  # by M-RoPE
_SEE: Mapping[str, Callable[[Any, Tensor, Media], VisionFeatures]] = {
    "qwen2_5_vl": _see_patches,
    "qwen3_vl": _see_patches,
    "smolvlm": _see_tiles,
    "llava_next": _see_anyres,
    "llava_onevision": _see_anyres,
}


def _llava_original(
    folder: Path, dtype: torch.dtype, decoder_attention: str, vision_attention: str, vision_tower: Path | None
) -> ModelAdapter:
    found = llava_original.load(folder, dtype, decoder_attention, vision_attention, vision_tower=vision_tower)
    patch = found.tower.config.patch_size
    side = patch if isinstance(patch, int) else patch[0]
    clip = getattr(found.tower, "vision_model", found.tower)
    layers = clip.encoder.layers if hasattr(clip.encoder, "layers") else clip.encoder.layer
    return _original(found, lambda size: (size[0] // side, size[1] // side), tuple(layers))


def _qwen_vl(folder: Path, dtype: torch.dtype, decoder_attention: str, vision_attention: str) -> ModelAdapter:
    found = qwen_vl.load(folder, dtype, decoder_attention, "sdpa" if vision_attention == "sdpa" else "eager")
    side = isqrt(len(found.tower.attn_pool.query))  # the resampler's queries stand in a square
    return _original(found, lambda size: (side, side), ())


def _original(
    found: Any, grid: Callable[[tuple[int, int]], tuple[int, int]], layers: tuple[torch.nn.Module, ...]
) -> ModelAdapter:
    return ModelAdapter(
        whole=found, decoder=found.causal.model, head=found.causal.lm_head,
        see=lambda pixels: VisionFeatures(found.image_features(pixels).flatten(0, 1)), is_image=found.is_image,
        stop_tokens=found.stop_tokens, pad_token=found.pad_token, grid=grid, vision_layers=layers,
    )  # fmt: skip
