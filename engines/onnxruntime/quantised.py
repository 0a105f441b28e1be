"""Products with quantised weights as MatMulNBits, the operator that onnxruntime's kernels for them belong to.

onnxruntime makes it of our DequantizeLinear and Gemm by itself, whenever a session is opened: on copies of the weights,
turned round in memory and then packed for the CPU. So an engine holds the operator already, over weights that lie
turned in a file that is mapped, and what a session packs is all that fills memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.bundle import Bundle
from himap_export.engines.extras import required
from himap_export.engines.manifest import QuantisedWeight
from himap_export.engines.weight_file import StoredTensor, map_tensors, read_header, turn_int4, write_safetensors
from himap_export.graphs.errors import HimapError

TURNED = "onnxruntime.safetensors"  # in a bundle
_BITS = {"int8": 8, "int4": 4}  # what MatMulNBits computes with; int8-dynamic has operators of its own
_ZERO = {8: np.uint8(0x80), 4: np.uint8(0x88)}  # what makes signed integers unsigned ones, by xor
_BLOCK = 32  # inputs that share a copy of a scale that all inputs share, as in onnxruntime's own fusion


@dataclass(frozen=True)
class _Layout:
    """How MatMulNBits holds a weight [out,in]: integers [out,blocks,bytes of one] and scales [out,blocks], the last
    block padded with zeros."""

    out: int
    inputs: int
    bits: int
    block: int

    @classmethod
    def of(cls, form: QuantisedWeight, q: StoredTensor) -> "_Layout":
        """Returns the layout of a weight whose integers are stored as `q`: [in,out], two int4 of a row in a byte."""
        bits = _BITS[form.kind]
        return cls(q.shape[1] * 8 // bits, q.shape[0], bits, form.block or _BLOCK)

    @property
    def blocks(self) -> int:
        return ceil(self.inputs / self.block)

    @property
    def integers(self) -> tuple[int, int, int]:
        return self.out, self.blocks, self.block * self.bits // 8


def fused(bundle: Bundle) -> dict[str, QuantisedWeight]:
    """Returns the quantised weights that MatMulNBits computes with, by name."""
    return {name: form for name, form in bundle.manifest.quantised().items() if form.kind in _BITS}


def write_turned(bundle: Bundle, file: Path) -> None:
    """Writes the weights of `fused` with outputs as rows, in the layout of MatMulNBits, a tensor at a time."""
    stored, held = bundle.tensors, dict[str, tuple[str, tuple[int, ...]]]()
    weights = list[tuple[StoredTensor, StoredTensor, _Layout]]()
    for name, form in fused(bundle).items():
        q, scale = stored[f"{name}.{form.numbers}"], stored[f"{name}.scale"]
        layout = _Layout.of(form, q)
        weights.append((q, scale, layout))
        held[q.name] = "U8", layout.integers
        held[scale.name] = {"fp32": "F32", "fp16": "F16"}[scale.dtype], layout.integers[:2]

    def arrays() -> Iterator[npt.NDArray[Any]]:
        for q, scale, layout in weights:
            raw = np.memmap(q.file, np.uint8, "r", q.offset, q.shape)
            rows = (turn_int4(raw) if layout.bits == 4 else raw.T) ^ _ZERO[layout.bits]
            padding = layout.blocks * layout.integers[2] - rows.shape[1]
            yield np.pad(rows, ((0, 0), (0, padding)), constant_values=_ZERO[layout.bits])
            steps = np.atleast_2d(map_tensors([scale])[scale.name]).T
            yield np.broadcast_to(steps, layout.integers[:2])

    write_safetensors(file, held, arrays())


def write_engine(bundle: Bundle, source: Path, file: Path, level: int) -> None:
    """Writes the graph in `source` with MatMulNBits where it multiplies by weights in the file TURNED beside it, at an
    accuracy `level`: 0 takes activations as they are, 4 rounds them to 8 bits, 32 inputs together.

    HimapError if one of those weights is read by something else than a product.
    """
    onnx = required("onnx")
    model, turned = onnx.load(source, load_external_data=False), read_header(bundle.path(TURNED))
    weights = {f"{name}.{form.numbers}": form for name, form in fused(bundle).items()}
    g = model.graph
    nodes = list(g.node)
    dequantised = {n.output[0]: n for n in nodes if n.op_type == "DequantizeLinear" and n.input[0] in weights}
    del g.node[:]
    g.node.extend(n for n in nodes if n.output[0] not in dequantised)
    for node in g.node:
        if node.op_type == "Gemm" and node.input[1] in dequantised:
            q, scale = dequantised[node.input[1]].input
            layout = _Layout.of(weights[q], bundle.tensors[q])
            node.CopyFrom(_product(node, (q, scale), layout, level))
    if left := sorted({name for node in g.node for name in node.input} & dequantised.keys()):
        raise HimapError(f"{source.name} reads the quantised weight {left[0]} otherwise than in a product")
    parts = {name for node in dequantised.values() for name in node.input}
    for held in [held for held in g.initializer if held.name in parts]:
        held.CopyFrom(_external(turned[held.name]))
    if not any(used.domain == "com.microsoft" for used in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, file)


def _product(gemm: Any, weight: tuple[str, str], layout: _Layout, level: int) -> Any:
    """Returns what takes the place of a Gemm by a `weight` of these names: its integers and its scales."""
    bias = ["", "", gemm.input[2]] if len(gemm.input) > 2 else []
    return required("onnx").helper.make_node(
        "MatMulNBits", [gemm.input[0], *weight, *bias], gemm.output, gemm.name, domain="com.microsoft",
        K=layout.inputs, N=layout.out, bits=layout.bits, block_size=layout.block, accuracy_level=level,
    )  # fmt: skip


def _external(tensor: StoredTensor) -> Any:
    """Returns an initializer over a tensor of the turned weights."""
    kinds = required("onnx").TensorProto
    kind = {"U8": kinds.UINT8, "fp32": kinds.FLOAT, "fp16": kinds.FLOAT16}[tensor.dtype]
    made = kinds(name=tensor.name, data_type=kind, dims=tensor.shape, data_location=kinds.EXTERNAL)
    for key, value in {"location": TURNED, "offset": tensor.offset, "length": tensor.nbytes}.items():
        made.external_data.add(key=key, value=str(value))
    return made


def exact(engine: Path) -> bytes:
    """Returns the graph of an engine in which no activation is rounded beside quantised weights."""
    model = required("onnx").load(engine, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 0
    content: bytes = model.SerializeToString()
    return content
