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
from himap_export.validate.accuracy.prompter import Prompter
from himap_export.validate.accuracy.statistics import (
    Interval,
    SeedSpread,
    accuracy_interval,
    over_seeds,
    paired_difference,
)
from himap_export.validate.accuracy.systems import PlanSystem
from himap_export.validate.progress import Count
from himap_export.validate.report.columns import aligned

ALL = "all"


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
    # Examples outside, systems inside: every image is read and preprocessed once, and none is kept.
    for at in range(0, len(numbered), size):
        chunk, prepared = numbered[at : at + size], dict[int, Inputs]()
        for system in systems:
            asked = [(n, e) for n, e in chunk if (system.name, system.seed, e.line) not in log.done]
            prepared |= {n: prompter.arrays(e) for n, e in asked if n not in prepared}
            for start in range(0, len(asked), system.batch):
                batch = asked[start : start + system.batch]
                numbers = [n for n, _ in batch]
                tokens = system.answer([prepared[n] for n in numbers], numbers)
                said = [prompter.processor.text(row, stop_tokens) for row in tokens]
                log.append([_answered(system, e, text) for (_, e), text in zip(batch, said, strict=True)])
                progress(done := done + len(batch), total)


def _answered(system: PlanSystem, e: Example, said: str) -> Answered:
    right = is_right(e, said)
    name, seed = system.name, system.seed
    return Answered(name, seed, line=e.line, id=e.id, type=e.type, said=said, expected=expected(e), right=right)


def summarise(answered: Sequence[Answered], dataset: Dataset, baselines: Mapping[str, Sequence[str]]) -> Summary:
    """Sums up the answers by system and type; `baselines` lists all systems and whom each is compared with. KeyError if
    one lacks answers."""
    lines = [e.line for e in dataset.examples]
    kinds = np.array([e.type for e in dataset.examples])
    types = (ALL, *dict.fromkeys(kind for kind in kinds.tolist() if kind not in ("", ALL)))
    right = {name: _right(answered, name, lines) for name in baselines}
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


def _right(answered: Sequence[Answered], name: str, lines: Sequence[int]) -> npt.NDArray[np.bool_]:
    """[seeds, n]"""
    found = {(a.seed, a.line): a.right for a in answered if a.policy == name}
    seeds = sorted({seed for seed, _ in found}) or [0]
    return np.array([[found[seed, line] for line in lines] for seed in seeds])


def accuracy_rows(summary: Summary) -> list[tuple[str, ...]]:
    """Returns how many questions there are of each type, then each system's accuracy on them."""
    first = next(iter(summary.cells.values()))
    rows = [(name, *(percent(cells[kind].accuracy) for kind in summary.types)) for name, cells in summary.cells.items()]
    return [("questions", *(f"{first[kind].questions}" for kind in summary.types)), *rows]


def summary_lines(summary: Summary) -> list[str]:
    """Returns, a line each, accuracy by system and type, then each system against its baselines."""
    lines = aligned([("", *summary.types), *accuracy_rows(summary)])
    differences = [("", "over", "points, with their 95 % interval")]
    for name, cells in summary.cells.items():
        differences += [(name, other, points(i)) for other, i in cells[ALL].over.items()]
    title = "right answers in percent, with their 95 % interval; paired differences on all questions:"
    return [*lines, "", title, *aligned(differences)]


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


def summary_json(summary: Summary) -> dict[str, Any]:
    """Returns {"types": [..], "accuracy": {system: {type: {questions, accuracy, over, seeds}}}}"""
    cells = {name: {kind: asdict(cell) for kind, cell in found.items()} for name, found in summary.cells.items()}
    return {"types": list(summary.types), "accuracy": cells}
