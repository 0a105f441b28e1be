"""`himap-validate --dataset`: a bundle's plans, the unpruned model and the baselines answer a data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle, digest
from himap_export.engines.manifest import FILE_NAME
from himap_export.engines.questions import Dataset, read_dataset
from himap_export.engines.session import open_pipeline
from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.accuracy.answers import Answered, AnswerLog, check_count, check_log, claim, read_log
from himap_export.validate.accuracy.costs import Costs, measure_costs
from himap_export.validate.accuracy.evaluate import Findings, right_answers, run, summarise, summary_lines
from himap_export.validate.accuracy.front import front
from himap_export.validate.accuracy.page import accuracy_page
from himap_export.validate.accuracy.prompter import Prompter, prompter_of_bundle
from himap_export.validate.accuracy.systems import PlanSystem, open_systems
from himap_export.validate.checkpoint import Source
from himap_export.validate.dequantised import has_original
from himap_export.validate.progress import counted, say
from himap_export.validate.report.machine import provenance
from himap_export.validate.report.page import check_libraries, write_report

ANSWERS = "answers.jsonl"
SHORT = 8  # tokens of an answer, unless asked otherwise or the right ones are longer


@dataclass(frozen=True)
class Scoring:
    """`plans` of the bundle to score (none named: all), random ones `seeds` times, on the first `limit` lines;
    `timing`: how often each is timed, and before that to warm up, None if none is."""

    dataset: Path
    report: Path
    plans: tuple[str, ...]
    text_budget: int | None
    backend: str | None
    seeds: int
    limit: int | None
    new_tokens: int | None
    skip_bad: bool
    timing: tuple[int, int] | None
    command: tuple[str, ...]


def score(bundle: Bundle, source: Source, opening: Opening, asked: Scoring) -> tuple[list[str], dict[str, Any]]:
    """Answers what `report`/answers.jsonl does not hold yet, writes the report, and tells the result as text and JSON.

    HimapError (usage) for bad lines, a prompt longer than the text budget, or an unknown plan.
    """
    claim(asked.report, ANSWERS)
    check_libraries()  # before hours of answers, not behind them
    whole = read_dataset(asked.dataset, asked.skip_bad)
    data = Dataset(whole.examples[: asked.limit], whole.skipped)
    for line in data.skipped:
        say(f"left out: {line}")
    prompter = prompter_of_bundle(bundle)
    held = (v.plan_name for v in bundle.manifest.variants)
    names = tuple(dict.fromkeys(bundle.plan_name(name) for name in asked.plans) or dict.fromkeys(held))
    check_count(len(data.examples) * (len(names) * (2 + asked.seeds) + 2))  # each with its baselines, and the unpruned
    # What is measured does not depend on --limit: who asked a few questions can go on with all.
    longest_text = _longest(prompter, whole, data=data, bundle=bundle, asked=asked)
    spec = bundle.select(names[0], asked.text_budget, text_tokens=longest_text)
    longest = max(len(prompter.answer(e)) + 1 for e in whole.examples)  # and the token that ends it
    new_tokens = min(asked.new_tokens or max(SHORT, longest), spec.budget.new)
    header: dict[str, Any] = {
        "bundle": digest(bundle.path(FILE_NAME)).sha256, "dataset": digest(asked.dataset).sha256, "plans": list(names),
        "text_budget": spec.budget.text, "max_new_tokens": new_tokens,
    }  # fmt: skip
    check_log(asked.report / ANSWERS, header | ({"backend": asked.backend} if asked.backend else {}))
    first = open_pipeline(spec, asked.backend, opening)
    header["backend"] = first.backend
    asked.report.mkdir(parents=True, exist_ok=True)
    everyone = open_systems(
        first, source.folder, opening, names, seeds=asked.seeds, new_tokens=new_tokens, vision_tower=source.tower,
        original=bundle.manifest.quantization is not None and has_original(source),
    )  # fmt: skip
    with AnswerLog(asked.report / ANSWERS, header) as log, everyone as systems:
        with counted("answers") as count:
            run(systems, data, prompter, log, stop_tokens=bundle.manifest.model.eos_tokens, progress=count)
        wanted = {(c.name, c.seed) for c in systems}
        lines = {e.line for e in data.examples}
        answered = [a for a in read_log(log.file) if (a.policy, a.seed) in wanted and a.line in lines]
        costs = Costs("Times were not asked for.")
        if asked.timing is not None:
            say(f"timing, each in a process of its own: {', '.join(dict.fromkeys(c.name for c in systems))}")
            costs = measure_costs(systems, source.folder, opening, *asked.timing)
        found = _findings(systems, answered, data, costs)
        facts = header | {"skipped": list(data.skipped)} | found.to_json()
        digests = {"bundle's digest": bundle.manifest.digest, "data set's sha256": header["dataset"]}
        made = provenance(asked.command, digests)
        page = accuracy_page(found, answered, systems=systems, data=data, prompter=prompter, made=made)
    written = write_report(asked.report, page, facts)
    return [*summary_lines(found), "", f"report: {written}"], facts


def _findings(systems: Sequence[PlanSystem], answered: Sequence[Answered], data: Dataset, costs: Costs) -> Findings:
    """What the answers and the costs come to; the front is by prefill's median time or, without times, by FLOPs."""
    flops = {c.name: c.flops for c in systems}
    cost = {name: t.median("prefill") for name, t in costs.times.items()} or flops
    right = right_answers(answered, data)
    summary = summarise(right, data, {c.name: c.baselines for c in systems})
    return Findings(summary, flops, costs, front(cost, right))


def _longest(prompter: Prompter, whole: Dataset, data: Dataset, bundle: Bundle, asked: Scoring) -> int:
    """Text tokens of the longest prompt of the `whole` data set, or as many as the largest budget holds; HimapError
    (usage) with the line of one of `data` that no text budget holds."""
    lengths = {e.line: prompter.text_tokens(e) for e in whole.examples}
    line = max((e.line for e in data.examples), key=lambda line: lengths[line])
    budget = asked.text_budget or max(v.budget.text for v in bundle.manifest.variants)
    if lengths[line] > budget:
        summary, longest = f"line {line} of {asked.dataset} has {lengths[line]} text tokens", lengths[line]
        raise HimapError(
            summary, f"the budget is {budget}", f"export with `text_budget` {longest}, or leave it out", Exit.USAGE
        )
    return min(budget, max(lengths.values()))
