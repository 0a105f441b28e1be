"""Checkpoints' processors that cut pictures: ids and pixels are Hugging Face's, and misfits are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FAMILIES, tokenizer_of
from PIL import Image
from sklearn.datasets import load_sample_images
from tokenizers import Tokenizer
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor

from himap_export.engines.image import CLIP_MEAN
from himap_export.engines.manifest import ImageSpec
from himap_export.engines.processor import Processor
from himap_export.exporter.families.anyres import Anyres
from himap_export.exporter.families.llava_next import LlavaNext
from himap_export.exporter.families.llava_onevision import LlavaOnevision
from himap_export.exporter.family import ImageOptions
from himap_export.exporter.processor import read_processor
from himap_export.exporter.prompts import default_prompt
from himap_export.graphs.errors import HimapError

CHINA, FLOWER = (Image.fromarray(each) for each in load_sample_images().images)
CLASSES: dict[str, type[Anyres]] = {"llava-next": LlavaNext, "llava-onevision": LlavaOnevision}
QUESTION = "What is <this>, 你?"


def theirs(name: str) -> Any:
    """Hugging Face's whole processor, as a checkpoint saves it."""
    parts = {"image_processor": FAMILIES[name].processor(), "tokenizer": tokenizer_of(name)}
    parts["chat_template"] = parts["tokenizer"].chat_template
    if name == "llava-next":
        return LlavaNextProcessor(
            **parts, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    made = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)  # its video processor wants torchvision
    vars(made).update(
        parts, num_image_tokens=9, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_1"
    )
    made.image_token, made.image_token_id, made.video_token, made.video_processor = "<image>", 299, "<video>", None
    return made


def family(name: str) -> Anyres:
    return CLASSES[name].parse(FAMILIES[name].config().to_dict())


def saved(name: str, folder: Path, **changed: object) -> Path:
    """A folder with the files that an export reads; `changed` in its image processor's."""
    folder.mkdir()
    tokenizer_of(name).save_pretrained(folder)
    FAMILIES[name].processor().save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return folder


def read(name: str, folder: Path, asked: ImageOptions) -> tuple[Processor, ImageSpec]:
    known = family(name)
    found = read_processor(folder, known, {"": known.vision(asked)})
    assert found.prompt is not None
    tokenizer = Tokenizer.from_buffer(found.files["tokenizer.json"])
    return Processor(tokenizer, found.prompt, found.images[""]), found.images[""]


@pytest.mark.parametrize("size", [(40, 56), (61, 47), (90, 300)])
@pytest.mark.parametrize("name", CLASSES)
def test_ids_and_pixels_are_hugging_faces(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    """Of a photograph of exactly the size: tokens counted by its processor, tiles in the order of its arrays."""
    processor, spec = read(name, saved(name, tmp_path / "model"), ImageOptions(size))
    image, whole = CHINA.resize((size[1], size[0])), theirs(name)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = whole.tokenizer.apply_chat_template(chat, tokenize=False)
    wanted = whole(images=image, text=text, return_tensors="np")
    found = processor.inputs([image], QUESTION)
    np.testing.assert_array_equal(found.input_ids, wanted["input_ids"])
    np.testing.assert_array_equal(found.pixel_values, wanted["pixel_values"][0])
    assert (found.input_ids == 299).sum() == spec.tokens


def test_several_pictures_are_seen_as_hugging_face_sees_them(tmp_path: Path) -> None:
    name, size = "llava-onevision", (61, 47)
    processor, spec = read(name, saved(name, tmp_path / "model"), ImageOptions(size, several=True))
    images, whole = [each.resize((47, 61)) for each in (CHINA, FLOWER)], theirs(name)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": QUESTION}]
    text = whole.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    wanted = whole(images=[images], text=text, return_tensors="np")
    found = processor.inputs(images, QUESTION)
    np.testing.assert_array_equal(found.input_ids, wanted["input_ids"])
    np.testing.assert_array_equal(found.pixel_values, np.concatenate(list(wanted["pixel_values"])))
    assert (found.input_ids == 299).sum() == 2 * spec.tokens == 20


def test_a_film_stands_where_a_picture_stands_without_a_chat_template() -> None:
    how = default_prompt(family("llava-onevision").prompt())
    wanted = "<|im_start|>user\n<video>\nWhy?<|im_end|><|im_start|>assistant\n"
    assert how.render("Why?", ["<video>"], film=True) == wanted
    assert how.render("Why?", ["<image>"]) == wanted.replace("<video>", "<image>")


def test_colours_and_filter_are_the_files(tmp_path: Path) -> None:
    changed = {"image_mean": [0.1, 0.2, 0.3], "resample": 2, "rescale_factor": 1 / 128}
    _, spec = read("llava-next", saved("llava-next", tmp_path / "model", **changed), ImageOptions((40, 56)))
    how = spec.preprocessing
    assert (how.mean, how.resample, how.rescale_factor, how.pad_color) == (
        (0.1, 0.2, 0.3),
        "bilinear",
        1 / 128,
        (25, 51, 76),
    )
    folder = saved("llava-next", tmp_path / "plain", do_normalize=False)
    how = read("llava-next", folder, ImageOptions((40, 56)))[1].preprocessing
    assert (how.mean, how.std) == ((0, 0, 0), (1, 1, 1)) and how.pad_color == tuple(int(255 * m) for m in CLIP_MEAN)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_grid_pinpoints": [[28, 56]]}, "image_grid_pinpoints are not those of config.json"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints are not those of config.json"),  # the class's own
        ({"size": {"height": 28, "width": 42}}, "gives 28 x 42, the vision tower expects 28 x 28"),
        ({"crop_size": {"height": 56, "width": 56}}, "gives 56 x 56, the vision tower expects 28 x 28"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor cuts no tiles; expected LlavaNextImage"),
        ({"image_processor_type": "Idefics2ImageProcessor"}, "Idefics2ImageProcessor cuts no tiles"),
        ({"image_grid_pinpoints": [[0, 28]]}, "image_grid_pinpoints"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, object], message: str, tmp_path: Path) -> None:
    folder = saved("llava-next", tmp_path / "model", **changed)
    with pytest.raises(HimapError, match=message):
        read("llava-next", folder, ImageOptions((40, 56)))
