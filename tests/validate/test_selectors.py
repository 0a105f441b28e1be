"""Every selector three times: as ONNX graph, in the reference, and in NumPy from the stored attention."""

from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from frames import give, give_integers, take
from numpy.typing import NDArray

from himap_export.graphs import plan
from himap_export.graphs.build import Frame
from himap_export.graphs.gather import top_k_gather
from himap_export.graphs.importance import SCORES, ScoringContext, importance
from himap_export.graphs.spec import IMAGE, INSTRUCTION, PADDING, SYSTEM, DecoderSpec
from himap_export.validate.reference import criteria
from himap_export.validate.reference.criteria import State

CASES, LAYER, B = 200, 3, 2
Floats, Ints = NDArray[np.floating], NDArray[np.int64]
# (image tokens V, text slots T, V' kept, query heads, key heads)
SHAPES = ((16, 9, 4, 4, 4), (36, 14, 20, 4, 2), (64, 24, 1, 2, 1), (7, 3, 0, 3, 1), (12, 5, 11, 2, 2))


def by_numpy(criterion: str, attention: Floats, kind: Ints, position: Ints, keep: int, seed: int) -> list[int]:
    """Positions of the image tokens that stay, from attention [S,S] of one prompt without padding."""
    image, instruction = np.flatnonzero(kind == IMAGE), np.flatnonzero(kind == INSTRUCTION)
    rows = {"instruction": instruction, "image": image, "last": [-1], "boundary": instruction[:1]}
    if criterion in rows:
        score = attention[rows[criterion]][:, image].sum(0)
    elif criterion == "uniform":
        score = np.diff(np.arange(len(image) + 1) * keep // len(image))
    else:
        numbers = [seed * 48271 + int(p) * 16807 + LAYER * 69621 + 1 for p in position[image]]
        for constant in (1013904223, 374761393, 668265263):
            numbers = [x**5 % (2**31 - 1) + constant for x in numbers]
        score = np.array(numbers) % 2**24
    return sorted(position[image[np.argsort(-score, kind="stable")[:keep]]].tolist())


@cache
def session(criterion: str, shape: tuple[int, ...]) -> onnxruntime.InferenceSession:
    """Score and gather, alone: queries and keys in, kept positions out."""
    v, t, keep, heads, groups = shape
    spec, tokens, f = DecoderSpec(4, 8, 8, heads, groups, 8, 16), v + t, Frame("selector", "fp32")
    q, k = give(f, "q", (B, heads, tokens, 8)), give(f, "k", (B, groups, tokens, 8))
    position, kind, seed = (
        give_integers(f, "position", B, tokens),
        give_integers(f, "kind", B, tokens),
        give_integers(f, "seed", B, 1),
    )
    score = importance(criterion, ScoringContext(f.op, spec, q, k, kind, position, seed, LAYER, v, keep, t))
    x = f.op.Cast(f.op.Unsqueeze(position, [2]), to=ir.DataType.FLOAT)
    _, kept, kept_kind = top_k_gather(f.op, x, score, position, kind, keep + t)
    take(f, "kept", kept, (B, keep + t), ir.DataType.INT64)
    take(f, "kept_kind", kept_kind, (B, keep + t), ir.DataType.INT64)
    return onnxruntime.InferenceSession(ir.to_proto(f.finish().model).SerializeToString())


def prompts(random: np.random.Generator, v: int, t: int) -> tuple[Ints, Ints, list[int]]:
    """kind and original position [B,V+T], right-padded, as after an earlier cut, and each prompt's length."""
    kind, position, lengths = np.full((B, v + t), PADDING), np.zeros((B, v + t), np.int64), []
    for row in range(B):
        text = int(random.integers(1, t + 1))
        system = int(random.integers(0, text + 1))  # all of it: no instruction at all
        inside = int(random.integers(0, system + 1))  # text between image tokens
        run = np.insert(np.full(v, IMAGE), random.integers(0, v, inside), SYSTEM)
        real = np.concatenate([np.full(system - inside, SYSTEM), run, np.full(text - system, INSTRUCTION)])
        kind[row, : len(real)] = real
        position[row] = np.sort(random.choice(3 * (v + t), v + t, replace=False))
        lengths.append(len(real))
    return kind, position, lengths


def attention_of(q: Floats, k: Floats) -> Floats:
    """Causal softmax [S,S] fp64, mean over heads, of q [H,S,E] and k [G,S,E]."""
    logits = q.astype(np.float64) @ np.repeat(k, len(q) // len(k), 0).astype(np.float64).swapaxes(1, 2) / np.sqrt(8)
    weights = np.exp(np.where(np.tri(q.shape[1], dtype=bool), logits, -np.inf))
    mean: Floats = (weights / weights.sum(-1, keepdims=True)).mean(0)
    return mean


def test_there_is_one_of_each() -> None:
    assert set(SCORES) == set(criteria.CRITERIA) == {c for cs in plan.POLICIES.values() for c in cs}


@pytest.mark.parametrize("criterion", SCORES)
def test_graph_reference_and_numpy_keep_the_same_tokens(criterion: str) -> None:
    random, kept_sets = np.random.default_rng(0), set()
    for case in range(CASES // B):
        shape = SHAPES[case % len(SHAPES)]
        v, t, keep, heads, groups = shape
        kind, position, lengths = prompts(random, v, t)
        q, k = (2.4 * random.standard_normal((B, n, v + t, 8), np.float32) for n in (heads, groups))
        seeds = random.integers(0, 2**32, B)
        feeds = {"q": q, "k": k, "kind": kind, "position": position, "seed": seeds[:, None]}
        run = session(criterion, shape)
        kept, kept_kind = run.run(None, {i.name: feeds[i.name] for i in run.get_inputs()})
        for row, length in enumerate(lengths):
            attention, seed = attention_of(q[row, :, :length], k[row, :, :length]), int(seeds[row])
            there = kind[row, :length], position[row, :length]
            expected = by_numpy(criterion, attention, *there, keep, seed)
            assert kept[row][kept_kind[row] == IMAGE].tolist() == expected
            state = State(
                LAYER, torch.zeros(1, length, 1), torch.tensor(there[1]), torch.tensor(there[1][there[0] == IMAGE]),
                attention=torch.tensor(attention, dtype=torch.float32),
            )  # fmt: skip
            order = criteria.CRITERIA[criterion](state, keep, seed).sort(descending=True, stable=True).indices[:keep]
            assert state.image[order.sort().values].tolist() == expected
            text = position[row, :length][kind[row, :length] != IMAGE].tolist()
            assert kept[row][(kept_kind[row] != IMAGE) & (kept_kind[row] != PADDING)].tolist() == text
            kept_sets.add((shape, tuple(np.flatnonzero(np.isin(position[row, :length], expected)))))
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
