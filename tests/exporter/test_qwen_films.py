"""The static towers of Qwen2.5-VL and Qwen3-VL see films as Hugging Face's see them: pairs of frames, step by step."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from qwen_towers import CONFIG_2_5, CONFIG_3, features, qwen2_5_model, qwen3_model
from rtx_builds import expect_rtx_build
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from himap_export.engines.film import Film, Frames
from himap_export.exporter.families import qwen2_5_vl, qwen3_vl
from himap_export.exporter.family import ImageOptions
from himap_export.exporter.registry import AnyFamily
from himap_export.exporter.vision import vision_graph
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import WeightRef


def compared(family: AnyFamily, config: dict[str, Any], model: Any, size: tuple[int, int], frames: int) -> None:
    """Pixels of noise, each frame another, through `get_video_features` and through the graph."""
    known = family.parse(config)
    spec = known.vision(ImageOptions(size, frames=frames))
    assert (spec.size, spec.tiles, spec.tokens) == (size, frames, frames // 2 * spec.grid[0] * spec.grid[1])
    graph = vision_graph("vision", known, spec, hidden=48, dtype="fp32", names=WeightRef)
    pixels = np.random.default_rng(frames).standard_normal((frames, 3, *size), np.float32)
    tower = model.config.vision_config
    # Qwen2VLVideoProcessor's is the same, in a module that asks for torchvision.
    patches, *grid = Qwen3VLVideoProcessor.patchify(
        Qwen3VLVideoProcessor, torch.from_numpy(pixels)[None], tower.patch_size, tower.spatial_merge_size, 2
    )
    assert grid == [frames // 2, spec.grid[0] * 2, spec.grid[1] * 2]
    with torch.inference_mode():
        seen = model.model.get_video_features(patches[0], torch.tensor([grid]), return_dict=True)
    wanted = [torch.cat(each) for each in (seen.pooler_output, *(getattr(seen, "deepstack_features", None) or ()))]
    found = features(graph, model, pixels)
    assert len(found) == 1 + spec.deepstack
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == (1, spec.tokens, 48)
        np.testing.assert_allclose(ours[0], theirs.numpy(), atol=1e-4, rtol=0)
        steps = theirs.reshape(frames // 2, -1)
        assert frames == 2 or (steps[0] - steps[-1]).abs().max() > 0.5  # a step out of its place would show


def by_frames(first: tuple[int, int], *others: tuple[int, int]) -> Any:
    """4 frames of the size `first`; 2 and 8, and other sizes, are slow."""
    rest = [(size, frames) for size in (first, *others) for frames in (2, 4, 8) if (size, frames) != (first, 4)]
    slow = [pytest.param(*each, marks=pytest.mark.slow) for each in rest]
    return pytest.mark.parametrize(("size", "frames"), [(first, 4), *slow])


@by_frames((140, 196), (112, 112))  # ragged windows; one
def test_qwen2_5_vl(size: tuple[int, int], frames: int) -> None:
    compared(qwen2_5_vl.Qwen25Vl, CONFIG_2_5, qwen2_5_model(), size, frames)


@by_frames((96, 224), (128, 128))
def test_qwen3_vl(size: tuple[int, int], frames: int) -> None:
    compared(qwen3_vl.Qwen3Vl, CONFIG_3, qwen3_model(), size, frames)


BOTH = pytest.mark.parametrize(
    ("family", "config"),
    [(qwen2_5_vl.Qwen25Vl, CONFIG_2_5), (qwen3_vl.Qwen3Vl, CONFIG_3)],
    ids=["qwen2.5-vl", "qwen3-vl"],
)


@BOTH
def test_frames_come_in_pairs(family: AnyFamily, config: dict[str, Any]) -> None:
    for frames in (1, 7, 0, -2, 1026):
        with pytest.raises(HimapError, match="an even number from 2 to 1024") as caught:
            family.parse(config).vision(ImageOptions(frames=frames))
        assert caught.value.code == Exit.USAGE


@BOTH
@pytest.mark.parametrize("per_second", [None, 2])
def test_time_is_told_as_the_model_is(family: AnyFamily, config: dict[str, Any], per_second: int | None) -> None:
    """Qwen2.5-VL by positions, of which its published checkpoints have 2 a second, and transformers' default 4;
    Qwen3-VL in words."""
    if per_second is not None:
        config = {**config, "vision_config": {**config["vision_config"], "tokens_per_second": per_second}}
    film = family.parse(config).vision(ImageOptions(frames=8)).film
    if family is qwen3_vl.Qwen3Vl:
        assert film == Film(8, 4, "rounded", 2.0)
    else:
        assert film == Film(8, 4, "arange", 2.0, rope_per_second=per_second or 4)
    assert family.parse(config).vision(ImageOptions()).film is None


def test_words_around_a_films_tokens_are_hugging_faces() -> None:
    """Qwen3-VL's processor writes a step's time in front of it; Qwen2.5-VL's writes nothing."""
    family = qwen3_vl.Qwen3Vl.parse(CONFIG_3)
    spec = family.vision(ImageOptions((64, 96), frames=8))
    about = VideoMetadata(100, fps=23.976, frames_indices=[0, 14, 28, 42, 57, 71, 85, 99])
    processor = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2), video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
        _calculate_timestamps=lambda *given: Qwen3VLProcessor._calculate_timestamps(None, *given),
    )  # fmt: skip
    told = {"video_grid_thw": torch.tensor([[4, 4, 6]]), "video_metadata": [about]}
    seconds = tuple(index / about.fps for index in about.frames_indices)
    frames = Frames((), seconds, duration=100 / about.fps, fps=about.fps, total=100)
    found = family.expansion(spec).write("<|video_pad|>", frames.step_seconds(4), frames.duration)
    assert found == Qwen3VLProcessor.replace_video_token(processor, told, 0)
    assert found.startswith("<0.3 seconds><|vision_start|><|video_pad|>") and family.expansion(spec).tokens == 24
    older = qwen2_5_vl.Qwen25Vl.parse(CONFIG_2_5)
    assert older.expansion(older.vision(ImageOptions((56, 84), frames=4))).write("*", (0.0, 1.0), 2.0) == "*" * 12


@pytest.mark.slow
@BOTH
def test_tensorrt_rtx_builds_films(family: AnyFamily, config: dict[str, Any]) -> None:
    """Steps of time are a batch: as many fused attentions as a picture has."""
    width = 80 if family is qwen2_5_vl.Qwen25Vl else 72
    tower = {**config["vision_config"], "hidden_size": 2 * width, "depth": 2, "num_heads": 2}
    tower |= {"fullatt_block_indexes": [1], "deepstack_visual_indexes": [0]}
    known = family.parse({**config, "vision_config": tower})
    spec = known.vision(ImageOptions((252, 168) if width == 80 else (96, 224), frames=8))
    graph = vision_graph("vision", known, spec, hidden=48, dtype="fp16", names=WeightRef)
    assert [node.op_type for node in graph.model.graph].count("Attention") == (5 if width == 80 else 2)
    expect_rtx_build(graph)
