"""The study's tables and figures, from the logs of answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from draw import TYPES
from numpy.typing import NDArray

from himap_export.engines.questions import read_dataset
from himap_export.exporter.planning import describe
from himap_export.exporter.registry import resolve
from himap_export.graphs.flops import true_ratio
from himap_export.graphs.plan import himap
from himap_export.validate.accuracy.answers import read_log
from himap_export.validate.accuracy.evaluate import percent, points, right_answers
from himap_export.validate.accuracy.statistics import Interval, accuracy_interval, paired_difference
from himap_export.validate.report.charts import Datum, bars, lines

Bools = NDArray[np.bool_]
Cuts = tuple[int, int, float, float]  # K1, K2, R1, R2
CHANCE, UNPRUNED = ("random", "uniform"), "none"
KINDS = ("all", *TYPES)


@dataclass(frozen=True)
class Judged:
    """One budget: whether each policy was `right`, [seeds,n] of n questions whose types are `kinds` [n]; its share of
    the unpruned FLOPs."""

    name: str
    cuts: Cuts
    flops: float
    right: Mapping[str, Bools]
    kinds: NDArray[np.str_]

    def of(self, policy: str, kind: str) -> Bools:
        return self.right[policy][:, (self.kinds == kind) | (kind == "all")]

    def accuracy(self, policy: str, kind: str = "all") -> Interval:
        return accuracy_interval(self.of(policy, kind))

    def over(self, policy: str, other: str, kind: str = "all") -> Interval:
        return paired_difference(self.of(policy, kind), self.of(other, kind))


def read(
    reports: Sequence[Path], dataset: Path, policies: Sequence[str], budgets: Mapping[str, Cuts], text: int
) -> list[Judged]:
    """Every budget from the reports that hold it; the baselines are named after the first policy."""
    data, (spec, (vision, *_)) = read_dataset(dataset), describe(resolve("shapes"))
    kinds, found = np.array([e.type for e in data.examples]), list[Judged]()
    answers = [right_answers(read_log(report / "answers.jsonl"), data) for report in reports]
    for name, cuts in budgets.items():
        held = next(right for right in answers if f"{policies[0]}-{name}" in right)
        systems = {policy: f"{policy}-{name}" for policy in policies}
        systems |= {chance: f"{chance}-{policies[0]}-{name}" for chance in CHANCE} | {UNPRUNED: UNPRUNED}
        right = {policy: held[system] for policy, system in systems.items()}
        plan = himap(*cuts)
        found.append(Judged(name, cuts, true_ratio(spec, plan, plan.kept(vision.tokens), text), right, kinds))
    return found


def tables(budgets: Sequence[Judged]) -> list[str]:
    """Markdown: all policies at all budgets by type; each against random and uniform; debiased HiMAP against HiMAP."""
    questions = len(budgets[0].kinds)
    found = [f"# Selectors at equal FLOPs on `shapes`, {questions} questions of {len(TYPES)} types", ""]
    found += ["Right answers in percent, with Wilson's 95 % intervals; the best pruned one of each column in bold."]
    for b in budgets:
        k1, k2, r1, r2 = b.cuts
        found += ["", f"**Budget {b.name}**: {b.flops:.0%} of the FLOPs; K1 {k1}, K2 {k2}, R1 {r1}, R2 {r2}", ""]
        found += table(("policy", *KINDS), [(p, *(_cell(b, p, kind) for kind in KINDS)) for p in b.right])
    pruned = [p for p in budgets[0].right if p != UNPRUNED]
    heads = [f"{b.name}, {b.flops:.0%}" for b in budgets]
    for other in CHANCE:
        found += ["", f"Points over {other} at the same cuts, all questions, with Tango's 95 % intervals of pairs:", ""]
        rows = [(p, *(points(b.over(p, other)) for b in budgets)) for p in pruned if p != other]
        found += table(("policy", *heads), rows)
    found += ["", "Points of debiased HiMAP over HiMAP:", ""]
    rows = [(kind, *(points(b.over("himap-debiased", "himap", kind)) for b in budgets)) for kind in KINDS]
    return found + table(("questions", *heads), rows)


def _cell(budget: Judged, policy: str, kind: str) -> str:
    best = max(budget.accuracy(p, kind).mean for p in budget.right if p != UNPRUNED)
    own = budget.accuracy(policy, kind)
    return f"**{percent(own)}**" if policy != UNPRUNED and own.mean == best else percent(own)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def draw_figures(budgets: Sequence[Judged], folder: Path) -> None:
    """accuracy.png: all questions over FLOPs; types.png: each type at the second budget."""

    def datum(b: Judged, policy: str, x: str | float, kind: str) -> Datum:
        i = b.accuracy(policy, kind)
        return Datum(policy, x, 100 * i.mean, 100 * i.low, 100 * i.high)

    ordered, right = sorted(budgets, key=lambda b: b.flops), "right answers (%)"
    over = [datum(b, policy, 100 * b.flops, "all") for policy in budgets[0].right for b in ordered]
    title = f"Right answers at equal FLOPs, {len(budgets[0].kinds)} questions, with 95 % intervals"
    (folder / "accuracy.png").write_bytes(lines("accuracy", title, "", over, "FLOPs kept (%)", right).png)
    by_type = [datum(budgets[1], policy, kind, kind) for policy in budgets[1].right for kind in TYPES]
    title = f"Right answers by type of question at {budgets[1].flops:.0%} of the FLOPs, with 95 % intervals"
    (folder / "types.png").write_bytes(bars("types", title, "", by_type, "type", right).png)
