"""One tiny random checkpoint of each family that transformers knows, prompts for it, and Hugging Face's own answer.

Adding a family is adding a row to FAMILIES. Weights are scaled as in tiny.py: attention is peaked, scores lie apart.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny import EOS, PAD, Inputs, randomise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE, get_image_prompt_string

from himap_export.validate.reference.adapter import Media

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
WORD, VOCAB, IMAGE, FILM = 20, 300, 299, 298  # ids 20 to 275 are the 256 bytes, 0 to 19 and the last two special tokens
TEXT = {
    "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "max_position_embeddings": 2048, "bos_token_id": 1,
    "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
MERGED = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": HIDDEN}

CLIP: dict[str, Any] = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64}
CLIP |= {"num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56, "patch_size": 14, "projection_dim": 32}
SHEETS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
LARGE_SHEETS = [[42 * rows, 42 * columns] for rows in range(1, 4) for columns in range(1, 4)]


@dataclass(frozen=True)
class Row:
    """`config` of a family; pictures are [tiles,3,*size] and become `tokens` tokens; `flags` ask for them. `view`: of
    tiles that are cut from pictures of `size`. `several`: the tokens and tiles of each of several pictures, if others.

    `patch`: of towers that take patches. `chat`: how its published chat template renders {pictures}, each of them as
    `lead`, and {prompt}, behind `system`; `image` is the placeholder, and `around` what its processor puts around the
    placeholder's tokens. `frames`: of a film instead, whose tokens stand in `runs`, with text between them.
    `expansion`: what its processor makes of the placeholder, with `text` tokens beside the image tokens, of which
    `special` are tokens of their own. `template`: the published chat template itself.
    """

    config: Callable[[], PretrainedConfig]
    size: tuple[int, int]
    tokens: int
    processor: Callable[[], Any]
    chat: str
    lead: str
    image: str
    system: str = ""
    around: tuple[str, str] = ("", "")
    tiles: int = 1
    flags: tuple[object, ...] = ()
    patch: int | None = None
    view: tuple[int, int] | None = None
    frames: int = 0
    runs: int = 1
    expansion: str = ""
    text: int = 0
    special: tuple[str, ...] = ()
    template: str = ""
    several: tuple[int, int] | None = None

    def seen(self, images: int) -> tuple[int, int]:
        """Tokens and tiles of each picture of a prompt that holds so many."""
        return self.several if self.several and images > 1 else (self.tokens, self.tiles)

    def media(self, images: int = 1) -> Media:
        """What the pixels of prompts of so many pictures, or of films, are to the reference."""
        if not self.view and not self.frames:
            return Media()
        several = self.several is not None and images > 1
        return Media(self.size, self.seen(images)[1], self.frames, several=several)


def _rope(**more: object) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": 1e4, **more}


def _llava(text: Mapping[str, Any]) -> PretrainedConfig:
    return LlavaConfig(text_config=dict(text), vision_config=CLIP, image_token_index=IMAGE, image_seq_length=16)


def _qwen2_5_vl() -> PretrainedConfig:
    text = TEXT | {"rope_parameters": _rope(mrope_section=[2, 3, 3])}
    vision = MERGED | {"window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=FILM)


def _qwen3_vl() -> PretrainedConfig:
    text = TEXT | {"head_dim": HEAD_DIM, "rope_parameters": _rope(mrope_section=[3, 3, 2], mrope_interleaved=True)}
    vision = MERGED | {"deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 16}
    return Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=FILM)


def _internvl() -> PretrainedConfig:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": [56, 56], "patch_size": [14, 14]}
    text = TEXT | {"model_type": "qwen2", "rope_parameters": _rope()}
    return InternVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=4)


def _patched(patch: int, **colours: Sequence[float]) -> Any:
    """Keeps any size of a few patches, as the published ones keep photographs'."""
    size = {"shortest_edge": 28 * 28, "longest_edge": 1 << 20}
    return Qwen2VLImageProcessorPil(patch_size=patch, size=size, **colours)


def _tiled(**more: Any) -> Any:
    side = {"height": 56, "width": 56}
    return GotOcr2ImageProcessorPil(size=side, image_mean=IMAGENET[0], image_std=IMAGENET[1], **more)


def _llava_next() -> PretrainedConfig:
    vision = CLIP | {"image_size": 28}
    text = TEXT | {"model_type": "mistral", "sliding_window": None}
    return LlavaNextConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, image_grid_pinpoints=SHEETS)


def _llava_onevision() -> PretrainedConfig:
    """Its grid of 6 x 9 tokens, of which 4 x 9 are the picture's, shrinks to 2 x 4."""
    vision = CLIP | {"model_type": "siglip_vision_model", "image_size": 42, "vision_use_head": False}
    text = TEXT | {"model_type": "qwen2"}
    return LlavaOnevisionConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, video_token_index=FILM,
        image_grid_pinpoints=LARGE_SHEETS, vision_aspect_ratio="anyres_max_1",
    )  # fmt: skip


def _anyres(side: int, kind: Any, sheets: Sequence[Sequence[int]], **more: Any) -> Any:
    size = {"height": side, "width": side}
    return kind(size=size, image_grid_pinpoints=sheets, **more)


def _smolvlm() -> PretrainedConfig:
    vision = {key: value for key, value in CLIP.items() if key not in ("model_type", "projection_dim")}
    text = TEXT | {"model_type": "llama"}
    return SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, scale_factor=2)


def _splitting() -> Any:
    sides: Any = {"size": {"longest_edge": 4 * 56}, "max_image_size": {"longest_edge": 56}}
    return SmolVLMImageProcessorPil(**sides)


def _onevision() -> Any:
    halves = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return _anyres(42, LlavaOnevisionImageProcessorPil, LARGE_SHEETS, **halves)


def _clip() -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})


PICTURE_INPUTS = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes", "batch_num_images")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CHATML = "<|im_start|>user\n{pictures}{prompt}<|im_end|>\n<|im_start|>assistant\n"
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
TAGS = ("<img>", "</img>")
AROUND, OVERVIEW = "<fake_token_around_image>", "<global-img>"
TILES = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2, 3, 4))
FAMILIES: Mapping[str, Row] = {
    "llava": Row(
        lambda: _llava(TEXT | {"model_type": "llama"}), (56, 56), 16, _clip,
        "USER: {pictures}{prompt} ASSISTANT:", "<image>\n", "<image>",
    ),
    "qwen2.5-vl": Row(
        _qwen2_5_vl, (84, 140), 15, lambda: _patched(14), CHATML, VISION, "<|image_pad|>", SYSTEM,
        flags=("--image-size", "140x84"), patch=14,
    ),
    "qwen3-vl": Row(
        _qwen3_vl, (96, 160), 15, lambda: _patched(16, image_mean=[0.5] * 3, image_std=[0.5] * 3), CHATML, VISION,
        "<|image_pad|>", flags=("--image-size", "160x96"), patch=16,
    ),
    "internvl": Row(_internvl, (56, 56), 4, _tiled, CHATML, "<IMG_CONTEXT>\n", "<IMG_CONTEXT>", around=TAGS),
    "internvl-tiles": Row(
        _internvl, (56, 56), 12, lambda: _tiled(crop_to_patches=True, min_patches=2, max_patches=2), CHATML,
        "<IMG_CONTEXT>\n", "<IMG_CONTEXT>", around=TAGS, tiles=3, flags=("--tiles", "3"),
    ),
    "qwen2.5-vl-film": Row(
        _qwen2_5_vl, (56, 84), 12, lambda: _patched(14), CHATML, VISION, "<|image_pad|>", SYSTEM, tiles=4,
        flags=("--image-size", "84x56", "--frames", "4"), patch=14, frames=4,
    ),
    "qwen3-vl-film": Row(
        _qwen3_vl, (64, 96), 12, lambda: _patched(16, image_mean=[0.5] * 3, image_std=[0.5] * 3), CHATML, VISION,
        "<|image_pad|>", tiles=4, flags=("--image-size", "96x64", "--frames", "4"), patch=16, frames=4, runs=2,
    ),
    "llava-next": Row(
        _llava_next, (40, 56), 14,
        lambda: _anyres(28, LlavaNextImageProcessorPil, SHEETS, crop_size={"height": 28, "width": 28}),
        "USER: {pictures}{prompt} ASSISTANT:", "<image>\n", "<image>", tiles=5, view=(28, 28),
        flags=("--image-size", "56x40"),
    ),
    "llava-onevision": Row(
        _llava_onevision, (60, 126), 19, _onevision, CHATML, "<image>\n", "<image>", tiles=7, view=(42, 42),
        several=(10, 1), flags=("--image-size", "126x60"),
    ),
    "llava-onevision-film": Row(
        _llava_onevision, (60, 126), 17, _onevision, CHATML, "<image>\n", "<image>", tiles=4, view=(42, 42),
        flags=("--image-size", "126x60", "--frames", "4"), frames=4,
    ),
    "smolvlm": Row(
        _smolvlm, (40, 100), 36, _splitting, "", "<image>", "<image>", tiles=9, view=(56, 56),
        flags=("--image-size", "100x40"), expansion=get_image_prompt_string(2, 4, 4, AROUND, "<image>", OVERVIEW),
        text=22, special=(AROUND, OVERVIEW, "<end_of_utterance>", *TILES), template=DEFAULT_CHAT_TEMPLATE,
    ),
}  # fmt: skip


def make_family(folder: Path, name: str, seed: int = 0) -> None:
    """Saves the checkpoint in the layout of transformers' `save_pretrained`."""
    model = AutoModelForImageTextToText.from_config(FAMILIES[name].config())
    randomise(model, seed, tied=False)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    model.save_pretrained(folder)
    tokenizer_of(name).save_pretrained(folder)
    FAMILIES[name].processor().save_pretrained(folder)


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Bytes for words, and the special tokens of all families."""
    row = FAMILIES[name]
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", *TAGS]
    special += row.special
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(special)} | {c: WORD + n for n, c in enumerate(letters)}
    films = getattr(row.config(), "video_token_id", None) == FILM
    placeholders = {row.image: IMAGE} | ({row.image.replace("image", "video"): FILM} if films else {})
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | placeholders, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*special, *placeholders])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=row.template or chat_template(row),
    )


def chat_template(row: Row) -> str:
    """As published ones: pictures and texts in their order, and an answer between two questions."""
    before, after = row.chat.split("{pictures}{prompt}")
    stop = "<|im_end|>\n" if "<|im_end|>" in after else ""
    return (
        f"{{{{ {row.system!r} }}}}{{% for m in messages %}}{{% if m['role'] == 'user' %}}{{{{ {before!r} }}}}"
        "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        f"{{% elif part['type'] == 'image' %}}{{{{ {row.lead!r} }}}}"
        f"{{% elif part['type'] == 'video' %}}{{{{ {row.lead.replace('image', 'video')!r} }}}}"
        f"{{% endif %}}{{% endfor %}}{{{{ {after!r} }}}}"
        f"{{% else %}}{{{{ m['content'][0]['text'] + {stop!r} }}}}{{% endif %}}{{% endfor %}}"
    )


def processed(name: str, images: Sequence[Image.Image], *content: str | None) -> dict[str, torch.Tensor]:
    """What Hugging Face's processor makes of pictures, each where `content` has None, and texts."""
    row, tokenizer = FAMILIES[name], tokenizer_of(name)
    seen = row.processor()(images=[list(images)] if row.view else list(images), return_tensors="pt")
    parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in content]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    tokens, _ = row.seen(len(images))
    expansion = row.expansion or row.around[0] + row.image * tokens + row.around[1]
    text = chat.replace(row.image, expansion)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    found = {"input_ids": ids, **{name: seen[name] for name in PICTURE_INPUTS if name in seen}}
    if row.patch is not None:
        found["mm_token_type_ids"] = (ids == IMAGE).int()
    return found


def family_inputs(name: str, text_lengths: Sequence[int] = (9,), seed: int = 0, images: Sequence[int] = ()) -> Inputs:
    """Prompts of 5 system tokens, one image or `images[i]` with 2 tokens between them, `text_lengths[i]` tokens."""
    row, random = FAMILIES[name], np.random.default_rng(seed)
    words, many = np.arange(WORD, WORD + 256), images or (1,) * len(text_lengths)
    prompts = []
    for count, text in zip(many, text_lengths, strict=True):
        image = np.full(row.seen(count)[0] // row.runs, FILM if row.frames else IMAGE)
        between = [part for _ in range(count * row.runs - 1) for part in (random.choice(words, 2), image)]
        prompts.append(np.concatenate([random.choice(words, 5), image, *between, random.choice(words, text)]))
    width = max(map(len, prompts))
    ids, mask = np.full((len(prompts), width), PAD, np.int64), np.zeros((len(prompts), width), np.int64)
    for sample, prompt in enumerate(prompts):
        ids[sample, : len(prompt)], mask[sample, : len(prompt)] = prompt, 1
    shape = (sum(count * row.seen(count)[1] for count in many), 3, *(row.view or row.size))
    pixels = random.standard_normal(shape, np.float32)
    return Inputs(ids, mask, pixels, tuple(random.uniform(0.2, 2.0, len(many))) if row.frames else ())


def hugging_face_answer(folder: Path, name: str, inputs: Inputs, new_tokens: int) -> NDArray[np.int64]:
    """Greedy tokens [1,N] of Hugging Face's own `generate` for one prompt, its pixels as its processor gives them."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = model.generate(**hugging_face_inputs(name, inputs), max_new_tokens=new_tokens, do_sample=False)
    return found[:, inputs.input_ids.shape[1] :].numpy()


def hugging_face_inputs(name: str, inputs: Inputs) -> dict[str, torch.Tensor]:
    """One prompt as Hugging Face's model takes it."""
    row, ids, pixels = FAMILIES[name], torch.from_numpy(inputs.input_ids), torch.from_numpy(inputs.pixel_values)
    if row.expansion:
        return {"input_ids": ids, "pixel_values": pixels[None]}
    if row.view is not None and row.frames:
        return {"input_ids": ids, "pixel_values_videos": pixels.unflatten(0, (-1, row.frames))}
    if row.view is not None:
        several = row.several is not None and len(pixels) % row.tiles > 0
        pixels = pixels.unflatten(0, (-1, row.several[1] if row.several and several else row.tiles))
        sizes = {"image_sizes": torch.tensor([row.size] * len(pixels))}
        sizes |= {"batch_num_images": torch.tensor([len(pixels)])} if several else {}
        return {"input_ids": ids, "pixel_values": pixels, **sizes}
    if row.patch is None:
        return {"input_ids": ids, "pixel_values": pixels}
    if row.frames:
        film = film_arrays(inputs.pixel_values, row.patch, None if row.runs > 1 else inputs.seconds[0])
        return {"input_ids": ids, "mm_token_type_ids": 2 * (ids == FILM).int(), **film}
    patches = np.concatenate([patches_of(pixels, row.patch) for pixels in inputs.pixel_values])
    return {
        "input_ids": ids,
        "pixel_values": torch.from_numpy(patches),
        "image_grid_thw": torch.tensor(
            [[1, row.size[0] // row.patch, row.size[1] // row.patch]] * len(inputs.pixel_values)
        ),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def film_arrays(frames: NDArray[np.float32], patch: int, seconds: float | None) -> dict[str, torch.Tensor]:
    """A film's frames [F,3,H,W], its steps so many seconds apart if the model wants to know, as Hugging Face's models
    take them."""
    patches = np.concatenate([patches_of(a, patch, b) for a, b in zip(frames[::2], frames[1::2], strict=True)])
    told = {} if seconds is None else {"second_per_grid_ts": torch.tensor([seconds])}
    return told | {
        "pixel_values_videos": torch.from_numpy(patches),
        "video_grid_thw": torch.tensor([[len(frames) // 2, frames.shape[2] // patch, frames.shape[3] // patch]]),
    }


def patches_of(
    pixels: NDArray[np.float32], patch: int, later: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """[N,3*2*p*p], told patch by patch: blocks of 2 x 2 patches that will be merged, each of two frames: of pixels
    [3,H,W] and `later` ones, or the same again."""
    _, height, width = pixels.shape
    found = []
    for top in range(0, height, 2 * patch):
        for left in range(0, width, 2 * patch):
            for y, x in ((0, 0), (0, patch), (patch, 0), (patch, patch)):
                place = slice(None), slice(top + y, top + y + patch), slice(left + x, left + x + patch)
                found.append(np.stack([pixels[place], (pixels if later is None else later)[place]], axis=1).ravel())
    return np.array(found)
