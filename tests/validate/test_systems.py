"""The baselines beside a bundle's plans: cut alike, ranked by nothing, and answering as the reference does."""

import pytest
from commands import Workshop, greedy
from tiny import make_inputs

from himap_export.engines.arrays import Inputs
from himap_export.engines.backends import Opening
from himap_export.engines.scratch import scratch_place
from himap_export.graphs.errors import HimapError
from himap_export.graphs.flops import equal_keep, true_ratio
from himap_export.graphs.plan import Cut, PruningPlan, himap
from himap_export.graphs.spec import DecoderSpec
from himap_export.validate.accuracy.systems import PlanSystem, missing_baselines, open_systems, request_seed
from himap_export.validate.parity.runs import reference_cuts

PLAN, FASTV, VISUAL = himap(1, 3, 0.5, 0.75), PruningPlan((Cut(1, "last", keep=8),)), (16, 8, 2)


def test_a_plan_alone_gets_all_three_controls() -> None:
    assert missing_baselines({"qa": (PLAN, VISUAL)}) == {
        "none": (PruningPlan(), (16,)),
        "random": (himap(1, 3, 0.5, 0.75).ranked_by("random"), VISUAL),
        "uniform": (himap(1, 3, 0.5, 0.75).ranked_by("uniform"), VISUAL),
    }


def test_baselines_are_not_repeated() -> None:
    intra = PLAN.ranked_by("image")
    held = {"a": (PLAN, VISUAL), "b": (intra, VISUAL), "f": (FASTV, (16, 8)), "none": (PruningPlan(), (16,))}
    found = missing_baselines(held | {"mine": (PLAN.ranked_by("uniform"), VISUAL)})
    assert list(found) == ["random-a", "random-f", "uniform-f"]
    assert found["random-f"] == (FASTV.ranked_by("random"), (16, 8))


def test_baselines_of_an_aligned_plan_keep_what_it_keeps() -> None:
    assert missing_baselines({"qa": (PLAN, (16, 11, 6))})["random"][1] == (16, 11, 6)


@pytest.fixture(scope="module")
def systems(work: Workshop, tmp_path_factory: pytest.TempPathFactory) -> list[PlanSystem]:
    bundle = work.bundle("gqa2", "--k1", 1, "--k2", 3, "--batch", 2)
    first = work.pipeline(bundle)
    with open_systems(first, work.checkpoint("gqa2"), Opening(threads=1), ["custom"], seeds=2, new_tokens=5) as found:
        return found


def test_everyone_answers_as_the_reference_does(work: Workshop, systems: list[PlanSystem]) -> None:
    assert [(c.name, c.seed) for c in systems] == [
        ("custom", 0),
        ("none", 0),
        ("random", 0),
        ("random", 1),
        ("uniform", 0),
    ]
    inputs, numbers = make_inputs(work.tiny("gqa2"), [9, 3], [5, 2], seed=4), [7, 3]
    singles = [inputs.sample(row) for row in range(2)]
    batch = [Inputs(single.input_ids, single.pixel_values) for single in singles]
    for system in systems:
        budget = system.pipeline.spec.budget
        cuts = reference_cuts(system.pipeline.spec.plan, budget.visual)
        seeds = [request_seed(system.seed, number) for number in numbers]
        said = greedy(
            work.reference("gqa2"), inputs.input_ids, inputs.pixel_values, inputs.attention_mask,
            max_new_tokens=5, cuts=cuts, seeds=seeds,
        )  # fmt: skip
        assert system.answer(batch, numbers, {}) == said.tolist(), system.name


def test_baselines_lie_where_leftovers_are_cleared_away(systems: list[PlanSystem]) -> None:
    assert scratch_place() in systems[1].pipeline.spec.bundle.folder.parents
    assert not systems[1].pipeline.spec.bundle.folder.exists()  # they last as long as the comparison


def test_baselines_cost_what_the_plan_costs(systems: list[PlanSystem]) -> None:
    flops = {c.name: c.flops for c in systems}
    assert flops["custom"] == flops["random"] == flops["uniform"] < flops["none"] == 1


def test_no_two_requests_draw_alike() -> None:
    assert len({request_seed(seed, number) for seed in range(20) for number in range(500)}) == 10000


@pytest.mark.parametrize("layer", [1, 2, 4])
def test_one_cut_at_equal_flops(layer: int) -> None:
    spec = DecoderSpec(10, 128, 256, 4, 2, 32, 300)
    keep = equal_keep(spec, layer, 64, 32, 0.6)
    ratios = [
        true_ratio(spec, PruningPlan((Cut(layer, "last", keep=n),)), (64, n), 32) for n in (keep - 1, keep, keep + 1)
    ]
    assert abs(ratios[1] - 0.6) <= min(abs(ratios[0] - 0.6), abs(ratios[2] - 0.6))
    with pytest.raises(HimapError, match="cannot keep 30% of the FLOPs"):
        equal_keep(spec, 4, 64, 32, 0.3)
