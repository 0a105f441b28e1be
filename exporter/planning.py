"""From what the user asked to what will be built: model, plan, budget, dtype. Needs no weights."""

from dataclasses import dataclass
from typing import Any, get_args

from himap_export.exporter import llava
from himap_export.exporter.registry import Model
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.flops import StageCost, paper_ratio, stage_costs, true_ratio
from himap_export.graphs.plan import TASKS, PruningPlan, TokenBudget
from himap_export.graphs.spec import DecoderSpec, Dtype


@dataclass(frozen=True)
class Request:
    """The command's arguments; None where the user left the choice to us."""

    task: str = "qa"
    k1: int | None = None
    k2: int | None = None
    r1: float | None = None
    r2: float | None = None
    text_budget: int = 192
    max_new_tokens: int = 128
    batch: int = 1
    dtype: Dtype | None = None
    backends: tuple[str, ...] = ("onnxruntime",)


@dataclass(frozen=True)
class Planned:
    """Everything an export has decided before it touches a weight."""

    model: Model
    decoder: DecoderSpec
    vision: llava.VisionSpec
    plan: PruningPlan
    budget: TokenBudget
    dtype: Dtype
    backends: tuple[str, ...]

    @property
    def costs(self) -> tuple[StageCost, ...]:
        return stage_costs(self.decoder, self.plan, self.budget, self.dtype)

    @property
    def ratios(self) -> tuple[float, float]:
        """FLOPs kept: as the paper counts them (image tokens only), and with the text budget filled."""
        visual = self.budget.visual[0]
        return (
            paper_ratio(self.decoder, self.plan, visual),
            true_ratio(self.decoder, self.plan, visual, self.budget.text),
        )


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
    default = TASKS[asked.task]
    chosen = {name: getattr(asked, name) for name in ("k1", "k2", "r1", "r2")}
    plan = PruningPlan(**{n: getattr(default, n) if v is None else v for n, v in chosen.items()}).check(decoder.layers)
    budget = TokenBudget(plan.kept(vision.tokens), asked.text_budget, asked.max_new_tokens, asked.batch)
    _check_positions(model.config, budget)
    return Planned(model, decoder, vision, plan, budget, dtype, asked.backends)


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
