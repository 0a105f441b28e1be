"""What `himap-run` must know of a checkpoint's processor, as data: image preprocessing, prompt format, tokenizer.

Only JSON and Jinja files are read; no code of the checkpoint runs (`trust_remote_code` is False, the chat template is
rendered in transformers' sandbox). Every file is optional. Which file wins, and what a missing key means, follows
transformers 5.23: `get_processor_dict`, `get_image_processor_dict`, the class attributes of the PIL image processors.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from himap_export.engines.image import CLIP_MEAN, CLIP_STD, RESAMPLING, ImagePreprocessing, mean_color
from himap_export.engines.prompt import QUESTION, TOKENIZER, PromptFormat
from himap_export.exporter.family import Config, Family, PromptRules, VisionSpec
from himap_export.graphs.errors import HimapError

SENTINEL: Final = "himap-export asks 7c41"
PROBE: Final = '  Is "5 < 6" & {true}?\n\tÆther  '  # what a template might strip or escape

# Hugging Face class -> its defaults for missing keys. Classes that tile the image (anyres) are not here.
CLIP: Final[Mapping[str, Any]] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "resample": 3,
    "do_pad": False,
    "do_center_crop": True,
    "crop_size": 224,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
SIGLIP: Final[Mapping[str, Any]] = {
    **CLIP,
    "size": {"height": 224, "width": 224},
    "default_to_square": True,
    "do_center_crop": False,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
}
PROCESSORS: Final[Mapping[str, Mapping[str, Any]]] = {
    "CLIPImageProcessor": CLIP,
    "LlavaImageProcessor": CLIP,
    "SiglipImageProcessor": SIGLIP,
}
UNSUPPORTED: Final = ("image_grid_pinpoints", "use_square_size")
# Their sizes follow the picture; here they are static, as the family says, and only the colours are the checkpoint's.
DYNAMIC: Final = ("Qwen2VLImageProcessor", "Qwen3VLImageProcessor", "GotOcr2ImageProcessor", "InternVLImageProcessor")


@dataclass(frozen=True)
class ProcessorData:
    """`images` by picture; `prompt` is None without a tokenizer: the bundle then answers only `--load-inputs`.

    `files` maps names in the bundle to their content.
    """

    images: Mapping[str, ImagePreprocessing]
    prompt: PromptFormat | None
    files: Mapping[str, bytes] = field(default_factory=dict)


def alias_processor(family: Family, config: Config, pictures: Mapping[str, VisionSpec]) -> ProcessorData:
    """Of a published model without its checkpoint: its prompt is known, its tokenizer comes with the weights."""
    rules, tokens = family.prompt(config), next(iter(pictures.values())).tokens
    images = {name: family.image(config, spec) for name, spec in pictures.items()}
    return ProcessorData(images, PromptFormat(rules.template, rules.image_text, tokens, image_id=rules.image_token))


def read_processor(folder: Path, family: Family, config: Config, pictures: Mapping[str, VisionSpec]) -> ProcessorData:
    """Reads the processor of the checkpoint in `folder`; where it does not say, its family does.

    HimapError: damaged files, an image processor or an option that is not supported, sizes that are not the vision
    tower's, a chat template without exactly one image and one question, a tokenizer at odds with the model.
    """
    rules, tokens = family.prompt(config), next(iter(pictures.values())).tokens
    processor = _read_json(folder / "processor_config.json")
    nested = processor.get("image_processor")
    flat = nested if isinstance(nested, dict) else _read_json(folder / "preprocessor_config.json")
    flat = {} if family.own_image else flat
    images = {name: _image(flat, family.image(config, spec)) for name, spec in pictures.items()}
    if (folder / TOKENIZER).is_file():
        return _with_tokenizer(folder, processor, rules, images, tokens)
    made = family.tokenizer(folder, rules)
    if made is None:
        return ProcessorData(images, None)
    prompt = PromptFormat(rules.template, rules.image_text, tokens, image_id=rules.image_token)
    return ProcessorData(images, prompt, {TOKENIZER: made})


def _image(found: Mapping[str, Any], default: ImagePreprocessing) -> ImagePreprocessing:
    if not found:
        return default
    if _kind(found) in DYNAMIC:
        mean, std = (_three(found.get(f"image_{what}") or getattr(default, what)) for what in ("mean", "std"))
        return replace(default, mean=mean, std=std)
    image = read_image_preprocessing(found)
    if image.output_size != default.output_size:
        sizes = "the image processor gives {} x {}, the vision tower expects {} x {}"
        details = sizes.format(*image.output_size, *default.output_size)
        raise HimapError("the checkpoint's image processor does not fit its model", details)
    return image


def _with_tokenizer(
    folder: Path,
    processor: Mapping[str, Any],
    rules: PromptRules,
    images: Mapping[str, ImagePreprocessing],
    image_tokens: int,
) -> ProcessorData:
    template = _chat_template(folder, processor)
    tokenizer = _load_tokenizer(folder)
    image_token = getattr(tokenizer, "image_token", None) or processor.get("image_token") or rules.image_text
    known = tokenizer.backend_tokenizer.token_to_id(image_token)
    if known != rules.image_token and rules.image_token >= 0:
        details = f"{image_token!r} is {known} in the tokenizer, {rules.image_token} in the model's config"
        raise HimapError("the tokenizer's image token is not the model's", details)
    own = _default(tokenizer.chat_template)
    if template is None and isinstance(own, str) and image_token in own:
        template = own  # Hugging Face would refuse: its processor has none; the tokenizer's places the image, so use it
    if template is None:
        prompt = PromptFormat(rules.template.replace(rules.image_text, image_token), image_token, image_tokens)
    else:
        prompt = _render(template, tokenizer.special_tokens_map, image_token, image_tokens)
        before, after = rules.surround
        prompt = replace(prompt, template=prompt.template.replace(image_token, before + image_token + after))
    # Written from what transformers loaded: it may add tokens and BOS rules that the file itself does not hold.
    prompt = replace(prompt, image_id=rules.image_token)
    return ProcessorData(images, prompt, {TOKENIZER: tokenizer.backend_tokenizer.to_str().encode()})


def _kind(config: Mapping[str, Any]) -> str:
    """The image processor's class, whichever of its spellings the checkpoint uses."""
    name = config.get("image_processor_type") or config.get("feature_extractor_type") or "LlavaImageProcessor"
    return str(name).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")


def read_image_preprocessing(config: Mapping[str, Any]) -> ImagePreprocessing:
    """From the content of a `preprocessor_config.json`, or of "image_processor" in a `processor_config.json`."""
    name = _kind(config)
    if name not in PROCESSORS:
        raise HimapError(f"unsupported image processor {name}", f"supported: {', '.join(PROCESSORS)}")
    for key in UNSUPPORTED:
        if config.get(key):
            raise HimapError(f"unsupported option {key} of the image processor", f"{config[key]}")
    given = {key: value for key, value in config.items() if value is not None}
    options = {**PROCESSORS[name], **given}
    try:
        return _preprocessing(name, options)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise HimapError("the image processor's configuration is not usable", str(error)) from error


def _preprocessing(name: str, options: Mapping[str, Any]) -> ImagePreprocessing:
    mean = _three(options["image_mean"])
    pad_color = None
    if options["do_pad"]:
        if name != "LlavaImageProcessor":
            raise HimapError(f"unsupported option do_pad of {name}", hint="LlavaImageProcessor pads to a square")
        pad_color = mean_color(mean)
    size = _size("size", options["size"], bool(options["default_to_square"])) if options["do_resize"] else None
    crop = _size("crop_size", options["crop_size"], True) if options["do_center_crop"] else None
    if isinstance(crop, int):
        raise HimapError("unsupported crop_size of the image processor", str(options["crop_size"]))
    names = {int(value): text for text, value in RESAMPLING.items()}
    return ImagePreprocessing(
        resize=size,
        crop=crop,
        resample=names.get(options["resample"], str(options["resample"])),
        rescale_factor=float(options["rescale_factor"]) if options["do_rescale"] else 1.0,
        mean=mean if options["do_normalize"] else (0.0, 0.0, 0.0),
        std=_three(options["image_std"]) if options["do_normalize"] else (1.0, 1.0, 1.0),
        pad_color=pad_color,
    )


def _size(name: str, value: object, square: bool) -> int | tuple[int, int]:
    """The shorter edge, or (height, width). Old configs write one number, or two (transformers' `get_size_dict`)."""
    if isinstance(value, int):
        return (value, value) if square else value
    if isinstance(value, list | tuple) and len(value) == 2:
        return int(value[0]), int(value[1])
    sides = {key: side for key, side in value.items() if side is not None} if isinstance(value, Mapping) else {}
    if set(sides) == {"shortest_edge"}:
        return int(sides["shortest_edge"])
    if set(sides) == {"height", "width"}:
        return int(sides["height"]), int(sides["width"])
    raise HimapError(f"unsupported {name} of the image processor", str(value), "shortest_edge, or height and width")


def _three(value: Any) -> tuple[float, float, float]:
    red, green, blue = [value] * 3 if isinstance(value, int | float) else value
    return float(red), float(green), float(blue)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise HimapError(f"{path.name} cannot be read", str(path), str(error)) from error
    if not isinstance(data, dict):
        raise HimapError(f"{path.name} is not a JSON object", str(path))
    return data


def _load_tokenizer(folder: Path) -> Any:
    """The tokenizer as transformers sees it, so that the bundle encodes exactly like Hugging Face."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise all kinds, bare Exception included
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        details = f"{folder / TOKENIZER}: {reason}"
        hint = "without tokenizer.json the bundle is exported without a tokenizer"
        raise HimapError("the checkpoint's tokenizer cannot be loaded", details, hint) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise HimapError("unsupported tokenizer", f"{type(tokenizer).__name__} does not use the tokenizers library")
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def _chat_template(folder: Path, processor: Mapping[str, Any]) -> str | None:
    """The template that Hugging Face's processor would use, or None."""
    template = processor.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    path = folder / "chat_template.jinja"
    if template is None and path.is_file():
        try:
            template = path.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise HimapError(f"{path.name} cannot be read", str(path), str(error)) from error
    template = _default(template)
    if template is not None and not isinstance(template, str):
        raise HimapError("the chat template is not text", repr(template)[:80])
    return template


def _default(template: Any) -> Any:
    """One of several templates: the one named default, if it is there."""
    return template.get("default", template) if isinstance(template, dict) else template


def _render(template: str, special: Mapping[str, Any], image_token: str, image_tokens: int) -> PromptFormat:
    """The chat template as a `PromptFormat`: rendered with a sentinel question, then checked with an awkward one."""
    bos = str(special.get("bos_token") or "")

    def rendered(question: str) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        content = [{"type": "image"}, {"type": "text", "text": question}]
        chats = [[{"role": "user", "content": content}]]
        try:
            texts, _ = render_jinja_template(chats, chat_template=template, add_generation_prompt=True, **special)
        except Exception as error:  # whatever the template does or raises
            raise HimapError("the chat template cannot be rendered", str(error) or type(error).__name__) from error
        return str(texts[0])

    text = rendered(SENTINEL)
    if text.count(SENTINEL) != 1 or text.count(image_token) != 1 or QUESTION in text:
        details = f"expected one {image_token} and the question once in {text!r}"
        raise HimapError("unsupported chat template", details)
    starts_with_bos = bool(bos) and text.startswith(bos)
    for strip in (False, True):
        how = PromptFormat(text.replace(SENTINEL, QUESTION), image_token, image_tokens, not starts_with_bos, strip)
        if how.render(PROBE) == rendered(PROBE):
            return how
    raise HimapError("unsupported chat template", "it changes the text of the question")
