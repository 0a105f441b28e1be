"""LLaVA-NeXT's and LLaVA-OneVision's static vision graphs see what Hugging Face's models see, at any size."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from rtx_builds import expect_rtx_build, serialized
from safetensors import safe_open
from sklearn.datasets import load_sample_images
from transformers import (
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from himap_export.engines.image import preprocess
from himap_export.exporter.aliases import ALIASES
from himap_export.exporter.bind import WeightNames
from himap_export.exporter.families.anyres import Anyres
from himap_export.exporter.families.llava_next import LlavaNext
from himap_export.exporter.families.llava_onevision import LlavaOnevision
from himap_export.exporter.family import ImageOptions
from himap_export.exporter.vision import vision_graph
from himap_export.graphs.build import StageGraph
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import WeightRef
from himap_export.graphs.spec import Dtype

Pixels = NDArray[np.float32]
CHINA = Image.fromarray(load_sample_images().images[0])
TEXT: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
TEXT |= {"num_key_value_heads": 1, "vocab_size": 64}
TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
TOWER |= {"image_size": 70, "patch_size": 14}  # 5 x 5 tokens a tile
NEXT: dict[str, Any] = {
    "model_type": "llava_next", "image_token_index": 60, "tie_word_embeddings": False,
    "text_config": {"model_type": "mistral", "sliding_window": None, **TEXT},
    "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **TOWER},
    "image_grid_pinpoints": [[70, 140], [140, 70], [140, 140], [210, 70], [70, 210]],
}  # fmt: skip
ONEVISION: dict[str, Any] = {
    "model_type": "llava_onevision", "image_token_index": 60, "video_token_index": 61, "tie_word_embeddings": False,
    "text_config": {"model_type": "qwen2", **TEXT}, "vision_aspect_ratio": "anyres_max_2",
    "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER},
    "image_grid_pinpoints": [[70 * rows, 70 * columns] for rows in range(1, 5) for columns in range(1, 5)],
}  # fmt: skip
CONFIGS = {"next": NEXT, "onevision": ONEVISION}
CLASSES: dict[str, type[Anyres]] = {"llava_next": LlavaNext, "llava_onevision": LlavaOnevision}
MODELS = {"llava_next": LlavaNextForConditionalGeneration, "llava_onevision": LlavaOnevisionForConditionalGeneration}
# (height, width): whole sheets; with borders above and below, or left and right; very long; smaller than a tile.
SIZES = [(140, 140), (100, 190), (190, 100), (70, 801), (801, 70), (31, 300), (30, 30), (427, 640)]


def family(config: dict[str, Any]) -> Anyres:
    return CLASSES[config["model_type"]].parse(config)


def model(config: dict[str, Any]) -> Any:
    """With every parameter random: Hugging Face starts biases, norms and positions where mistakes would not show."""
    made: Any = MODELS[config["model_type"]](family(config).full)
    generator = torch.Generator().manual_seed(7)
    for parameter in made.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 16
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan**0.5 + (parameter.data == 1)
    return made.eval()


def graph(config: dict[str, Any], asked: ImageOptions, dtype: Dtype = "fp32") -> StageGraph:
    known = family(config)
    return vision_graph("vision", known, known.vision(asked), hidden=48, dtype=dtype, names=WeightRef)


def wanted(theirs: Any, asked: ImageOptions, pixels: Pixels) -> Pixels:
    """Hugging Face's features [V,D] of one picture or film."""
    given, size = torch.from_numpy(pixels)[None], torch.tensor([asked.size])
    with torch.inference_mode():
        if asked.frames:
            found = theirs.model.get_video_features(given).pooler_output
        elif asked.several:
            both, sizes = torch.cat([given, given.flip(2)]), torch.cat([size, size])
            found = theirs.model.get_image_features(both, sizes, batch_num_images=torch.tensor([2])).pooler_output
        else:
            found = theirs.model.get_image_features(given, size).pooler_output
    return np.asarray(found[0])


def random_pixels(asked: ImageOptions, config: dict[str, Any]) -> Pixels:
    spec = family(config).vision(asked)
    return np.random.default_rng(3).normal(size=(spec.tiles, 3, *spec.view)).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_features_at_every_size(name: str, size: tuple[int, int]) -> None:
    """The module itself, with Hugging Face's weights."""
    config, asked = CONFIGS[name], ImageOptions(size)
    theirs, known, pixels = model(config), family(config), random_pixels(asked, config)
    spec = known.vision(asked)
    ours = known.module(spec, torch.float32).to_empty(device="cpu")
    loaded = ours.load_state_dict(theirs.model.state_dict(), strict=False)
    assert not loaded.missing_keys and all(key.startswith("language_model.") for key in loaded.unexpected_keys)
    for buffer, values in ours.constants.items():  # type: ignore[operator, union-attr]
        ours.get_buffer(buffer).copy_(torch.from_numpy(values))
    with torch.inference_mode():
        found = ours(torch.from_numpy(pixels)).numpy()
    features = wanted(theirs, asked, pixels)
    assert found.shape == (1, spec.tokens, 48) == (1, *features.shape) and features.std() > 0.05
    np.testing.assert_allclose(found[0], features, atol=1e-5, rtol=0)


ASKED = [
    ("next", ImageOptions((100, 190))),
    ("onevision", ImageOptions((190, 100))),
    ("onevision", ImageOptions((427, 640))),  # its grid shrinks
    ("onevision", ImageOptions((70, 70), several=True)),
    ("onevision", ImageOptions((70, 70), frames=3)),
]


@pytest.mark.parametrize(("name", "asked"), ASKED)
def test_the_graph_equals_hugging_face(name: str, asked: ImageOptions) -> None:
    """Features, and every weight by its name and shape."""
    config = CONFIGS[name]
    theirs, ours, pixels = model(config), graph(config, asked), random_pixels(asked, config)
    weights = {name: value.numpy() for name, value in theirs.model.state_dict().items()}
    assert {name: weights[name].shape for name in ours.weights} == {n: spec.shape for n, spec in ours.weights.items()}
    idle = {name for name in weights if name.startswith(("language_model.", "vision_tower.post_layernorm."))}
    if name == "next":  # the features come from the last layer but one
        idle |= {name for name in weights if name.startswith("vision_tower.encoder.layers.2.")}
    assert set(ours.weights) == weights.keys() - idle and "image_newline" in ours.weights
    session = onnxruntime.InferenceSession(serialized(ours), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixel_values": pixels, **{name: weights[name] for name in ours.weights}})
    np.testing.assert_allclose(found[0], wanted(theirs, asked, pixels), atol=1e-4, rtol=0)


def test_a_large_grid_shrinks() -> None:
    """To the tokens of two tiles, where it would have 1.1 times their side; not where it is told of no most."""
    known = family(ONEVISION)
    assert known.layout((427, 640)).covered == (13, 20) and known.layout((427, 640)).grid == (5, 8)
    assert known.layout((75, 140)).grid == known.layout((75, 140)).covered == (6, 10)
    assert family(NEXT).layout((427, 640)).grid == family(NEXT).layout((427, 640)).covered


def published(name: str) -> Anyres:
    config = ALIASES[name].config
    return CLASSES[config["model_type"]].parse(config)


def processor(kind: Any, known: Anyres, **more: Any) -> Any:
    """Hugging Face's processor as far as it counts tokens, which needs no tokenizer."""
    made = object.__new__(kind)
    made.image_processor = SimpleNamespace(image_grid_pinpoints=known.full.image_grid_pinpoints)
    vars(made).update(more)
    return made


def test_tokens_of_published_models_are_as_many_as_hugging_faces_processors_count() -> None:
    next_, onevision = published("llava-next-mistral-7b"), published("llava-onevision-7b")
    assert next_.vision(ImageOptions()).tokens == 576 + 48 * 49
    assert onevision.vision(ImageOptions()).tokens == 729 + 54 * 55
    assert onevision.vision(ImageOptions(several=True)).tokens == 730
    assert onevision.vision(ImageOptions(frames=8)).tokens == 8 * 196 + 1
    counting = [
        (next_, 336, processor(LlavaNextProcessor, next_, patch_size=14, num_additional_image_tokens=0)),
        (
            onevision, 384,
            processor(LlavaOnevisionProcessor, onevision, num_image_tokens=729, vision_aspect_ratio="anyres_max_9"),
        ),
    ]  # fmt: skip
    random = np.random.default_rng(5)
    for known, side, theirs in counting:
        for height, width in np.exp(random.uniform(np.log(100), np.log(2000), (300, 2))).astype(int).tolist():
            spec = known.vision(ImageOptions((height, width)))
            assert spec.tokens == theirs._get_number_of_features(height, width, side, side)
            assert spec.tokens == (side // 14) ** 2 + spec.grid[0] * (spec.grid[1] + spec.newline)


def decoder_role(name: str) -> str:
    return name.removeprefix("model.language_model.") if ".language_model." in name else name.removeprefix("model.")


@pytest.mark.parametrize("name", CONFIGS)
def test_names_cover_a_saved_checkpoint(name: str, tmp_path: Path) -> None:
    """As transformers saves it, which is as the published ones are, and by the paths of its modules."""
    chosen, saved = CONFIGS[name], model(CONFIGS[name])
    saved.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, not a mapping
    known = WeightNames(stored, family(chosen))
    found = {name: known(decoder_role(name)).name for name in saved.state_dict()}
    assert sorted(found.values()) == sorted(stored)
    assert {name: tuple(saved.state_dict()[name].shape) for name in found} == {n: stored[f] for n, f in found.items()}
    assert all(name in family(chosen).names(decoder_role(name)) for name in saved.state_dict())
    first = WeightNames((), family(chosen))
    assert first("image_newline").name == "image_newline"
    assert first("layers.3.mlp.up_proj.weight").name == "language_model.model.layers.3.mlp.up_proj.weight"


def test_a_decoder_may_tie_what_its_model_denies() -> None:
    assert published("llava-onevision-0.5b").tied and not published("llava-onevision-7b").tied


@pytest.mark.parametrize(("name", "asked"), [ASKED[0], ASKED[2], ASKED[4]])
def test_tensorrt_rtx_builds_the_graph(name: str, asked: ImageOptions) -> None:
    expect_rtx_build(graph(CONFIGS[name], asked, "fp16"))


def test_pixels_of_the_three_kinds() -> None:
    """A picture is cut; one of several lies in the middle of a square of the mean colour; a frame is stretched."""
    known = family(ONEVISION)
    size = (60, 100)
    one, several, film = (known.vision(ImageOptions(size, **kind)) for kind in ({}, {"several": True}, {"frames": 4}))
    assert [spec.size for spec in (one, several, film)] == [size] * 3
    assert [known.image(spec).resize for spec in (one, several, film)] == [size, (100, 100), size]
    assert (one.tiles, several.tiles, film.tiles) == (3, 1, 4)
    photograph = CHINA.resize((100, 60))
    sides = {"height": 70, "width": 70}
    theirs: Any = LlavaOnevisionImageProcessorPil(size=sides, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    theirs.image_grid_pinpoints = ONEVISION["image_grid_pinpoints"]
    made = theirs([[photograph]], return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(preprocess(photograph, known.image(one)), made)
    made = theirs([[photograph, photograph]], return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(preprocess(photograph, known.image(several)), made)
    square = known.image(known.vision(ImageOptions((70, 70), several=True)))
    frame = preprocess(photograph.resize((70, 70), Image.Resampling.BICUBIC), square)
    np.testing.assert_array_equal(preprocess(photograph, known.image(film)), frame)


@pytest.mark.parametrize(
    ("config", "asked", "message"),
    [
        (NEXT, ImageOptions(tiles=4), "4 tiles do not fit: a picture of 140x140 becomes 5"),
        (NEXT, ImageOptions(frames=4), "`frames` do not fit"),
        (ALIASES["llava-next-vicuna-7b"].config, ImageOptions((50, 4000)), "an image size of 4000x50"),
        (ALIASES["llava-next-vicuna-7b"].config, ImageOptions((4000, 50)), "an image size of 50x4000"),
        (ONEVISION, ImageOptions(tiles=4, several=True), "4 tiles"),
        (NEXT | {"vision_feature_select_strategy": "full"}, ImageOptions(), "selection full"),
        (ONEVISION | {"vision_feature_select_strategy": "default"}, ImageOptions(), "selection default"),
        (NEXT | {"image_grid_pinpoints": [[70, 100]]}, ImageOptions(), "100x70 is not made of tiles of 70x70"),
        (ONEVISION | {"vision_aspect_ratio": "anyres"}, ImageOptions(), "'anyres' is not anyres_max_N"),
        (NEXT | {"vision_feature_layer": -9}, ImageOptions(), "vision_feature_layer -9"),
    ],
)
def test_what_does_not_fit_is_refused(config: dict[str, Any], asked: ImageOptions, message: str) -> None:
    with pytest.raises(HimapError, match=message) as caught:
        family(config).vision(asked)
    assert caught.value.code == Exit.USAGE


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (NEXT, {"model_type": "mistral", "sliding_window": 4096}),
        (NEXT, {"model_type": "mistral"}),  # transformers takes 4096
        (NEXT, {"model_type": "qwen2"}),
        (ONEVISION, {"model_type": "llama"}),
    ],
)
def test_other_decoders_are_refused(config: dict[str, Any], text: dict[str, Any]) -> None:
    with pytest.raises(HimapError, match="unsupported") as caught:
        family(config | {"text_config": {**TEXT, **text}}).decoder()
    assert caught.value.code == Exit.USAGE
