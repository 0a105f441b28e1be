"""Graphs of a part: inputs and outputs under any name, where a bundle's graphs have ports with roles."""

from collections.abc import Sequence

import onnx_ir as ir

from himap_export.graphs.build import Frame
from himap_export.graphs.scoring import ScoringContext
from himap_export.graphs.spec import DecoderSpec

SEEN = ("query", "key", "value", "raw_query", "raw_key", "hidden", "layer_input")  # the floats of a ScoringContext


def give(f: Frame, name: str, shape: tuple[int, ...], dtype: ir.DataType | None = None) -> ir.Value:
    """An input of the graph, of the frame's dtype if none is named."""
    return f.builder.input(name, dtype or f.dtype, shape)


def give_integers(f: Frame, name: str, *shape: int) -> ir.Value:
    return give(f, name, shape, ir.DataType.INT64)


def take(f: Frame, name: str, value: ir.Value, shape: tuple[int, ...], dtype: ir.DataType | None = None) -> None:
    """Declares `value` as an output of the graph."""
    value.shape, value.type = ir.Shape(shape), ir.TensorType(dtype or f.dtype)
    f.builder.add_output(value, name)


def scoring_context(
    f: Frame,
    spec: DecoderSpec,
    shape: tuple[int, int],
    reads: Sequence[str] = SEEN,
    *,
    layer: int,
    visual: int,
    keep: int,
    seeded: bool = False,
    coefficients: Sequence[float] = (),
) -> ScoringContext:
    """What criteria look at of `shape` [B,S] tokens, each field an input of the graph under its own name.

    Fields that are not in `reads` are there in name only: a graph that used one would not load. `layer_input` is
    [B*S,D], as graphs have it. The final norm changes nothing.
    """
    batch, tokens = shape
    heads = {"query": spec.heads, "key": spec.kv_heads}
    by_head = {name: (batch, n, tokens, spec.head_dim) for name, n in heads.items()}
    shapes = by_head | {f"raw_{name}": by_head[name] for name in by_head} | {"value": by_head["key"]}
    shapes |= {"hidden": (batch, tokens, spec.hidden), "layer_input": (batch * tokens, spec.hidden)}
    values = {name: give(f, name, shapes[name]) if name in reads else ir.Value(name=f"no {name}") for name in SEEN}
    return ScoringContext(
        f.op, spec, **values, token_type=give_integers(f, "token_type", *shape),
        position=give_integers(f, "position", *shape), seed=give_integers(f, "seed", batch, 1) if seeded else None,
        layer=layer, visual=visual, keep=keep, text=tokens - visual,
        final_norm=lambda x: x, coefficients=coefficients,
    )  # fmt: skip
