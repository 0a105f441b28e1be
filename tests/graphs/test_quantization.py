"""Linear layers over integers: the graphs, as onnx's reference runs them, against NumPy statements of the formats."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from himap_export.graphs.build import IR_DTYPE, Frame
from himap_export.graphs.ports import Kind, LinearForm, WeightRef
from himap_export.graphs.quantization import linear, linear_shapes, parts
from himap_export.graphs.spec import DecoderSpec

ROWS, WIDE, OUT = 3, 64, 6


def frame(form: LinearForm) -> ReferenceEvaluator:
    f = Frame("linear", "fp32")
    x = f.builder.input("x", ir.DataType.FLOAT, (ROWS, WIDE))
    f.builder.add_output(linear(f, x, WeightRef("w", form=form), OUT), "y")
    return ReferenceEvaluator(ir.to_proto(f.finish().model))


def integers(form: LinearForm, rng: np.random.Generator) -> NDArray[Any]:
    high = 7 if form.kind == "int4" else 127
    kind = IR_DTYPE["int4" if form.kind == "int4" else "int8"].numpy()
    return rng.integers(-high, high + 1, (WIDE, OUT)).astype(kind)


@pytest.mark.parametrize(("kind", "block"), [("int8", 0), ("int8", 32), ("int4", 32), ("int4", 64)])
def test_weights_are_integers_times_the_scale_of_their_block(kind: Kind, block: int) -> None:
    form, rng = LinearForm(kind, block), np.random.default_rng(0)
    q, x = integers(form, rng), rng.standard_normal((ROWS, WIDE), dtype=np.float32)
    scale = rng.random((WIDE // block, OUT) if block else (OUT,), dtype=np.float32) + 0.1
    (found,) = frame(form).run(None, {"x": x, f"w.{kind}": q, "w.scale": scale})
    weight = q.astype(np.float32) * (np.repeat(scale, block, axis=0) if block else scale)
    np.testing.assert_allclose(found, x @ weight, rtol=1e-4, atol=1e-4)


def test_dynamic_ones_meet_activations_rounded_to_8_bits_by_their_own_range() -> None:
    form, rng = LinearForm("int8-dynamic"), np.random.default_rng(1)
    q, x = integers(form, rng), rng.standard_normal((ROWS, WIDE), dtype=np.float32)
    scale = rng.random(OUT, dtype=np.float32)
    (found,) = frame(form).run(None, {"x": x, "w.int8": q, "w.scale": scale})
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = np.float32((high - low) / 255)
    zero = np.rint(-low / step)
    rounded = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    np.testing.assert_allclose(found, rounded @ (q * scale), rtol=1e-3, atol=1e-2)
    assert np.abs(found - x @ (q * scale)).max() > 0.01  # it does round


def test_parts_have_the_shapes_of_what_is_stored() -> None:
    found = {part.suffix: (part.dtype, part.shape) for part in parts(LinearForm("int4", 32), (OUT, WIDE), "bf16")}
    assert found == {"int4": ("int4", (WIDE, OUT)), "scale": ("bf16", (2, OUT))}
    assert parts(LinearForm("int8"), (OUT, WIDE), "fp16")[1].shape == (OUT,)


def test_every_linear_layer_of_a_decoder_is_listed() -> None:
    spec = DecoderSpec(layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=100)
    shapes = linear_shapes(spec)
    assert len(shapes) == 7 * 2 + 1
    assert shapes["layers.1.self_attn.k_proj.weight"] == (32, 64)
    assert shapes["layers.0.mlp.down_proj.weight"] == (64, 96)
    assert shapes["lm_head.weight"] == (100, 64)
