"""From what the user asked to what will be built: model, plans, budgets, dtype. Needs no weights."""

from dataclasses import dataclass
from typing import Any, get_args

from himap_export.engines.backends import Gather
from himap_export.engines.manifest import WeightForm
from himap_export.exporter import llava
from himap_export.exporter.plans import KEYS, flag_plans, named_plans
from himap_export.exporter.registry import Model
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.flops import StageCost, paper_ratio, stage_costs, true_ratio
from himap_export.graphs.plan import PruningPlan, TokenBudget, Visual, align
from himap_export.graphs.spec import DecoderSpec, Dtype


@dataclass(frozen=True)
class Request:
    """The command's arguments; None where the user left the choice to us.

    `plans` holds names of the authors' tasks and TOML files; empty: each of `policies` (none named: himap), the
    `task`'s cuts changed by `k1`, `k2`, `r1`, `r2`, `keep`.
    """

    task: str = "qa"
    policies: tuple[str, ...] = ()
    k1: int | None = None
    k2: int | None = None
    r1: float | None = None
    r2: float | None = None
    keep: int | None = None
    plans: tuple[str, ...] = ()
    text_budgets: tuple[int, ...] = (192,)
    max_new_tokens: int = 128
    batch: int = 1
    align: int | None = None
    dtype: Dtype | None = None
    backends: tuple[str, ...] = ("onnxruntime",)
    gather: Gather = "auto"
    weights: WeightForm = "shared"
    hard_link: bool = False


@dataclass(frozen=True)
class PlannedVariant:
    """One plan at one text budget; `asked` is what the plan keeps before `--align` adds to it."""

    plan_name: str
    plan: PruningPlan
    budget: TokenBudget
    asked: Visual

    @property
    def name(self) -> str:
        return f"{self.plan_name}-{self.budget.text}"


@dataclass(frozen=True)
class Planned:
    """Everything an export has decided before it touches a weight."""

    model: Model
    decoder: DecoderSpec
    vision: llava.VisionSpec
    variants: tuple[PlannedVariant, ...]
    dtype: Dtype
    backends: tuple[str, ...]
    gather: Gather = "auto"
    weights: WeightForm = "shared"
    hard_link: bool = False
    align: int | None = None

    def costs(self, v: PlannedVariant) -> tuple[StageCost, ...]:
        return stage_costs(self.decoder, v.plan, v.budget, self.dtype)

    def ratios(self, v: PlannedVariant, visual: Visual | None = None) -> tuple[float, float]:
        """FLOPs kept: as the paper counts them (image tokens only), and with the text budget filled."""
        visual = visual or v.budget.visual
        paper = paper_ratio(self.decoder, v.plan, visual)
        return paper, true_ratio(self.decoder, v.plan, visual, v.budget.text)


def plan_export(model: Model, asked: Request) -> Planned:
    """Fills in what was left open and checks the whole; HimapError (usage) for a plan that the model cannot follow."""
    dtype = asked.dtype or _own_dtype(model.config, asked.backends)
    try:
        decoder, vision = llava.decoder_spec(model.config), llava.vision_spec(model.config)
    except HimapError:
        raise
    except Exception as problem:  # transformers checks a configuration with errors of many kinds
        hint = "is it a LLaVA configuration in Hugging Face format?"
        raise HimapError(f"{model.name}: unusable config.json", str(problem), hint, Exit.USAGE) from None
    variants = []
    for name, plan in _plans(asked).items():
        kept = plan.check(decoder.layers).kept(vision.tokens)
        for text in dict.fromkeys(asked.text_budgets):
            visual = align(kept, text, asked.align) if asked.align is not None else kept
            budget = TokenBudget(visual, text, asked.max_new_tokens, asked.batch)
            _check_positions(model.config, budget)
            variants.append(PlannedVariant(name, plan, budget, kept))
    return Planned(
        model, decoder, vision, tuple(variants), dtype, asked.backends, asked.gather, asked.weights, asked.hard_link,
        asked.align,
    )  # fmt: skip


def _plans(asked: Request) -> dict[str, PruningPlan]:
    """Every plan by its name, in the order asked for."""
    values = {key: value for key in KEYS if (value := getattr(asked, key)) is not None}
    if not asked.plans:
        return flag_plans(asked.policies or ("himap",), asked.task, values)
    given = [*values, *(["policy"] if asked.policies else [])]
    if given:
        hint = "with --plan, write the plan into a TOML file"
        raise HimapError(f"--{given[0]} changes one plan only", hint=hint, code=Exit.USAGE)
    return named_plans(asked.plans)


def _check_positions(config: dict[str, Any], budget: TokenBudget) -> None:
    """LlamaConfig's default is 2048; LLaVA-1.5's checkpoints say 4096."""
    limit, needed = config.get("text_config", {}).get("max_position_embeddings", 2048), budget.capacity[0]
    if needed > limit:
        details = f"image, text and new tokens take {needed} positions, the model has {limit}"
        raise HimapError("the budgets are too long", details, "lower --text-budget or --max-new-tokens", Exit.USAGE)


def _own_dtype(config: dict[str, Any], backends: tuple[str, ...]) -> Dtype:
    """The checkpoint's own; but fp16 for fp32 weights on TensorRT, which has no fused attention in fp32."""
    names: dict[str, Dtype] = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    text = config.get("text_config", {})
    stored = (
        config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype") or "float16"
    )
    if stored not in names:
        raise HimapError(
            f"unsupported dtype {stored} in config.json", f"use --dtype {'|'.join(get_args(Dtype))}", code=Exit.USAGE
        )
    own = names[stored]
    return "fp16" if own == "fp32" and any(b.startswith("tensorrt") for b in backends) else own
