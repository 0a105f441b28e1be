"""A tuning: the sweep over a data set, the front, its baseline and its times, and the plan to take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from himap_export.engines.bundle import digest
from himap_export.engines.questions import Dataset, Example, expected
from himap_export.exporter.planning import describe
from himap_export.exporter.registry import resolve
from himap_export.graphs.flops import true_ratio
from himap_export.graphs.spec import Dtype
from himap_export.validate.accuracy.answers import Answered, AnswerLog, read_log
from himap_export.validate.accuracy.prompter import Prompter, prompter_of_checkpoint
from himap_export.validate.accuracy.statistics import Interval, accuracy_interval, paired_difference
from himap_export.validate.accuracy.systems import UNPRUNED
from himap_export.validate.progress import counted
from himap_export.validate.tuning.front import Choice, RankedPlan, Right, choose, rank
from himap_export.validate.tuning.grid import Candidate
from himap_export.validate.tuning.sweep import Job, sweep
from himap_export.validate.tuning.timing import Timing, measure

BASELINE = "random-"  # before a plan's name in the log: its cuts, ranked by chance


@dataclass(frozen=True)
class TuneOptions:
    """How to sweep. `keep`: the fraction of the unpruned accuracy that a plan must keep.

    `backend`, `threads` (None: as many as gain anything): of the engines that are timed, `iterations` times; without
    a backend none are. `baseline`: whether chance answers too, at the cuts of the front.
    """

    candidates: tuple[Candidate, ...]
    workers: int
    dtype: Dtype
    seed: int
    keep: float
    backend: str
    iterations: int
    threads: int | None
    baseline: bool


@dataclass(frozen=True)
class Tuned:
    """`front`: with the chosen plan, should one that dominates it have the wider interval. `over_random`: by name of a
    plan of the front, how much righter it is than chance at its cuts; `timing`: of these plans and of the unpruned
    model. Empty and None if they were not asked for."""

    questions: int
    image_tokens: int
    text: int
    unpruned: Interval
    ranked: tuple[RankedPlan, ...]
    front: tuple[RankedPlan, ...]
    over_random: Mapping[str, Interval]
    timing: Timing | None
    choice: Choice


def tune(checkpoint: Path, dataset_file: Path, data: Dataset, log_file: Path, options: TuneOptions) -> Tuned:
    """Answers what the log does not hold yet, and returns the plans by accuracy, cost and time. HimapError as `sweep`,
    or if the log is another sweep's."""
    prompter = prompter_of_checkpoint(checkpoint)
    spec, (vision,) = describe(resolve(str(checkpoint)))
    tokens = vision.tokens
    text = max(prompter.text_tokens(e) for e in data.examples)
    flops = {c.name: true_ratio(spec, c.plan, c.plan.kept(tokens), text) for c in options.candidates}
    with AnswerLog(log_file, _header(checkpoint, dataset_file, options)) as log:
        candidates, seed = options.candidates, options.seed
        job = Job(checkpoint, options.dtype, threads=1, candidates=candidates, policy="himap", seed=seed)
        answer = partial(_answer, data=data, log=log, prompter=prompter, workers=options.workers)
        answer(job)
        right = _right(log.file, data)
        unpruned = accuracy_interval(right[UNPRUNED])
        ranked = rank(options.candidates, flops, right, right[UNPRUNED])
        choice = choose(ranked, unpruned.mean, options.keep)
        front = tuple(j for j in ranked if j.on_front or j.candidate == choice.candidate)
        plans = tuple(sorted(j.candidate for j in front))
        over: dict[str, Interval] = {}
        if options.baseline:
            answer(replace(job, candidates=plans, policy="random"))
            right = _right(log.file, data)
            over = {c.name: paired_difference(right[c.name], right[BASELINE + c.name]) for c in plans}
    timing = None
    if options.backend:
        named = {c.name: c.plan for c in plans}
        timing = measure(
            checkpoint, named, image_tokens=tokens, text=text, dtype=options.dtype, backend=options.backend,
            threads=options.threads, iterations=options.iterations,
        )  # fmt: skip
    return Tuned(
        questions=len(data.examples), image_tokens=tokens, text=text, unpruned=unpruned, ranked=ranked, front=front,
        over_random=over, timing=timing, choice=choice,
    )  # fmt: skip


def _header(checkpoint: Path, dataset_file: Path, options: TuneOptions) -> dict[str, Any]:
    """What a log has to agree on to go on. The folder too: fine-tuned models share their config.json."""
    grid = {field: sorted({getattr(c, field) for c in options.candidates}) for field in ("k1", "r1", "k2", "r2")}
    return {
        "model": str(checkpoint.resolve()), "config": digest(checkpoint / "config.json").sha256,
        "dataset": digest(dataset_file).sha256, "dtype": options.dtype, "seed": options.seed, "grid": grid,
    }  # fmt: skip


def _answer(job: Job, data: Dataset, log: AnswerLog, prompter: Prompter, workers: int) -> None:
    """All plans of the job answer the examples that one of them has not answered yet."""
    prefix = BASELINE if job.policy == "random" else ""
    names = [prefix + c.name for c in job.candidates] + ([] if prefix else [UNPRUNED])
    todo = [(n, e) for n, e in enumerate(data.examples) if any((name, 0, e.line) not in log.done for name in names)]
    if not todo:
        return
    with counted(f"{job.policy}: questions") as count:
        count(done := len(data.examples) - len(todo), len(data.examples))
        for example, tokens, label in sweep(job, todo, workers):
            wanted = {prefix + name: token for name, token in tokens.items() if not prefix or name != UNPRUNED}
            log.append(_answers(example, wanted, label=label, prompter=prompter, log=log))
            count(done := done + 1, len(data.examples))


def _answers(
    e: Example, tokens: Mapping[str, int], label: int, prompter: Prompter, log: AnswerLog
) -> Sequence[Answered]:
    return [
        Answered(
            name, 0, line=e.line, id=e.id, type=e.type, said=prompter.processor.text([token], ()),
            expected=expected(e), right=token == label,
        )
        for name, token in tokens.items()
        if (name, 0, e.line) not in log.done
    ]  # fmt: skip


def _right(file: Path, data: Dataset) -> dict[str, Right]:
    """By name, [n] over the examples; only of plans that have answered all of them."""
    lines, found = [e.line for e in data.examples], dict[str, dict[int, bool]]()
    for a in read_log(file):
        found.setdefault(a.policy, {})[a.line] = a.right
    return {
        name: np.array([by_line[line] for line in lines])
        for name, by_line in found.items()
        if all(n in by_line for n in lines)
    }
