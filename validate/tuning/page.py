"""A tuning as people read it: accuracy against FLOPs and against time, the front, and the plan to take."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from himap_export.validate.accuracy.evaluate import points as in_points
from himap_export.validate.accuracy.systems import UNPRUNED
from himap_export.validate.report.charts import Point, pareto
from himap_export.validate.report.columns import aligned
from himap_export.validate.report.page import Block, Command, Facts, Page, Section, Table
from himap_export.validate.tuning.front import RankedPlan, on_front
from himap_export.validate.tuning.tune import Tuned

HOW = (
    "Every plan runs on the PyTorch reference, one prefill each; what plans agree on is computed once. The first "
    "generated token decides: for answers of one token that is the accuracy. A plan is on the front if no other is at "
    "least as right for at most its FLOPs."
)


def toml(t: Tuned) -> str:
    """Returns [tuned], if a plan was chosen, and every plan of the front by its name."""
    tables = [t.choice.candidate.toml("tuned")] if t.choice.candidate else []
    return "\n".join([*tables, *(j.candidate.toml(j.candidate.name) for j in t.front)])


def tuned_json(t: Tuned) -> dict[str, Any]:
    """Returns every plan, and of those on the front their advantage over chance and their times."""
    return {
        "questions": t.questions,
        "unpruned": asdict(t.unpruned),
        "plans": [asdict(j) | {"name": j.candidate.name} for j in t.ranked],
        "over_random": {name: asdict(i) for name, i in t.over_random.items()},
        "times": {name: asdict(time) for name, time in t.timing.plans.items()} if t.timing else {},
        "timed_on": {"backend": t.timing.backend, "threads": t.timing.threads} if t.timing else None,
        "choice": {"name": t.choice.candidate and t.choice.candidate.name, "reason": t.choice.reason},
    }


def tuned_lines(t: Tuned) -> list[str]:
    """Returns the front as a table, then the choice."""
    return [*aligned([_HEAD, *_rows(t)]), "", t.choice.reason]


_HEAD = (
    "on the front", "image tokens", "FLOPs", "right", "unpruned - plan", "plan - random", "prefill time", "by FLOPs",
)  # fmt: skip


def _rows(t: Tuned) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (UNPRUNED, f"{t.image_tokens}", "100%", f"{t.unpruned.mean:.1%}", "", "", _time(t, UNPRUNED), "1.00x")
    ]
    for j in t.front:
        tokens = " → ".join(map(str, j.candidate.plan.kept(t.image_tokens)))
        over = in_points(t.over_random[j.candidate.name]) if t.over_random else "-"
        rows.append((
            j.candidate.name, tokens, f"{j.flops:.0%}", f"{j.accuracy.mean:.1%}", in_points(j.loss), over,
            _time(t, j.candidate.name), f"{1 / j.flops:.2f}x",
        ))  # fmt: skip
    return rows


def _time(t: Tuned, name: str) -> str:
    if t.timing is None:
        return "-"
    time = t.timing.plans[name]
    return f"{1e3 * time.seconds:.1f} ms, {time.speed_up[0]:.2f}x"


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
        "Differences in percentage points with 95 % intervals of paired differences; chance is one draw at the same "
        "cuts. Times are medians; beside them the speed-up over unpruned, and the one that FLOPs allow."
    )
    sections = (
        Section("The plan to take", tuple(advice)),
        Section("Accuracy against cost", _plots(t)),
        Section("The front", (Table("front", _HEAD, tuple(_rows(t)), caption),)),
        Section("How this was made", (HOW, *made)),
    )
    subtitle = f"{len(t.ranked)} plans, {t.questions} questions of up to {t.text} text tokens"
    return Page(f"Tuning the cuts of {model}", subtitle, sections)


def _chosen(t: Tuned) -> list[tuple[str, str, str]]:
    found = [(j.accuracy, j.flops) for j in t.ranked if j.candidate == t.choice.candidate]
    items = [("its accuracy", f"{a.mean:.1%}", f"{a.low:.1%} to {a.high:.1%}") for a, _ in found]
    return [*items, *(("its FLOPs", f"{flops:.0%}", "of the decoder's prefill") for _, flops in found)]


def _plots(t: Tuned) -> tuple[Block, ...]:
    y, u = "right answers (%)", t.unpruned
    whole = Point(UNPRUNED, 100, y=100 * u.mean, low=100 * u.low, high=100 * u.high, label=UNPRUNED)
    by_flops = [whole, *(_point(j, j.flops) for j in t.ranked)]
    how = "up and to the left is better. The line joins the front: no other plan is at least as right for at most its"
    figures = [
        pareto(
            "flops", "Accuracy against FLOPs, with 95 % intervals", how=f"{how} FLOPs.", data=_fronted(by_flops),
            x_label="share of the decoder's prefill FLOPs (%)", y_label=y,
        )
    ]  # fmt: skip
    if t.timing:
        by_time = [whole, *(_point(j, 1 / t.timing.plans[j.candidate.name].speed_up[0]) for j in t.front)]
        on = f"{t.timing.backend}, threads: {t.timing.threads}"
        figures.append(
            pareto(
                "time", "Accuracy against measured prefill time, plans of the front above", how=f"{how} time.",
                data=_fronted(by_time), x_label=f"share of the unpruned prefill time (%); {on}", y_label=y,
            )
        )  # fmt: skip
    return tuple(figures)


def _point(j: RankedPlan, share: float) -> Point:
    a = j.accuracy
    return Point("himap", 100 * share, y=100 * a.mean, low=100 * a.low, high=100 * a.high, label=j.candidate.name)


def _fronted(points: Sequence[Point]) -> list[Point]:
    """On the front of all points, that of the unpruned model included."""
    worth = [(p.x, p.y) for p in points]
    return [replace(p, on_front=on_front(own, worth)) for p, own in zip(points, worth, strict=True)]
