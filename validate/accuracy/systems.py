"""Who answers a data set: the bundle's plans on its backend, and beside each the baselines at equal FLOPs.

The baselines are bundles like any other: the same model, budgets, backend and cuts, ranked by nothing (random, uniform)
or not cut at all (none); of a quantised bundle, with its weights, and beside them the unpruned model before rounding
(original). They are exported into a temporary folder for as long as the comparison lasts.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from himap_export.engines.arrays import Inputs
from himap_export.engines.backends import Opening
from himap_export.engines.layout import Integers
from himap_export.engines.pipeline import Pipeline
from himap_export.engines.prefill import Seen
from himap_export.engines.scratch import scratch_folder
from himap_export.graphs.flops import true_ratio
from himap_export.graphs.plan import Criterion, PruningPlan
from himap_export.validate.baseline import Kept, export_baseline

CHANCE: tuple[Criterion, ...] = ("random", "uniform")
UNPRUNED, ORIGINAL = "none", "original"
SeenBefore = MutableMapping[tuple[object, ...], Seen]  # by tower and the numbers of examples


@dataclass(frozen=True)
class PlanSystem:
    """One plan on its pipeline; `seed` is one of the repetitions of a random plan, and 0 for all others."""

    name: str
    seed: int
    pipeline: Pipeline
    new_tokens: int
    baselines: tuple[str, ...] = ()  # whom it is compared with

    @property
    def batch(self) -> int:
        return self.pipeline.spec.budget.batch

    @property
    def flops(self) -> float:
        """Of the unpruned decoder's prefill, the text budget filled."""
        run = self.pipeline.spec
        return true_ratio(run.manifest.decoder, run.plan, run.budget.visual, run.budget.text)

    def answer(self, inputs: Sequence[Inputs], numbers: Sequence[int], seen: SeenBefore) -> list[list[int]]:
        """Returns greedy tokens of up to `batch` prompts, each of one sample; random cuts draw by seed and example
        number. An image that a system of the same tower has `seen` is not looked at again; what is new is added."""
        run = self.pipeline.spec
        key = self.pipeline.backend, run.manifest.dtype, run.image, self.batch, *numbers
        ids, mask = padded(inputs)
        image = seen.get(key) or np.concatenate([i.pixel_values for i in inputs])
        seeds = np.array([request_seed(self.seed, n) for n in numbers], np.int64)
        prefilled, layout = self.pipeline.prefill(ids, image, mask, seeds)
        if key not in seen:
            seen[key] = self.pipeline.seen()
        tokens = np.stack(list(self.pipeline.generate(prefilled, layout, self.new_tokens)), axis=1)
        return [row.tolist() for row in tokens]


def padded(inputs: Sequence[Inputs]) -> tuple[Integers, Integers]:
    """Returns the ids of prompts of one sample each as one batch, [b,S], and the mask of those that are theirs."""
    width = max(i.input_ids.shape[1] for i in inputs)
    ids, mask = np.zeros((len(inputs), width), np.int64), np.zeros((len(inputs), width), np.int64)
    for row, i in enumerate(inputs):
        length = i.input_ids.shape[1]
        ids[row, :length], mask[row, :length] = i.input_ids[0], 1
    return ids, mask


def request_seed(seed: int, number: int) -> int:
    """Returns what the random cuts of example `number` draw by in repetition `seed`: 32 bits, unlike those of any
    neighbour."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def missing_baselines(plans: Mapping[str, Kept]) -> dict[str, Kept]:
    """Returns the baselines that `plans`, by name, lack: none, and for each plan that ranks, random and uniform at its
    cuts."""
    unpruned = PruningPlan(), next(iter(plans.values()))[1][:1]
    judged = {name: kept for name, kept in plans.items() if kept[0].policy not in (*CHANCE, UNPRUNED)}
    wanted = {UNPRUNED: unpruned}
    for name, (plan, visual) in judged.items():
        for baseline in CHANCE:
            wanted[baseline if len(judged) == 1 else f"{baseline}-{name}"] = plan.ranked_by(baseline), visual
    found: dict[str, Kept] = {}
    for name, kept in wanted.items():
        if kept not in (*plans.values(), *found.values()):
            found[name] = kept
    return found


@contextmanager
def open_systems(
    first: Pipeline,
    checkpoint: Path,
    opening: Opening,
    names: Sequence[str],
    *,
    seeds: int,
    new_tokens: int,
    vision_tower: Path | None = None,
    original: bool = False,
) -> Iterator[list[PlanSystem]]:
    """Yields the plans `names` of a bundle and their baselines, random ones `seeds` times, with the `original` model if
    they are quantised; `first` is open at the first plan.

    All are at the text budget and on the backend of `first`. `vision_tower` as for `export_baseline`.
    """
    run, backend = first.spec, first.backend
    here = [run.bundle.select(name, run.budget.text) for name in names]
    plans = {r.plan_name: (r.plan, r.budget.visual) for r in here}
    with scratch_folder("baselines") as folder:
        pipelines = [first, *(Pipeline(r, backend, opening, first) for r in here[1:])]
        if baselines := missing_baselines(plans):
            baseline = export_baseline(
                checkpoint, run.budget, dtype=run.manifest.dtype, backend=backend, plans=baselines,
                out=folder / "bundle", image=run.image, vision_tower=vision_tower, beside=run.bundle,
            )  # fmt: skip
            beside: list[Pipeline] = []
            for name in baselines:  # over one copy of the weights
                beside.append(Pipeline(baseline.select(name), backend, opening, beside[0] if beside else None))
            pipelines += beside
        if original:
            unrounded = export_baseline(
                checkpoint, run.budget, dtype=run.manifest.dtype, backend=backend,
                plans={ORIGINAL: (PruningPlan(), run.budget.visual[:1])}, out=folder / "original", image=run.image,
                vision_tower=vision_tower,
            )  # fmt: skip
            pipelines.append(Pipeline(unrounded.select(), backend, opening))
        everyone = {p.spec.plan_name: (p.spec.plan, p.spec.budget.visual) for p in pipelines}
        yield [
            PlanSystem(name, seed, pipeline=p, new_tokens=new_tokens, baselines=_baselines(name, everyone))
            for p in pipelines
            for name in [p.spec.plan_name]
            for seed in range(seeds if p.spec.plan.policy == "random" else 1)
        ]


def _baselines(name: str, everyone: Mapping[str, Kept]) -> tuple[str, ...]:
    """The unpruned model and, for a plan that ranks, whoever keeps as many tokens at the same cuts by chance."""
    if name == ORIGINAL:
        return ()
    plan, visual = everyone[name]
    chance = (plan.ranked_by("random"), visual)
    ranks = plan.policy not in (*CHANCE, UNPRUNED)
    found = [other for other, kept in everyone.items() if not kept[0].cuts or (ranks and kept == chance)]
    return tuple(other for other in found if other != name)
