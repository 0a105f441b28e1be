"""Every criterion three times: as ONNX graph, in the reference, and in NumPy in fp64, from the same drawn layer."""

from functools import cache
from itertools import cycle

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from frames import scoring_context, take
from numpy.typing import NDArray
from oracle_criteria import RANKINGS, Layer, coefficients
from oracle_criteria import kept as highest

from himap_export.graphs import plan
from himap_export.graphs.build import Frame
from himap_export.graphs.gather import top_k_gather
from himap_export.graphs.importance import SCORES, importance
from himap_export.graphs.spec import IMAGE, INSTRUCTION, PADDING, SYSTEM, DecoderSpec
from himap_export.validate.reference import criteria
from himap_export.validate.reference.criteria import LayerView, State

CASES, LAYER = 200, 3
Floats, Ints = NDArray[np.floating], NDArray[np.int64]
# (batch B, image tokens V, text slots T, V' kept, query heads, key heads)
SHAPES = ((2, 16, 9, 4, 4, 4), (1, 36, 14, 20, 4, 2), (3, 64, 24, 1, 2, 1), (2, 7, 3, 0, 3, 1), (1, 12, 5, 11, 2, 2))
TIE = 1e-5  # of the largest score: fp32 may decide otherwise between two that are closer


@cache
def session(criterion: str, shape: tuple[int, ...]) -> onnxruntime.InferenceSession:
    """Score and gather, alone: what a layer computed in, scores and kept positions out."""
    b, v, t, keep, heads, groups = shape
    spec, f = DecoderSpec(4, 8, 8, heads, groups, 8, 16), Frame("selector", "fp32")
    s = scoring_context(
        f,
        spec,
        (b, v + t),
        layer=LAYER,
        visual=v,
        keep=keep,
        seeded=criterion == "random",
        coefficients=coefficients(criterion, heads),
    )
    score = importance(criterion, s)
    x = f.op.Cast(f.op.Unsqueeze(s.position, [2]), to=ir.DataType.FLOAT)
    _, kept, kept_type = top_k_gather(f.op, x, score, s.position, s.token_type, keep + t)
    take(f, "score", score, (b, v + t), ir.DataType.FLOAT)
    take(f, "kept", kept, (b, keep + t), ir.DataType.INT64)
    take(f, "kept_type", kept_type, (b, keep + t), ir.DataType.INT64)
    return onnxruntime.InferenceSession(ir.to_proto(f.finish().model).SerializeToString())


def drawn_layer(random: np.random.Generator, shape: tuple[int, ...]) -> dict[str, Floats]:
    """The floats of a ScoringContext, as a graph takes them; keys and states of different lengths."""
    b, v, t, _, heads, groups = shape
    by_head = {"query": heads, "key": groups, "value": groups, "raw_query": heads, "raw_key": groups}
    made = {name: 2.4 * random.standard_normal((b, n, v + t, 8), np.float32) for name, n in by_head.items()}
    made |= {name: random.standard_normal((b, v + t, 8), np.float32) for name in ("hidden", "layer_input")}
    return made | {"layer_input": made["layer_input"].reshape(-1, 8)}


def prompts(random: np.random.Generator, b: int, v: int, t: int) -> tuple[Ints, Ints, list[int]]:
    """token_type and original position [B,V+T], right-padded, as after an earlier cut, and each prompt's length."""
    token_type, position, lengths = np.full((b, v + t), PADDING), np.zeros((b, v + t), np.int64), []
    for row in range(b):
        text = int(random.integers(1, t + 1))
        system = int(random.integers(0, text + 1))  # all of it: no instruction at all
        inside = int(random.integers(0, system + 1))  # text between image tokens
        run = np.insert(np.full(v, IMAGE), random.integers(0, v, inside), SYSTEM)
        real = np.concatenate([np.full(system - inside, SYSTEM), run, np.full(text - system, INSTRUCTION)])
        token_type[row, : len(real)] = real
        position[row] = np.sort(random.choice(3 * (v + t), v + t, replace=False))
        lengths.append(len(real))
    return token_type, position, lengths


def attention_of(q: Floats, k: Floats) -> Floats:
    """Causal softmax [S,S] fp64, mean over heads, of q [H,S,E] and k [G,S,E]."""
    logits = q.astype(np.float64) @ np.repeat(k, len(q) // len(k), 0).astype(np.float64).swapaxes(1, 2) / np.sqrt(8)
    weights = np.exp(np.where(np.tri(q.shape[1], dtype=bool), logits, -np.inf))
    mean: Floats = (weights / weights.sum(-1, keepdims=True)).mean(0)
    return mean


def test_there_is_one_of_each() -> None:
    assert set(SCORES) == set(criteria.CRITERIA) == set(RANKINGS) == {c for cs in plan.POLICIES.values() for c in cs}


def tied(scores: Floats, found: Ints, keep: int) -> bool:
    """Whether `found` are `keep` of the tokens with `scores` [V], wrong at most among those as good as the last."""
    bar, slack = np.sort(scores)[::-1][keep - 1], TIE * np.abs(scores).max()
    left = np.setdiff1d(np.arange(len(scores)), found)
    return len(found) == keep and bool((scores[found] >= bar - slack).all() and (scores[left] <= bar + slack).all())


@pytest.mark.parametrize("criterion", SCORES)
def test_graph_reference_and_numpy_keep_the_same_tokens(criterion: str) -> None:
    """200 prompts; scores and kept sets of all three."""
    random, kept_sets, case, exact, shapes = np.random.default_rng(0), set(), 0, 0, cycle(SHAPES)
    while case < CASES:
        shape = next(shapes)
        b, v, t, keep, heads, _ = shape
        token_type, position, lengths = prompts(random, b, v, t)
        floats, seeds = drawn_layer(random, shape), random.integers(0, 2**32, b)
        feeds = floats | {"token_type": token_type, "position": position, "seed": seeds[:, None]}
        run = session(criterion, shape)
        scores, kept, kept_type = run.run(None, {i.name: feeds[i.name] for i in run.get_inputs()})
        floats["previous"] = floats.pop("layer_input").reshape(b, v + t, 8)
        for row, length in enumerate(lengths):
            case += 1
            types, place, seed = token_type[row, :length], position[row, :length], int(seeds[row])
            own = {name: x[row][..., :length, :] for name, x in floats.items()}
            exactly = {name: x.astype(np.float64) for name, x in own.items()}
            attention = attention_of(exactly["query"], exactly["key"])
            image = np.flatnonzero(types == IMAGE)
            s = Layer(
                **exactly, attention=attention, candidates=image, instruction=np.flatnonzero(types == INSTRUCTION),
                last=length - 1, position=place, cut=LAYER, keep=keep, seed=seed,
                normed=exactly["hidden"], coefficients=coefficients(criterion, heads),
            )  # fmt: skip
            wanted = RANKINGS[criterion](s)
            tensors = {name: torch.tensor(x) for name, x in own.items()}
            hidden, previous = tensors.pop("hidden")[None], tensors.pop("previous")[None]
            seen = torch.tensor(attention, dtype=torch.float32)
            view = LayerView(**tensors, attention=seen, previous=previous, normed=hidden)
            state = State(
                LAYER, hidden, torch.tensor(place), torch.tensor(place[image]), seen=view,
                coefficients=coefficients(criterion, heads),
            )  # fmt: skip
            said = criteria.CRITERIA[criterion](state, keep, seed).numpy()
            for found in (scores[row, image], said):
                np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=TIE * max(1e-3, np.abs(wanted).max()))
            expected = highest(wanted, keep)
            for stays in (highest(said, keep), np.searchsorted(place[image], kept[row][kept_type[row] == IMAGE])):
                same = stays.tolist() == expected.tolist()
                assert same or tied(wanted, stays, keep)
                exact += same
            text = place[types != IMAGE].tolist()
            assert kept[row][(kept_type[row] != IMAGE) & (kept_type[row] != PADDING)].tolist() == text
            kept_sets.add((shape, tuple(image[expected])))
    assert exact > 2 * case - 4, "ties are rare"
    assert len(kept_sets) > 20 or criterion == "uniform", "selectors that keep the same place always prove nothing"


def test_random_sets_are_uniform_and_differ_by_seed_and_layer() -> None:
    """8 of 64 tokens over 4000 seeds: each is kept about 500 times, and any two as often as chance has it."""
    state = State(2, torch.zeros(1, 64, 1), torch.arange(5, 69), torch.arange(5, 69))
    kept = np.zeros((4000, 64))
    for seed in range(4000):
        order = criteria.CRITERIA["random"](state, 8, seed).argsort(descending=True)[:8]
        kept[seed, order] = 1
    often = kept.sum(0)
    chi2 = ((often - 500) ** 2 / (500 * (1 - 8 / 64))).sum()  # 63 degrees of freedom: 109 is the 99.98th percentile
    assert chi2 < 109
    together = (kept.T @ kept)[~np.eye(64, dtype=bool)]
    expected = 4000 * 8 * 7 / (64 * 63)
    assert np.abs(together - expected).max() < 6 * np.sqrt(expected)
    other = State(8, state.hidden, state.alive, state.image)
    deeper = criteria.CRITERIA["random"](other, 8, 0).argsort(descending=True)[:8]
    assert set(deeper.tolist()) != set(np.flatnonzero(kept[0]))
