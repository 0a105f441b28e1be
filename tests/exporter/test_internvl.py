"""InternVL3's static vision graph sees what Hugging Face's model sees, tiles included; checkpoints' names are known."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from rtx_builds import expect_rtx_build, serialized
from safetensors import safe_open
from transformers import InternVLForConditionalGeneration

from himap_export.exporter.bind import WeightNames
from himap_export.exporter.families.internvl import InternVl
from himap_export.exporter.family import ImageOptions
from himap_export.exporter.vision import vision_graph
from himap_export.graphs.build import StageGraph
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import WeightRef
from himap_export.graphs.spec import Dtype

TEXT: dict[str, Any] = {"model_type": "qwen2", "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 64, "tie_word_embeddings": False}
TEXT |= {"rope_theta": 1e6, "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}}
TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
TOWER |= {"image_size": [84, 84], "patch_size": [14, 14], "attention_bias": True}
LARGE = {"attention_bias": False, "norm_type": "rms_norm", "use_qk_norm": True}  # as InternViT-6B has them


def config(tower: dict[str, Any] | None = None, **text: Any) -> dict[str, Any]:
    changed = {"text_config": {**TEXT, **text}, "vision_config": {**TOWER, **(tower or {})}}
    return {"model_type": "internvl", "image_token_id": 60, "tie_word_embeddings": False, **changed}


def model(config: dict[str, Any]) -> Any:
    """With every parameter random: Hugging Face starts biases, norms and positions where mistakes would not show."""
    made: Any = InternVLForConditionalGeneration(InternVl.parse(config).full)
    generator = torch.Generator().manual_seed(7)
    for parameter in made.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 16
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan**0.5 + (parameter.data == 1)
    return made.eval()


def graph(config: dict[str, Any], tiles: int, dtype: Dtype = "fp32", hidden: int = 48) -> StageGraph:
    family = InternVl.parse(config)
    spec = family.vision(ImageOptions(tiles=tiles))
    return vision_graph("vision", family, spec, hidden=hidden, dtype=dtype, names=WeightRef)


TOWERS: dict[str, dict[str, Any]] = {"300M": {}, "6B": LARGE, "with a last norm": {"use_mean_pooling": False}}
QUICK = {(name, 3) for name in TOWERS} | {("300M", 1)}  # tiles are alike to every tower


@pytest.mark.parametrize(
    ("name", "tiles"),
    [
        pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow)
        for each in itertools.product(TOWERS, (1, 3))
    ],
)
def test_features_equal_hugging_face(name: str, tiles: int) -> None:
    chosen = config(TOWERS[name])
    theirs, ours = model(chosen), graph(chosen, tiles)
    assert ours.model.graph.outputs[0].shape == ir.Shape([1, 9 * tiles, 48])
    pixels = np.random.default_rng(3).normal(size=(tiles, 3, 84, 84)).astype(np.float32)
    with torch.inference_mode():
        wanted = theirs.get_image_features(torch.from_numpy(pixels)).pooler_output.numpy()
    weights = {name: value.numpy() for name, value in theirs.model.state_dict().items()}
    assert {name: weights[name].shape for name in ours.weights} == {
        name: spec.shape for name, spec in ours.weights.items()
    }
    assert set(ours.weights) == {name for name in weights if not name.startswith("language_model.")}
    session = onnxruntime.InferenceSession(serialized(ours), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixel_values": pixels, **{name: weights[name] for name in ours.weights}})
    assert found.shape == (1, 9 * tiles, 48) and wanted.std() > 0.05
    np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=1e-4, rtol=0)


def test_each_layer_is_one_attention_node() -> None:
    operators = [node.op_type for node in graph(config(), 3, "bf16").model.graph]
    assert operators.count("Attention") == 3 and "Softmax" not in operators and "Resize" not in operators
    assert "MatMul" not in operators  # every projection is a Gemm over stored weights
    operators = [node.op_type for node in graph(config(LARGE), 3, "bf16").model.graph]
    assert operators.count("Attention") == 3 and operators.count("RMSNormalization") == 4 * 3


def decoder_role(name: str) -> str:
    return name.removeprefix("model.language_model.") if ".language_model." in name else name.removeprefix("model.")


@pytest.mark.parametrize("tied", [False, True])
def test_names_cover_a_saved_checkpoint(tied: bool, tmp_path: Path) -> None:
    """As transformers saves it, which is as the published ones are, and by the paths of its modules."""
    chosen = {**config(), "tie_word_embeddings": tied}
    saved = model(chosen)
    saved.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, not a mapping
    family = InternVl.parse(chosen)
    known = WeightNames(stored, family)
    found = {name: known(decoder_role(name)).name for name in saved.state_dict()}
    assert set(found.values()) == set(stored) and len(found) == len(stored) + tied
    assert {name: tuple(saved.state_dict()[name].shape) for name in found} == {n: stored[f] for n, f in found.items()}
    assert all(name in family.names(decoder_role(name)) for name in saved.state_dict())
    published = WeightNames((), InternVl.parse({"tie_word_embeddings": False}))
    assert published("lm_head.weight").name == "language_model.lm_head.weight"
    assert published("layers.3.mlp.up_proj.weight").name == "language_model.model.layers.3.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("tower", [{}, LARGE], ids=["300M", "6B"])
def test_tensorrt_rtx_fuses_the_attention(tower: dict[str, Any], dtype: Dtype) -> None:
    expect_rtx_build(graph(config(tower), 3, dtype))


def test_decoders_as_published() -> None:
    spec = InternVl.parse(config()).decoder()
    assert (spec.qkv_bias, spec.out_bias, spec.qk_norm, spec.head_dim, spec.rope_base) == (True, False, False, 16, 1e6)
    spec = InternVl.parse(config(model_type="qwen3", head_dim=24)).decoder()
    assert (spec.qkv_bias, spec.qk_norm, spec.head_dim) == (False, True, 24)
    spec = InternVl.parse(config(model_type="llama", mlp_bias=True)).decoder()
    assert (spec.qkv_bias, spec.mlp_bias, spec.head_dim) == (False, True, 16)
    assert InternVl.parse(config(max_position_embeddings=777)).prompt().positions == 777


def test_tokens_of_a_published_model() -> None:
    chosen = config({"image_size": [448, 448]})
    spec = InternVl.parse(chosen).vision(ImageOptions(tiles=13))
    assert (spec.tokens, spec.grid, spec.tiles, spec.size) == (256 * 13, (16, 16), 13, (448, 448))
    how = InternVl.parse(chosen).image(spec)
    assert (how.resize, how.tiles, how.resample) == ((448, 448), 13, "bicubic")


@pytest.mark.parametrize(
    ("asked", "changed", "message"),
    [
        (ImageOptions(size=(168, 84)), {}, "an image size of 84x168"),
        (ImageOptions(tiles=0), {}, "0 tiles"),
        (ImageOptions(tiles=10**6), {}, "1000000 tiles"),
        (ImageOptions(), {"vision_config": {**TOWER, "image_size": [84, 112]}}, "112x84"),
        (ImageOptions(), {"vision_config": {**TOWER, "image_size": [70, 70]}}, "70x70"),
        (ImageOptions(), {"vision_feature_layer": -2}, "vision feature layer -2"),
        (ImageOptions(), {"vision_feature_select_strategy": "full"}, "selection full"),
        (ImageOptions(), {"downsample_ratio": 0.25}, "downsample ratio 0.25"),
    ],
)
def test_what_does_not_fit_is_refused(asked: ImageOptions, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(HimapError, match=message) as caught:
        InternVl.parse({**config(), **changed}).vision(asked)
    assert caught.value.code == Exit.USAGE


@pytest.mark.parametrize(
    "text", [{"model_type": "gemma2"}, {"hidden_act": "gelu"}, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}]
)
def test_other_decoders_are_refused(text: dict[str, Any]) -> None:
    with pytest.raises(HimapError, match="unsupported") as caught:
        InternVl.parse(config(**text)).decoder()
    assert caught.value.code == Exit.USAGE
