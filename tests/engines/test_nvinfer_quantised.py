"""Engines of TensorRT-RTX over quantised weights: each linear layer one kernel that reads them as they are."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from msgspec.structs import replace
from unsealed import LAYERS, SPEC, staged, unsealed

from himap_export.engines.backends import tensorrt_rtx
from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import EngineRecord, Quantization, QuantisedWeight
from himap_export.engines.nvinfer import build as builder
from himap_export.engines.nvinfer.kernels import multiplied_out
from himap_export.engines.weight_file import as_stored
from himap_export.exporter.quantize.floats import FLOATS, quantise_floats
from himap_export.exporter.quantize.rounding import quantise
from himap_export.graphs.errors import HimapError
from himap_export.graphs.ports import LinearForm, WeightRef, WeightSpec
from himap_export.graphs.quantization import linear_shapes
from himap_export.graphs.spec import Dtype
from himap_export.graphs.stages import StagedModel

FORMS = {
    "int4": LinearForm("int4", 32),
    "int8": LinearForm("int8"),
    "fp8": LinearForm("fp8"),
    "nvfp4": LinearForm("nvfp4", 16),
}
TARGETS = {"int4": (80, 86, 89, 120, 121), "int8": (80, 86, 89, 120, 121), "fp8": (89, 120, 121), "nvfp4": (120, 121)}
NUMBERS: Mapping[Dtype, type[Any]] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
SHAPES = linear_shapes(SPEC)


def quantised(folder: Path, form: LinearForm, dtype: Dtype) -> Bundle:
    """A work folder whose linear layers, the head's among them, are all of `form`."""

    def names(role: str) -> WeightRef:
        return WeightRef(f"model.{role}", form=form if role in SHAPES else None)

    plain = staged(dtype)
    model = StagedModel(plain.spec, plain.plan, plain.budget, dtype, names)
    graphs, random = model.graphs(), np.random.default_rng(0)
    weights: dict[str, npt.NDArray[Any]] = {}
    for name, spec in {name: spec for g in graphs for name, spec in g.weights.items()}.items():
        if not spec.constant:
            weights[name] = (random.standard_normal(spec.shape, np.float32) / 10).astype(NUMBERS[dtype])
    for role, shape in SHAPES.items():
        w = random.standard_normal(shape, np.float32) / 10
        found = quantise_floats(w, form, 5.0) if form.kind in FLOATS else quantise(w, form, dtype)
        weights |= {f"model.{role}.{suffix}": part for suffix, part in found.parts.items()}
    bundle = unsealed(folder, model, graphs, "embedded", weights)
    record = QuantisedWeight(form.kind, form.block, error=0.1)
    quantization = Quantization("round to nearest", {f"model.{role}": record for role in SHAPES})
    return Bundle(folder, replace(bundle.manifest, quantization=quantization))


def count(kernels: tuple[str, ...], *words: str) -> int:
    return sum(int(k.partition("x ")[0]) for k in kernels if all(word in k for word in words))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", FORMS)
def test_every_stage_multiplies_quantised_weights_as_they_are(kind: str, dtype: Dtype, tmp_path: Path) -> None:
    bundle = quantised(tmp_path / "work", FORMS[kind], dtype)
    for name, layers in LAYERS.items():
        record = tensorrt_rtx.build(bundle, name)
        print(kind, dtype, name, *record.kernels, sep="\n   ")
        assert record.targets == TARGETS[kind]
