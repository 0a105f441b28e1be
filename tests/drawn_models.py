"""Staged models drawn by hypothesis, and their graphs chained: what a backend computes against the NumPy oracle."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime
from hypothesis import assume
from hypothesis import strategies as st
from msgspec import structs
from numpy.typing import NDArray
from oracle import IMAGE_TOKEN, Decoded, Floats, Ints, decode
from oracle_criteria import coefficients

from himap_export.engines.layout import ImageTokens, PromptLayout, lay_out
from himap_export.graphs.build import StageGraph
from himap_export.graphs.importance import SCORES
from himap_export.graphs.plan import Cut, PruningPlan, TokenBudget
from himap_export.graphs.ports import WeightRef
from himap_export.graphs.spec import PADDING, DecoderSpec
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
def plans(draw: st.DrawFn, layers: int, visual: int, heads: int) -> PruningPlan:
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
        cuts.append(structs.replace(cut, coefficients=coefficients(criterion, heads)))
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
    plan = draw(plans(layers, visual, spec.heads))
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


def check_chain(example: Example, make: Callable[[], Chain]) -> None:
    """Kept sets are the oracle's, and logits, of prefill and of NEW steps behind it; one chain is made."""
    expected = example.decoded()
    layout, chain = example.layout(), make()
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
