"""Engines of TensorRT-RTX over quantised weights at real size: seconds, memory, bytes, and the kernels that multiply.

Needs no GPU and no checkpoint: the weights of a decode graph, of all layers or of some, are drawn at random. Memory is
the most that the build held at once: anonymous, and with the pages of mapped files, which the system may drop.
"""

import argparse
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from msgspec.structs import replace
from prefill import work_folder
from real_size import peak_memory

from himap_export.engines.backends import build_all
from himap_export.engines.bundle import Bundle
from himap_export.engines.image import clip_preprocessing
from himap_export.engines.layout import ImageTokens
from himap_export.engines.manifest import (
    GraphRecord,
    ImageSpec,
    Manifest,
    ModelRecord,
    QuantisedWeight,
    Quantization,
    Variant,
)  # fmt: skip
from himap_export.engines.prompt import Expansion, Segment
from himap_export.engines.weight_file import as_held, read_header, write_safetensors
from himap_export.exporter.bind import bind
from himap_export.exporter.planning import Planned, Request, plan_export
from himap_export.exporter.registry import resolve
from himap_export.graphs.build import StageGraph
from himap_export.graphs.ports import Kind, WeightRef, WeightSpec
from himap_export.graphs.stages import StagedModel

KINDS: tuple[Kind, ...] = ("int4", "int8", "fp8", "nvfp4")
PIECE = 1 << 25  # numbers that are drawn at once
# Of floats: their words, the bits of 1, those of the mantissa.
WORDS: Mapping[str, tuple[type[np.unsignedinteger[Any]], int, int]] = {
    "fp16": (np.uint16, 0x3C00, 0x3FF), "bf16": (np.uint16, 0x3F80, 0x7F), "fp32": (np.uint32, 0x3F800000, 0x7FFFFF),
}  # fmt: skip


@dataclass(frozen=True)
class Built:
    """A decode engine. Sizes in bytes: `weights` that it holds, the `engine`, and memory. `products`: the kernels that
    multiply the `linears` quantised layers."""

    alias: str
    kind: Kind
    block: int
    layers: int
    linears: int
    products: tuple[str, ...]
    targets: tuple[int, ...]
    seconds: float
    weights: int
    engine: int
    anonymous: int
    resident: int


def drawn(spec: WeightSpec, rng: np.random.Generator) -> Iterator[npt.NDArray[Any]]:
    """A weight's numbers, in pieces: floats between 1 and 2, any others in 8 and 4 bits, but NaN. No two weights are
    alike, or a compiler would store them once."""
    left = prod(as_held(spec)[1])
    while left:
        count = min(left, PIECE)
        if spec.dtype in WORDS:
            kind, one, mantissa = WORDS[spec.dtype]
            yield rng.integers(0, mantissa, count, kind, endpoint=True) | kind(one)
        else:
            yield np.frombuffer(rng.bytes(count), np.uint8) & np.uint8(0x77 if spec.dtype == "fp8" else 0xFF)
        left -= count


def decode_bundle(planned: Planned, layers: int | None, folder: Path) -> Bundle:
    """A work folder as an export leaves it before it compiles, of nothing but decode."""
    v, spec = planned.variants[0], replace(planned.decoder, layers=layers or planned.decoder.layers)
    v.plan.check(spec.layers)
    names = {role: WeightRef(role, form=form) for role, form in planned.forms.items()}
    model = StagedModel(spec, v.plan, v.budget, planned.dtype, names=lambda role: names.get(role, WeightRef(role)))
    graph, rng, file = model.decode(), np.random.default_rng(0), folder / "weights/decode.safetensors"
    file.parent.mkdir(parents=True)
    held = {name: as_held(weight) for name, weight in graph.weights.items()}
    write_safetensors(file, held, (piece for weight in graph.weights.values() for piece in drawn(weight, rng)))
    ir.save(bind(graph, read_header(file), lambda stored: f"weights/{stored.file.name}"), folder / "decode.onnx")
    return Bundle(folder, _manifest(planned, graph))


def _manifest(planned: Planned, graph: StageGraph) -> Manifest:
    v = planned.variants[0]
    errors = {role: QuantisedWeight(form.kind, form.block, error=1.0) for role, form in planned.forms.items()}
    tokens, how = v.vision.tokens, clip_preprocessing(v.vision.size[0])
    image = ImageSpec(v.vision.size, 1, tokens, v.vision.grid, how, Expansion((Segment("", tokens),)))
    return Manifest(
        model=ModelRecord(planned.model.name, "random", "llava", ImageTokens(1), (2,), 0), decoder=planned.decoder,
        variants=(Variant(v.plan_name, v.plan, v.budget, v.image, {"decode": "decode"}),), dtype=planned.dtype,
        graphs={"decode": GraphRecord("decode.onnx", *graph.ports, graph.weights)}, engines={}, weight_form="embedded",
        weights=("weights/decode.safetensors",), quantization=Quantization("random", errors),
        images={v.image: image}, prompt=None, tokenizer=None, toolchain={}, command=(),
    )  # fmt: skip


def build(alias: str, kind: Kind, block: int | None, layers: int | None, folder: Path) -> Built:
    # Planning asks for a calibration set where one is needed, and does not read it.
    asked = Request(quantize=kind, block=block, backends=("tensorrt-rtx",), calibrate=Path("none"))
    planned = plan_export(resolve(alias, weights=False), asked)
    bundle = decode_bundle(planned, layers, folder)
    with peak_memory(os.getpid()) as memory:
        record = build_all("tensorrt-rtx", bundle, ["decode"], "ops")["decode"]
        peak = memory()
    weights = bundle.manifest.graphs["decode"].weights
    linears = sum(name.endswith(".scale") and spec.constant for name, spec in weights.items())
    return Built(
        alias, kind, next(iter(planned.forms.values())).block, layers or planned.decoder.layers, linears,
        tuple(k for k in record.kernels if re.search(r"\(DequantizeLinear, Gemm", k) and "Conc" not in k),
        record.targets, record.seconds, (folder / "weights/decode.safetensors").stat().st_size,
        (folder / record.file).stat().st_size, *peak,
    )  # fmt: skip


def told(b: Built) -> str:
    gb = {name: f"{getattr(b, name) / 1e9:.2f} GB" for name in ("weights", "engine", "anonymous", "resident")}
    memory_ = f"memory {gb['anonymous']} anonymous, {gb['resident']} with mapped pages"
    block = f"/{b.block}" if b.block else ""
    return (
        f"{b.alias} {b.kind}{block}, {b.layers} layers, SM {', '.join(map(str, b.targets))}: {b.seconds:.0f} s, "
        f"weights {gb['weights']}, engine {gb['engine']}, {memory_}\n"
        f"  {b.linears} linear layers in {', '.join(b.products)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("llava-7b", "llava-13b"), default="llava-7b")
    parser.add_argument("--quantize", choices=KINDS, action="append", help="repeatable (default: all)")
    parser.add_argument("--block", type=int, help="inputs that share a scale, for int4 (default: 32)")
    parser.add_argument("--layers", type=int, help="of the decoder's (default: all)")
    args = parser.parse_args()
    rows = []
    for kind in args.quantize or KINDS:
        with work_folder(None) as folder:
            rows.append(build(args.model, kind, args.block if kind == "int4" else None, args.layers, folder / "work"))
        print(told(rows[-1]), flush=True)
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
