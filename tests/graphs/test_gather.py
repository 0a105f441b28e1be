"""`himap::TopKGather` as a model of one node, in onnxruntime, against its meaning written in NumPy."""

from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from frames import give, give_integers, take
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from himap_export.graphs.build import IR_DTYPE, Frame
from himap_export.graphs.gather import top_k_gather
from himap_export.graphs.spec import Dtype

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
HIDDEN = 3
INF, NAN = float("inf"), float("nan")


@cache
def session(batch: int, tokens: int, keep: int, dtype: Dtype) -> onnxruntime.InferenceSession:
    f = Frame("gather", dtype)
    x = give(f, "x", (batch, tokens, HIDDEN))
    score = give(f, "score", (batch, tokens), ir.DataType.FLOAT)
    position, token_type = (give_integers(f, name, batch, tokens) for name in ("position", "token_type"))
    outputs = top_k_gather(f.op, x, score, position, token_type, keep)
    take(f, "y", outputs[0], (batch, keep, HIDDEN))
    for name, value in (("kept", outputs[1]), ("kept_type", outputs[2])):
        take(f, name, value, (batch, keep), ir.DataType.INT64)
    graph = f.finish()
    assert [(node.domain, node.op_type) for node in graph.model.graph] == [("himap", "TopKGather")]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(ir.to_proto(graph.model).SerializeToString(), options)


def top_k(scores: Floats, keep: int) -> list[int]:
    """Indices of the `keep` best, ascending: of equals the lowest index first; NaN counts as -inf, the worst."""

    def rank(index: int) -> tuple[float, int]:
        return (INF if np.isnan(scores[index]) else -float(scores[index]), index)

    return sorted(sorted(range(len(scores)), key=rank)[:keep])


def check(scores: Floats, keep: int, dtype: Dtype = "fp32") -> None:
    """x, position and token_type are all different, so that any row taken from elsewhere shows."""
    batch, tokens = scores.shape
    x = np.arange(batch * tokens * HIDDEN).reshape(batch, tokens, HIDDEN).astype(IR_DTYPE[dtype].numpy())
    position = 7 + 2 * np.arange(batch * tokens).reshape(batch, tokens)
    token_type = -position
    feeds = {"x": x, "score": scores, "position": position, "token_type": token_type}
    y, kept, kept_type = session(batch, tokens, keep, dtype).run(None, feeds)
    chosen = np.array([top_k(row, keep) for row in scores])
    np.testing.assert_array_equal(kept, np.take_along_axis(position, chosen, 1))
    np.testing.assert_array_equal(kept_type, np.take_along_axis(token_type, chosen, 1))
    np.testing.assert_array_equal(y, np.take_along_axis(x, chosen[:, :, None], 1))
    assert y.dtype == x.dtype and (np.diff(kept, axis=1) > 0).all()


# Few distinct values, so that ties at the cut are the rule; some differ in the last bit only, or not at all (-0.0).
VALUES = (0.0, -0.0, 1.0, float(np.nextafter(np.float32(1), np.float32(2))), -1.0, 1e-45, 3e38, INF, -INF, NAN)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Floats, int]:
    batch, tokens = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 5, 8, 13]))
    values = st.sampled_from(VALUES) if draw(st.booleans()) else st.floats(width=32)
    row = st.lists(values, min_size=tokens, max_size=tokens)
    scores = draw(st.lists(row, min_size=batch, max_size=batch))
    return np.array(scores, np.float32), draw(st.integers(1, tokens))


@given(cuts(), st.sampled_from(["fp16", "fp32"]))
@example((np.zeros((2, 13), np.float32), 5), "fp32")  # all equal
@example((np.full((1, 8), INF, np.float32), 3), "fp16")
@example((np.full((1, 8), NAN, np.float32), 3), "fp32")
@example((np.array([[NAN, -INF, NAN, -INF, 1]], np.float32), 3), "fp32")
@example((np.array([[-0.0, 0.0, -0.0, 0.0]], np.float32), 2), "fp32")  # equal, whatever their sign
@settings(max_examples=300)
def test_keeps_what_the_numpy_oracle_keeps(cut: tuple[Floats, int], dtype: Dtype) -> None:
    check(*cut, dtype)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("keep", [1, 376, 750, 751])
def test_a_stage_of_real_size(keep: int, dtype: Dtype) -> None:
    """751 tokens, odd, of which 175 must stay; scores rounded so that the cut falls among equals."""
    random = np.random.default_rng(keep)
    scores = random.random((2, 751), np.float32).round(2)
    scores[:, :35] = scores[:, -140:] = INF
    ranked = np.sort(scores)[:, ::-1]
    if keep < 751:
        assert (ranked[:, keep - 1] == ranked[:, keep]).all()
    check(scores, keep, dtype)


def test_the_oracle_itself() -> None:
    """The rules, spelled out: what the other tests compare with."""
    assert top_k(np.array([1, 3, 2, 3], np.float32), 2) == [1, 3]
    assert top_k(np.array([1, 1, 1], np.float32), 2) == [0, 1]
    assert top_k(np.array([NAN, -1e38, 0], np.float32), 2) == [1, 2]
    assert top_k(np.array([NAN, -INF, 0], np.float32), 2) == [0, 2]
    assert top_k(np.array([0.0, -0.0], np.float32), 1) == top_k(np.array([-0.0, 0.0], np.float32), 1) == [0]


def test_the_node_says_what_a_plugin_needs() -> None:
    """TensorRT finds the plugin by these; without `plugin_namespace` it would always inline the function."""
    f = Frame("gather", "fp16")
    x, score = give(f, "x", (1, 8, HIDDEN)), give(f, "score", (1, 8), ir.DataType.FLOAT)
    top_k_gather(f.op, x, score, give_integers(f, "position", 1, 8), give_integers(f, "token_type", 1, 8), 4)
    (node,) = f.graph
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {
        "keep": 4,
        "plugin_namespace": "himap",
        "plugin_version": "1",
    }
