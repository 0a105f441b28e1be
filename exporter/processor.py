"""What `himap-run` must know of a checkpoint's processor, as data: image preprocessing, prompt format, tokenizer.

Only JSON and Jinja files are read; no code of the checkpoint runs (`trust_remote_code` is False, the chat template is
rendered in transformers' sandbox). Every file is optional. Which file wins, and what a missing key means, follows
transformers 5.23: `get_processor_dict`, `get_image_processor_dict`, the class attributes of the PIL image processors.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import replace as replaced
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from msgspec import Meta, Struct
from msgspec.structs import replace

from himap_export.engines.documents import read_file, read_json, typed
from himap_export.engines.image import CLIP_MEAN, CLIP_STD, RESAMPLING, ImagePreprocessing, mean_color
from himap_export.engines.manifest import ImageSpec
from himap_export.engines.prompt import TOKENIZER, PromptFormat, read_tokenizer
from himap_export.engines.scratch import scratch_folder
from himap_export.engines.split import Split
from himap_export.exporter.config import Name, Side
from himap_export.exporter.family import Family, PromptRules, VisionSpec
from himap_export.exporter.prompts import default_prompt, told_prompt
from himap_export.exporter.template import MOST_TEXT
from himap_export.graphs.errors import Exit, HimapError

S = TypeVar("S", bound=Struct)
Template = Annotated[str, Meta(max_length=MOST_TEXT)]
Number = Annotated[float, Meta(ge=-(2**16), le=2**16)]  # of a colour: 0 to 1, or to 255
# Not tuple[Number, Number, Number]: msgspec 0.22 breaks memory where a union has one beside a bounded number.
Colour = Number | Annotated[tuple[Number, ...], Meta(min_length=3, max_length=3)]
Sizes = tuple[tuple[int, int], ...]
Pair = Annotated[tuple[Side, ...], Meta(min_length=2, max_length=2)]


SIX: Final = range(1, 7)


class Files(Struct, frozen=True):
    """What is read of processor_config.json and of chat_template.json."""

    image_processor: dict[str, Any] | None = None
    chat_template: Template | dict[str, Template] | None = None
    image_token: Name | None = None


class Size(Struct, frozen=True, forbid_unknown_fields=True):
    """A picture's sides, or its shorter one. With the others its size would depend on the picture."""

    shortest_edge: Side | None = None
    height: Side | None = None
    width: Side | None = None
    longest_edge: None = None
    max_height: None = None
    max_width: None = None


class Colours(Struct, frozen=True, kw_only=True):
    """What is read of an image processor whose sizes follow the picture: here they are static, as the family says."""

    image_mean: Colour | None = None
    image_std: Colour | None = None


class Edge(Struct, frozen=True):
    """A picture's longer side."""

    longest_edge: Side


class Splitting(Colours, frozen=True, kw_only=True):
    """SmolVLM's and Idefics3's, with its defaults for what is missing."""

    do_resize: bool = True
    do_image_splitting: bool = True
    size: Edge = Edge(4 * 364)
    max_image_size: Edge = Edge(364)
    resample: Annotated[int, Meta(ge=0, le=5)] = 1


class Clip(Struct, frozen=True, kw_only=True):
    """CLIP's image processor, with its defaults for what is missing."""

    do_resize: bool = True
    size: Side | Pair | Size = Size(shortest_edge=224)
    default_to_square: bool = False
    resample: Annotated[int, Meta(ge=0, le=5)] = 3
    do_pad: bool = False
    do_center_crop: bool = True
    crop_size: Side | Pair | Size = 224
    do_rescale: bool = True
    rescale_factor: Number = 1 / 255
    do_normalize: bool = True
    image_mean: Colour = CLIP_MEAN
    image_std: Colour = CLIP_STD


class Siglip(Clip, frozen=True, kw_only=True):
    """SigLIP's."""

    size: Side | Pair | Size = Size(height=224, width=224)
    default_to_square: bool = True
    do_center_crop: bool = False
    image_mean: Colour = (0.5, 0.5, 0.5)
    image_std: Colour = (0.5, 0.5, 0.5)


class LlavaNext(Clip, frozen=True, kw_only=True):
    """LLaVA-NeXT's, which cuts tiles from the best of `image_grid_pinpoints`. Its `do_pad` is of batches."""

    do_pad: bool = True
    image_grid_pinpoints: tuple[Pair, ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


class LlavaOnevision(LlavaNext, frozen=True, kw_only=True):
    """LLaVA-OneVision's."""

    size: Side | Pair | Size = Size(height=384, width=384)
    default_to_square: bool = True
    do_center_crop: bool = False
    image_grid_pinpoints: tuple[Pair, ...] = tuple((384 * rows, 384 * columns) for rows in SIX for columns in SIX)


# By Hugging Face's class.
PROCESSORS: Final = {"CLIPImageProcessor": Clip, "LlavaImageProcessor": Clip, "SiglipImageProcessor": Siglip}
ANYRES: Final = {"LlavaNextImageProcessor": LlavaNext, "LlavaOnevisionImageProcessor": LlavaOnevision}
RESAMPLE_NAMES: Final = {int(value): name for name, value in RESAMPLING.items()}
MISFIT: Final = "the checkpoint's image processor does not fit its model"
WHERE: Final = "the image processor's configuration"
UNSUPPORTED: Final = ("image_grid_pinpoints", "use_square_size")
SPLITTING: Final = ("SmolVLMImageProcessor", "Idefics3ImageProcessor")
DYNAMIC: Final = ("Qwen2VLImageProcessor", "Qwen3VLImageProcessor", "GotOcr2ImageProcessor", "InternVLImageProcessor")
# Of a tokenizer's files those that transformers may see, which are copies; tokenizer.json is one more.
TOKENIZER_FILES: Final = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class ProcessorData:
    """`images` by their names; `prompt` is None without a tokenizer: the bundle then answers only `--load-inputs`.

    `files` maps names in the bundle to their content.
    """

    images: Mapping[str, ImageSpec]
    prompt: PromptFormat | None
    files: Mapping[str, bytes] = field(default_factory=dict)


def read_processor(folder: Path | None, family: Family[Any], images: Mapping[str, VisionSpec]) -> ProcessorData:
    """Returns the processor of the checkpoint in `folder`, for `images` by name. Where it does not say, `family` does:
    without a folder all of it, but for the tokenizer, which comes with the weights.

    HimapError: damaged files, an image processor or an option that is not supported, sizes that are not the vision
    tower's, a chat template without exactly one image and one question, a tokenizer at odds with the model.
    """
    rules = family.prompt()
    prompt, own = default_prompt(rules), {name: family.image(spec) for name, spec in images.items()}

    def data(how: Mapping[str, ImagePreprocessing], *rest: Any) -> ProcessorData:
        return ProcessorData({name: _spec(family, images[name], each) for name, each in how.items()}, *rest)

    if folder is None:
        return data(own, prompt)
    processor = _read(folder / "processor_config.json", Files)
    flat = processor.image_processor
    if flat is None and os.path.lexists(path := folder / "preprocessor_config.json"):
        flat = read_json(path, dict[str, Any], "image processor", code=Exit.FAILURE)
    flat = {} if family.own_image or flat is None else flat
    how = {name: _image(flat, default, family.pinpoints) for name, default in own.items()}
    if os.path.lexists(folder / TOKENIZER):
        tokenizer = _load_tokenizer(folder, family.model_type)
        prompt = _told_prompt(folder, processor, tokenizer=tokenizer, rules=rules)
        # Written from what transformers loaded: it may add tokens and BOS rules that the file itself does not hold.
        return data(how, prompt, {TOKENIZER: tokenizer.backend_tokenizer.to_str().encode()})
    made = family.tokenizer(folder)
    return data(how, None) if made is None else data(how, prompt, {TOKENIZER: made})


def _spec(family: Family[Any], spec: VisionSpec, how: ImagePreprocessing) -> ImageSpec:
    """Returns what the bundle says of pictures that become pixels in this way."""
    return ImageSpec(
        spec.size, spec.tiles, tokens=spec.tokens, grid=spec.grid, preprocessing=how,
        expansion=family.expansion(spec), newline=spec.newline, film=spec.film, several=spec.several,
    )  # fmt: skip


def _image(found: Mapping[str, Any], default: ImagePreprocessing, pinpoints: Sizes) -> ImagePreprocessing:
    if not found:
        return default
    if (kind := _kind(found)) in DYNAMIC:
        return _coloured(default, typed(found, Colours, WHERE, Exit.FAILURE))
    if pinpoints:
        if kind not in ANYRES:
            raise HimapError(MISFIT, f"{kind} cuts no tiles; expected {' or '.join(ANYRES)}")
        return _anyres(typed(_given(found), ANYRES[kind], WHERE, Exit.FAILURE), default, pinpoints)
    if default.split is not None:
        return _splitting(found, default, default.split)
    image = read_image_preprocessing(found)
    _check_fit(image.output_size, default)
    return image


def _anyres(how: LlavaNext, default: ImagePreprocessing, pinpoints: Sizes) -> ImagePreprocessing:
    """Returns `default`, whose sizes are the family's, with the file's colours and filter, if the sizes are alike."""
    if how.image_grid_pinpoints != pinpoints:
        raise HimapError(MISFIT, "its image_grid_pinpoints are not those of config.json")
    told = _preprocessing(replace(how, do_pad=False))
    side = _size("size", how.size, how.default_to_square)
    for size in (told.output_size, (side, side) if isinstance(side, int) else side):
        _check_fit(size, default)
    return replace(
        default, resample=told.resample, rescale_factor=told.rescale_factor, mean=told.mean, std=told.std,
        pad_color=mean_color(_three(how.image_mean)),
    )  # fmt: skip


def _check_fit(size: tuple[int, int], default: ImagePreprocessing) -> None:
    if size != default.output_size:
        sizes = "the image processor gives {} x {}, the vision tower expects {} x {}"
        raise HimapError(MISFIT, sizes.format(*size, *default.output_size))


def _coloured(default: ImagePreprocessing, told: Colours) -> ImagePreprocessing:
    mean = default.mean if told.image_mean is None else _three(told.image_mean)
    std = default.std if told.image_std is None else _three(told.image_std)
    return replace(default, mean=mean, std=std)


def _splitting(found: Mapping[str, Any], default: ImagePreprocessing, split: Split) -> ImagePreprocessing:
    """Returns `default` with the processor's colours and resampling, if it cuts pictures as `split` does."""
    if (kind := _kind(found)) not in SPLITTING:
        raise HimapError(MISFIT, f"{kind} cuts no tiles; expected {' or '.join(SPLITTING)}")
    told = typed(found, Splitting, WHERE, Exit.FAILURE)
    theirs, ours = (told.size.longest_edge, told.max_image_size.longest_edge), (max(split.resizes[0]), split.tile[0])
    if theirs != ours or not told.do_resize:
        what = "{} pixels along the longer edge, tiles of {}"
        resized = what.format(*theirs) if told.do_resize else "no resizing"
        raise HimapError(MISFIT, f"the image processor has {resized}, the model {what.format(*ours)}")
    if split.overview == "last" and not told.do_image_splitting:
        raise HimapError(MISFIT, "the image processor cuts no tiles (do_image_splitting)", "ask for `tiles` 1")
    coloured = _coloured(default, told)
    return replace(coloured, resample=RESAMPLE_NAMES[told.resample], pad_color=mean_color(coloured.mean))


def _told_prompt(folder: Path, processor: Files, tokenizer: Any, rules: PromptRules) -> PromptFormat:
    """Returns the prompt as the checkpoint's chat template and tokenizer tell it, else as `rules` have it."""
    template = _chat_template(folder, processor)
    told = getattr(tokenizer, "image_token", None)
    image_token = (told if isinstance(told, str) else None) or processor.image_token or rules.image_text
    known = tokenizer.backend_tokenizer.token_to_id(image_token)
    if known != rules.image_token and rules.image_token >= 0:
        details = f"{image_token!r} is {known} in the tokenizer, {rules.image_token} in the model's config"
        raise HimapError("the tokenizer's image token is not the model's", details)
    own = _default(tokenizer.chat_template)
    if template is None and isinstance(own, str) and image_token in own:
        template = own  # Hugging Face would refuse: its processor has none; the tokenizer's places the image, so use it
    rules = replaced(rules, lead=rules.lead.replace(rules.image_text, image_token), image_text=image_token)
    return default_prompt(rules) if template is None else told_prompt(template, tokenizer.special_tokens_map, rules)


def _kind(config: Mapping[str, Any]) -> str:
    """Returns the image processor's class, whichever of its spellings the checkpoint uses."""
    name = config.get("image_processor_type") or config.get("feature_extractor_type") or "LlavaImageProcessor"
    return str(name)[:80].replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")


def read_image_preprocessing(config: Mapping[str, Any]) -> ImagePreprocessing:
    """Returns what a `preprocessor_config.json` says, or the "image_processor" in a `processor_config.json`."""
    name = _kind(config)
    if name not in PROCESSORS:
        raise HimapError(f"unsupported image processor {name}", f"supported: {', '.join(PROCESSORS)}")
    for key in UNSUPPORTED:
        if config.get(key):
            raise HimapError(f"unsupported option {key} of the image processor", str(config[key])[:80])
    how = typed(_given(config), PROCESSORS[name], WHERE, Exit.FAILURE)
    if how.do_pad and name != "LlavaImageProcessor":
        raise HimapError(f"unsupported option do_pad of {name}", hint="LlavaImageProcessor pads to a square")
    return _preprocessing(how)


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


def _preprocessing(how: Clip) -> ImagePreprocessing:
    mean = _three(how.image_mean)
    crop = _size("crop_size", how.crop_size, True) if how.do_center_crop else None
    if isinstance(crop, int):
        raise HimapError("unsupported crop_size of the image processor", f"shortest_edge {crop}")
    return ImagePreprocessing(
        resize=_size("size", how.size, how.default_to_square) if how.do_resize else None,
        crop=crop,
        resample=RESAMPLE_NAMES[how.resample],
        rescale_factor=how.rescale_factor if how.do_rescale else 1.0,
        mean=mean if how.do_normalize else (0.0, 0.0, 0.0),
        std=_three(how.image_std) if how.do_normalize else (1.0, 1.0, 1.0),
        pad_color=mean_color(mean) if how.do_pad else None,
    )


def _size(name: str, value: int | tuple[int, ...] | Size, square: bool) -> int | tuple[int, int]:
    """Returns the shorter edge, or (height, width). Old configs write one number or two (`get_size_dict`)."""
    if isinstance(value, int):
        return (value, value) if square else value
    if isinstance(value, tuple):
        return value[0], value[1]
    if value.shortest_edge and not (value.height or value.width):
        return value.shortest_edge
    if value.height and value.width and not value.shortest_edge:
        return value.height, value.width
    raise HimapError(f"unsupported {name} of the image processor", hint="expected shortest_edge, or height and width")


def _three(value: float | tuple[float, ...]) -> tuple[float, float, float]:
    return (value[0], value[1], value[2]) if isinstance(value, tuple) else (value, value, value)


def _read(path: Path, kind: type[S]) -> S:
    """Returns what a JSON file says; the defaults, if there is no such file."""
    return read_json(path, kind, "processor's file", code=Exit.FAILURE) if os.path.lexists(path) else kind()


def _load_tokenizer(folder: Path, model_type: str) -> Any:
    """Returns the tokenizer as transformers sees it, so that the bundle encodes exactly like Hugging Face.

    It sees copies of the files that a tokenizer is made of, beside a config.json that says no more than `model_type`:
    no file that they name elsewhere, no code, and no configuration that nobody has checked.
    """
    from transformers import AutoTokenizer

    with scratch_folder("tokenizer") as stage:
        _copy_tokenizer(folder, stage)
        (stage / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
        try:
            tokenizer = AutoTokenizer.from_pretrained(stage, trust_remote_code=False, local_files_only=True)
        except MemoryError:
            raise
        except Exception as error:  # transformers and tokenizers raise all kinds, bare Exception included
            reason = str(error).replace(str(stage), str(folder)).strip().partition("\n")[0] or type(error).__name__
            details = f"{folder / TOKENIZER}: {reason[:300]}"
            hint = "without tokenizer.json the bundle is exported without a tokenizer"
            raise HimapError("the checkpoint's tokenizer cannot be loaded", details, hint) from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise HimapError("unsupported tokenizer", f"{type(tokenizer).__name__} does not use the tokenizers library")
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def _copy_tokenizer(folder: Path, stage: Path) -> None:
    """Copies the tokenizer's files into `stage`, without what in them names other files."""
    (stage / TOKENIZER).write_bytes(read_tokenizer(folder / TOKENIZER))
    for name in TOKENIZER_FILES:
        if os.path.lexists(folder / name):
            found = read_json(folder / name, dict[str, Any], "tokenizer's file", code=Exit.FAILURE)
            kept = {key: value for key, value in found.items() if not key.endswith(("_file", "_files", "_path"))}
            kept.pop("init_inputs", None)
            (stage / name).write_text(json.dumps(kept))


def _chat_template(folder: Path, processor: Files) -> str | None:
    """Returns the template that Hugging Face's processor would use, or None."""
    template = _default(processor.chat_template or _read(folder / "chat_template.json", Files).chat_template)
    path = folder / "chat_template.jinja"
    if template is None and os.path.lexists(path):
        try:
            template = read_file(path, "chat template", MOST_TEXT, Exit.FAILURE).decode()
        except UnicodeDecodeError:
            raise HimapError(f"chat template {path} is not valid UTF-8 text") from None
    if template is not None and not isinstance(template, str):
        raise HimapError("the chat template is not text", repr(template)[:80])
    return template


def _default(template: Any) -> Any:
    """Returns, of several templates, the one named default, if it is there."""
    return template.get("default", template) if isinstance(template, dict) else template
