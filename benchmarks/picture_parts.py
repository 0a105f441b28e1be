"""What many_pictures.py measures besides prefill, each backend in its own process: the bytes of KV caches, and whether
a tower should see the pictures of a prompt one by one or all at once (the same weights and threads, in turn).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from himap_export.engines.bundle import RunSpec
from himap_export.engines.isolation import child
from himap_export.engines.pipeline import Pipeline
from himap_export.engines.weight_file import read_header
from himap_export.graphs.flops import BYTES, stage_costs

PIXELS = "pixel_values"


@dataclass(frozen=True)
class AtOnce:
    """Median seconds of `images` pictures on a backend, one by one and at once."""

    backend: str
    images: int
    one_by_one: float
    at_once: float

    def told(self) -> str:
        ratio = self.one_by_one / self.at_once
        faster = "at once" if ratio > 1.02 else "one by one" if ratio < 0.98 else "neither"
        times = f"{self.one_by_one * 1e3:.0f} ms one by one, {self.at_once * 1e3:.0f} ms at once"
        return f"vision, {self.backend}, {self.images} images: {times} ({ratio:.2f}x); faster: {faster}"


def _cache_bytes(run: RunSpec, backend: str) -> Callable[[None], int]:
    """What says how many bytes the keys and values of an open pipeline take."""
    tensors = Pipeline(run, backend).tensors.items()
    caches = [tensor for place, tensor in tensors if place.role in ("key", "value")]
    return lambda _: sum(prod(t.spec.shape) * BYTES[t.spec.dtype] for t in caches)


def caches(run: RunSpec, backend: str) -> int:
    """Bytes of KV caches, of tensors that are there. SystemExit unless they are what the budgets say."""
    with child("counting caches", {}, _cache_bytes, run, backend) as counting:
        found = counting.ask(None)
    told = sum(c.kv_bytes for c in stage_costs(run.manifest.decoder, run.plan, run.budget, run.manifest.dtype))
    if found != told:
        raise SystemExit(f"the caches take {found} bytes, the budgets say {told}")
    return found


def write_graphs(model: Path, out: Path, counts: Sequence[int]) -> None:
    """Vision graphs of `counts` pictures a run, fp32, over the checkpoint's own file of weights."""
    import onnx_ir as ir
    import torch

    from himap_export.exporter.bind import WeightNames, bind
    from himap_export.exporter.family import ImageOptions
    from himap_export.exporter.registry import resolve
    from himap_export.exporter.vision import vision_graph

    family, weights = resolve(str(model)).family, out / "weights.safetensors"
    (weights.unlink(missing_ok=True), weights.hardlink_to(model / "model.safetensors"))
    header, spec = read_header(weights), family.vision(ImageOptions())

    class Flat(torch.nn.Module):
        """Features of all pictures in one row, [1,N*V,D], under the names that the tower's weights have by itself."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.vision_tower, self.multi_modal_projector = inner.vision_tower, inner.multi_modal_projector
            self.constants, self.see = inner.constants, [inner.forward]

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.see[0](pixel_values).flatten(0, 1)[None]

    made = family.module
    family.module = lambda asked, dtype: Flat(made(asked, dtype))
    for count in counts:
        many = replace(spec, tiles=count, tokens=count * spec.tokens)
        names = WeightNames(header.keys(), family)
        graph = vision_graph(f"vision{count}", family, many, hidden=1024, dtype="fp32", names=names)
        ir.save(bind(graph, header, lambda stored: stored.file.name), out / f"vision{count}.onnx")


def _seeing(backend: str, dtype: str, folder: Path, counts: Sequence[int], threads: int) -> Callable[[int], float]:
    """What looks at as many pictures once and returns its seconds; the graphs that it knows are open."""
    runs = {count: _opened(backend, dtype, folder / f"vision{count}.onnx", threads) for count in counts}
    pixels = {count: np.random.default_rng(0).standard_normal((count, 3, 336, 336), np.float32) for count in counts}

    def seen(count: int) -> float:
        start = time.perf_counter()
        runs[count](pixels[count])
        return time.perf_counter() - start

    return seen


def _opened(backend: str, dtype: str, file: Path, threads: int) -> Callable[[Any], object]:
    if backend == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3  # weights are inputs, as in bundles
        session = onnxruntime.InferenceSession(file, options)
        return lambda pixels: session.run(None, {PIXELS: pixels})
    import openvino

    told = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": {"bf16": "bf16", "fp32": "f32"}[dtype]}
    request = openvino.Core().compile_model(file, "CPU", told).create_infer_request()
    return lambda pixels: request.infer({PIXELS: pixels})


def at_once(
    model: Path, folder: Path, backends: Sequence[tuple[str, str]], counts: Sequence[int], *, rounds: int, threads: int
) -> list[AtOnce]:
    """Returns what was found for each backend, with its dtype, and each number of pictures."""
    folder.mkdir(exist_ok=True)
    write_graphs(model, folder, (1, *counts))
    found = []
    for backend, dtype in backends:
        with child(f"seeing with {backend}", {}, _seeing, backend, dtype, folder, (1, *counts), threads) as tower:
            for count in counts:
                turns = [(sum(tower.ask(1) for _ in range(count)), tower.ask(count)) for _ in range(rounds + 1)][1:]
                each, together = (statistics.median(times) for times in zip(*turns, strict=True))
                found.append(AtOnce(backend, count, each, together))
    return found
