"""What a served load came to: rates and latencies, tables of them, what costs promise, and the gates."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from serve_clients import Loaded
from serve_model import PRUNED, UNPRUNED

QUANTILES = (50, 95, 99)
FASTER, LOADED = 1.6, (16, 32)  # times unpruned's requests/s, at these many clients, when prompts dominate
SHORT = 16  # answer tokens of which that is said
HEAD = (
    "load", "plan", "answers", "requests/s", "TTFT p50 / p95 / p99, ms", "between tokens p50 / p95 / p99, ms",
    "whole p50, s", "refused",
)  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A plan under one load, in each of its rounds. `load` says which; `tokens`: of every answer."""

    load: str
    plan: str
    tokens: int
    rounds: tuple[Loaded, ...]

    def __post_init__(self) -> None:
        """SystemExit if an answer is not as long as it was asked to be."""
        wrong = [a.tokens for a in self.answers if a.tokens != self.tokens or len(a.pieces) != self.tokens]
        if wrong:
            raise SystemExit(f"{self.load}: answers of {sorted(set(wrong))} tokens, not {self.tokens}")

    @cached_property
    def answers(self) -> list[Any]:
        return [answer for loaded in self.rounds for answer in loaded.answers if answer.status == 200]

    @property
    def refused(self) -> int:
        return sum(answer.status != 200 for loaded in self.rounds for answer in loaded.answers)

    @property
    def rate(self) -> float:
        """Answers per second, the median of the rounds."""
        return statistics.median(loaded.rate for loaded in self.rounds)

    @property
    def first_s(self) -> list[float]:
        return [answer.pieces[0] - answer.due for answer in self.answers]

    @property
    def between_s(self) -> list[float]:
        return [float(gap) for answer in self.answers for gap in np.diff(answer.pieces)]

    @property
    def whole_s(self) -> list[float]:
        return [answer.ended - answer.due for answer in self.answers]

    def row(self) -> tuple[str, ...]:
        """Returns the cells below HEAD."""
        rates = [loaded.rate for loaded in self.rounds]
        spread = f" ({min(rates):.2f} to {max(rates):.2f})" if len(rates) > 1 else ""
        first, between = (_milliseconds(found) for found in (self.first_s, self.between_s))
        whole = f"{np.median(self.whole_s):.2f}" if self.answers else ""
        cells = (f"{len(self.answers)}", f"{self.rate:.2f}{spread}", first, between, whole, f"{self.refused}")
        return (f"{self.load}, {self.tokens} tokens", self.plan, *cells)

    def document(self) -> dict[str, Any]:
        """Returns it for JSON, in seconds."""
        found = {"first_token_s": self.first_s, "inter_token_s": self.between_s, "whole_s": self.whole_s}
        quantiles = {name: dict(zip(("p50", "p95", "p99"), _quantiles(v), strict=True)) for name, v in found.items()}
        return {
            "load": self.load, "plan": self.plan, "tokens": self.tokens, "answers": len(self.answers),
            "refused": self.refused, "requests_per_s": [loaded.rate for loaded in self.rounds], **quantiles,
        }  # fmt: skip


@dataclass(frozen=True)
class Costs:
    """Seconds that the server's engines take: a prefill, vision included, and a decode step over all slots."""

    prefill: float
    step: float

    @classmethod
    def of(cls, alone: Point) -> "Costs":
        """Those of a point with one client, as the server gave them with each answer."""
        times = [answer.timing for answer in alone.answers]
        step = statistics.median(t["decode_s"] for t in times) / (alone.tokens - 1)
        return cls(statistics.median(t["prefill_s"] for t in times), step)

    def rate(self, clients: int, slots: int, tokens: int) -> float:
        """Returns the requests/s that they allow: each of those who have a slot waits for everybody's prefills."""
        running = min(clients, slots)
        return running / (running * self.prefill + (tokens - 1) * self.step)


@dataclass(frozen=True)
class Gate:
    """What must hold, what was found, and whether it does."""

    what: str
    found: float
    bar: float

    @property
    def met(self) -> bool:
        return self.found >= self.bar

    def line(self) -> str:
        """Returns the verdict."""
        return f"{'met    ' if self.met else 'NOT MET'}  {self.found:.2f}x {self.what}, the bar is {self.bar:g}"


Closed = Mapping[tuple[int, int, str], Point]  # by answer tokens, clients and plan


def ratios(pruned: Point, unpruned: Point) -> tuple[float, float, float]:
    """Returns pruned's requests/s over unpruned's, round by round: median, lowest, highest."""
    found = [p.rate / u.rate for p, u in zip(pruned.rounds, unpruned.rounds, strict=True)]
    return statistics.median(found), min(found), max(found)


def comparisons(closed: Closed, slots: int, flops: float) -> Iterator[str]:
    """Yields for each closed loop how many times the requests/s pruning brings, and what could be had."""
    for tokens, clients in dict.fromkeys((tokens, clients) for tokens, clients, _ in closed):
        found = ratios(closed[tokens, clients, PRUNED], closed[tokens, clients, UNPRUNED])
        promised = ""
        alone = [closed.get((tokens, 1, plan)) for plan in (PRUNED, UNPRUNED)]
        if alone[0] is not None and alone[1] is not None:
            fast, slow = (Costs.of(point).rate(clients, slots, tokens) for point in alone if point is not None)
            promised = f"; its times of one client allow {fast / slow:.2f}x"
        yield (
            f"{tokens} tokens, {clients} clients: pruned answers {found[0]:.2f}x as many requests/s "
            f"({found[1]:.2f} to {found[2]:.2f}){promised}; FLOPs allow {flops:.2f}x of prefill"
        )


def gates(closed: Closed) -> Iterator[Gate]:
    """Yields what must hold of the closed loops that were measured."""
    for tokens, clients in dict.fromkeys((tokens, clients) for tokens, clients, _ in closed):
        found = ratios(closed[tokens, clients, PRUNED], closed[tokens, clients, UNPRUNED])[0]
        where = f"unpruned's requests/s with {clients} clients and {tokens} answer tokens"
        yield Gate(where, found, FASTER if tokens == SHORT and clients in LOADED else 1.0)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns GitHub's Markdown, numbers to the right."""
    lines = (f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2))
    return "\n".join((*lines, *(f"| {' | '.join(row)} |" for row in rows)))


def _quantiles(seconds: Sequence[float]) -> list[float]:
    return [float(q) for q in np.percentile(seconds, QUANTILES)] if seconds else [float("nan")] * len(QUANTILES)


def _milliseconds(seconds: Sequence[float]) -> str:
    return " / ".join(f"{1e3 * q:.0f}" for q in _quantiles(seconds)) if seconds else ""
