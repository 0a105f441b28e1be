"""Random scores are as chance has it: 2,000 requests, each of which keeps 72 of 576 image tokens at two cuts."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from frames import scoring_context, take
from numpy.typing import NDArray
from scipy import stats

from himap_export.graphs.baseline_scores import random_score
from himap_export.graphs.build import Frame
from himap_export.graphs.spec import SEEDS, DecoderSpec

REQUESTS, TOKENS, KEEP, SIDE = 2000, 576, 72, 24
Sets = NDArray[np.float32]  # [REQUESTS,TOKENS], 1 for a token that is kept
SEED = {"from 0": 0, "from within": 1_000_000, "the last": SEEDS - REQUESTS}


def drawn(layer: int, first_seed: int) -> Sets:
    """Returns whom a cut at `layer` keeps, of requests whose seeds follow one another, as a command numbers them."""
    f, shape = Frame("random", "fp32"), (REQUESTS, TOKENS)
    spec = DecoderSpec(layers=8, hidden=8, ffn=8, heads=1, kv_heads=1, head_dim=8, vocab=8)
    context = scoring_context(f, spec, shape, (), layer=layer, visual=TOKENS, keep=KEEP, seeded=True)
    take(f, "score", random_score(context), shape, ir.DataType.FLOAT)
    run = onnxruntime.InferenceSession(ir.to_proto(f.finish().model).SerializeToString())
    feeds = {
        "position": np.tile(np.arange(35, 35 + TOKENS), (REQUESTS, 1)),
        "seed": first_seed + np.arange(REQUESTS)[:, None],
        "token_type": np.zeros(shape, np.int64),
    }
    (score,) = run.run(None, {port.name: feeds[port.name] for port in run.get_inputs()})
    order, kept = np.argsort(-score, axis=1), np.zeros(shape, np.float32)
    assert (np.diff(np.take_along_axis(score, order, axis=1)) < 0).all(), "no two positions score the same"
    np.put_along_axis(kept, order[:, :KEEP], 1, axis=1)
    return kept


def as_independent(a: Sets, b: Sets) -> float:
    """Returns the p value of how many tokens sets of `a` and `b` share, row by row, where they are independent."""
    shared, law = np.rint((a * b).sum(axis=1)).astype(int), stats.hypergeom(TOKENS, KEEP, KEEP)
    edges = np.arange(law.ppf(0.01), law.ppf(0.99))  # what is rarer is counted with them
    found = np.bincount(np.searchsorted(edges, shared), minlength=len(edges) + 1)
    p: float = stats.chisquare(found, len(a) * np.diff([0, *law.cdf(edges), 1])).pvalue
    return p


@pytest.mark.parametrize("first_seed", SEED.values(), ids=SEED)
def test_random_sets_are_as_chance_has_it(first_seed: int) -> None:
    """Each token is kept equally often, and neighbours together as often as any; seeds and layers have nothing in
    common."""
    kept, deeper = drawn(2, first_seed), drawn(6, first_seed)
    share = KEEP / TOKENS
    for sets in (kept, deeper):
        spread = REQUESTS * share * (1 - share) * TOKENS / (TOKENS - 1)  # as each request keeps exactly KEEP
        assert stats.chi2.sf(((sets.sum(axis=0) - REQUESTS * share) ** 2).sum() / spread, TOKENS - 1) > 1e-3
        for distance in (1, 2, 3, SIDE - 1, SIDE, SIDE + 1):
            together = (sets[:, distance:] * sets[:, :-distance]).sum()
            expected = REQUESTS * (TOKENS - distance) * share * (KEEP - 1) / (TOKENS - 1)
            assert abs(together - expected) < 4 * np.sqrt(expected), distance
        pair = share * (KEEP - 1) / (TOKENS - 1)
        pairs = (sets.T @ sets)[np.triu_indices(TOKENS, 1)]
        assert np.abs(pairs - REQUESTS * pair).max() < 6.5 * np.sqrt(REQUESTS * pair)  # of 165,600 pairs
        for other in (np.roll(sets, lag, axis=0) for lag in (1, 2, 3, 16)):
            assert as_independent(sets, other) > 1e-3
    for other in (deeper, np.roll(deeper, 4, axis=0)):  # at the same seed, or at the same seed + layer
        assert as_independent(kept, other) > 1e-3
