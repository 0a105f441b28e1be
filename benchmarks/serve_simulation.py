"""A discrete simulation of three ways to serve, where costs are given: one after the other, static batches, slots.

Arrivals are Poisson's, answers uniform in length, every cost is a constant. What is measured elsewhere on a CPU and
what is assumed of a GPU differ in their costs alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LOADS = (0.5, 0.8, 0.95)  # of the most that one after the other or static batches can do
COUNT = 1500


@dataclass(frozen=True)
class Costs:
    """Seconds: a prefill of one prompt and of `rows` together, a decode step of one answer and of `rows`."""

    name: str
    rows: int
    prefill: float
    prefill_rows: float
    step: float
    step_rows: float


# A 7B model in 16 bits on a datacenter GPU, about: steps read the weights, prefill computes.
ASSUMED = (
    Costs("a GPU, costs assumed", 8, 0.040, prefill_rows=0.260, step=0.0110, step_rows=0.0125),
    Costs("a GPU, costs assumed", 16, 0.040, prefill_rows=0.500, step=0.0110, step_rows=0.0140),
)

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Served:
    """Of each request the seconds from its arrival to its first token and to its last; when all was done."""

    first: Sequence[float]
    whole: Sequence[float]
    end: float


def alone(arrivals: Floats, lengths: Integers, costs: Costs) -> Served:
    """Serves one after the other."""
    now, first, whole = 0.0, list[float](), list[float]()
    for arrival, length in zip(arrivals, lengths, strict=True):
        now = max(now, arrival) + costs.prefill
        first.append(now - arrival)
        now += (length - 1) * costs.step
        whole.append(now - arrival)
    return Served(first, whole, now)


def static(arrivals: Floats, lengths: Integers, costs: Costs) -> Served:
    """Serves whatever waits, up to `rows`, together; all leave when the longest has ended."""
    now, at, first, whole = 0.0, 0, list[float](), list[float]()
    while at < len(arrivals):
        now = max(now, arrivals[at])
        to = min(at + costs.rows, int(np.searchsorted(arrivals, now, "right")))
        now += costs.prefill_rows
        first += list(now - arrivals[at:to])
        whole += list(now + (lengths[at:to] - 1) * costs.step_rows - arrivals[at:to])
        now += (int(lengths[at:to].max()) - 1) * costs.step_rows
        at = to
    return Served(first, whole, now)


def slots(arrivals: Floats, lengths: Integers, costs: Costs, prefills: int = 1) -> Served:
    """Serves each in a row of its own, with at most `prefills` between two steps; a row whose answer ends is free."""
    now, at, rows, first = 0.0, 0, list[list[int]](), list[float]()
    whole = [0.0] * len(arrivals)
    while at < len(arrivals) or rows:
        if not rows:
            now = max(now, arrivals[at])
        for _ in range(prefills):
            if at < len(arrivals) and len(rows) < costs.rows and arrivals[at] <= now:
                now += costs.prefill
                first.append(now - arrivals[at])
                rows.append([at, int(lengths[at]) - 1])
                at += 1
        now += costs.step_rows
        for row in rows:
            row[1] -= 1
            if row[1] <= 0:
                whole[row[0]] = now - arrivals[row[0]]
        rows = [row for row in rows if row[1] > 0]
    return Served(first, whole, now)


WAYS: dict[str, Callable[[Floats, Integers, Costs], Served]] = {
    "one after the other": alone,
    "static batches": static,
    "slots": slots,
}


def simulated(costs: Costs, longest: int, count: int = COUNT) -> tuple[str, list[tuple[str, ...]]]:
    """Returns what the most is that each way can do, and rows of load, way, time to first token p50 and p95, whole p50
    and p95, for answers of 5 to `longest` tokens."""
    draw = np.random.default_rng(0)
    lengths, gaps = draw.integers(5, longest + 1, count), draw.exponential(1, count)
    most = {name: count / way(np.zeros(count), lengths, costs).end for name, way in WAYS.items()}
    base, rows = max(most["one after the other"], most["static batches"]), list[tuple[str, ...]]()
    for load in LOADS:
        arrivals = np.cumsum(gaps) / (load * base)
        for name, way in WAYS.items():
            served = way(arrivals, lengths, costs)
            cells = [f"{q:.3g}" for found in (served.first, served.whole) for q in np.percentile(found, (50, 95))]
            rows.append((f"{load:.0%}, {load * base:.2f}/s", name, *cells))
    said = ", ".join(f"{name} {rate:.3g}" for name, rate in most.items())
    gain = most["slots"] / most["static batches"]
    return f"simulated, {costs.name}, {costs.rows} rows: most requests/s {said}; slots over static {gain:.2f}x", rows


HEAD = ("load", "way", "TTFT p50, s", "TTFT p95, s", "whole p50, s", "whole p95, s")
