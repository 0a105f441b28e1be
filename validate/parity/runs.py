"""The same prompts through both: first PyTorch's reference, then the bundle's engines, told what the reference kept.

Behind a cut at which the engines keep other tokens, the reference's are forced, by writing the score that crosses the
stage boundary: what lies behind is compared on the same tokens. Decode is compared behind the reference's answer.

Letters as in docs/architecture.md: b prompts, S tokens, V image tokens, D hidden, W vocabulary, N tokens of an answer.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from himap_export.engines.arrays import Inputs
from himap_export.engines.fitting import batches
from himap_export.engines.layout import PromptLayout
from himap_export.engines.pipeline import Pipeline
from himap_export.graphs.errors import HimapError
from himap_export.graphs.plan import PruningPlan, Visual
from himap_export.graphs.ports import Place
from himap_export.graphs.spec import IMAGE
from himap_export.validate.parity.tensors import Floats, Integers, Tensors
from himap_export.validate.reference.criteria import ReferenceCut
from himap_export.validate.reference.reference import Reference

UNDRAWN = -1  # the token that follows logits which are no numbers: no token's id


@dataclass(frozen=True)
class Prompts:
    """One batch, and the seeds [b] by which its random cuts draw."""

    inputs: Inputs
    seeds: Integers

    def __len__(self) -> int:
        return len(self.inputs.input_ids)


@dataclass(frozen=True)
class ReferenceRun:
    """What the reference computes: its `tensors`, per cut the positions `kept` [b,S_i] (-1 pads), its answer [b,N]."""

    tensors: Tensors
    kept: tuple[Integers, ...]
    reference_tokens: Integers


@dataclass(frozen=True)
class RankedCut:
    """What the engines did at one cut, before anything was forced: the positions `kept` [b,S_i] (-1 pads), and of each
    prompt those of its `candidates` [V], the image tokens before the cut. `ranked`: among how many sets of them, 0 if
    none had to leave."""

    name: str
    kept: Integers
    candidates: tuple[Integers, ...]
    ranked: int


@dataclass(frozen=True)
class EngineRun:
    """What the engines compute: tensors by the names of the reference's, the cuts, and their own answer [b,N]."""

    tensors: Tensors
    cuts: tuple[RankedCut, ...]
    engine_tokens: Integers


def batched(inputs: Inputs, pipeline: Pipeline) -> list[Prompts]:
    """Returns `inputs` in batches of the pipeline's; prompt n draws by seed n. HimapError (usage) for one that it does
    not take."""
    found = list[Prompts]()
    for batch in batches(inputs, pipeline.spec):
        first = sum(map(len, found))
        found.append(Prompts(batch, np.arange(first, first + len(batch.input_ids))))
        _load(pipeline, found[-1])  # refused now, not behind a model
    return found


def _load(pipeline: Pipeline, prompts: Prompts) -> PromptLayout:
    inputs = prompts.inputs
    return pipeline.load(
        inputs.input_ids, inputs.pixel_values, inputs.attention_mask, seeds=prompts.seeds, seconds=inputs.seconds
    )


def reference_cuts(plan: PruningPlan, visual: Visual, images: int = 1) -> tuple[ReferenceCut, ...]:
    """Returns the plan in the reference's words, for prompts of so many `images`; it rounds for itself unless the
    budget keeps more than the plan asks for."""
    aligned = plan.kept(visual[0] // images, images) != visual
    ranked = images if plan.quota == "per-image" else 1
    counts = visual[1:] if aligned else [None if cut.keep is None else ranked * cut.keep for cut in plan.cuts]
    return tuple(
        ReferenceCut(
            cut.layer, cut.criterion, cut.remove or 0.0, keep=keep, coefficients=cut.coefficients, images=ranked
        )
        for cut, keep in zip(plan.cuts, counts, strict=True)
    )  # fmt: skip


def run_reference(
    reference: Reference, pipeline: Pipeline, prompts: Prompts, new_tokens: int, same: ReferenceRun | None = None
) -> ReferenceRun:
    """Returns what `reference` computes of what `pipeline` does, its answer of at most `new_tokens`.

    `same`: another dtype's run, whose kept tokens and answer are taken instead of its own.
    """
    arrays = prompts.inputs.input_ids, prompts.inputs.pixel_values, prompts.inputs.attention_mask
    budget = pipeline.spec.budget
    cuts = reference_cuts(pipeline.spec.plan, budget.visual, budget.images)
    seeds = prompts.seeds.tolist()
    start = reference.prefill(
        *arrays, cuts=cuts, forced=same.kept if same else None, seeds=seeds, seconds=prompts.inputs.seconds
    )  # fmt: skip
    tokens, logits = reference.answer(start, new_tokens, same.reference_tokens if same else None)
    seen = reference.image_features(prompts.inputs.pixel_values, len(prompts))
    tensors: dict[str, list[Floats]] = {
        name: list(features.float().cpu().numpy()) for name, features in zip(_vision(pipeline), seen, strict=True)
    }
    for stage, name in enumerate(pipeline.stages):
        if Place("score", cut=stage) in pipeline.tensors:
            tensors[f"score {name}"] = list(start.scores[stage - 1])
        tensors[name] = list(start.hidden[stage])
    tensors["logits"] = list(start.logits)
    if tokens.shape[1] > 1:
        tensors["decode"] = list(logits[:, 1:])
    return ReferenceRun(tensors, start.kept, tokens)


def save_run(file: Path, run: ReferenceRun) -> None:
    """Writes `run` for `load_run`."""
    arrays: dict[str, Any] = {f"{n}/{row}": array for n, rows in run.tensors.items() for row, array in enumerate(rows)}
    arrays |= {f"kept/{cut}": positions for cut, positions in enumerate(run.kept)}
    np.savez(file, **arrays, tokens=run.reference_tokens)


def load_run(file: Path) -> ReferenceRun:
    """Returns what `save_run` wrote."""
    tensors, kept = dict[str, list[Floats]](), list[Integers]()
    with np.load(file) as arrays:
        for key in arrays.files[:-1]:  # in the order of writing, the tokens last
            name = key.partition("/")[0]
            (kept if name == "kept" else tensors.setdefault(name, [])).append(arrays[key])
        return ReferenceRun(tensors, tuple(kept), arrays["tokens"])


def run_engine(pipeline: Pipeline, prompts: Prompts, reference: ReferenceRun, new_tokens: int) -> EngineRun:
    """Returns what `pipeline` computes of `prompts`, stage by stage, with the kept tokens of `reference` forced behind
    every cut at which its own are others."""
    layout, rows = _load(pipeline, prompts), len(prompts)
    tensors = {name: list(pipeline.read(*place)[:rows].copy()) for name, place in _vision(pipeline).items()}
    cuts: list[RankedCut] = []
    for stage, name in enumerate(pipeline.stages):
        pipeline.run(name)
        if stage > 0:
            cut, scores = _cut(pipeline, stage, reference.kept[stage - 1])
            cuts.append(cut)
            tensors |= {f"score {name}": scores} if scores else {}
        last = name == pipeline.stages[-1]
        hidden = pipeline.read("last_hidden") if last else pipeline.read("hidden", cut=stage + 1)
        tensors[name] = [hidden[row, : len(tokens)].copy() for row, tokens in enumerate(reference.tensors[name])]
    tensors["logits"] = list(pipeline.read("logits")[:rows].copy())
    engine_tokens = greedy_answer(pipeline, layout, rows, new_tokens)
    if reference.reference_tokens.shape[1] > 1:
        tensors["decode"] = replayed(pipeline, layout, reference.reference_tokens)
    return EngineRun(tensors, tuple(cuts), engine_tokens)


def _cut(pipeline: Pipeline, stage: int, expected: Integers) -> tuple[RankedCut, list[Floats]]:
    """What opened `stage`, and the scores [V] of each prompt that decided it, none if nothing had to leave. Forces what
    the reference kept, the positions `expected`, and runs the stage again, if image tokens differ."""
    name, score, rows = pipeline.stages[stage], pipeline.tensors.get(Place("score", cut=stage)), len(expected)
    read = Place("kept_types", cut=stage - 1), Place("kept_positions", cut=stage - 1)
    if stage == 1:
        read = Place("token_type"), Place("position_ids")
    types, positions = (pipeline.read(*place)[:rows] for place in read)
    images = [row == IMAGE for row in types]  # [S] each
    candidates = tuple(row[image] for row, image in zip(positions, images, strict=True))
    kept = pipeline.kept(stage)[:rows]
    sets = pipeline.spec.budget.images if pipeline.spec.plan.quota == "per-image" else 1
    cut = RankedCut(name, kept, candidates, 0 if score is None else sets)
    if score is None:
        return cut, []
    scores = score.read()
    found = [scores[row][image] for row, image in enumerate(images)]
    chosen = [np.isin(tokens, row) for tokens, row in zip(candidates, expected, strict=True)]
    if any((np.isin(c, k) != e).any() for c, k, e in zip(candidates, kept, chosen, strict=True)):
        for row, image in enumerate(images):  # 1 for what the reference kept, 0 for the other image tokens
            scores[row][image] = chosen[row]
        score.write(scores)
        pipeline.run(name)
    return cut, found


def greedy_answer(pipeline: Pipeline, layout: PromptLayout, rows: int, new_tokens: int) -> Integers:
    """Returns the pipeline's own greedy answer [b,N] to what it has prefilled, UNDRAWN where its logits are no
    numbers."""
    found: list[Integers] = []
    try:
        for tokens in pipeline.generate(pipeline.prefilled(rows), layout, new_tokens):
            found.append(tokens)
    except HimapError:
        if np.isfinite(pipeline.read("logits")[:rows]).all():
            raise
        found.append(np.full(rows, UNDRAWN))
    return np.stack(found, axis=1)


def replayed(pipeline: Pipeline, layout: PromptLayout, tokens: Integers) -> list[Floats]:
    """Returns logits [N-1,W] of each prompt behind every prefix of `tokens` [b,N], the whole excepted.

    Needs no new prefill: decode writes a token's slot before it reads it, and sees none beyond.
    """
    rows, batch = len(tokens), len(layout.lengths)
    steps = [
        pipeline.step(np.resize(column, batch), layout.lengths + n)[:rows].copy()
        for n, column in enumerate(tokens.T[:-1])
    ]
    return list(np.stack(steps, axis=1))


def _vision(pipeline: Pipeline) -> dict[str, Place]:
    """The vision graph's outputs by their names in a comparison."""
    deepstack = range(pipeline.manifest.decoder.deepstack)
    return {"vision": Place("image_features")} | {f"vision {i}": Place("deepstack", i) for i in deepstack}
