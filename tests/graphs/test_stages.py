"""Staged equals unstaged: the four graphs, chained, against the pruned decoder in NumPy, without stages or caches."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from drawn_models import NEW, Arrays, Chain, Example, check_chain, examples, real
from frames import scoring_context, take
from hypothesis import given, settings
from oracle import IMAGE_TOKEN

from himap_export.engines.layout import PromptLayout
from himap_export.graphs.build import Frame
from himap_export.graphs.importance import importance
from himap_export.graphs.plan import TokenBudget
from himap_export.graphs.spec import IMAGE, INSTRUCTION, PADDING, SYSTEM, DecoderSpec, Dtype, stage_layers
from himap_export.graphs.stages import StagedModel


@given(examples())
@settings(max_examples=15)
def test_staged_prefill_and_decode_equal_the_oracle(example: Example) -> None:
    check_chain(example, lambda: Chain(example.model, example.weights))


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
    for graph in graphs.values():  # nothing that a criterion might look at is there for one that does not
        given = set(graph.model.graph.outputs)
        assert [node for node in graph.model.graph if not any(v.uses() or v in given for v in node.outputs)] == []
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
    context = scoring_context(f, spec, (1, len(token_type)), ("query", "key"), layer=2, visual=32, keep=8)
    rows = {
        "instruction": token_type == INSTRUCTION, "image": is_image,
        "last": np.arange(len(token_type)) == 44, "boundary": np.arange(len(token_type)) == 36,
    }  # fmt: skip
    for name in rows:
        take(f, name, importance(name, context), (1, len(token_type)), ir.DataType.FLOAT)
    session = onnxruntime.InferenceSession(ir.to_proto(f.finish().model).SerializeToString())
    found = session.run(None, {"query": q, "key": k, "token_type": token_type[None], "position": position[None]})

    logits = q[0].astype(np.float64) @ np.repeat(k[0], 3, 0).astype(np.float64).swapaxes(1, 2) / 4
    probability = np.exp(np.where(np.tri(len(token_type), dtype=bool), logits, -np.inf))
    attention = (probability / probability.sum(-1, keepdims=True)).mean(0)
    for score, of in zip(found, rows.values(), strict=True):
        assert score.dtype == np.float32 and np.isposinf(score[0, ~is_image]).all()
        np.testing.assert_allclose(score[0, is_image], attention[of][:, is_image].sum(0), rtol=0, atol=1e-5)
