"""`per_image`, alone and in front of the top-k gather, in onnxruntime, against its meaning written in NumPy."""

from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from frames import give, give_integers, take
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from himap_export.graphs.build import Frame
from himap_export.graphs.gather import top_k_gather
from himap_export.graphs.quota import per_image
from himap_export.graphs.spec import IMAGE, INSTRUCTION, PADDING, SYSTEM

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
INF, NAN = float("inf"), float("nan")
COUNTS = (1, 2, 5)  # pictures of a prompt
FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


@cache
def session(batch: int, tokens: int, *, images: int, visual: int, keep: int) -> onnxruntime.InferenceSession:
    """Verdicts, and the positions that the gather then keeps."""
    f = Frame("quota", "fp32")
    score, x = give(f, "score", (batch, tokens), FLOAT), give(f, "x", (batch, tokens, 1))
    position, token_type = (give_integers(f, name, batch, tokens) for name in ("position", "token_type"))
    verdict = per_image(f.op, score, token_type, images=images, visual=visual, keep=keep)
    stay = tokens - visual + keep
    take(f, "verdict", verdict, (batch, tokens), FLOAT)
    take(f, "kept", top_k_gather(f.op, x, verdict, position, token_type, stay)[1], (batch, stay), INT64)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(ir.to_proto(f.finish().model).SerializeToString(), options)


def oracle(score: Floats, token_type: Ints, images: int, keep: int) -> Floats:
    """What one prompt [S] should be told: of each picture, whose tokens follow each other, the best in Python's stable
    order; NaN is as bad as -inf."""
    verdict = np.full(len(score), INF, np.float32)
    for picture in np.split(np.flatnonzero(token_type == IMAGE), images):
        worth = [-INF if np.isnan(score[at]) else float(score[at]) for at in picture]
        best = sorted(range(len(picture)), key=lambda n: -worth[n])[: keep // images]
        verdict[picture] = np.isin(np.arange(len(picture)), best)
    return verdict


def check(scores: Floats, types: Ints, images: int, keep: int) -> None:
    """Of `scores` and `types` [B,S]; each picture keeps as many, and every other token stays."""
    visual = int((types[0] == IMAGE).sum())
    x, position = np.zeros((*scores.shape, 1), np.float32), np.arange(types.size).reshape(types.shape)
    run = session(*scores.shape, images=images, visual=visual, keep=keep)
    verdict, kept = run.run(None, {"score": scores, "token_type": types, "x": x, "position": position})
    for row, wanted in enumerate(oracle(s, t, images, keep) for s, t in zip(scores, types, strict=True)):
        np.testing.assert_array_equal(verdict[row], wanted)
        np.testing.assert_array_equal(kept[row], position[row][wanted > 0])
        of_pictures = np.isin(position[row][types[row] == IMAGE], kept[row]).reshape(images, -1)
        assert of_pictures.sum(axis=1).tolist() == [keep // images] * images


# Few distinct values, so that ties at the cut are the rule.
VALUES = (0.0, -0.0, 1.0, float(np.nextafter(np.float32(1), np.float32(2))), -1.0, 1e-45, 3e38, INF, -INF, NAN)
OTHERS = (SYSTEM, INSTRUCTION, PADDING)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[Floats, Ints, int, int]:
    """Scores, types, images, tokens that stay; text lies anywhere, with scores as criteria leave them: of any kind."""
    images, each, text = draw(st.sampled_from(COUNTS)), draw(st.sampled_from([1, 3, 4])), draw(st.sampled_from([0, 4]))
    batch, tokens = draw(st.sampled_from([1, 2])), images * each + text
    scores = draw(st.lists(st.sampled_from(VALUES), min_size=batch * tokens, max_size=batch * tokens))
    types = [
        draw(st.permutations([IMAGE] * images * each + [draw(st.sampled_from(OTHERS)) for _ in range(text)]))
        for _ in range(batch)
    ]
    return (
        np.array(scores, np.float32).reshape(batch, tokens),
        np.array(types),
        images,
        images * draw(st.integers(0, each)),
    )


def pictures(images: int, each: int, between: int) -> Ints:
    """Types [1,S] of pictures with text in front, between and behind, and padding at the end."""
    words = [SYSTEM] * between
    return np.array([[*[t for _ in range(images) for t in (*words, *[IMAGE] * each)], INSTRUCTION, PADDING]])


@given(prompts())
@example((np.zeros((1, 22), np.float32), pictures(5, 4, 0), 5, 10))  # all equal: the first two of each
@example((np.full((1, 22), NAN, np.float32), pictures(5, 4, 0), 5, 5))
@example((np.array([[NAN, -INF, NAN, 5, 5, 1, 5, 1, INF, INF]], np.float32), pictures(2, 4, 0), 2, 4))
@example((np.array([[-INF, NAN, -INF, -INF, INF, NAN]], np.float32), pictures(2, 2, 0), 2, 2))
@settings(max_examples=150)
def test_keeps_of_each_picture_what_the_numpy_oracle_keeps(prompt: tuple[Floats, Ints, int, int]) -> None:
    check(*prompt)


@pytest.mark.parametrize("images", COUNTS)
@pytest.mark.parametrize("each", [0, 1, 64, 575, 576])
def test_pictures_of_real_size(images: int, each: int) -> None:
    """One picture's tokens all score higher than another's: ranked together, nothing would stay of it. Scores are
    rounded, so that cuts fall among equals."""
    types = np.repeat(pictures(images, 576, 3), 2, axis=0)
    scores = np.random.default_rng(images).random(types.shape, np.float32).round(2)
    scores[types == IMAGE] += np.tile(np.repeat(np.arange(images, dtype=np.float32), 576), 2)
    scores[types != IMAGE] = INF
    check(scores, types, images, images * each)


def test_the_oracle_itself() -> None:
    """The rules, spelled out: what the other tests compare with."""
    types = np.array([SYSTEM, IMAGE, IMAGE, IMAGE, INSTRUCTION, IMAGE, IMAGE, IMAGE, PADDING])
    score = np.array([0, 7, 9, 9, 0, NAN, 1, 1, NAN], np.float32)
    assert oracle(score, types, 2, 2).tolist() == [INF, 0, 1, 0, INF, 0, 1, 0, INF]
    assert oracle(score, types, 2, 4).tolist() == [INF, 0, 1, 1, INF, 0, 1, 1, INF]
    assert oracle(score, types, 1, 2).tolist() == [INF, 0, 1, 1, INF, 0, 0, 0, INF]
