"""A tuning: the sweep over a data set, the front, its baseline and its times, and the plan to take."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from himap_export.engines.bundle import digest
from himap_export.engines.questions import Dataset, Example, expected
from himap_export.exporter.planning import describe
from himap_export.exporter.registry import resolve
from himap_export.graphs.flops import true_ratio
from himap_export.graphs.plan import PruningPlan
from himap_export.graphs.spec import Dtype
from himap_export.validate.accuracy.answers import Answered, AnswerLog, read_log
from himap_export.validate.accuracy.evaluate import Right, right_answers
from himap_export.validate.accuracy.front import Front
from himap_export.validate.accuracy.prompter import Prompter, prompter_of_checkpoint
from himap_export.validate.accuracy.statistics import Interval, accuracy_interval, paired_difference
from himap_export.validate.accuracy.systems import UNPRUNED
from himap_export.validate.parity.runs import reference_cuts
from himap_export.validate.progress import counted
from himap_export.validate.registration import require_references
from himap_export.validate.tuning.front import Choice, RankedPlan, choose, rank
from himap_export.validate.tuning.grid import Candidate
from himap_export.validate.tuning.sweep import Draw, Job, sweep
from himap_export.validate.tuning.timing import Timing, measure

BASELINE = "random-"  # before a plan's name in the log: its cuts, ranked by chance


@dataclass(frozen=True)
class TuneOptions:
    """How to sweep `candidates`, all of one policy. `keep`: the fraction of the unpruned accuracy that a plan must
    keep.

    `backend`, `threads` (None: as many as gain anything): of the engines that are timed, `iterations` times; without
    a backend none are. `draws`: how often chance answers, too, at the cuts of the front, drawn by `seed` and the
    numbers after it.
    """

    candidates: tuple[Candidate, ...]
    workers: int
    dtype: Dtype
    seed: int
    keep: float
    backend: str
    iterations: int
    threads: int | None
    draws: int


@dataclass(frozen=True)
class Tuned:
    """All plans `ranked`, and the `front` by FLOPs. `shown`: the plans of the front, and the chosen one. Of these
    `over_random`: by name, how much righter each is than `draws` of chance at its cuts; and `timing`, of the unpruned
    model, too. Empty and None if they were not asked for, or no plan is shown. `right`: of all, and the unpruned."""

    policy: str
    questions: int
    image_tokens: int
    text: int
    unpruned: Interval
    ranked: tuple[RankedPlan, ...]
    front: Front
    shown: tuple[RankedPlan, ...]
    right: Mapping[str, Right]
    draws: int
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
    plans = {c.name: c.plan for c in options.candidates}
    require_references("the sweep", (cut.criterion for plan in plans.values() for cut in plan.cuts))
    flops = {name: true_ratio(spec, plan, plan.kept(tokens), text) for name, plan in plans.items()}
    with AnswerLog(log_file, _header(checkpoint, dataset_file, options)) as log:
        answer = partial(_answer, checkpoint, options, tokens, data=data, log=log, prompter=prompter)
        answer({UNPRUNED: PruningPlan(), **plans})
        right = _right(log.file, data)
        unpruned = accuracy_interval(right[UNPRUNED])
        ranked, front = rank(options.candidates, flops, right)
        choice = choose(ranked, unpruned.mean, options.keep)
        shown = tuple(j for j in ranked if j.on_front or j.candidate == choice.candidate)
        named = {c.name: c.plan for c in sorted(j.candidate for j in shown)}
        over: dict[str, Interval] = {}
        if options.draws:
            answer({BASELINE + name: plan.ranked_by("random") for name, plan in named.items()}, options.draws)
            drawn = _right(log.file, data, options.draws)
            over = {name: paired_difference(right[name], drawn[BASELINE + name]) for name in named}
    timing = None
    if options.backend and named:
        timing = measure(
            checkpoint, named, image_tokens=tokens, text=text, dtype=options.dtype, backend=options.backend,
            threads=options.threads, iterations=options.iterations,
        )  # fmt: skip
    return Tuned(
        policy=options.candidates[0].policy, questions=len(data.examples), image_tokens=tokens, text=text,
        unpruned=unpruned, ranked=ranked, front=front, shown=shown, right=right, draws=options.draws, over_random=over,
        timing=timing, choice=choice,
    )  # fmt: skip


def _header(checkpoint: Path, dataset_file: Path, options: TuneOptions) -> dict[str, Any]:
    """What a log has to agree on to go on. The folder too: fine-tuned models share their config.json."""
    cuts = [dict(enumerate(c.cuts, 1)) for c in options.candidates]
    grid = {f"{letter}{n}": sorted({c[n][i] for c in cuts}) for n in cuts[0] for i, letter in enumerate("kr")}
    return {
        "model": str(checkpoint.resolve()), "config": digest(checkpoint / "config.json").sha256,
        "dataset": digest(dataset_file).sha256, "dtype": options.dtype, "seed": options.seed,
        "policy": options.candidates[0].policy, "grid": grid,
    }  # fmt: skip


def _answer(
    checkpoint: Path,
    options: TuneOptions,
    image_tokens: int,
    plans: Mapping[str, PruningPlan],
    draws: int = 1,
    *,
    data: Dataset,
    log: AnswerLog,
    prompter: Prompter,
) -> None:
    """All `plans`, by name, answer `draws` times the examples that one of them has not answered yet."""
    keys = [(name, n) for name in plans for n in range(draws)]
    todo = [(n, e) for n, e in enumerate(data.examples) if any((*key, e.line) not in log.done for key in keys)]
    if not todo:
        return
    cuts = {name: reference_cuts(plan, plan.kept(image_tokens)) for name, plan in plans.items()}
    seeds = tuple(options.seed + n for n in range(draws))
    job = Job(checkpoint, options.dtype, threads=1, plans=cuts, seeds=seeds)
    what = options.candidates[0].policy if UNPRUNED in plans else "random"
    with counted(f"{what}: questions") as count:
        count(done := len(data.examples) - len(todo), len(data.examples))
        for example, tokens, label in sweep(job, todo, options.workers):
            log.append(_answers(example, tokens, label=label, prompter=prompter, log=log))
            count(done := done + 1, len(data.examples))


def _answers(
    e: Example, tokens: Mapping[Draw, int], label: int, prompter: Prompter, log: AnswerLog
) -> Sequence[Answered]:
    return [
        Answered(
            name, n, line=e.line, id=e.id, type=e.type, said=prompter.processor.text([token], ()),
            expected=expected(e), right=token == label,
        )
        for (name, n), token in tokens.items()
        if (name, n, e.line) not in log.done
    ]  # fmt: skip


def _right(file: Path, data: Dataset, draws: int = 1) -> dict[str, Right]:
    """By name, [draws, n] over the examples; only of plans that have answered all of them so often."""
    lines = {e.line for e in data.examples}
    asked = {a.key: a for a in read_log(file) if a.seed < draws and a.line in lines}
    answers = Counter(a.policy for a in asked.values())
    return right_answers([a for a in asked.values() if answers[a.policy] == draws * len(lines)], data)
