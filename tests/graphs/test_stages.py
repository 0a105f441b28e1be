"""Staged equals unstaged: the four graphs, chained, against the pruned decoder in NumPy, without stages or caches."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from frames import give, give_integers, take
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec import structs
from numpy.typing import NDArray
from oracle import IMAGE_TOKEN, Decoded, Floats, Ints, decode

from himap_export.engines.layout import ImageTokens, PromptLayout, lay_out
from himap_export.graphs.build import Frame, StageGraph
from himap_export.graphs.importance import SCORES, ScoringContext, importance
from himap_export.graphs.plan import Cut, PruningPlan, TokenBudget
from himap_export.graphs.ports import WeightRef
from himap_export.graphs.spec import IMAGE, INSTRUCTION, PADDING, SYSTEM, DecoderSpec, Dtype, stage_layers
from himap_export.graphs.stages import StagedModel

Arrays = dict[str, NDArray[np.generic]]
FIRST_WORD, NEW = 1, 3
SURE = 1e-4  # fp32 scores err by less: rankings closer than this are left to chance, and to other examples


class Chain:
    """The graphs of a model in onnxruntime, weights fed as inputs."""

    def __init__(self, model: StagedModel, weights: Mapping[str, Floats]) -> None:
        self.model, self.weights = model, weights
        self.graphs = {graph.name: graph for graph in model.graphs()}
        self.sessions = {name: self._session(graph) for name, graph in self.graphs.items()}

    def _session(self, graph: StageGraph) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        return onnxruntime.InferenceSession(ir.to_proto(graph.model).SerializeToString(), options)

    def run(self, name: str, have: Arrays) -> None:
        """Runs a graph on what it needs of `have`, adds its outputs."""
        graph, session = self.graphs[name], self.sessions[name]
        names = [i.name for i in session.get_inputs()]
        feeds = {name: self.weights[name] if name in graph.weights else have[name] for name in names}
        have |= dict(zip((o.name for o in session.get_outputs()), session.run(None, feeds), strict=True))

    def prefill(self, layout: PromptLayout, features: Floats, deep: Floats, seeds: Ints) -> Arrays:
        names = ("input_ids", "position_ids", "token_type", "rope_position_ids")
        have: Arrays = {name: getattr(layout, name) for name in names}
        have |= {"image_features": features, "seed": seeds[:, None], "rope_shift": layout.rope_shift}
        have |= {f"deepstack_{i}": deep[:, i] for i in range(deep.shape[1])}
        for name in self.model.plan.stages:
            # Whatever an earlier prompt left in the caches must not matter.
            have |= {v.name: self.stale(v) for v in self.graphs[name].model.graph.inputs if "past_" in str(v.name)}
            self.run(name, have)
        return have

    def stale(self, cache: ir.Value) -> Floats:
        assert cache.shape is not None
        return np.full(cache.shape.numpy(), 1e3, np.float32)

    def step(self, have: Arrays, tokens: Ints, positions: Ints) -> Floats:
        """Appends `tokens` [B] at `positions` [B] to the caches in `have`; logits [B,W]."""
        past = {"past" + n.removeprefix("present"): v for n, v in have.items() if n.startswith("present_")}
        turn = (positions + have["rope_shift"])[:, None]
        after: Arrays = past | {"input_ids": tokens[:, None], "position_ids": positions[:, None]}
        after["rope_position_ids"] = np.stack([turn] * 3, axis=2)
        self.run("decode", after)
        have |= {n: v for n, v in after.items() if n.startswith("present_")}
        return after["logits"]  # type: ignore[return-value]


@dataclass(frozen=True)
class Example:
    """A staged model, its weights, and prompts [S_b] of any layout with V0 image tokens each, which lie in a `grid`
    under M-RoPE; `deep` [B,n,V0,D]."""

    model: StagedModel
    weights: dict[str, Floats]
    grid: tuple[int, int] | None
    prompts: list[Ints]
    features: Floats
    deep: Floats
    answers: Ints
    seeds: Ints

    def layout(self) -> PromptLayout:
        ids = np.full((len(self.prompts), max(map(len, self.prompts))), FIRST_WORD)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(self.prompts):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
        return lay_out(ids, mask, ImageTokens(IMAGE_TOKEN), self.model.spec.vocab, self.model.budget, self.grid)

    def decoded(self) -> list[Decoded]:
        """What the oracle says; examples whose ranking hangs on fp32's last bits are given up."""
        spec, plan = self.model.spec, self.model.plan
        samples = zip(self.prompts, self.features, self.deep, self.answers, self.seeds.tolist(), strict=True)
        found = [decode(spec, plan, self.weights, self.grid, *sample) for sample in samples]
        assume(min(d.margin for d in found) > SURE)
        return found


def random_weights(model: StagedModel, random: np.random.Generator) -> dict[str, Floats]:
    """Scaled as in tiny.py: peaked attention, scores well apart, norms and biases that matter."""
    weights: dict[str, Floats] = {}
    for graph in model.graphs():
        for name, spec in graph.weights.items():
            shape = spec.shape
            noise = random.standard_normal(shape)
            if len(shape) == 1:
                noise = 0.1 * noise + (1 if "norm" in name else 0)
            elif name != "embed_tokens.weight":
                noise *= (2.4 if "q_proj" in name or "k_proj" in name else 0.64) / shape[1] ** 0.5
            weights.setdefault(name, noise.astype(np.float32))
    return weights


@st.composite
def plans(draw: st.DrawFn, layers: int, visual: int) -> PruningPlan:
    """No cut, HiMAP's two, or any others in any order."""
    places = sorted(draw(st.sets(st.integers(1, layers - 1), max_size=min(3, layers - 1))))
    himap = draw(st.booleans())
    cuts, alive = [], visual
    for n, place in enumerate(places):
        criterion = ("instruction", "image")[min(n, 1)] if himap else draw(st.sampled_from(sorted(SCORES)))
        if draw(st.booleans()):
            cut = Cut(place, criterion, remove=draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])))
        else:
            cut = Cut(place, criterion, keep=draw(st.integers(1, alive)))
        alive = cut.kept(alive)
        cuts.append(cut)
    return PruningPlan(tuple(cuts)).check(layers)


@st.composite
def examples(draw: st.DrawFn, unpruned: bool = False) -> Example:
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layers, pairs, m_rope = draw(st.integers(3, 5)), draw(st.integers(2, 4)), draw(st.booleans())
    spec = DecoderSpec(
        layers=layers, hidden=draw(st.integers(9, 24)), ffn=draw(st.integers(9, 24)), vocab=draw(st.integers(8, 20)),
        heads=kv_heads * group, kv_heads=kv_heads, head_dim=2 * pairs,
        rope_base=draw(st.sampled_from([100.0, 10000.0])),
        qkv_bias=draw(st.booleans()), out_bias=draw(st.booleans()), mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()), deepstack=draw(st.integers(0, layers)),
        rope_axes=tuple(draw(st.lists(st.integers(0, 2), min_size=pairs, max_size=pairs))) if m_rope else (),
    )  # fmt: skip
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    visual, text, batch = rows * columns, draw(st.integers(1, 8)), draw(st.integers(1, 3))
    plan = draw(plans(layers, visual))
    if unpruned:
        plan = PruningPlan(tuple(structs.replace(cut, remove=0.0, keep=None) for cut in plan.cuts))
    model = StagedModel(spec, plan, TokenBudget(plan.kept(visual), text, NEW, batch), "fp32", WeightRef)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    prompts = []
    for _ in range(batch):
        words = random.integers(FIRST_WORD, spec.vocab, draw(st.integers(0, text)))
        # Image tokens in one run, or anywhere: each word goes before one of them, or behind them all.
        split = not m_rope and draw(st.booleans())
        place = st.integers(0, visual) if split else st.sampled_from([0, visual])
        places = [draw(place) for _ in words]
        prompts.append(np.insert(np.full(visual, IMAGE_TOKEN), places, words))
    features = random.standard_normal((batch, visual, spec.hidden)).astype(np.float32)
    deep = random.standard_normal((batch, spec.deepstack, visual, spec.hidden)).astype(np.float32)
    answers, seeds = random.integers(FIRST_WORD, spec.vocab, (batch, NEW)), random.integers(0, 2**32, batch)
    grid = (rows, columns) if m_rope else None
    return Example(model, random_weights(model, random), grid, prompts, features, deep, answers, seeds)


def real(kept: NDArray[np.generic], token_type: NDArray[np.generic]) -> Ints:
    """A sample's kept positions without padding, which must all lie behind them."""
    is_real: NDArray[np.bool_] = token_type != PADDING
    assert not (np.diff(is_real.astype(int)) > 0).any(), "padding stands before a real token"
    return kept[is_real].astype(np.int64)


@given(examples())
@settings(max_examples=25)
def test_staged_prefill_and_decode_equal_the_oracle(example: Example) -> None:
    expected = example.decoded()
    layout, chain = example.layout(), Chain(example.model, example.weights)
    have = chain.prefill(layout, example.features, example.deep, example.seeds)
    for sample, wanted in enumerate(expected):
        for cut, name in enumerate(example.model.plan.stages[1:]):
            kept = real(have[f"kept_{name}"][sample], have[f"type_{name}"][sample])
            np.testing.assert_array_equal(kept, wanted.kept[cut])
        np.testing.assert_allclose(have["logits"][sample], wanted.logits[0], atol=1e-3)
    for step in range(NEW):
        logits = chain.step(have, example.answers[:, step], layout.lengths + step)
        for sample, wanted in enumerate(expected):
            np.testing.assert_allclose(logits[sample], wanted.logits[1 + step], atol=1e-3)


@given(examples())
@settings(max_examples=15)
def test_text_is_never_dropped_and_budgets_are_met(example: Example) -> None:
    """Whatever the ranking: also where scores are too close for the test above."""
    budget, prompts = example.model.budget, example.prompts
    have = Chain(example.model, example.weights).prefill(
        example.layout(), example.features, example.deep, example.seeds
    )
    before = [np.arange(len(prompt)) for prompt in prompts]
    for name, visual, total in zip(example.model.plan.stages[1:], budget.visual[1:], budget.total[1:], strict=True):
        assert have[f"kept_{name}"].shape == (len(prompts), total)
        for sample, prompt in enumerate(prompts):
            kept = real(have[f"kept_{name}"][sample], have[f"type_{name}"][sample])
            text = np.flatnonzero(prompt != IMAGE_TOKEN)
            assert set(text) <= set(kept) <= set(before[sample]) and (np.diff(kept) > 0).all()
            assert len(kept) == visual + len(text)
            before[sample] = kept


@given(examples(unpruned=True))
@settings(max_examples=10)
def test_unpruned_decode_equals_prefill_of_the_longer_prompt(example: Example) -> None:
    """The same graphs both times, with room for the answer in the text budget: no oracle in between."""
    budget = example.model.budget
    wide = TokenBudget(budget.visual, budget.text + NEW, NEW, budget.batch)
    model = StagedModel(example.model.spec, example.model.plan, wide, "fp32", example.model.names)
    chain = Chain(model, example.weights)

    def prefill(answered: int) -> tuple[PromptLayout, Arrays]:
        longer = [np.append(p, a[:answered]) for p, a in zip(example.prompts, example.answers, strict=True)]
        layout = replace(example, model=model, prompts=longer).layout()
        return layout, chain.prefill(layout, example.features, example.deep, example.seeds)

    layout, have = prefill(0)
    for step in range(NEW):
        logits = chain.step(have, example.answers[:, step], layout.lengths + step)
        np.testing.assert_allclose(logits, prefill(step + 1)[1]["logits"], atol=1e-4)


@given(examples())
@settings(max_examples=10)
def test_graphs_pass_on_what_the_next_one_reads(example: Example) -> None:
    """Inputs and outputs meet by name, dtype and shape; each layer's cache is written once, of its stage's capacity."""
    graphs = {graph.name: graph for graph in example.model.graphs()}
    made: dict[str, tuple[object, ...]] = {}
    for name in example.model.plan.stages:
        for value in graphs[name].model.graph.inputs:
            if value.name in made:
                assert made[value.name] == (value.dtype, value.shape)
            elif value.name == "seed":
                made["seed"] = (value.dtype, value.shape)
        fresh = {v.name: (v.dtype, v.shape) for v in graphs[name].model.graph.outputs}
        assert not fresh.keys() & made.keys()
        made |= {str(n): v for n, v in fresh.items()}
    spec, budget = example.model.spec, example.model.budget
    doors = {v.name: v.shape for v in graphs["decode"].model.graph.inputs}
    ends = {v.name: v.shape for v in graphs["decode"].model.graph.outputs}
    for layers, capacity in zip(stage_layers(example.model.plan, spec.layers), budget.capacity, strict=True):
        for i in layers:
            for what in ("key", "value"):
                shape = (budget.batch, spec.kv_heads, capacity, spec.head_dim)
                present, past = f"present_{what}.{i}", f"past_{what}.{i}"
                assert made[present][1] == doors[past] == ends[present] == shape
    scored = [f"score_k{i}" for i, (a, b) in enumerate(pairwise(budget.visual), 1) if b < a]
    assert [name for name in made if name.startswith("score_")] == scored  # a cut that removes nothing costs nothing


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_scores_are_fp32_whatever_the_model_is(dtype: Dtype) -> None:
    """From the same queries and keys, fp64 differs by fp32's roundings only: fp16 anywhere inside would err by 1e-4."""
    spec = DecoderSpec(layers=3, hidden=8, ffn=8, heads=6, kv_heads=2, head_dim=16, vocab=8)
    token_type = np.array([SYSTEM] * 3 + [IMAGE] * 20 + [SYSTEM] + [IMAGE] * 12 + [INSTRUCTION] * 9 + [PADDING] * 4)
    is_image, position = (
        token_type == IMAGE,
        np.arange(len(token_type)) + (np.arange(len(token_type)) > 10) * 7,
    )  # as after a cut
    random, f = np.random.default_rng(0), Frame("scores", dtype)
    q, k = (2.4 * random.standard_normal((1, heads, len(token_type), 16)) for heads in (6, 2))
    q, k = (a.astype(np.float16).astype(f.dtype.numpy()) for a in (q, k))
    inputs = (
        give(f, "q", q.shape),
        give(f, "k", k.shape),
        *(give_integers(f, n, 1, len(token_type)) for n in ("token_type", "position")),
    )
    context = ScoringContext(f.op, spec, *inputs, seed=None, layer=2, visual=32, keep=8, text=17)
    rows = {
        "instruction": token_type == INSTRUCTION, "image": is_image,
        "last": np.arange(len(token_type)) == 44, "boundary": np.arange(len(token_type)) == 36,
    }  # fmt: skip
    for name in rows:
        take(f, name, importance(name, context), (1, len(token_type)), ir.DataType.FLOAT)
    session = onnxruntime.InferenceSession(ir.to_proto(f.finish().model).SerializeToString())
    found = session.run(None, {"q": q, "k": k, "token_type": token_type[None], "position": position[None]})

    logits = q[0].astype(np.float64) @ np.repeat(k[0], 3, 0).astype(np.float64).swapaxes(1, 2) / 4
    probability = np.exp(np.where(np.tri(len(token_type), dtype=bool), logits, -np.inf))
    attention = (probability / probability.sum(-1, keepdims=True)).mean(0)
    for score, of in zip(found, rows.values(), strict=True):
        assert score.dtype == np.float32 and np.isposinf(score[0, ~is_image]).all()
        np.testing.assert_allclose(score[0, is_image], attention[of][:, is_image].sum(0), rtol=0, atol=1e-5)
