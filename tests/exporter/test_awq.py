"""Activation-aware scaling, on its own: the layer stays what it was, and rounding errs less where inputs are large."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Workshop
from families import FAMILIES, hugging_face_logits
from numpy.typing import NDArray
from transformers import AutoModelForImageTextToText

from himap_export.engines.weight_file import as_numbers, as_stored
from himap_export.exporter.planning import describe
from himap_export.exporter.quantize.awq import HEAD, Activations, Folding, layer_groups, search, spread, storable
from himap_export.exporter.quantize.rounding import dequantise, quantise
from himap_export.exporter.registry import resolve
from himap_export.graphs.ports import LinearForm
from himap_export.graphs.quantization import linear_shapes
from himap_export.graphs.spec import DecoderSpec, Dtype

Floats = NDArray[np.float32]
SPEC = DecoderSpec(layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=50)


def rounding(kind: str, block: int = 0):
    form = LinearForm(kind, block)
    return lambda weight: dequantise(quantise(weight, form, "fp32"), form, "fp32")
