"""Arithmetic of a plan before anything is built: FLOPs by the paper and in truth, KV bytes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import Cut, PruningPlan, TokenBudget, Visual
from himap_export.graphs.spec import DecoderSpec, Dtype, image_blocks, stage_layers

BYTES: dict[Dtype, int] = {"fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class StageCost:
    """One row of the plan: what a stage holds and what its prefill costs, over the whole batch."""

    name: str
    layers: range
    tokens: int
    image_tokens: int
    kv_bytes: int
    flops: int


def paper_flops(tokens: int, spec: DecoderSpec) -> int:
    """Returns a layer's FLOPs by the paper's equation 10, `4nd^2 + 2n^2 d + 2ndm`: image tokens, two FFN matrices."""
    n, d, m = tokens, spec.hidden, spec.ffn
    return 4 * n * d * d + 2 * n * n * d + 2 * n * d * m


def layer_flops(tokens: int, spec: DecoderSpec) -> int:
    """Returns a layer's FLOPs in truth, for S `tokens`: a multiply-add counts 2, full S x S attention as kernels do."""
    s, d, e = tokens, spec.hidden, spec.head_dim
    projections = 2 * s * d * e * (2 * spec.heads + 2 * spec.kv_heads)
    attention = 2 * 2 * s * s * spec.heads * e
    return projections + attention + 2 * 3 * s * d * spec.ffn


# A criterion's own multiply-adds count 2, over S `tokens` of which V are of the image: products with the keys of the
# rows that it looks at (T, V or 1), or what it does to each token. One's own criteria are not counted.
_SCORING: Mapping[str, Callable[[DecoderSpec, int, int], int]] = {
    "instruction": lambda spec, s, v: _rows_flops(spec, s, s - v),
    "instruction-debiased": lambda spec, s, v: _rows_flops(spec, s, s - v),
    "image": lambda spec, s, v: sum(_rows_flops(spec, seen, b - a) for a, b, seen in image_blocks(v, s - v)),
    "last": lambda spec, s, v: _rows_flops(spec, s, 1),
    "boundary": lambda spec, s, v: _rows_flops(spec, s, 1),
    "random": lambda spec, s, v: 0,
    "uniform": lambda spec, s, v: 0,
    "key-norm": lambda spec, s, v: 2 * s * spec.kv_heads * spec.head_dim,
    "v2drop": lambda spec, s, v: 3 * s * spec.hidden,
    "hawk": lambda spec, s, v: 2 * _rows_flops(spec, s, 1),  # the mean query, then one row
    "dart": lambda spec, s, v: 2 * s * (spec.kv_heads * spec.head_dim + (8 + 1) * spec.hidden),
}


def _rows_flops(spec: DecoderSpec, tokens: int, rows: int) -> int:
    return 2 * rows * tokens * spec.heads * spec.head_dim


def scoring_flops(spec: DecoderSpec, plan: PruningPlan, budget: TokenBudget) -> tuple[int | None, ...]:
    """Returns what each cut's ranking costs of a prefill, over the whole batch; 0 where nothing leaves, None for a
    criterion of one's own."""
    rows = zip(plan.cuts, budget.total, budget.visual, budget.visual[1:], strict=False)
    return tuple(
        0 if after == before
        else budget.batch * _SCORING[cut.criterion](spec, tokens, before) if cut.criterion in _SCORING
        else None
        for cut, tokens, before, after in rows
    )  # fmt: skip


def stage_costs(spec: DecoderSpec, plan: PruningPlan, budget: TokenBudget, dtype: Dtype) -> tuple[StageCost, ...]:
    """Returns one row per stage. KV bytes count the whole static cache of C_i tokens."""
    kv_token = 2 * spec.kv_heads * spec.head_dim * BYTES[dtype]
    rows = zip(plan.stages, stage_layers(plan, spec.layers), budget.total, budget.visual, budget.capacity, strict=True)
    return tuple(
        StageCost(
            name=name,
            layers=layers,
            tokens=tokens,
            image_tokens=visual,
            kv_bytes=budget.batch * len(layers) * capacity * kv_token,
            flops=budget.batch * len(layers) * layer_flops(tokens, spec),
        )
        for name, layers, tokens, visual, capacity in rows
    )


def paper_ratio(spec: DecoderSpec, plan: PruningPlan, visual: Visual) -> float:
    """Returns FLOPs of the pruned over the unpruned decoder as the paper counts (LLaVA-7B, default plan: 0.246)."""
    stages = zip(stage_layers(plan, spec.layers), visual, strict=True)
    pruned = sum(len(layers) * paper_flops(n, spec) for layers, n in stages)
    return pruned / (spec.layers * paper_flops(visual[0], spec))


def true_ratio(spec: DecoderSpec, plan: PruningPlan, visual: Visual, text_tokens: int) -> float:
    """Returns FLOPs of the pruned over the unpruned decoder prefill, with text tokens and all three FFN matrices."""
    stages = zip(stage_layers(plan, spec.layers), visual, strict=True)
    pruned = sum(len(layers) * layer_flops(n + text_tokens, spec) for layers, n in stages)
    return pruned / (spec.layers * layer_flops(visual[0] + text_tokens, spec))


def equal_keep(spec: DecoderSpec, layer: int, image_tokens: int, text_tokens: int, ratio: float) -> int:
    """Returns how many image tokens one cut at `layer` may keep so that `true_ratio` comes nearest to `ratio`.

    HimapError (usage) if the layers before the cut alone cost more.
    """
    if layer / spec.layers > ratio:
        details = f"its first {layer} of {spec.layers} layers alone take {layer / spec.layers:.0%}"
        raise HimapError(f"one cut at layer {layer} cannot keep {ratio:.0%} of the FLOPs", details, code=Exit.USAGE)
    plan = PruningPlan((Cut(layer, "last", keep=0),))
    counts = range(image_tokens + 1)
    return min(counts, key=lambda n: abs(true_ratio(spec, plan, (image_tokens, n), text_tokens) - ratio))
