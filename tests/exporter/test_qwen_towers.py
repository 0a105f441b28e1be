"""The static towers of Qwen2.5-VL and Qwen3-VL see what Hugging Face's see, whatever the size of the picture."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from qwen_towers import CONFIG_2_5, CONFIG_3, features, qwen2_5_model, qwen3_model
from rtx_builds import expect_rtx_build
from safetensors import safe_open
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from himap_export.exporter.families import qwen2_5_vl, qwen3_vl
from himap_export.exporter.family import ImageOptions
from himap_export.exporter.registry import AnyFamily
from himap_export.exporter.vision import vision_graph
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import WeightRef
from himap_export.graphs.spec import Dtype


def compared(family: AnyFamily, config: dict[str, Any], model: Any, patch: int, size: tuple[int, int]) -> None:
    """Bytes through Hugging Face's processor and model against the same bytes, normalised, through the graph."""
    spec = family.parse(config).vision(ImageOptions(size))
    graph = vision_graph("vision", family.parse(config), spec, hidden=48, dtype="fp32", names=WeightRef)
    picture = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    how = family.parse(config).image(spec)
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch, image_mean=how.mean, image_std=how.std, size={"shortest_edge": 1, "longest_edge": 10**7}
    )
    made = processor(list(picture), return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, spec.grid[0] * 2, spec.grid[1] * 2]]
    with torch.inference_mode():
        seen = model.model.get_image_features(made["pixel_values"], made["image_grid_thw"])
    wanted = [torch.cat(each) for each in (seen.pooler_output, *(getattr(seen, "deepstack_features", None) or ()))]
    pixels = ((picture / 255 - how.mean) / how.std).astype(np.float32).transpose(0, 3, 1, 2)
    found = features(graph, model, pixels)
    assert len(found) == 1 + spec.deepstack and spec.tokens == spec.grid[0] * spec.grid[1]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == (1, spec.tokens, 48)
        np.testing.assert_allclose(ours.reshape(-1, 48), theirs.numpy(), atol=1e-4, rtol=0)
        assert theirs.std() > 0.05


@pytest.fixture(scope="module")
def qwen2_5() -> Any:
    return qwen2_5_model()


@pytest.fixture(scope="module")
def qwen3() -> Any:
    return qwen3_model()


# One window; whole windows; ragged at the right, at the bottom, at both; smaller than a window.
SIZES_2_5 = ((112, 112), (112, 448), (112, 140), (140, 112), (140, 196), (252, 168), (28, 56))


@pytest.mark.parametrize("size", SIZES_2_5)
def test_qwen2_5_vl(qwen2_5: Any, size: tuple[int, int]) -> None:
    compared(qwen2_5_vl.Qwen25Vl, CONFIG_2_5, qwen2_5, 14, size)


@pytest.mark.parametrize("size", [(128, 128), (96, 224), (320, 64), (32, 32)])
def test_qwen3_vl(qwen3: Any, size: tuple[int, int]) -> None:
    compared(qwen3_vl.Qwen3Vl, CONFIG_3, qwen3, 16, size)


BOTH = pytest.mark.parametrize(
    ("family", "config"),
    [(qwen2_5_vl.Qwen25Vl, CONFIG_2_5), (qwen3_vl.Qwen3Vl, CONFIG_3)],
    ids=["qwen2.5-vl", "qwen3-vl"],
)


@BOTH
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_tensorrt_rtx_builds_heads_of_the_published_width(
    family: AnyFamily, config: dict[str, Any], dtype: Dtype
) -> None:
    """Ragged windows, heads of 80 (2.5) and 72 (3): fused, or the build fails. The rotary tables stay in fp32."""
    width, layers = (80, 2) if family is qwen2_5_vl.Qwen25Vl else (72, 1)
    tower = {**config["vision_config"], "hidden_size": 2 * width, "depth": layers, "num_heads": 2}
    tower |= {"fullatt_block_indexes": [1], "deepstack_visual_indexes": [0]}
    config = {**config, "vision_config": tower}
    spec = family.parse(config).vision(ImageOptions((252, 168) if width == 80 else (96, 224)))
    graph = vision_graph("vision", family.parse(config), spec, hidden=48, dtype=dtype, names=WeightRef)
    tables = [value for name, value in graph.model.graph.initializers.items() if name in ("cos", "sin", "tap_weights")]
    assert tables and all(value.dtype == ir.DataType.FLOAT for value in tables)
    attentions = [node for node in graph.model.graph if node.op_type == "Attention"]
    assert len(attentions) == (5 if width == 80 else 1)  # whole, right, bottom and corner windows, and the full block
    expect_rtx_build(graph)


@BOTH
def test_decoder_is_read_from_config(family: AnyFamily, config: dict[str, Any]) -> None:
    text = config.get("text_config", config)
    spec = family.parse(config).decoder()
    assert (spec.layers, spec.hidden, spec.ffn, spec.heads, spec.kv_heads) == (2, 48, 40, 3, 1)
    assert (spec.head_dim, spec.vocab, spec.rope_base) == (16, 64, 5e5)
    three = family is qwen3_vl.Qwen3Vl
    assert (spec.qkv_bias, spec.qk_norm, spec.deepstack) == ((False, True, 2) if three else (True, False, 0))
    full = family.parse(config).full.text_config  # type: ignore[attr-defined]  # both have it
    rotary = (Qwen3VLTextRotaryEmbedding if three else Qwen2_5_VLRotaryEmbedding)(full)
    axes = rotary.recomposition_frequencies(torch.arange(3.0).view(3, 1, 1, 1).repeat(1, 1, 1, 8))
    assert axes.flatten()[:8].tolist() == list(spec.rope_axes)
    assert family.parse(config).prompt().positions == 512
    scaled = {**text["rope_scaling"], "type": "yarn", "rope_type": "yarn", "factor": 4.0}
    changed = {**text, "rope_scaling": scaled}
    with pytest.raises(HimapError, match="unsupported rotary embedding yarn"):
        family.parse({**config, "text_config": changed} if three else changed).decoder()


def test_axes_of_published_checkpoints() -> None:
    axes = qwen3_vl.rope_axes([24, 20, 20])
    assert axes == (0, 1, 2) * 20 + (0,) * 4 and [axes.count(i) for i in range(3)] == [24, 20, 20]


def test_sliding_windows_are_refused() -> None:
    with pytest.raises(HimapError, match="unsupported kind of layer sliding_attention"):
        qwen2_5_vl.Qwen25Vl.parse({**CONFIG_2_5, "use_sliding_window": True}).decoder()


@BOTH
def test_sizes(family: AnyFamily, config: dict[str, Any]) -> None:
    unit = 32 if family is qwen3_vl.Qwen3Vl else 28
    spec = family.parse(config).vision(ImageOptions())
    assert (spec.size, spec.grid) == ((448, 448), (448 // unit, 448 // unit))
    with pytest.raises(HimapError, match=rf"multiples of {unit}; the nearest size is {unit * 12}x{unit}") as caught:
        family.parse(config).vision(ImageOptions((7, unit * 12 - 1)))
    assert caught.value.code == Exit.USAGE
    with pytest.raises(HimapError, match="2 tiles"):
        family.parse(config).vision(ImageOptions(tiles=2))
    how = family.parse(config).image(family.parse(config).vision(ImageOptions((unit, 2 * unit))))
    assert how.output_size == (unit, 2 * unit) and how.letterbox
    assert how.pad_color == ((127, 127, 127) if unit == 32 else (122, 116, 104))


def test_names_are_those_transformers_saves(qwen2_5: Any, qwen3: Any, tmp_path: Path) -> None:
    rows = ((qwen2_5_vl.Qwen25Vl, CONFIG_2_5, qwen2_5), (qwen3_vl.Qwen3Vl, CONFIG_3, qwen3))
    for family, config, model in rows:
        model.save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            saved = set(file.keys())
        spec = family.parse(config).vision(ImageOptions())
        roles = list(dict(family.parse(config).module(spec, torch.float16).named_parameters()))
        roles += [n.removeprefix("language_model.") for n in dict(model.model.named_parameters()) if "visual" not in n]
        assert {next(family.parse(config).names(role)) for role in [*roles, "lm_head.weight"]} == saved
        modules = set(dict(model.named_parameters()))  # the names in memory, as another tool may write them
        assert all(modules & set(family.parse(config).names(role)) for role in [*roles, "lm_head.weight"])
