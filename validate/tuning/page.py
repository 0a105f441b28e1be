"""A tuning as people read it: accuracy against FLOPs and against time, the front, and the plan to take."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from himap_export.validate.accuracy.evaluate import points as in_points
from himap_export.validate.accuracy.front import HOW as HOW_FRONT
from himap_export.validate.accuracy.front import Front, front
from himap_export.validate.accuracy.systems import UNPRUNED
from himap_export.validate.report.charts import Point, pareto
from himap_export.validate.report.columns import aligned
from himap_export.validate.report.page import Block, Command, Facts, Figure, Page, Section, Table
from himap_export.validate.speed.results import ratio
from himap_export.validate.tuning.tune import Tuned

HOW = (
    "Every plan runs on the PyTorch reference, one prefill each; what plans agree on is computed once. The first "
    f"generated token decides: for answers of one token that is the accuracy. {HOW_FRONT}"
)


def toml(t: Tuned) -> str:
    """Returns [tuned], if a plan was chosen, and every plan of the front by its name."""
    tables = [t.choice.candidate.toml("tuned")] if t.choice.candidate else []
    return "\n".join([*tables, *(j.candidate.toml(j.candidate.name) for j in t.shown)])


def tuned_json(t: Tuned) -> dict[str, Any]:
    """Returns every plan, the front, and of the plans on it, and the chosen one, advantage over chance and times."""
    return {
        "policy": t.policy,
        "questions": t.questions,
        "unpruned": asdict(t.unpruned),
        "plans": [asdict(j) | {"name": j.candidate.name} for j in t.ranked],
        "front": asdict(t.front),
        "draws": t.draws,
        "over_random": {name: asdict(i) for name, i in t.over_random.items()},
        "times": {name: asdict(time) for name, time in t.timing.plans.items()} if t.timing else {},
        "timed_on": {"backend": t.timing.backend, "threads": t.timing.threads} if t.timing else None,
        "choice": {"name": t.choice.candidate and t.choice.candidate.name, "reason": t.choice.reason},
    }


def tuned_lines(t: Tuned) -> list[str]:
    """Returns the front as a table, or that there is none, then the choice."""
    return [*aligned([_HEAD, *_rows(t)]), *([t.front.note] if t.front.note else []), "", t.choice.reason]


_HEAD = (
    "", "front", "image tokens", "FLOPs", "right", "unpruned - plan", "plan - random", "prefill time", "by FLOPs",
)  # fmt: skip


def _rows(t: Tuned) -> list[tuple[str, ...]]:
    right, whole = f"{t.unpruned.mean:.1%}", (UNPRUNED, _on_front(t, UNPRUNED), f"{t.image_tokens}", "100%")
    rows: list[tuple[str, ...]] = [(*whole, right, "", "", _time(t, UNPRUNED), "1.00x")]
    for j in t.shown:
        name, tokens = j.candidate.name, " → ".join(map(str, j.candidate.plan.kept(t.image_tokens)))
        over = in_points(t.over_random[name]) if t.over_random else "-"
        rows.append((
            name, _on_front(t, name), tokens, f"{j.flops:.0%}", f"{j.accuracy.mean:.1%}", in_points(j.loss), over,
            _time(t, name), f"{1 / j.flops:.2f}x",
        ))  # fmt: skip
    return rows


def _on_front(t: Tuned, name: str) -> str:
    return "yes" if name in t.front.names else "no" if t.front.names else "-"


def _time(t: Tuned, name: str) -> str:
    if t.timing is None:
        return "-"
    time = t.timing.plans[name]
    return f"{1e3 * time.seconds:.1f} ms" + (f", {ratio(time.speed_up)}" if name != UNPRUNED else "")


def tuned_page(t: Tuned, model: str, made: tuple[Block, ...], plans: str) -> Page:
    """Returns the choice, two Pareto plots, the front as a table, and what `made` the report."""
    candidate = t.choice.candidate
    facts = Facts((
        ("plan", candidate.name if candidate else "none", f"of {len(t.ranked)} tried on {t.questions} questions"),
        ("unpruned", f"{t.unpruned.mean:.1%}", f"{t.unpruned.low:.1%} to {t.unpruned.high:.1%}"),
        *_chosen(t),
    ))  # fmt: skip
    advice: list[Block] = [facts, t.choice.reason]
    if candidate is not None:
        advice.append(Command(shlex.join(["himap-export", model, "--plan", plans, "--out", "bundle/"])))
    caption = (
        f"Differences in percentage points with 95 % intervals of paired differences; chance: {t.draws} draws at the "
        "same cuts, averaged by question. Times are medians; beside them the speed-up over unpruned with the least and "
        "the most of all repetitions, and the one that FLOPs allow."
    )
    sections = (
        Section("The plan to take", tuple(advice)),
        Section("Accuracy against cost", _plots(t)),
        Section(
            "The front",
            (
                *filter(None, [t.front.note]),
                Table("front", _HEAD, tuple(_rows(t)), caption),
            ),
        ),
        Section("How this was made", (HOW, *made)),
    )
    subtitle = f"{len(t.ranked)} plans, {t.questions} questions of up to {t.text} text tokens"
    return Page(f"Tuning {t.policy}'s cuts of {model}", subtitle, sections)


def _chosen(t: Tuned) -> list[tuple[str, str, str]]:
    found = [(j.accuracy, j.flops) for j in t.ranked if j.candidate == t.choice.candidate]
    items = [("its accuracy", f"{a.mean:.1%}", f"{a.low:.1%} to {a.high:.1%}") for a, _ in found]
    return [*items, *(("its FLOPs", f"{flops:.0%}", "of the decoder's prefill") for _, flops in found)]


def _plots(t: Tuned) -> tuple[Block, ...]:
    flops = {UNPRUNED: 1.0} | {j.candidate.name: j.flops for j in t.ranked}
    x_label = "share of the decoder's prefill FLOPs (%)"
    figures = [_plot(t, "flops", "Accuracy against FLOPs, with 95 % intervals", flops, best=t.front, x_label=x_label)]
    if t.timing:
        times = {name: 1 / timed.speed_up[0] for name, timed in t.timing.plans.items()}
        x_label = f"share of the unpruned prefill time (%); {t.timing.backend}, threads: {t.timing.threads}"
        title, best = "Accuracy against measured prefill time, plans of the front above", front(times, t.right)
        figures.append(_plot(t, "time", title, times, best=best, x_label=x_label))
    return tuple(figures)


def _plot(t: Tuned, name: str, title: str, share: Mapping[str, float], *, best: Front, x_label: str) -> Figure:
    """The plans that have a `share` of the unpruned model's cost, and the front."""
    accuracy = {UNPRUNED: t.unpruned} | {j.candidate.name: j.accuracy for j in t.ranked}
    points = [
        Point(
            UNPRUNED if plan == UNPRUNED else t.policy, 100 * x, y=100 * a.mean, low=100 * a.low, high=100 * a.high,
            label=plan, on_front=plan in best.names,
        )
        for plan, x in share.items()
        for a in (accuracy[plan],)
    ]  # fmt: skip
    how = f"up and to the left is better. {best.note or 'The line joins the front. ' + HOW_FRONT}"
    return pareto(name, title, how=how, data=points, x_label=x_label, y_label="right answers (%)")
