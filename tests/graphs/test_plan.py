"""Plans, budgets and FLOPs: the paper's numbers, and properties that hold for every plan."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.flops import (
    BYTES,
    layer_flops,
    paper_flops,
    paper_ratio,
    scoring_flops,
    stage_costs,
    true_ratio,
)
from himap_export.graphs.importance import SCORES, require_scores
from himap_export.graphs.plan import POLICIES, TASKS, Cut, PruningPlan, TokenBudget, himap
from himap_export.graphs.spec import DecoderSpec, Dtype, stage_layers

LLAVA_7B = DecoderSpec(32, 4096, 11008, 32, 32, 128, 32064)
LLAVA_13B = DecoderSpec(40, 5120, 13824, 40, 40, 128, 32064)
IMAGE_TOKENS = 576

RATIOS = st.floats(0, 1, exclude_max=True) | st.integers(0, 99).map(lambda n: n / 100)


@st.composite
def plans(draw: st.DrawFn, layers: int = 40) -> PruningPlan:
    k1 = draw(st.integers(1, layers - 2))
    return himap(k1, draw(st.integers(k1 + 1, layers - 1)), draw(RATIOS), draw(RATIOS))


@st.composite
def specs(draw: st.DrawFn, layers: int = 40) -> DecoderSpec:
    kv_heads, e = draw(st.integers(1, 8)), 2 * draw(st.integers(1, 64))
    heads = kv_heads * draw(st.integers(1, 8))
    return DecoderSpec(layers, draw(st.integers(1, 4096)), draw(st.integers(1, 8192)), heads, kv_heads, e, 100)


# --- the paper ---


@pytest.mark.parametrize(
    ("spec", "task", "visual", "ratio"),
    [
        (LLAVA_7B, "qa", (576, 288, 72), 0.246),
        (LLAVA_13B, "qa", (576, 288, 72), 0.222),
        (LLAVA_7B, "caption", (576, 288, 144), 0.393),
    ],
    ids=["7B", "13B", "7B-caption"],
)
def test_the_papers_numbers(spec: DecoderSpec, task: str, visual: tuple[int, int, int], ratio: float) -> None:
    plan = TASKS[task].check(spec.layers)
    assert plan.kept(IMAGE_TOKENS) == visual
    assert round(paper_ratio(spec, plan, plan.kept(IMAGE_TOKENS)), 3) == ratio


def test_the_authors_settings() -> None:
    assert TASKS["qa"] == PruningPlan((Cut(2, "instruction", 0.5), Cut(8, "image", 0.75)))
    assert TASKS["caption"] == PruningPlan((Cut(2, "instruction", 0.5), Cut(15, "image", 0.5)))


# --- plans ---


@given(plans(), st.integers(1, 3000))
def test_budgets_never_grow_and_removed_is_the_floor(plan: PruningPlan, image_tokens: int) -> None:
    v0, v1, v2 = plan.check(40).kept(image_tokens)
    assert image_tokens == v0 >= v1 >= v2 >= 1
    for removed, ratio, of in ((v0 - v1, plan.cuts[0].remove, v0), (v1 - v2, plan.cuts[1].remove, v1)):
        assert ratio is not None
        # Exactly floor(R n), but for the one rounding of the product, as the authors' `int(R * n)` has it.
        assert removed == int(ratio * of) and abs(removed - math.floor(Fraction(ratio) * of)) <= 1
        assert (removed == 0) == (ratio * of < 1)


@given(plans(), st.integers(1, 3000), st.integers(1, 500), st.integers(1, 500), st.integers(1, 8))
def test_text_is_in_every_stage(plan: PruningPlan, image_tokens: int, text: int, new: int, batch: int) -> None:
    budget = TokenBudget(plan.kept(image_tokens), text, new, batch)
    s0, s1, s2 = budget.total
    assert s0 >= s1 >= s2 > text
    assert [s - v for s, v in zip(budget.total, budget.visual, strict=True)] == [text] * 3
    assert [c - s for c, s in zip(budget.capacity, budget.total, strict=True)] == [new] * 3


@given(plans(layers=12))
def test_every_layer_is_in_one_stage(plan: PruningPlan) -> None:
    stages = stage_layers(plan, 12)
    assert [i for stage in stages for i in stage] == list(range(12))
    assert [stage.start for stage in stages] == [0, *(cut.layer for cut in plan.cuts)] and all(stages)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (himap(0, 8, 0.5, 0.5), "`k1` 0 is below 1"),
        (himap(-3, 8, 0.5, 0.5), "`k1` -3"),
        (himap(8, 8, 0.5, 0.5), "`k2` 8 is not above `k1` 8"),
        (himap(9, 8, 0.5, 0.5), "`k2` 8 is not above `k1` 9"),
        (himap(2, 32, 0.5, 0.5), "`k2` 32 is past the last layer (the model has 32 layers: use at most 31)"),
        (himap(2, 8, 1.0, 0.5), "`r1` 1.0 is outside [0, 1)"),
        (himap(2, 8, -0.1, 0.5), "`r1` -0.1"),
        (himap(2, 8, 0.5, 1.5), "`r2` 1.5"),
        (himap(2, 8, 0.5, float("nan")), "`r2` nan"),
        (himap(2, 8, float("inf"), 0.5), "`r1` inf"),
        (PruningPlan((Cut(2, "last", keep=-1),)), "`keep` -1 is below 0"),
        (PruningPlan((Cut(2, "last"),)), "needs either a fraction to remove or a number to keep"),
        (PruningPlan((Cut(2, "last", 0.5, 3),)), "needs either a fraction to remove or a number to keep"),
        (PruningPlan((*himap(2, 8, 0.5, 0.5).cuts, Cut(8, "last", 0.5))), "`k3` 8 is not above `k2` 8"),
    ],
)
def test_a_plan_the_model_cannot_follow(plan: PruningPlan, words: str) -> None:
    with pytest.raises(HimapError) as found:
        plan.check(32)
    assert words in str(found.value) and found.value.code == Exit.USAGE


@pytest.mark.parametrize("plan", [himap(1, 2, 0, 0), himap(30, 31, 0.999, 0.999), PruningPlan()])
def test_the_outermost_plans_are_allowed(plan: PruningPlan) -> None:
    assert plan.check(32) is plan


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TokenBudget((4, 2, 1), 0, 8), "`text_budget` 0"),
        (lambda: TokenBudget((4, 2, 1), 8, 0), "`max_new_tokens` 0"),
        (lambda: TokenBudget((4, 2, 1), 8, 8, 0), "`batch` 0"),
        (lambda: TokenBudget((4, 2, 1), 8, -1), "`max_new_tokens` -1"),
    ],
)
def test_an_empty_budget(make: Callable[[], TokenBudget], words: str) -> None:
    with pytest.raises(HimapError, match=words) as found:
        make()
    assert found.value.code == Exit.USAGE


# --- FLOPs ---


def test_layer_flops_by_hand() -> None:
    """3 tokens; hidden 8, 4 query heads and 2 kv heads of 2, ffn 5. [m,k] x [k,n] costs 2 m k n."""
    q, out = 2 * 3 * 8 * 8, 2 * 3 * 8 * 8
    k = v = 2 * 3 * 8 * 4
    scores = values = 4 * (2 * 3 * 2 * 3)
    gate = up = down = 2 * 3 * 8 * 5
    assert layer_flops(3, DecoderSpec(1, 8, 5, 4, 2, 2, 10)) == q + k + v + out + scores + values + gate + up + down


@given(specs(), st.integers(1, 3000))
def test_layer_flops_is_the_sum_of_its_matrix_products(spec: DecoderSpec, s: int) -> None:
    d, m, e = spec.hidden, spec.ffn, spec.head_dim
    products = [(s, d, spec.heads * e), (s, d, spec.kv_heads * e), (s, d, spec.kv_heads * e), (s, spec.heads * e, d)]
    products += [(s, e, s)] * spec.heads + [(s, s, e)] * spec.heads
    products += [(s, d, m), (s, d, m), (s, m, d)]
    assert layer_flops(s, spec) == sum(2 * rows * inner * columns for rows, inner, columns in products)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_plan_knows_its_policy_and_its_stages(policy: str) -> None:
    plan = PruningPlan(tuple(Cut(n, criterion, 0.5) for n, criterion in enumerate(POLICIES[policy], 1)))
    assert plan.policy == policy and plan.stages == ("prefix", "k1", "k2")[: 1 + len(plan.cuts)]
    assert set(POLICIES[policy]) <= set(SCORES)


def test_baselines_are_cut_where_the_plan_is() -> None:
    plan = TASKS["qa"].ranked_by("random")
    assert plan == PruningPlan((Cut(2, "random", 0.5), Cut(8, "random", 0.75))) and plan.policy == "random"
    assert TASKS["qa"].ranked_by("last").policy == "custom"


def test_rankings_cost_what_they_multiply() -> None:
    """7 tokens, 3 of the image; 4 query heads and 2 kv heads of 2, hidden 8. Where nothing leaves nothing is ranked."""
    spec, criteria = DecoderSpec(9, 8, 5, 4, 2, 2, 10), ("instruction", "image", "last", "v2drop", "random", "mine")
    plan = PruningPlan(tuple(Cut(n, criterion, keep=2) for n, criterion in enumerate(criteria, 1)))
    text, image, last, moved = 2 * 4 * 7 * 8, 2 * 3 * 7 * 8, 2 * 7 * 8, 3 * 7 * 8
    for n, cost in enumerate((text, image, last, moved, 0, None)):
        only = PruningPlan(plan.cuts[n : n + 1])
        assert scoring_flops(spec, only, TokenBudget((3, 2), 4, 1)) == (cost,)
        assert scoring_flops(spec, only, TokenBudget((3, 2), 4, 1, 3)) == (cost and 3 * cost,)
        assert scoring_flops(spec, only, TokenBudget((3, 3), 4, 1)) == (0,)


@pytest.mark.parametrize("criterion", SCORES)
def test_the_cost_of_every_ranking_is_known(criterion: str) -> None:
    (cost,) = scoring_flops(
        DecoderSpec(2, 8, 5, 4, 2, 2, 10), PruningPlan((Cut(1, criterion, keep=2),)), TokenBudget((3, 2), 4, 1)
    )
    assert cost == 0 if criterion in ("random", "uniform") else cost


def test_coefficients_are_numbers_and_as_many_as_a_criterion_takes() -> None:
    spec = DecoderSpec(4, 8, 5, 4, 2, 2, 10)
    for criterion, right in (("instruction-debiased", (0.1,)), ("hawk", ()), ("hawk", (0.1,) * 4), ("image", ())):
        require_scores(PruningPlan((Cut(1, criterion, 0.5, coefficients=right),)), spec)
    for criterion, wrong in (("instruction-debiased", ()), ("hawk", (0.1,)), ("image", (0.1,))):
        with pytest.raises(HimapError, match=f"has {len(wrong)} coefficients for {criterion}") as found:
            require_scores(PruningPlan((Cut(1, criterion, 0.5, coefficients=wrong),)), spec)
        assert found.value.code == Exit.USAGE
    with pytest.raises(HimapError, match="`coefficients` of the cut k1 are not finite"):
        PruningPlan((Cut(1, "hawk", 0.5, coefficients=(float("nan"),)),)).check(4)
    fitted = PruningPlan((Cut(1, "instruction-debiased", 0.5, coefficients=(0.1,)),))
    assert fitted.ranked_by("random").cuts == (Cut(1, "random", 0.5),)  # a baseline weighs with nothing


def test_kept_by_number() -> None:
    assert PruningPlan((Cut(3, "boundary", keep=100),)).kept(576) == (576, 100)
    assert PruningPlan((Cut(3, "boundary", keep=0),)).kept(576) == (576, 0)
    with pytest.raises(HimapError, match="keeps 600 image tokens"):
        PruningPlan((Cut(3, "boundary", keep=600),)).kept(576)
    with pytest.raises(HimapError, match="finds no image token"):
        PruningPlan((Cut(3, "boundary", keep=0), Cut(4, "image", 0.5))).kept(576)


@pytest.mark.parametrize("images", [1, 2, 3, 5])
def test_a_quota_keeps_as_many_of_each_picture(images: int) -> None:
    """Fractions and numbers are of each; ranked together, of all: floor(0.3 * 20) is not twice floor(0.3 * 10)."""
    cuts = (Cut(2, "last", 0.35), Cut(3, "last", keep=4), Cut(4, "last", 0.5))
    each = PruningPlan(cuts, quota="per-image")
    assert each.kept(10, images) == tuple(images * n for n in each.kept(10)) == tuple(images * n for n in (10, 7, 4, 2))
    all_of_them = 10 * images - math.floor(0.35 * 10 * images)
    assert PruningPlan(cuts).kept(10, images) == (10 * images, all_of_them, 4, 2)
    with pytest.raises(HimapError, match="keeps 8 image tokens"):
        PruningPlan((Cut(2, "last", keep=8), Cut(3, "last", 0.5)), quota="per-image").kept(7, images)
    for quota in ("prompt", "per-image"):
        assert PruningPlan((Cut(2, "last", keep=0),), quota=quota).kept(10, images) == (10 * images, 0)


def test_paper_flops_by_hand() -> None:
    """4nd^2 + 2n^2 d + 2ndm for n = 3, d = 8, m = 5."""
    assert paper_flops(3, DecoderSpec(1, 8, 5, 4, 2, 2, 10)) == 4 * 3 * 64 + 2 * 9 * 8 + 2 * 3 * 8 * 5


@given(plans(), specs(), st.integers(1, 1000), st.integers(1, 500))
def test_ratios_are_fractions_and_text_raises_the_true_one(
    plan: PruningPlan, spec: DecoderSpec, image_tokens: int, text: int
) -> None:
    visual = plan.kept(image_tokens)
    paper, true = paper_ratio(spec, plan, visual), true_ratio(spec, plan, visual, text)
    removes = plan.kept(image_tokens) != (image_tokens,) * 3
    assert (0 < paper < 1 and 0 < true < 1) if removes else paper == true == 1
    assert true_ratio(spec, plan, visual, text + 100) >= true


@given(plans(), specs(), st.integers(1, 1000), st.integers(1, 500), st.integers(1, 8), st.sampled_from(list(BYTES)))
def test_costs_of_the_stages_add_up_to_the_ratio(
    plan: PruningPlan, spec: DecoderSpec, image_tokens: int, text: int, batch: int, dtype: Dtype
) -> None:
    budget = TokenBudget(plan.kept(image_tokens), text, 16, batch)
    costs = stage_costs(spec, plan, budget, dtype)
    assert [cost.name for cost in costs] == ["prefix", "k1", "k2"]
    assert tuple(cost.tokens for cost in costs) == budget.total
    assert tuple(cost.image_tokens for cost in costs) == budget.visual
    unpruned = batch * spec.layers * layer_flops(image_tokens + text, spec)
    assert math.isclose(
        sum(cost.flops for cost in costs) / unpruned, true_ratio(spec, plan, plan.kept(image_tokens), text)
    )
    cache = sum(len(cost.layers) * c for cost, c in zip(costs, budget.capacity, strict=True))
    assert sum(cost.kv_bytes for cost in costs) == 2 * batch * cache * spec.kv_heads * spec.head_dim * BYTES[dtype]
