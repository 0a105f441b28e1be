"""From what the user asked to what will be built: model, plans, budgets, dtype. Needs no weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, get_args

import msgspec

from himap_export.engines.backends import READ_GRAPHS, Gather, check_forms, load_backend
from himap_export.engines.bundle import Bundle
from himap_export.engines.choice import best_backend
from himap_export.engines.documents import typed
from himap_export.engines.manifest import WeightForm
from himap_export.engines.split import MAX_PIXELS, MAX_SIDE
from himap_export.exporter.checks import require
from himap_export.exporter.family import ImageOptions, PromptRules, VisionSpec
from himap_export.exporter.plans import KEYS, Source, flag_plans, named_plans
from himap_export.exporter.quantize.floats import FLOATS
from himap_export.exporter.quantize.forms import plan_forms
from himap_export.exporter.registry import Model
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.flops import StageCost, paper_ratio, scoring_flops, stage_costs, true_ratio
from himap_export.graphs.importance import require_scores
from himap_export.graphs.plan import MOST_FRAMES, MOST_IMAGES, PruningPlan, Quota, TokenBudget, Visual, align
from himap_export.graphs.ports import Kind, LinearForm
from himap_export.graphs.spec import DecoderSpec, Dtype

MOST_TOKENS = 2**20  # of a picture; the longest contexts have a few million
MOST_VARIANTS = 256  # each has graphs of its own, seconds to build


@dataclass(frozen=True)
class Request:
    """What an export is asked for; None, or nothing, where the user left the choice to us. `image_sizes` are (height,
    width); `images`: how many a prompt may hold, a variant for each; `frames`: of a film, instead of images.

    `plans` holds names of the authors' tasks, TOML files, plans and plans by name; empty: each of `policies` (none
    named: himap), the `task`'s cuts changed by `k1`, `k2`, `r1`, `r2`, `keep`.
    """

    task: str = "qa"
    policies: tuple[str, ...] = ()
    k1: int | None = None
    k2: int | None = None
    r1: float | None = None
    r2: float | None = None
    keep: int | None = None
    plans: tuple[Source, ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()
    tiles: int | None = None
    images: tuple[int, ...] = (1,)
    frames: int | None = None
    quota: Quota | None = None
    text_budgets: tuple[int, ...] = (192,)
    max_new_tokens: int = 128
    batch: int = 1
    slots: int = 0
    align: int | None = None
    dtype: Dtype | None = None
    backends: tuple[str, ...] = ()
    gather: Gather = "auto"
    weight_form: WeightForm | None = None
    hard_link: bool = False
    allow_overflow: bool = False
    quantize: Kind | None = None
    block: int | None = None
    keep_dtype: tuple[str, ...] = ()
    quantize_head: bool = False
    calibrate: Path | None = None


@dataclass(frozen=True)
class PlannedVariant:
    """One plan at one text budget for images as `vision` says; `asked` is what the plan keeps before `--align` adds
    to it."""

    plan_name: str
    plan: PruningPlan
    budget: TokenBudget
    asked: Visual
    vision: VisionSpec

    @property
    def image(self) -> str:
        """The name of the image spec."""
        return self.vision.name


@dataclass(frozen=True)
class Planned:
    """Everything an export has decided before it touches a weight. `why`: what speaks for a backend of our choice.
    `forms`: of the weights that are quantised, by role; of a checkpoint that comes quantised, only its tensors say.
    `weights_of`: another bundle of the model, whose weights are taken as they are."""

    model: Model
    decoder: DecoderSpec
    variants: tuple[PlannedVariant, ...]
    dtype: Dtype
    asked: Request
    weight_form: WeightForm = "shared"
    forms: Mapping[str, LinearForm] = field(default_factory=dict)
    weights_of: Bundle | None = None
    why: str = ""

    @property
    def images(self) -> dict[str, VisionSpec]:
        """What the vision graphs see, by the name of the image spec."""
        return {v.image: v.vision for v in self.variants}

    def variant_name(self, v: PlannedVariant) -> str:
        """Returns a name that no other variant has: the plan, its text budget, and the image and the number of them if
        there are several."""
        counts = {other.budget.images for other in self.variants}
        image = f"-{v.image}" if len(self.images) > 1 else ""
        return f"{v.plan_name}-{v.budget.text}{image}" + (f"-{v.budget.images}-images" if len(counts) > 1 else "")

    def costs(self, v: PlannedVariant) -> tuple[StageCost, ...]:
        """Returns what each stage holds and what its prefill costs."""
        return stage_costs(self.decoder, v.plan, v.budget, self.dtype)

    def scoring(self, v: PlannedVariant) -> tuple[float | None, ...]:
        """Returns the share of the prefill's FLOPs that each cut's ranking takes; None of a criterion of one's own."""
        prefill = sum(cost.flops for cost in self.costs(v))
        return tuple(n if n is None else n / prefill for n in scoring_flops(self.decoder, v.plan, v.budget))

    def ratios(self, v: PlannedVariant, visual: Visual | None = None) -> tuple[float, float]:
        """Returns the share of FLOPs kept: as the paper counts (image tokens only), and with the text budget filled."""
        visual = visual or v.budget.visual
        paper = paper_ratio(self.decoder, v.plan, visual)
        return paper, true_ratio(self.decoder, v.plan, visual, v.budget.text)


def plan_export(model: Model, asked: Request) -> Planned:
    """Fills in what was left open and checks the whole; HimapError (usage) for a plan that the model cannot follow, as
    `best_backend` if that is left open."""
    choice = None if asked.backends else best_backend()
    if choice is not None:
        asked = replace(asked, backends=(choice.backend,))
    dtype = asked.dtype or _suitable_dtype(_own_dtype(model.family.fields), asked.backends)
    sizes, plans = dict.fromkeys(asked.image_sizes or (None,)), _plans(asked)
    texts, counts = dict.fromkeys(asked.text_budgets), dict.fromkeys(asked.images)
    if (count := len(sizes) * len(plans) * len(texts) * len(counts)) > MOST_VARIANTS:
        details = f"{len(sizes)} pictures, {len(plans)} plans, {len(texts)} text budgets: at most {MOST_VARIANTS}"
        raise HimapError(f"{count} variants are too many for one bundle", details, code=Exit.USAGE)
    _check_media(asked)
    kinds = [(n, ImageOptions(size, asked.tiles, asked.frames, n > 1)) for size in sizes for n in counts]
    decoder, visions = describe(model, *(options for _, options in kinds))
    variants = [
        _variant(model, asked, name=name, plan=plan.check(decoder.layers), vision=vision, images=images, text=text)
        for (images, _), vision in zip(kinds, visions, strict=True) for name, plan in plans.items() for text in texts
    ]  # fmt: skip
    for plan in plans.values():
        require_scores(plan, decoder)
    forms = plan_forms(
        decoder, dtype, kind=asked.quantize, block=asked.block, keep=asked.keep_dtype, head=asked.quantize_head
    )
    if forms and model.quantised is not None:
        details, hint = f"by {model.quantised.method}", "leave `quantize` out, or export what it was made from"
        raise HimapError(f"{model.name} comes quantised", details, hint, Exit.USAGE)
    if asked.calibrate is not None and not forms:
        raise HimapError("`calibrate` goes with `quantize`", code=Exit.USAGE)
    return Planned(
        model=model, decoder=decoder, variants=tuple(variants), dtype=dtype, asked=asked, forms=forms,
        weight_form=_weight_form(asked, forms, model.quantised is not None), why=choice.why if choice else "",
    )  # fmt: skip


def _variant(
    model: Model, asked: Request, *, name: str, plan: PruningPlan, vision: VisionSpec, images: int, text: int
) -> PlannedVariant:
    """Returns the variant of a plan for prompts of so many `images`, at one `text` budget."""
    kept = plan.kept(vision.tokens, images)
    if asked.align is not None and plan.quota == "per-image" and images > 1:
        details = "a multiple of all tokens is not one of each image's"
        raise HimapError("`align` and `quota` per-image exclude each other", details, code=Exit.USAGE)
    visual = align(kept, text, asked.align) if asked.align is not None else kept
    budget = TokenBudget(visual, text, asked.max_new_tokens, batch=asked.batch, slots=asked.slots, images=images)
    _check_positions(model, budget)
    typed(msgspec.to_builtins(budget), TokenBudget, "the budget")
    return PlannedVariant(plan_name=name, plan=plan, budget=budget, asked=kept, vision=vision)


def _check_media(asked: Request) -> None:
    """Checks how many images or frames are asked for."""
    if not asked.images or not all(1 <= n <= MOST_IMAGES for n in asked.images):
        details = f"expected 1 to {MOST_IMAGES} of them"
        raise HimapError(f"`images` {' '.join(map(str, asked.images))} does not fit", details, code=Exit.USAGE)
    if asked.frames is not None and tuple(asked.images) != (1,):
        raise HimapError("`frames` and `images` exclude each other", "a prompt holds one film", code=Exit.USAGE)
    if asked.frames is not None and not 1 <= asked.frames <= MOST_FRAMES:
        raise HimapError(f"`frames` {asked.frames} does not fit", f"expected 1 to {MOST_FRAMES}", code=Exit.USAGE)
    if asked.frames is not None and asked.tiles is not None:
        raise HimapError("`frames` and `tiles` exclude each other", "a frame is seen whole", code=Exit.USAGE)


def _weight_form(asked: Request, forms: Mapping[str, LinearForm], ready: bool) -> WeightForm:
    """Returns the form of the weights, chosen if it was left open: engines that hold constants of their own embed
    quantised ones, of `forms` or `ready`. HimapError (usage) where that form is refused, a backend has none of these
    weights, or they need what was not asked for."""
    if asked.quantize in FLOATS and asked.calibrate is None:
        details = "activations are rounded, too, on scales that are fixed beforehand"
        raise HimapError(f"{asked.quantize} weights need `calibrate`", details, code=Exit.USAGE)
    if asked.quantize == "int8-dynamic" and (asked.batch > 1 or asked.slots):
        details = "activations are rounded by one range over all prompts of a batch"
        raise HimapError("int8-dynamic weights need a `batch` of 1 and no `slots`", details, code=Exit.USAGE)
    for backend in asked.backends:
        check_forms(backend, set(forms.values()))
    quantised = ready or bool(forms)
    holding = [backend for backend in asked.backends if backend not in READ_GRAPHS]
    if quantised and (asked.weight_form == "absent" or (holding and asked.weight_form == "shared")):
        wanted = "`weight_form` embedded" if holding else "`weight_form` shared or embedded"
        details = "they are constants of the engines, packed for their kernels"
        raise HimapError("quantised weights cannot be inputs of engines", details, f"use {wanted}", Exit.USAGE)
    if quantised and asked.hard_link:
        raise HimapError("quantised weights cannot be links", hint="leave `hard_link` out", code=Exit.USAGE)
    return asked.weight_form or ("embedded" if quantised and holding else "shared")


def describe(model: Model, *images: ImageOptions) -> tuple[DecoderSpec, tuple[VisionSpec, ...]]:
    """Returns the model's decoder, and its vision graph for each of `images` (none: its own). HimapError (usage) if
    its config.json is damaged, not supported, or knows no such image."""
    family = model.family
    try:
        seen = tuple(family.vision(asked) for asked in images or (ImageOptions(),))
        decoder, rules = family.decoder(), family.prompt()
    except (HimapError, MemoryError, ModuleNotFoundError):
        raise
    except Exception as problem:  # transformers checks a configuration with errors of many kinds
        details, hint = " ".join(str(problem).split())[:300], f"is it a configuration of {family.architecture}?"
        raise HimapError(f"{model.name}: unusable config.json", details, hint, Exit.USAGE) from None
    for vision in seen:
        _check_vision(vision)
    _check_image_token(rules, decoder)
    return typed(msgspec.to_builtins(decoder), DecoderSpec, f"{model.name}: config.json"), seen


def _check_vision(vision: VisionSpec) -> None:
    """Checks the image's size before any table of that size is made."""
    (height, width), pixels = vision.size, max(vision.tiles * prod(vision.view), prod(vision.size))
    if max(height, width) > MAX_SIDE or pixels > MAX_PIXELS or not 1 <= vision.tokens <= MOST_TOKENS:
        details = f"{width}x{height} pixels in {vision.tiles} tiles, {vision.tokens} tokens"
        most = f"at most {MAX_SIDE} pixels a side, {MAX_PIXELS} in all, and 1 to {MOST_TOKENS} tokens"
        raise HimapError("no model sees such pictures", f"{details}: {most}", code=Exit.USAGE)
    require(vision.channels == 3, f"a vision tower of {vision.channels} colours, where pictures have 3")


def _check_image_token(rules: PromptRules, decoder: DecoderSpec) -> None:
    """Checks the image token's id. Those below zero are of no vocabulary: LLaVA's original layout means them so."""
    if rules.image_token >= decoder.vocab:
        details = f"it is {rules.image_token}, the vocabulary has {decoder.vocab}"
        raise HimapError("the image token of config.json is no token", details, code=Exit.USAGE)


def _plans(asked: Request) -> dict[str, PruningPlan]:
    """Returns every plan by its name, in the order asked for."""
    values = {key: value for key in KEYS if (value := getattr(asked, key)) is not None}
    flags = asked.policies or ("himap",)
    found = _named(asked, values) if asked.plans else flag_plans(flags, asked.task, values)
    if asked.quota is None:
        return found
    return {name: msgspec.structs.replace(plan, quota=asked.quota) for name, plan in found.items()}


def _named(asked: Request, values: Mapping[str, Any]) -> dict[str, PruningPlan]:
    """Returns the plans that are named, or in files; HimapError (usage) if flags would change them."""
    given = [*values, *(["policy"] if asked.policies else [])]
    if given:
        hint = "with `plan`, write the plan into a TOML file"
        raise HimapError(f"`{given[0]}` changes one plan only", hint=hint, code=Exit.USAGE)
    return named_plans(asked.plans)


def _check_positions(model: Model, budget: TokenBudget) -> None:
    limit, needed = model.family.prompt().positions, budget.capacity[0]
    if needed > limit:
        details = f"image, text and new tokens take {needed} positions, the model has {limit}"
        raise HimapError("the budgets are too long", details, "lower `text_budget` or `max_new_tokens`", Exit.USAGE)


def _own_dtype(config: dict[str, Any]) -> Dtype:
    """Returns the dtype in which the checkpoint's weights are stored. HimapError (usage) for one that is not ours."""
    names: dict[str, Dtype] = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    text = config.get("text_config", {})
    flags = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # Qwen-VL's way of saying it
    flagged = next((name for flag, name in flags.items() if config.get(flag) is True), "float16")
    stored = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype") or flagged
    if stored not in names:
        raise HimapError(
            f"unsupported dtype {stored} in config.json", f"use `dtype` {'|'.join(get_args(Dtype))}", code=Exit.USAGE
        )
    return names[stored]


def _suitable_dtype(own: Dtype, backends: tuple[str, ...]) -> Dtype:
    """Returns `own` if all `backends` compute it. If not, fp32, which holds all of fp16 and bf16; for fp32 weights, to
    which TensorRT has no fused attention, fp16. HimapError (usage) if that does not suit all of them either."""
    other: Dtype = "fp16" if own == "fp32" else "fp32"
    for dtype in (own, other):
        if all(_computes(backend, dtype) for backend in backends):
            return dtype
    refused = ", ".join(f"{b} no {dtype}" for dtype in (own, other) for b in backends if not _computes(b, dtype))
    details, hint = f"{refused}; fp16 may overflow", "export one bundle for each, or take the risk with `dtype` fp16"
    raise HimapError(f"{own} weights have no dtype that suits all backends", details, hint, Exit.USAGE)


def _computes(backend: str, dtype: Dtype) -> bool:
    """Whether a backend takes `dtype`. One that is not installed is no obstacle to a plan: the export says so."""
    try:
        load_backend(backend).check(dtype, "ops")
    except HimapError as problem:
        return problem.code == Exit.MISSING
    return True
