"""Tiny Qwen2.5-VL and Qwen3-VL, random in every parameter, and their static towers in onnxruntime."""

from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from rtx_builds import serialized
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from himap_export.exporter.families import qwen2_5_vl, qwen3_vl
from himap_export.graphs.build import StageGraph

TEXT: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
TEXT |= {"num_key_value_heads": 1, "vocab_size": 64, "rope_theta": 5e5, "max_position_embeddings": 512}
ROPE_2_5 = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
ROPE_3 = {"rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]}}
TOWER = {"depth": 4, "hidden_size": 48, "intermediate_size": 52, "num_heads": 2, "out_hidden_size": 48}
# As published: the text model's fields at the top, the vision config under the outer model's type.
CONFIG_2_5: dict[str, Any] = {
    **TEXT,
    **ROPE_2_5,
    "model_type": "qwen2_5_vl",
    "use_sliding_window": False,
    "sliding_window": 32768,
    "max_window_layers": 0,
    "vision_config": {**TOWER, "model_type": "qwen2_5_vl", "in_chans": 3, "fullatt_block_indexes": [1, 3]},
}
CONFIG_3: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "text_config": {**TEXT, **ROPE_3, "head_dim": 16},
    "vision_config": {**TOWER, "num_position_embeddings": 49, "deepstack_visual_indexes": [0, 2]},
}


def randomised(model: Any) -> Any:
    """Hugging Face's initialisation leaves biases and positions near zero: mistakes in them would not show."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 16
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan**0.5 + (parameter.data == 1)
    return model.eval()


def features(graph: StageGraph, model: Any, pixels: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """The graph's outputs in onnxruntime, its weights the tensors of the same names in `model`."""
    weights = {name: value.numpy() for name, value in model.model.state_dict().items()}
    assert {name: weights[name].shape for name in graph.weights} == {
        name: spec.shape for name, spec in graph.weights.items()
    }
    session = onnxruntime.InferenceSession(serialized(graph), providers=["CPUExecutionProvider"])
    found: list[NDArray[np.float32]] = session.run(
        None, {"pixel_values": pixels, **{name: weights[name] for name in graph.weights}}
    )
    return found


@cache
def qwen2_5_model() -> Any:
    torch.manual_seed(0)
    return randomised(Qwen2_5_VLForConditionalGeneration(qwen2_5_vl.Qwen25Vl.parse(CONFIG_2_5).full))


@cache
def qwen3_model() -> Any:
    torch.manual_seed(0)
    return randomised(Qwen3VLForConditionalGeneration(qwen3_vl.Qwen3Vl.parse(CONFIG_3).full))
