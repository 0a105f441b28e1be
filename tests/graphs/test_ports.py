"""What graphs promise each other: those that the builder makes keep it, and whatever breaks it is named."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from himap_export.graphs.errors import HimapError
from himap_export.graphs.plan import PruningPlan, TokenBudget, himap
from himap_export.graphs.ports import (
    GraphPorts,
    Place,
    Port,
    WeightRef,
    chain_problems,
    graph_problems,
    slots_problems,
    vision_problems,
)
from himap_export.graphs.spec import DecoderSpec
from himap_export.graphs.stages import StagedModel

PLAN = himap(1, 3, 0.5, 0.5)
SPEC, V = DecoderSpec(4, 8, 8, 2, 1, 4, 16, deepstack=1, rope_axes=(0, 1)), 16
VISION = GraphPorts(
    {"pixel_values": Port("fp32", (1, 3, 8, 8), "pixel_values")},
    {
        "image_features": Port("fp32", (1, V, 8), "seen_features"),
        "deepstack_0": Port("fp32", (1, V, 8), "seen_deepstack", layer=0),
    },
)
Chain = dict[str, GraphPorts]


def chain(plan: PruningPlan = PLAN, images: int = 1, batch: int = 1) -> Chain:
    """Of prompts of so many `images`, of which vision sees one at a time."""
    budget = TokenBudget(plan.kept(V, images), 4, 2, batch, images=images)
    graphs = StagedModel(SPEC, plan, budget, "fp32", WeightRef).graphs()
    return {"vision": VISION} | {graph.name: graph.ports for graph in graphs}


def problems(graphs: Chain) -> list[str]:
    alone = [problem for graph in graphs.values() for problem in graph_problems(graph)]
    return alone + list(chain_problems(list(graphs.values()), len(graphs) - 3)) + unseen(graphs)


def unseen(graphs: Chain, images: int = 1) -> list[str]:
    return list(vision_problems(graphs["vision"], [graphs[name] for name in graphs if name != "vision"], images))


@pytest.mark.parametrize("plan", [PruningPlan(), himap(1, 3, 0.5, 0.5), himap(1, 3, 0, 0), himap(2, 3, 0.9, 0)])
def test_what_the_builder_makes_keeps_its_promises(plan: PruningPlan) -> None:
    assert problems(chain(plan)) == []


def test_ports_are_declared_as_the_graph_has_them() -> None:
    for graph in StagedModel(SPEC, PLAN, TokenBudget((V, 8, 4), 4, 2), "fp16", WeightRef).graphs():
        given = {v.name: v for v in graph.model.graph.inputs if v.name not in graph.weights}
        for values, ports in (
            (given, graph.ports.inputs),
            ({v.name: v for v in graph.model.graph.outputs}, graph.ports.outputs),
        ):
            assert values.keys() == ports.keys()
            for name, port in ports.items():
                assert values[name].shape == port.shape and values[name].dtype is not None
                assert str(values[name].dtype) == {"fp16": "FLOAT16", "fp32": "FLOAT", "int64": "INT64"}[port.dtype]
                assert name == port.place.name(updated=port.updates is not None)


def test_stages_meet_where_the_table_says() -> None:
    graphs = chain()
    past, present = graphs["k1"].inputs["past_key.1"], graphs["k1"].outputs["present_key.1"]
    assert past.place == present.place == Place("key", 1) == graphs["decode"].inputs["past_key.1"].place
    assert present.updates == "past_key.1"
    assert graphs["prefix"].outputs["score_k1"].place == graphs["k1"].inputs["score_k1"].place == Place("score", cut=1)
    assert graphs["k2"].outputs["hidden"].role == "last_hidden"
    assert graphs["decode"].inputs["input_ids"].place != graphs["prefix"].inputs["input_ids"].place


def put(stage: str, name: str, outputs: bool = False, **changed: object) -> Callable[[Chain], None]:
    """Changes fields of one port."""

    def change(graphs: Chain) -> None:
        ports = graphs[stage][outputs]
        ports[name] = replace(ports[name], **changed)  # type: ignore[index]

    return change


def without(stage: str, name: str, outputs: bool = False) -> Callable[[Chain], None]:
    return lambda graphs: graphs[stage][outputs].pop(name)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("k1", "hidden_k1", cut=None), "hidden_k1 is hidden of layer None and cut None"),
        (put("k1", "hidden_k1", layer=3), "hidden_k1 is hidden of layer 3 and cut 1"),
        (put("prefix", "input_ids", cut=1), "input_ids is input_ids of layer None and cut 1"),
        (put("k1", "hidden_k1", updates="score_k1"), "hidden_k1 is an output, too"),
        (put("k1", "present_key.1", True, updates=None), "present_key.1 updates no input"),
        (put("k1", "present_key.1", True, updates="past_key.9"), "updates past_key.9, which is no such input"),
        (put("k1", "present_key.1", True, updates="past_value.1"), "updates past_value.1, which is no such input"),
        (put("k1", "present_key.1", True, shape=(1, 1, 9, 4)), "updates past_key.1, which is no such input"),
        (put("k1", "kept_k1", True, updates="position_ids"), "kept_k1 updates position_ids"),
        (put("k1", "score_k1", role="hidden"), "are one"),
        (put("k1", "score_k1", dtype="fp16"), "score_k1 is fp16[1, 20] and fp32[1, 20]"),
        (put("k2", "hidden_k2", shape=(1, 13, 8)), "hidden_k2 is fp32[1, 13, 8] and fp32[1, 12, 8]"),
        (put("prefix", "score_k1", True, cut=2), "nothing writes score_k1 before it is read"),
        (without("prefix", "score_k1", True), "nothing writes score_k1 before it is read"),
        (without("k1", "present_key.1", True), "nothing writes past_key.1 before it is read"),
        (put("vision", "deepstack_0", True, layer=1), "nothing reads deepstack_0"),
        (put("vision", "deepstack_0", True, layer=1), "vision does not write deepstack_0"),
        (put("k2", "kept_k2", True, cut=1), "two write kept_k2"),
        (put("k1", "kept_k1", True, role="seed", cut=None), "two write kept_k1"),
        (without("k2", "kept_k2", True), "no graph has kept_k2"),
        (without("decode", "position_ids"), "no graph has position_ids"),
        (put("vision", "pixel_values", role="seed"), "no graph has pixel_values"),
    ],
)
def test_a_promise_that_is_not_kept_is_named(change: Callable[[Chain], None], words: str) -> None:
    graphs = {stage: GraphPorts(dict(ports.inputs), dict(ports.outputs)) for stage, ports in chain().items()}
    assert problems(graphs) == []
    change(graphs)
    assert any(words in problem for problem in problems(graphs)), problems(graphs)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("images", [1, 2, 5])
def test_stages_read_what_vision_makes_of_each_picture(images: int, batch: int) -> None:
    """One picture a run, whatever the batch; another number than the stages are for is named at every tensor."""
    graphs = chain(images=images, batch=batch)
    assert unseen(graphs, images) == []
    found = f"is [1, {V}, 8] of one picture and [{batch}, {V * images}, 8] of {images + 1}"
    assert unseen(graphs, images + 1) == [f"{name} {found}" for name in ("image_features", "deepstack_0")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("vision", "image_features", True, role="image_features"), "image_features, which is image_features [1, "),
        (put("vision", "image_features", True, shape=(2, V, 8)), f"image_features, which is seen_features [2, {V}, 8]"),
        (put("vision", "image_features", True, shape=(V, 8)), f"image_features, which is seen_features [{V}, 8]"),
        (put("vision", "image_features", True, role="hidden", cut=1), "image_features, which is hidden"),
        (put("vision", "image_features", True, dtype="fp16"), f"image_features is [1, {V}, 8] of one picture"),
        (put("vision", "image_features", True, shape=(1, V, 9)), f"image_features is [1, {V}, 9] of one picture"),
        (put("vision", "deepstack_0", True, shape=(1, V + 1, 8)), f"deepstack_0 is [1, {V + 1}, 8] of one picture"),
        (put("prefix", "deepstack_0", layer=2), "nothing reads deepstack_0"),
        (put("prefix", "deepstack_0", layer=2), "vision does not write deepstack_2"),
        (without("prefix", "deepstack_0"), "nothing reads deepstack_0"),
        (without("vision", "deepstack_0", True), "vision does not write deepstack_0"),
        (without("vision", "image_features", True), "vision does not write image_features"),
    ],
)  # fmt: skip
def test_what_vision_makes_and_nobody_reads_is_named(change: Callable[[Chain], None], words: str) -> None:
    graphs = {stage: GraphPorts(dict(ports.inputs), dict(ports.outputs)) for stage, ports in chain().items()}
    change(graphs)
    assert any(words in problem for problem in unseen(graphs)), unseen(graphs)


def slots(rows: int) -> Chain:
    budget = TokenBudget(PLAN.kept(V), 4, 2, slots=rows)
    return {g.name: g.ports for g in StagedModel(SPEC, PLAN, budget, "fp32", WeightRef).graphs()}


def test_slots_are_decode_over_more_rows() -> None:
    graphs = slots(5)
    assert list(slots_problems(graphs["decode"], graphs["slots"], 5)) == []
    assert {port.shape[0] for ports in graphs["slots"] for port in ports.values()} == {5}
    assert "slots" not in slots(0) and {p.shape[0] for p in graphs["prefix"].inputs.values()} == {1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("slots", "input_ids", shape=(4, 1)), "slots has not decode's input_ids"),
        (put("slots", "present_key.1", True, updates="past_value.1"), "slots has not decode's present_key.1"),
        (put("slots", "logits", True, dtype="fp16"), "slots has not decode's logits"),
        (without("slots", "past_key.0"), "slots has not decode's past_key.0"),
        (without("decode", "past_key.0"), "slots has past_key.0, which decode has not"),
    ],
)
def test_slots_that_are_not_decodes_are_named(change: Callable[[Chain], None], words: str) -> None:
    graphs = {name: GraphPorts(dict(ports.inputs), dict(ports.outputs)) for name, ports in slots(5).items()}
    change(graphs)
    assert list(slots_problems(graphs["decode"], graphs["slots"], 5)) == [words]


def test_slots_take_one_prompt_each() -> None:
    with pytest.raises(HimapError, match="`slots` need a `batch` of 1, not 2"):
        TokenBudget((4,), 4, 2, batch=2, slots=3)
