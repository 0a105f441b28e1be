"""What image tokens receive from one another, in blocks of rows, against NumPy's sum over the whole attention."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from himap_export.graphs import spec as specs
from himap_export.graphs.build import Frame
from himap_export.graphs.flops import scoring_flops
from himap_export.graphs.importance import importance
from himap_export.graphs.plan import Cut, PruningPlan, TokenBudget
from himap_export.graphs.ports import Place
from himap_export.graphs.scoring import ScoringContext
from himap_export.graphs.spec import IMAGE, INSTRUCTION, PADDING, SYSTEM, DecoderSpec, image_blocks

SPEC = DecoderSpec(layers=4, hidden=32, ffn=48, heads=4, kv_heads=2, head_dim=8, vocab=64)
VISUAL, TEXT = 30, 9


def graph(batch: int) -> bytes:
    """From query, key, token_type and position_ids to the score, as a stage builds it."""
    f, tokens = Frame("score", "fp32"), VISUAL + TEXT
    query = f.input(Place("key", 0), (batch, SPEC.heads, tokens, SPEC.head_dim))
    key = f.input(Place("key", 1), (batch, SPEC.kv_heads, tokens, SPEC.head_dim))
    types, places = (f.integers(Place(role), batch, tokens) for role in ("token_type", "position_ids"))
    context = ScoringContext(
        f.op, SPEC, query=query, key=key, value=key, raw_query=query, raw_key=key, hidden=key, layer_input=key,
        token_type=types, position=places, seed=None, layer=3, visual=VISUAL, keep=7, text=TEXT,
        final_norm=lambda x: x,
    )  # fmt: skip
    f.output(Place("score", cut=1), importance("image", context), (batch, tokens), "fp32")
    return ir.to_proto(f.finish().model).SerializeToString()  # type: ignore[no-any-return]


def numpy_score(
    query: NDArray[np.float64], key: NDArray[np.float64], types: NDArray[np.int64], places: NDArray[np.int64]
) -> NDArray[np.float64]:
    """[S] of one sample, row by row."""
    found = np.full(len(types), np.inf)
    found[types == IMAGE] = 0
    for row in np.flatnonzero(types == IMAGE):
        for head in range(SPEC.heads):
            logits = key[head // (SPEC.heads // SPEC.kv_heads)] @ query[head, row] / SPEC.head_dim**0.5
            seen = np.where(places <= places[row], np.exp(logits), 0)
            found[types == IMAGE] += (seen / seen.sum() / SPEC.heads)[types == IMAGE]
    return found


@pytest.mark.parametrize("rows", [4, 7, 30, 256])
def test_blocks_add_up_to_the_whole_attention(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts whose text stands before, between or behind the image tokens, as after a cut, one of them padded."""
    monkeypatch.setattr(specs, "ROWS", rows)
    assert (len(image_blocks(VISUAL, TEXT)) == 1) == (rows >= VISUAL)
    random = np.random.default_rng(rows)
    scattered = np.full(VISUAL + TEXT, SYSTEM)
    scattered[np.sort(random.choice(VISUAL + TEXT, VISUAL, replace=False))] = IMAGE
    types = np.array([
        [SYSTEM] * TEXT + [IMAGE] * VISUAL,
        scattered,
        [SYSTEM] * 2 + [IMAGE] * VISUAL + [INSTRUCTION] * 4 + [PADDING] * 3,
        [IMAGE] * VISUAL + [INSTRUCTION] * TEXT,
    ])  # fmt: skip
    places = np.sort(np.stack([random.choice(500, VISUAL + TEXT, replace=False) for _ in types]), axis=1)
    query = 2 * random.standard_normal((4, SPEC.heads, VISUAL + TEXT, SPEC.head_dim)).astype(np.float32)
    key = random.standard_normal((4, SPEC.kv_heads, VISUAL + TEXT, SPEC.head_dim)).astype(np.float32)
    session = onnxruntime.InferenceSession(graph(batch=4))
    names = Place("key", 0).name(), Place("key", 1).name()
    feeds = dict(zip(names, (query, key), strict=True)) | {"token_type": types, "position_ids": places}
    (found,) = session.run(None, feeds)
    expected = [
        numpy_score(q, k, t, p)
        for q, k, t, p in zip(query.astype(float), key.astype(float), types, places, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_blocks_halve_what_ranking_costs() -> None:
    """Of 4 pictures of LLaVA at the second cut."""
    spec = DecoderSpec(32, 4096, 11008, 32, 32, 128, 32064)
    blocks = image_blocks(1152, 192)
    assert [stop for _, stop, _ in blocks] == [start for start, _, _ in blocks[1:]] + [1152]
    (cost,) = scoring_flops(spec, PruningPlan((Cut(8, "image", 0.75),)), TokenBudget((1152, 288), 192, 1))
    assert 0.5 < cost / (2 * 1152 * (1152 + 192) * 4096) < 0.7
