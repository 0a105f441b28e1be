"""SmolVLM2's static vision graph sees what Hugging Face's model sees; its prompts and pixels are their processor's."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from num2words import num2words
from PIL import Image
from rtx_builds import expect_rtx_build, serialized
from safetensors import safe_open
from sklearn.datasets import load_sample_images
from transformers import SmolVLMForConditionalGeneration, SmolVLMVisionConfig
from transformers.models.smolvlm.image_processing_pil_smolvlm import (
    SmolVLMImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE, SmolVLMProcessor
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.video_utils import VideoMetadata

from himap_export.engines.image import preprocess
from himap_export.exporter.aliases import ALIASES
from himap_export.exporter.bind import WeightNames
from himap_export.exporter.families.number_words import number_words
from himap_export.exporter.families.smolvlm import SmolVlm, _places
from himap_export.exporter.family import ImageOptions
from himap_export.exporter.processor import read_processor
from himap_export.exporter.prompts import default_prompt, told_prompt
from himap_export.exporter.vision import vision_graph
from himap_export.graphs.build import StageGraph
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import WeightRef
from himap_export.graphs.spec import Dtype

CHINA = Image.fromarray(load_sample_images().images[0])  # 640 x 427
TEXT: dict[str, Any] = {"model_type": "llama", "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 2048}
TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
TOWER |= {"image_size": 56, "patch_size": 14}
UNEVEN: dict[str, Any] = {"vision_config": TOWER | {"image_size": 38, "patch_size": 2}, "scale_factor": 1}
SIZES = [(40, 100), (224, 224), (427, 640), (300, 91), (56, 56)]
GRIDS = [(2, 4), (4, 4), (3, 4), (4, 2), (4, 4)]
IMAGE, VIDEO = "an image", "a video"
SIDES: Any = {"size": {"longest_edge": 4 * 56}, "max_image_size": {"longest_edge": 56}}


def config(**changed: Any) -> dict[str, Any]:
    said = {"model_type": "smolvlm", "text_config": TEXT, "vision_config": TOWER, "image_token_id": 60}
    return said | {"scale_factor": 2, "tie_word_embeddings": False} | changed


def family(**changed: Any) -> SmolVlm:
    return SmolVlm.parse(config(**changed))


def model(**changed: Any) -> Any:
    """With every parameter random: Hugging Face starts biases and norms where mistakes would not show."""
    made: Any = SmolVLMForConditionalGeneration(family(**changed).full)
    generator = torch.Generator().manual_seed(7)
    for parameter in made.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 16
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan**0.5 + (parameter.data == 1)
    return made.eval()


def graph(asked: ImageOptions, dtype: Dtype = "fp32", **changed: Any) -> StageGraph:
    found = family(**changed)
    return vision_graph("vision", found, found.vision(asked), hidden=48, dtype=dtype, names=WeightRef)


@pytest.mark.parametrize(
    ("asked", "changed", "tiles"),
    [
        (ImageOptions(size=(40, 100)), {}, 9),
        (ImageOptions(size=(300, 91), tiles=1), {}, 1),
        (ImageOptions(frames=3), {}, 3),
        (ImageOptions(tiles=1), UNEVEN, 1),
    ],
    ids=["split", "whole", "film", "places that are no plain count"],
)
def test_features_equal_hugging_face(asked: ImageOptions, changed: dict[str, Any], tiles: int) -> None:
    theirs, ours = model(**changed), graph(asked, **changed)
    side = theirs.config.vision_config.image_size
    pixels = np.random.default_rng(3).normal(size=(tiles, 3, side, side)).astype(np.float32)
    with torch.inference_mode():
        mask = torch.ones((1, tiles, side, side), dtype=torch.bool)
        (wanted,) = theirs.get_image_features(torch.from_numpy(pixels)[None], mask).pooler_output
    weights = {name: value.numpy() for name, value in theirs.model.state_dict().items()}
    assert {name: weights[name].shape for name in ours.weights} == {n: spec.shape for n, spec in ours.weights.items()}
    assert set(ours.weights) == {name for name in weights if not name.startswith("text_model.")}
    session = onnxruntime.InferenceSession(serialized(ours), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixel_values": pixels, **{name: weights[name] for name in ours.weights}})
    assert found.shape == (1, *wanted.shape) and wanted.std() > 0.05
    np.testing.assert_allclose(found[0], wanted, atol=1e-4, rtol=0)


def test_patches_have_the_places_of_hugging_face() -> None:
    """A tower of one channel whose positions are their own numbers tells which of them each patch gets."""
    plain = []
    for side in range(1, 41):
        tower = SmolVLMVisionConfig(hidden_size=1, image_size=side, patch_size=1, num_channels=1)
        theirs: Any = SmolVLMVisionEmbeddings(tower)
        theirs.position_embedding.weight.data = torch.arange(side**2, dtype=torch.float32)[:, None]
        mask = torch.ones((1, side, side), dtype=torch.bool)
        for bare in theirs.patch_embedding.parameters():
            bare.data.zero_()
        wanted = theirs(torch.zeros(1, 1, side, side), mask)[0, :, 0]
        np.testing.assert_array_equal(_places(side), wanted.detach().numpy())
        plain += [side] if (_places(side) == np.arange(side**2)).all() else []
    assert {27, 32} < {*plain} and not {19, 25, 29, 31, 38} & {*plain}  # the published towers' sides are plain


def test_each_layer_is_one_attention_node() -> None:
    operators = [node.op_type for node in graph(ImageOptions(size=(40, 100)), "bf16").model.graph]
    assert operators.count("Attention") == 3 and "Softmax" not in operators and "MatMul" not in operators


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_tensorrt_rtx_fuses_the_attention(dtype: Dtype) -> None:
    expect_rtx_build(graph(ImageOptions(size=(40, 100)), dtype))


@pytest.mark.parametrize(("size", "grid"), [*zip(SIZES, GRIDS, strict=True)])
@pytest.mark.parametrize("tiles", [None, 1])
def test_a_photograph_becomes_the_processors_pixels_and_text(
    size: tuple[int, int], grid: tuple[int, int], tiles: int | None
) -> None:
    processor: Any = SmolVLMImageProcessorPil(**SIDES, do_image_splitting=tiles is None)
    image = CHINA.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    theirs = processor(images=[[image]], return_tensors="np", return_row_col_info=True)
    spec = family().vision(ImageOptions(size=size, tiles=tiles))
    np.testing.assert_array_equal(preprocess(image, family().image(spec)), theirs["pixel_values"][0])
    assert theirs["pixel_values"].shape == (1, spec.tiles, 3, *spec.view) and theirs["pixel_attention_mask"].all()
    assert (theirs["rows"][0][0], theirs["cols"][0][0]) == ((0, 0) if tiles else grid)
    text = SmolVLMProcessor.replace_image_token(words(), theirs, 0)
    expansion = family().expansion(spec)
    assert expansion.write("<image>") == text
    assert expansion.tokens == spec.tokens == text.count("<image>") == 4 * spec.tiles


class Sizes(SmolVLMImageProcessorPil):
    """Resizes to nothing but a shape."""

    def resize(self, image: Any, size: Any, resample: Any = None, **more: Any) -> Any:
        return np.broadcast_to(np.uint8(0), (3, size.height, size.width))


def test_pictures_of_any_shape_are_cut_as_the_processor_cuts_them() -> None:
    random, ours, theirs = np.random.default_rng(0), family(), Sizes()
    for height, width in random.integers(1, 3000, (2000, 2)).tolist():
        first = get_resize_output_image_size(np.broadcast_to(0, (3, height, width)), 4 * 56)
        sheet = theirs.resize_for_vision_encoder(np.broadcast_to(0, (3, *first)), 56).shape[1:]
        split = ours.image(ours.vision(ImageOptions(size=(height, width)))).split
        assert split is not None and (split.resizes, split.sheet) == ((first, sheet), sheet)


def saved_processor(folder: Path, **said: Any) -> None:
    """As the released repositories have it: preprocessor_config.json."""
    processor: Any = SmolVLMImageProcessorPil(**SIDES)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor.to_dict() | said))


def test_the_files_colours_and_resampling_are_taken(tmp_path: Path) -> None:
    said = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 3}
    saved_processor(tmp_path, **said)
    processor: Any = SmolVLMImageProcessorPil(**SIDES, **said)
    spec = family().vision(ImageOptions(size=(427, 640)))
    how = read_processor(tmp_path, family(), {"": spec}).images[""].preprocessing
    assert (how.resample, how.mean, how.std) == ("bicubic", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert how.pad_color == (102, 127, 153)
    wanted = processor(images=[[CHINA]], return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(preprocess(CHINA, how), wanted)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"size": {"longest_edge": 112}}, "112 pixels along the longer edge, tiles of 56, the model 224 pixels"),
        ({"max_image_size": {"longest_edge": 28}}, "tiles of 28, the model 224 pixels along the longer edge"),
        ({"do_image_splitting": False}, "do_image_splitting"),
        ({"do_resize": False}, "no resizing"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor cuts no tiles"),
    ],
)
def test_a_processor_that_cuts_otherwise_is_refused(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    saved_processor(tmp_path, **said)
    cut, whole = (family().vision(ImageOptions(tiles=tiles)) for tiles in (None, 1))
    with pytest.raises(HimapError, match="does not fit its model") as caught:
        read_processor(tmp_path, family(), {"": cut})
    assert message in caught.value.details
    if said == {"do_image_splitting": False}:
        assert read_processor(tmp_path, family(), {"": whole}).images[""].preprocessing == family().image(whole)


def words() -> Any:
    """What the processor's methods read of it; an instance would need torchvision."""
    said = {"image_seq_len": 4, "image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    return SimpleNamespace(**said, global_image_token="<global-img>")


@pytest.mark.parametrize(
    ("indices", "fps", "duration"),
    [([0, 33, 66, 99], 29.97, 3.34), ([*range(7, 2000, 125)], 12.5, 161.9), ([0, 5000], 25.0, 3700.5), ([4], 1.0, 61)],
)
def test_a_film_becomes_the_processors_text(indices: list[int], fps: float, duration: float) -> None:
    spec = family().vision(ImageOptions(frames=len(indices)))
    metadata = VideoMetadata(total_num_frames=9999, fps=fps, duration=duration, frames_indices=indices)
    inputs = {"pixel_values": np.empty((1, len(indices), 3, 56, 56)), "video_metadata": [metadata]}
    wanted = SmolVLMProcessor.replace_video_token(words(), inputs, 0)
    expansion = family().expansion(spec)
    assert expansion.write("<image>", [index / fps for index in indices], duration) == wanted
    assert len(expansion.segments) == len(indices) and expansion.tokens == spec.tokens == 4 * len(indices)
    assert spec.film is not None and (spec.film.frames, spec.film.steps) == (len(indices), len(indices))


def rendered(*messages: tuple[str, list[Any]]) -> str:
    """What the published chat template makes of messages: texts, and "image" and "video" where these stand."""
    kinds = {IMAGE: {"type": "image"}, VIDEO: {"type": "video"}}
    chat = [
        {"role": role, "content": [kinds.get(part) or {"type": "text", "text": part} for part in content]}
        for role, content in messages
    ]
    (text,), _ = render_jinja_template([chat], chat_template=DEFAULT_CHAT_TEMPLATE, add_generation_prompt=True)
    return str(text)


@pytest.mark.parametrize("told", [True, False])
def test_prompts_are_those_of_the_published_chat_template(told: bool) -> None:
    """With the template at hand, and without."""
    rules = family().prompt()
    how = told_prompt(DEFAULT_CHAT_TEMPLATE, {}, rules) if told else default_prompt(rules)
    assert how.render("Why?", ["<image>"]) == rendered(("user", [IMAGE, "Why?"]))
    assert how.render("Why?", ["<image>"] * 3) == rendered(("user", [IMAGE] * 3 + ["Why?"]))
    both = how.render("Is <image> in <image>?", ["<image>"] * 2)
    assert both == rendered(("user", ["Is ", IMAGE, " in ", IMAGE, "?"]))
    wanted = rendered(("user", [VIDEO, "Why?"])).replace("<video>", "A film: <image>")
    assert how.render("Why?", ["A film: <image>"], film=True) == wanted
    wanted = rendered(("user", ["In ", VIDEO, ", why?"])).replace("<video>", "<image>")
    assert how.render("In <video>, why?", ["<image>"], film=True) == wanted
    turns = rendered(("user", [IMAGE, "Why?"]), ("assistant", ["So."]), ("user", ["And?"]))
    assert how.render("Why?", ["<image>"]) + " So." + how.next_turn("And?") == turns


def test_frames_are_seen_as_pictures_that_are_not_cut() -> None:
    size = (101, 237)
    film = family().vision(ImageOptions(size=size, frames=5))
    assert family().image(film) == family().image(family().vision(ImageOptions(size=size, tiles=1)))


def test_numbers_are_spelt_as_num2words_does() -> None:
    numbers = [*range(1200), 99_999, 123_456, 900_013]
    assert [number_words(number) for number in numbers] == [num2words(number) for number in numbers]
    for number in (-1, 10**6):
        with pytest.raises(ValueError, match="no words"):
            number_words(number)


def decoder_role(name: str) -> str:
    return name.removeprefix("model.text_model.") if ".text_model." in name else name.removeprefix("model.")


@pytest.mark.parametrize("tied", [False, True])
def test_names_cover_a_saved_checkpoint(tied: bool, tmp_path: Path) -> None:
    saved = model(tie_word_embeddings=tied)
    saved.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, not a mapping
    known = WeightNames(stored, family(tie_word_embeddings=tied))
    found = {name: known(decoder_role(name)).name for name in saved.state_dict()}
    assert set(found.values()) == set(stored) and len(found) == len(stored) + tied
    assert {name: tuple(saved.state_dict()[name].shape) for name in found} == {n: stored[f] for n, f in found.items()}
    assert family(text_config=TEXT | {"tie_word_embeddings": True}).tied is False  # transformers asks the outer field


@pytest.mark.parametrize(
    ("alias", "parameters", "tokens"),
    [("256m", 256_484_928, 64), ("500m", 507_482_304, 64), ("2.2b", 2_246_784_880, 81)],
)
def test_published_models_have_their_size(alias: str, parameters: int, tokens: int) -> None:
    """The parameters of the released files, and the processor's `image_seq_len`."""
    published = SmolVlm.parse(ALIASES[f"smolvlm2-{alias}"].config)
    with torch.device("meta"):
        made = SmolVLMForConditionalGeneration(published.full)
    assert sum(each.numel() for each in made.parameters()) == parameters
    square, wide = (published.vision(ImageOptions(size=size)) for size in (None, (1080, 1920)))
    assert (square.tiles, square.tokens) == (17, 17 * tokens) and (wide.tiles, wide.tokens) == (13, 13 * tokens)
    assert square.size[0] == 4 * square.view[0] == {64: 2048, 81: 1536}[tokens]
    assert published.vision(ImageOptions(frames=64)).tokens == 64 * tokens
    assert (published.prompt().image_token, published.prompt().positions) == (49190, 8192)


@pytest.mark.parametrize(
    ("asked", "changed", "message"),
    [
        (ImageOptions(size=(40, 100), tiles=8), {}, "8 tiles do not fit"),
        (ImageOptions(tiles=0), {}, "0 tiles do not fit"),
        (ImageOptions(frames=4, tiles=2), {}, "tiles do not fit a film"),
        (ImageOptions(frames=0), {}, "0 frames do not fit"),
        (ImageOptions(frames=10**6), {}, "1000000 frames do not fit"),
        (ImageOptions(), {"text_config": TEXT | {"max_position_embeddings": 64}}, "17 tiles do not fit"),
        (ImageOptions(), {"scale_factor": 3}, "unsupported configuration"),
        (ImageOptions(), {"vision_config": TOWER | {"patch_size": 57}}, "unsupported configuration"),
        (ImageOptions(), {"vision_config": TOWER | {"image_size": 1120}}, "unsupported configuration"),
        (ImageOptions(), {"vision_config": TOWER | {"hidden_act": "tanh"}}, "activation of the vision tower"),
    ],
)
def test_what_does_not_fit_is_refused(asked: ImageOptions, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(HimapError, match=message) as caught:
        family(**changed).vision(asked)
    assert caught.value.code == Exit.USAGE


def test_a_tile_count_that_is_the_pictures_is_taken() -> None:
    assert family().vision(ImageOptions(size=(40, 100), tiles=9)) == family().vision(ImageOptions(size=(40, 100)))


@pytest.mark.parametrize("changed", [{"model_type": "qwen2"}, {"hidden_act": "gelu"}])
def test_other_decoders_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(HimapError, match="unsupported") as caught:
        family(text_config=TEXT | changed).decoder()
    assert caught.value.code == Exit.USAGE
