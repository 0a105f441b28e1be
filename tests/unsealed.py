"""Work folders as the exporter leaves them before it compiles, of a tiny decoder that every backend can build."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from safetensors.numpy import save_file

from himap_export.engines.bundle import Bundle
from himap_export.engines.image import clip_preprocessing
from himap_export.engines.layout import ImageTokens
from himap_export.engines.manifest import (
    GraphRecord,
    ImageSpec,
    Manifest,
    ModelRecord,
    Variant,
    WeightForm,
)
from himap_export.engines.prompt import Expansion, Segment
from himap_export.engines.weight_file import read_header
from himap_export.exporter.bind import bind
from himap_export.exporter.families import llava
from himap_export.exporter.family import ImageOptions
from himap_export.graphs.build import StageGraph
from himap_export.graphs.plan import PruningPlan, TokenBudget, himap
from himap_export.graphs.ports import WeightRef
from himap_export.graphs.spec import DecoderSpec, Dtype
from himap_export.graphs.stages import StagedModel

SPEC, V, T, NEW = DecoderSpec(4, 64, 128, 4, 2, 16, 96), 16, 24, 8
PRUNED, WHOLE = himap(1, 3, 0.5, 0.75), himap(1, 3, 0, 0)
LAYERS = {"prefix": 1, "k1": 2, "k2": 1, "decode": 4}


def staged(dtype: Dtype, plan: PruningPlan = PRUNED) -> StagedModel:
    return StagedModel(SPEC, plan, TokenBudget(plan.kept(V), T, NEW), dtype, lambda role: WeightRef(f"model.{role}"))


def vision(dtype: Dtype) -> StageGraph:
    """A CLIP tower whose heads are wide enough to fuse, and its projector."""
    from himap_export.exporter.vision import vision_graph

    tower = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "image_size": 56}
    tower |= {"num_attention_heads": 4, "num_hidden_layers": 3, "patch_size": 14, "projection_dim": 64}
    text = {"model_type": "llama", "hidden_size": SPEC.hidden, "intermediate_size": SPEC.ffn, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "vocab_size": SPEC.vocab}
    config = {"model_type": "llava", "image_token_index": 95, "text_config": text, "vision_config": tower}
    family = llava.Llava.parse(config)
    spec = family.vision(ImageOptions())
    return vision_graph("vision", family, spec, hidden=SPEC.hidden, dtype=dtype, names=WeightRef)


def store(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: Dtype) -> None:
    """Writes random weights as a safetensors file."""
    random, kind = np.random.default_rng(0), {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    save_file({name: (0.1 * random.standard_normal(shape)).astype(kind) for name, shape in shapes.items()}, file)


def unsealed(
    folder: Path,
    model: StagedModel,
    graphs: tuple[StageGraph, ...],
    form: WeightForm = "shared",
    weights: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Bundle:
    """A work folder as the exporter leaves it before it compiles, over `weights`, random ones if None."""
    (folder / "weights").mkdir(parents=True)
    if weights is None:
        store(folder / "weights/w.safetensors", {n: s.shape for g in graphs for n, s in g.weights.items()}, model.dtype)
    else:
        save_file(dict(weights), folder / "weights/w.safetensors")
    tensors, records = read_header(folder / "weights/w.safetensors"), {}
    for graph in graphs:
        ir.save(bind(graph, tensors, lambda t: f"weights/{t.file.name}"), folder / f"{graph.name}.onnx")
        records[graph.name] = GraphRecord(f"{graph.name}.onnx", *graph.ports, graph.weights)
    variant = Variant("qa", model.plan, model.budget, "56x56", {graph.name: graph.name for graph in graphs})
    images = {"56x56": ImageSpec((56, 56), 1, V, (4, 4), clip_preprocessing(56), Expansion((Segment("", V),)))}
    manifest = Manifest(
        model=ModelRecord("tiny", "tiny", "tiny", ImageTokens(95), (2,), 0), decoder=model.spec, variants=(variant,),
        dtype=model.dtype, graphs=records, engines={}, weight_form=form, weights=("weights/w.safetensors",),
        images=images, prompt=None, tokenizer=None, toolchain={}, command=(),
    )  # fmt: skip
    return Bundle(folder, manifest)
