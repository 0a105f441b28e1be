"""An accuracy study as people read it: who is right how often, against whom, and on which patches."""

from collections.abc import Sequence

import numpy as np

from himap_export.engines.drawing import fade_dropped, kept_patches, model_view
from himap_export.engines.image import load_image, tile_grid
from himap_export.engines.questions import Dataset, Example
from himap_export.graphs.plan import POLICIES
from himap_export.validate.accuracy.answers import Answered
from himap_export.validate.accuracy.evaluate import ALL, Findings, Summary, points, system_rows, type_rows
from himap_export.validate.accuracy.front import HOW as HOW_FRONT
from himap_export.validate.accuracy.prompter import Prompter
from himap_export.validate.accuracy.systems import PlanSystem, request_seed
from himap_export.validate.report.charts import Datum, Point, bars, pareto
from himap_export.validate.report.page import Block, Facts, Figure, Gallery, Page, Picture, Section, Table, png

SHOWN, SIDE = 6, 336  # example images; pixels on which the line around a patch is still a thin one
HOW = (
    "An answer is right if it is the expected one, but for case, white space and final punctuation; of options, if it "
    "names the right one by the rule of lmms-eval: one that names none, or several, is wrong. Intervals are 95 %: "
    "Wilson's for accuracies, Tango's for differences, which are paired, question by question. Repetitions of a random "
    "plan are averaged per question first: they are no further questions."
)


def accuracy_page(
    found: Findings,
    answered: Sequence[Answered],
    systems: Sequence[PlanSystem],
    data: Dataset,
    prompter: Prompter,
    made: tuple[Block, ...],
) -> Page:
    """Returns headline, charts and tables, example images with the patches that the first pruned plan kept, and what
    `made` the report."""
    first = next((c for c in systems if c.pipeline.spec.plan.cuts), systems[0])
    run, m, summary = first.pipeline.spec, first.pipeline.spec.manifest, found.summary
    sections = (
        Section("Accuracy and cost", (_facts(summary, first), *_worth(found, systems))),
        Section("By type of question", (_plot(summary), *_types(summary))),
        Section("Against the unpruned model and against chance", (_differences(summary), HOW)),
        *([Section("What was kept", _examples(first, answered, data, prompter))] if first.baselines else []),
        Section("How this was made", (_plans(systems), *made)),
    )
    budget = f"{m.dtype}, {first.pipeline.backend}, text budget {run.budget.text}, batch {run.budget.batch}"
    skipped = f"; {len(data.skipped)} lines left out" if data.skipped else ""
    return Page(f"Accuracy of {m.model.name}, pruned", f"{len(data.examples)} questions{skipped}; {budget}", sections)


def _facts(summary: Summary, first: PlanSystem) -> Facts:
    types = f"of {len(summary.types) - 1} types" if len(summary.types) > 1 else ""
    items = [("questions", f"{summary.cells[first.name][ALL].questions}", types)]
    for name in dict.fromkeys((first.name, *first.baselines)):
        i = summary.cells[name][ALL].accuracy
        items.append((name, f"{i.mean:.1%}", f"{i.low:.1%} to {i.high:.1%}"))
    items.append(("FLOPs kept", f"{first.flops:.0%}", f"by {first.name}, of the decoder's prefill"))
    return Facts(tuple(items))


def _plot(summary: Summary) -> Figure:
    data = [
        Datum(name, kind, y=100 * i.mean, low=100 * i.low, high=100 * i.high)
        for name, cells in summary.cells.items()
        for kind in summary.types
        for i in (cells[kind].accuracy,)
    ]
    title = "Right answers by type of question, with 95 % intervals"
    how = "taller is better. Where two lines overlap, look at the paired differences below: they are sharper."
    return bars("accuracy", title, how=how, data=data, x_label="type", y_label="right answers (%)")


def _worth(found: Findings, systems: Sequence[PlanSystem]) -> tuple[Block, ...]:
    """Accuracy beside what it costs: the table, and each system in a chart."""
    head, *rows = system_rows(found)
    caption = f"Right answers in percent, with their 95 % interval. {found.costs.note}"
    policies = {c.name: c.pipeline.spec.plan.policy for c in systems}
    times = found.costs.times
    points = [
        Point(
            policies[name], 1e3 * times[name].median("prefill") if times else 100 * found.flops[name],
            y=100 * a.mean, low=100 * a.low, high=100 * a.high, label=name, on_front=name in found.front.names,
        )
        for name, cells in found.summary.cells.items()
        for a in (cells[ALL].accuracy,)
    ]  # fmt: skip
    title = f"Right answers against {'measured prefill time' if times else 'FLOPs'}, with 95 % intervals"
    how = f"up and to the left is better. {found.front.note or 'The line joins the front. ' + HOW_FRONT}"
    x_label = "prefill of a batch (ms)" if times else "share of the unpruned prefill's FLOPs (%)"
    figure = pareto("worth", title, how=how, data=points, x_label=x_label, y_label="right answers (%)")
    return figure, Table("systems", head, tuple(rows), caption)


def _types(summary: Summary) -> tuple[Table, ...]:
    """Accuracy on each type of question, if there are types."""
    rows = type_rows(summary)
    return (Table("types", rows[0], tuple(rows[1:]), "Right answers in percent."),) if rows else ()


def _differences(summary: Summary) -> Table:
    rows = [
        (f"{name} - {other}", *(points(cells[kind].over[other]) for kind in summary.types))
        for name, cells in summary.cells.items()
        for other in cells[ALL].over
    ]
    spread = [
        (f"{name}, {seeds[0].seeds} seeds", *(f"{s.low:.1%} to {s.high:.1%}" for s in seeds))
        for name, cells in summary.cells.items()
        if (seeds := [s for kind in summary.types if (s := cells[kind].seeds) is not None])
    ]
    caption = "Percentage points; below them, the worst and the best seed of each random baseline."
    return Table("differences", ("", *summary.types), (*rows, *spread), caption)


def _plans(systems: Sequence[PlanSystem]) -> str:
    told = {}
    for c in systems:
        budget, plan = c.pipeline.spec.budget, c.pipeline.spec.plan
        cuts = ", ".join(f"{cut.criterion} at layer {cut.layer}" for cut in plan.cuts) or "no cut"
        policy = f" ({plan.policy})" if plan.policy != c.name and plan.policy in POLICIES else ""
        told[c.name] = f"{c.name}{policy}: {cuts}; image tokens {' → '.join(map(str, budget.visual))}"
    return "\n\n".join(told.values())


def _examples(first: PlanSystem, answered: Sequence[Answered], data: Dataset, prompter: Prompter) -> tuple[Block, ...]:
    """Half of them answered rightly, half wrongly though the unpruned model is right, as far as there are any."""
    right = {(a.policy, a.line): a for a in answered if a.seed == 0}
    numbered = list(enumerate(data.examples))
    whole = first.baselines[0]
    good = [(n, e) for n, e in numbered if right[first.name, e.line].right]
    lost = [(n, e) for n, e in numbered if not right[first.name, e.line].right and right[whole, e.line].right]
    chosen = [*good[: SHOWN // 2], *lost[: SHOWN // 2]]
    drawn = ((e, _drawn(first, n, e, prompter), right[first.name, e.line]) for n, e in chosen)
    pictures = tuple(Picture(f"kept-{e.line}", image, _caption(answer, e)) for e, image, answer in drawn)
    cut = first.pipeline.stages[-1].upper()
    return (Gallery(pictures, f"The patches that {first.name} keeps behind its last cut, {cut}."),)


def _drawn(first: PlanSystem, number: int, e: Example, prompter: Prompter) -> bytes:
    inputs, run = prompter.arrays(e), first.pipeline.spec
    seeds = np.array([request_seed(first.seed, number)])
    prefilled, _ = first.pipeline.prefill(inputs.input_ids, inputs.pixel_values, seeds=seeds)
    kept = list(prefilled.kept.values())[-1][0]
    alive = np.isin(np.flatnonzero(run.manifest.model.image.find(inputs.input_ids[0])), kept)
    image = load_image(e.image)
    mask = kept_patches(alive, run.image.grid, tile_grid(image.size, prompter.processor.image), run.image.newline)
    return png(fade_dropped(model_view(image, prompter.processor.image, SIDE), mask))


def _caption(a: Answered, e: Example) -> str:
    verdict = "right" if a.right else f"wrong: {a.expected}"
    return f"{e.question} - {a.said.strip() or '(nothing)'} ({verdict})"
