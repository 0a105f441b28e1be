"""Activation-aware scaling, on its own: the layer stays what it was, and rounding errs less where inputs are large."""

import numpy as np
from numpy.typing import NDArray

from himap_export.exporter.quantize.rounding import dequantise, quantise
from himap_export.graphs.ports import LinearForm
from himap_export.graphs.spec import DecoderSpec

Floats = NDArray[np.float32]
SPEC = DecoderSpec(layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=50)


def rounding(kind: str, block: int = 0):
    form = LinearForm(kind, block)
    return lambda weight: dequantise(quantise(weight, form, "fp32"), form, "fp32")
