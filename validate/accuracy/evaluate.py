"""How often each system is right, and how sure that is: the run over a data set, and what it sums up to."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.arrays import Inputs
from himap_export.engines.questions import Dataset, Example, expected
from himap_export.validate.accuracy.answers import Answered, AnswerLog
from himap_export.validate.accuracy.choices import is_right
from himap_export.validate.accuracy.costs import HEAD, Costs
from himap_export.validate.accuracy.front import Front
from himap_export.validate.accuracy.prompter import Prompter
from himap_export.validate.accuracy.statistics import (
    Interval,
    SeedSpread,
    accuracy_interval,
    over_seeds,
    paired_difference,
)
from himap_export.validate.accuracy.systems import PlanSystem, SeenBefore
from himap_export.validate.progress import Count
from himap_export.validate.report.columns import aligned

ALL = "all"
Right = npt.NDArray[np.bool_]  # [seeds,n] of one system


@dataclass(frozen=True)
class Cell:
    """One system on the questions of one type. `over`: paired differences to its baselines, by name; `seeds`: the
    spread over the repetitions of a random one."""

    questions: int
    accuracy: Interval
    over: Mapping[str, Interval]
    seeds: SeedSpread | None


@dataclass(frozen=True)
class Summary:
    """`cells[name][type]`, "all" first; systems and types in the order in which they were given and found."""

    types: tuple[str, ...]
    cells: Mapping[str, Mapping[str, Cell]]


@dataclass(frozen=True)
class Findings:
    """What the systems know, their shares of the unpruned prefill's FLOPs, what they cost, and which are worth it."""

    summary: Summary
    flops: Mapping[str, float]
    costs: Costs
    front: Front

    def to_json(self) -> dict[str, Any]:
        """Returns {"flops_kept": {system: share}, "types": [..], "accuracy": {system: {type: {questions, accuracy,
        over, seeds}}}, "costs": {"note", "systems"}, "front": {"names", "note"}}"""
        every = self.summary.cells.items()
        cells = {name: {kind: asdict(cell) for kind, cell in found.items()} for name, found in every}
        found = {"flops_kept": dict(self.flops), "types": list(self.summary.types), "accuracy": cells}
        return found | {"costs": self.costs.to_json(), "front": asdict(self.front)}


def run(
    systems: Sequence[PlanSystem],
    dataset: Dataset,
    prompter: Prompter,
    log: AnswerLog,
    stop_tokens: Collection[int],
    progress: Count,
) -> None:
    """Asks everyone, up to `batch` prompts at a time, whatever `log` does not hold yet."""
    size, total = max(c.batch for c in systems), len(systems) * len(dataset.examples)
    numbered = list(enumerate(dataset.examples))
    progress(done := sum((c.name, c.seed, e.line) in log.done for c in systems for e in dataset.examples), total)
    # Examples outside, systems inside: every image is read, preprocessed and seen once, and none is kept.
    for at in range(0, len(numbered), size):
        chunk, prepared = numbered[at : at + size], dict[int, Inputs]()
        seen: SeenBefore = {}
        for system in systems:
            asked = [(n, e) for n, e in chunk if (system.name, system.seed, e.line) not in log.done]
            prepared |= {n: prompter.arrays(e) for n, e in asked if n not in prepared}
            for start in range(0, len(asked), system.batch):
                batch = asked[start : start + system.batch]
                numbers = [n for n, _ in batch]
                tokens = system.answer([prepared[n] for n in numbers], numbers, seen)
                said = [prompter.processor.text(row, stop_tokens) for row in tokens]
                log.append([_answered(system, e, text) for (_, e), text in zip(batch, said, strict=True)])
                progress(done := done + len(batch), total)


def _answered(system: PlanSystem, e: Example, said: str) -> Answered:
    right = is_right(e, said)
    name, seed = system.name, system.seed
    return Answered(name, seed, line=e.line, id=e.id, type=e.type, said=said, expected=expected(e), right=right)


def summarise(right: Mapping[str, Right], dataset: Dataset, baselines: Mapping[str, Sequence[str]]) -> Summary:
    """Sums up which answers were `right` by system and type; `baselines` lists the systems and whom each is compared
    with."""
    kinds = np.array([e.type for e in dataset.examples])
    types = (ALL, *dict.fromkeys(kind for kind in kinds.tolist() if kind not in ("", ALL)))
    cells: dict[str, dict[str, Cell]] = {}
    for name, others in baselines.items():
        cells[name] = {}
        for kind in types:
            here = np.ones(len(kinds), bool) if kind == ALL else kinds == kind
            own = right[name][:, here]
            over = {other: paired_difference(own, right[other][:, here]) for other in others}
            spread = over_seeds(own) if len(own) > 1 else None
            cells[name][kind] = Cell(int(here.sum()), accuracy_interval(own), over, spread)
    return Summary(types, cells)


def right_answers(answered: Sequence[Answered], dataset: Dataset) -> dict[str, Right]:
    """Returns whether each system was right, [seeds,n] over the examples. KeyError if one has not answered them all."""
    by_system: dict[str, dict[int, dict[int, bool]]] = {}
    for a in answered:
        by_system.setdefault(a.policy, {}).setdefault(a.seed, {})[a.line] = a.right
    return {
        name: np.array([[found[seed][e.line] for e in dataset.examples] for seed in sorted(found)])
        for name, found in by_system.items()
    }


def system_rows(found: Findings) -> list[tuple[str, ...]]:
    """Returns a head, then each system's accuracy, its share of the FLOPs and, if they were measured, time and
    memory."""
    head = ("", "right (%)", "FLOPs", *(HEAD if found.costs.times else ()))
    right = {name: percent(cells[ALL].accuracy) for name, cells in found.summary.cells.items()}
    return [head, *((name, right[name], f"{found.flops[name]:.0%}", *found.costs.cells(name)) for name in right)]


def type_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Returns the types as a head, how many questions there are of each, and each system's accuracy on them; nothing if
    the data set has no types."""
    types, first = summary.types[1:], next(iter(summary.cells.values()))
    if not types:
        return []
    rows = [(name, *(percent(cells[kind].accuracy) for kind in types)) for name, cells in summary.cells.items()]
    return [("", *types), ("questions", *(f"{first[kind].questions}" for kind in types)), *rows]


def summary_lines(found: Findings) -> list[str]:
    """Returns, a line each, what the systems know and cost, accuracy by type, and each system against its baselines."""
    summary = found.summary
    questions = next(iter(summary.cells.values()))[ALL].questions
    lines = [f"right answers to {questions} questions, with their 95 % interval, and what they cost:"]
    lines += [*aligned(system_rows(found)), found.costs.note]
    if found.front.note:
        lines.append(found.front.note)
    if by_type := type_rows(summary):
        lines += ["", "right answers by type, in percent:", *aligned(by_type)]
    differences = [("", "over", "points, with their 95 % interval")]
    for name, cells in summary.cells.items():
        differences += [(name, other, points(i)) for other, i in cells[ALL].over.items()]
    return [*lines, "", "paired differences on all questions:", *aligned(differences)]


def percent(i: Interval) -> str:
    """Returns an accuracy and its interval, in percent: 78.0 (76.9 to 79.0)."""
    mean, low, high = _rounded(i)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def points(i: Interval) -> str:
    """Returns a difference in percentage points: +1.2 (-0.3 to +2.7)."""
    mean, low, high = _rounded(i)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _rounded(i: Interval) -> tuple[float, float, float]:
    mean, low, high = (round(100 * value, 1) + 0.0 for value in (i.mean, i.low, i.high))  # -0.0 + 0.0 is 0.0
    return mean, low, high
