"""Who prefills and who goes on, turn by turn. One thread calls it, and no other touches the engines.

A turn: whoever was cancelled or is too late leaves; then up to `prefills` questions, the oldest first, each into a free
slot of its variant; then one decode step for everybody who has one. A question whose variant has no free slot waits
without holding up those behind it that another variant answers.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from himap_export.engines.bundle import RunSpec
from himap_export.engines.slots import Slots
from himap_export.graphs.errors import HimapError
from himap_export.serve.messages import Began, Deliver, Ended, Event, Piece, Question, Reason
from himap_export.serve.speaker import Speaker

Key = tuple[str, str, int, int]  # of a variant: its plan, image spec, images a prompt and text budget
Watch = Callable[[Question, Event], None]


def key_of(spec: RunSpec) -> Key:
    """Returns what tells a variant from the bundle's others."""
    return spec.plan_name, spec.variant.image, spec.budget.images, spec.budget.text


@dataclass(eq=False)
class Ticket:
    """A question that was taken in, `since` when, and who hears of it. Any thread may set `cancelled`."""

    question: Question
    deliver: Deliver
    cancelled: bool = False
    since: float = field(default_factory=time.monotonic)


@dataclass(eq=False)
class Answering:
    """A ticket that has a slot; `first` is when its first token came."""

    ticket: Ticket
    speaker: Speaker
    first: float


class Scheduler:
    """The slots of all variants, who has them and who waits. `most` is how many rows of each are used."""

    def __init__(self, slots: Mapping[Key, Slots], watch: Watch, prefills: int = 1, most: int | None = None) -> None:
        self._held, self._watch, self._prefills = slots, watch, prefills
        self._free = {key: list(range(min(s.rows, most or s.rows)))[::-1] for key, s in slots.items()}
        self._rows: dict[Key, dict[int, Answering]] = {key: {} for key in slots}
        self.slots = sum(map(len, self._free.values()))
        self.waiting = deque[Ticket]()

    @property
    def running(self) -> int:
        return sum(map(len, self._rows.values()))

    def unplaced(self, tickets: Iterable[Ticket]) -> int:
        """Counts those of `tickets` for which no slot is free; any thread may ask."""
        wanted = Counter(key_of(ticket.question.request.spec) for ticket in tickets)
        return sum(max(0, count - len(self._free[key])) for key, count in wanted.items())

    def turn(self) -> None:
        """Does one turn."""
        self._drop(time.monotonic())
        for ticket in self._next():
            self._prefill(ticket)
        for key, rows in self._rows.items():
            if rows:
                self._step(key, rows)

    def end_all(self, reason: Reason, problem: HimapError | None = None) -> None:
        """Ends whatever runs or waits."""
        for key, rows in self._rows.items():
            for row in list(rows):
                self._leave(key, row, reason, problem)
        while self.waiting:
            self._tell(self.waiting.popleft(), Ended(reason, 0, time.monotonic(), problem=problem))

    def _drop(self, now: float) -> None:
        for key, rows in self._rows.items():
            for row, answering in list(rows.items()):
                if why := _gone(answering.ticket, now):
                    self._leave(key, row, why)
        for ticket in list(self.waiting):
            if why := _gone(ticket, now):
                self.waiting.remove(ticket)
                self._tell(ticket, Ended(why, 0, now))

    def _next(self) -> Iterator[Ticket]:
        """Takes up to `prefills` tickets out of the queue, the oldest that have a free slot each."""
        for _ in range(self._prefills):
            found = next((t for t in self.waiting if self._free[key_of(t.question.request.spec)]), None)
            if found is None:
                return
            self.waiting.remove(found)
            yield found

    def _prefill(self, ticket: Ticket) -> None:
        question, start = ticket.question, time.monotonic()
        spec, processor = question.request.spec, question.request.processor
        assert processor is not None  # questions are made of an image and words
        key, slots = key_of(spec), self._held[key_of(spec)]
        row = self._free[key].pop()
        eos = spec.manifest.model.eos_tokens
        speaker = Speaker(
            processor.tokenizer, eos, most=question.max_new_tokens, sampling=question.sampling, stop=question.stop
        )
        known, looked = slots.features.hits, slots.features.misses
        try:
            prefilled = slots.prefill(row, question.request.inputs, question.sampling.seed)
            text, now = speaker.say(prefilled.logits), time.monotonic()
        except HimapError as problem:
            self._release(key, row)
            self._tell(ticket, Ended("error", 0, time.monotonic(), problem=problem))
            return
        self._rows[key][row] = Answering(ticket, speaker, now)
        kept = {name: positions[0] for name, positions in prefilled.kept.items()}
        self._tell(ticket, Began(
            kept, now, queue_s=start - ticket.since, prefill_s=now - start, known=slots.features.hits - known,
            looked=slots.features.misses - looked,
        ))  # fmt: skip
        self._spoken(key, row, text, now)

    def _step(self, key: Key, rows: dict[int, Answering]) -> None:
        try:
            logits = self._held[key].step({row: a.speaker.token for row, a in rows.items()})
        except HimapError as problem:
            for row in list(rows):
                self._leave(key, row, "error", problem)
            return
        for row, answering in list(rows.items()):
            try:
                text = answering.speaker.say(logits[row : row + 1])
            except HimapError as problem:  # its logits are not finite: the others' are their own
                self._leave(key, row, "error", problem)
            else:
                self._spoken(key, row, text, time.monotonic())

    def _spoken(self, key: Key, row: int, text: str, now: float) -> None:
        answering = self._rows[key][row]
        self._tell(answering.ticket, Piece(text, answering.speaker.count, now))
        if answering.speaker.reason is not None:
            self._leave(key, row, answering.speaker.reason)

    def _leave(self, key: Key, row: int, reason: Reason, problem: HimapError | None = None) -> None:
        answering, now = self._rows[key].pop(row), time.monotonic()
        self._release(key, row)
        ended = Ended(reason, answering.speaker.count, now, decode_s=now - answering.first, problem=problem)
        self._tell(answering.ticket, ended)

    def _release(self, key: Key, row: int) -> None:
        self._held[key].free(row)
        self._free[key].append(row)

    def _tell(self, ticket: Ticket, event: Event) -> None:
        self._watch(ticket.question, event)
        ticket.deliver(event)


def _gone(ticket: Ticket, now: float) -> Reason | None:
    if ticket.cancelled:
        return "cancelled"
    return "timeout" if now > ticket.question.deadline else None
