"""A bundle's plans as models: one thread owns the engines, a bounded queue leads to it.

service = Service(bundle, "shapes")
service.open()
cancel = service.submit(question, deliver=print)
"""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from himap_export.engines.answer import Request
from himap_export.engines.backends import ANYWAY, Opening
from himap_export.engines.bundle import Bundle, RunSpec
from himap_export.engines.layout import text_tokens
from himap_export.engines.prefill import check_memory
from himap_export.engines.processor import load_processor
from himap_export.engines.session import Session, open_first
from himap_export.engines.slots import Slots, graphs_of
from himap_export.graphs.errors import Exit, HimapError
from himap_export.serve.messages import Deliver, Ended, Event, Question, Reason
from himap_export.serve.scheduler import Scheduler, Ticket, key_of

FAILED = HimapError("the engines failed", hint="the server's log says why")
STUCK = 120.0  # seconds of one turn, from which on the engines are taken for dead


@dataclass(frozen=True)
class Settings:
    """How many rows of each variant's slots are used (`max_batch`, None: all), how many questions may wait, and how
    many prefills there may be between two decode steps."""

    max_batch: int | None = None
    max_queue: int = 64
    prefills: int = 1


@dataclass(frozen=True)
class Load:
    """What is under way: questions that have a slot, questions that wait for one, and slots in all."""

    running: int
    waiting: int
    slots: int


class QueueFull(HimapError):  # noqa: N818  as queue.Full: a state, more than a mistake
    """No more questions may wait; a slot may be free in `retry_after_s` seconds."""

    retry_after_s = 1


class Draining(HimapError):  # noqa: N818
    """Nothing is taken in: not yet, no longer, or never again."""


def nobody(question: Question, event: Event) -> None:
    """Watches nothing."""


class Service:
    """A bundle's plans as models, one thread that owns the engines, and what waits for it.

    `models`: by id, the plan that it means, by its own name or its policy's; the bundle's `name` alone is its first
    plan. `watch` sees every event before `deliver` does; both are called on the engines' thread and must neither block
    nor raise.
    """

    def __init__(
        self,
        bundle: Bundle,
        name: str,
        *,
        plans: Sequence[str] = (),
        backend: str | None = None,
        opening: Opening = ANYWAY,
        settings: Settings | None = None,
        watch: Callable[[Question, Event], None] = nobody,
    ) -> None:
        """HimapError (usage) for a plan that the bundle does not hold, or a bundle for films."""
        self.bundle, self.name, self.settings, self._watch = bundle, name, settings or Settings(), watch
        held = tuple(dict.fromkeys(v.plan_name for v in bundle.manifest.variants))
        chosen = tuple(dict.fromkeys(bundle.plan_name(plan) for plan in plans)) or held
        policies = {RunSpec(bundle, v).plan.policy: v.plan_name for v in bundle.manifest.variants[::-1]}
        called = {plan: plan for plan in chosen} | {
            p: plan for p, plan in policies.items() if plan in chosen and p != "custom"
        }
        self.models: Mapping[str, str] = {name: chosen[0]} | {f"{name}:{each}": plan for each, plan in called.items()}
        self.max_new_tokens = min(v.budget.new for v in bundle.manifest.variants)
        self.variants = [RunSpec(bundle, v) for v in bundle.manifest.variants if v.plan_name in chosen]
        if any(spec.image.film for spec in self.variants):
            hint = "ask with himap-run and `video`"
            raise HimapError(f"{bundle.folder} is for films", "only pictures are served", hint, Exit.USAGE)
        self._preparing = {plan: Session(bundle, plan=plan) for plan in chosen}
        self._backend, self._opening = backend, opening
        self._scheduler: Scheduler | None = None
        self._inbox, self._changed = list[Ticket](), threading.Condition()
        self._taking, self._closing = False, False
        self._turn_since, self._last_end, self._pace = math.inf, math.inf, 0.0
        self._problem: HimapError | None = None
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)

    def open(self) -> None:
        """Starts the thread; returns when every variant has answered a question. HimapError if one cannot."""
        self._thread.start()
        self._opened.wait()
        if self._problem:
            raise self._problem

    @property
    def ready(self) -> bool:
        """Whether questions are taken in, and the engines go on."""
        stuck = time.monotonic() - self._turn_since > STUCK
        return self._taking and self._thread.is_alive() and not stuck

    @property
    def load(self) -> Load:
        found = self._scheduler
        if found is None:
            return Load(0, 0, 0)
        return Load(found.running, found.unplaced([*self._inbox, *found.waiting.copy()]), found.slots)

    def check_images(self, model: str, count: int) -> None:
        """Checks that a model takes prompts of so many pictures; HimapError (usage) says which it takes if not.
        KeyError for an unknown model."""
        try:
            self.bundle.variants(self.models[model], count)
        except HimapError as problem:  # whoever asks knows the model, not the folder
            summary = problem.summary.replace(str(self.bundle.folder), model)
            raise HimapError(summary, problem.details, problem.hint, problem.code) from None

    def prepare(self, model: str, images: Sequence[Image.Image], prompt: str) -> Request:
        """Returns the request of one question to a model about pictures, in milliseconds; `<image>` in the prompt says
        where they stand, else they stand in front. Any thread may call it. KeyError for an unknown model, HimapError
        (usage) for a question that does not fit."""
        self.check_images(model, len(images))
        request = self._preparing[self.models[model]].prepare(images, prompt)
        ids, mask = request.inputs.input_ids, request.inputs.attention_mask
        budget, needed = request.spec.budget, text_tokens(ids, mask, self.bundle.manifest.model.image)
        if needed > budget.text:
            hint = f"shorten it, or export with `text_budget` {needed}"
            raise HimapError(f"the prompt has {needed} text tokens", f"the budget is {budget.text}", hint, Exit.USAGE)
        return replace(request, pictures=())  # photographs' pixels would wait in the queue with it

    def submit(self, question: Question, deliver: Deliver) -> Callable[[], None]:
        """Takes a question in and returns what cancels it; `deliver` hears of it. QueueFull or Draining if it is not
        taken."""
        ticket = Ticket(question, deliver)
        with self._changed:
            if not self._taking:
                raise Draining("the server takes no questions now", "it starts or stops", "ask again later")
            if (waiting := self.load.waiting) >= self.settings.max_queue:
                problem = QueueFull(f"{waiting} questions wait already", hint="ask again later")
                problem.retry_after_s = max(1, math.ceil(self._pace * waiting))
                raise problem
            self._inbox.append(ticket)
            self._changed.notify_all()

        def cancel() -> None:
            ticket.cancelled = True

        return cancel

    def drain(self) -> None:
        """Takes nothing in any more; returns when all that was taken in has ended."""
        with self._changed:
            self._taking = False
            self._changed.wait_for(lambda: not (self._busy() and self._thread.is_alive()))

    def close(self) -> None:
        """Ends the thread; what is under way is cancelled."""
        with self._changed:
            self._taking, self._closing = False, True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _busy(self) -> bool:
        return bool(self._inbox or (self._scheduler and (self._scheduler.running or self._scheduler.waiting)))

    def _run(self) -> None:
        """What the thread does."""
        try:
            scheduler = self._scheduler = self._scheduled()
        except HimapError as problem:
            self._problem = problem
            return
        except BaseException:
            self._problem = FAILED
            raise
        finally:
            self._opened.set()
        reason: Reason = "cancelled"
        try:
            while self._take_in(scheduler):
                scheduler.turn()
                self._turn_since = math.inf
        except BaseException:  # a bug of ours or the engines': everybody hears of it, nobody waits
            reason, self._problem = "error", FAILED
            raise
        finally:
            with self._changed:
                self._taking = False
                scheduler.waiting.extend(self._inbox)
                self._inbox.clear()
                scheduler.end_all(reason, self._problem)
                self._changed.notify_all()

    def _take_in(self, scheduler: Scheduler) -> bool:
        """Waits for something to do, and takes in what came; False if it is to end."""
        with self._changed:
            while not self._busy() and not self._closing:
                self._changed.notify_all()
                self._changed.wait()
            scheduler.waiting.extend(self._inbox)
            self._inbox.clear()
            self._turn_since = time.monotonic()
            return not self._closing

    def _scheduled(self) -> Scheduler:
        """Opens every variant, over one copy of the weights, and lets each answer a question."""
        first = open_first(self.variants[0], self._backend, self._opening, Slots)
        slots = {key_of(first.spec): first}
        check_memory(first.engines.device, [graph for spec in self.variants for graph in graphs_of(spec)])
        for spec in self.variants[1:]:
            slots[key_of(spec)] = Slots(spec, first.backend, self._opening, first)
        trial = Scheduler(slots, nobody)
        for spec in self.variants:
            _try(trial, spec)
        with self._changed:
            self._taking = True
        return Scheduler(slots, self._watched, self.settings.prefills, self.settings.max_batch)

    def _watched(self, question: Question, event: Event) -> None:
        """Keeps the pace, seconds between two ends under load, by which a full queue says when to come again."""
        if isinstance(event, Ended):
            between = max(0.0, event.at - max(self._last_end, question.asked)) if self._last_end < math.inf else 0.0
            self._pace, self._last_end = 0.9 * self._pace + 0.1 * between, event.at
        self._watch(question, event)


def _try(scheduler: Scheduler, spec: RunSpec) -> None:
    """Lets a variant answer a question about grey images; HimapError if it cannot."""
    image, events = Image.new("RGB", spec.image.size[::-1], "gray"), list[Event]()
    processor = load_processor(spec.bundle, spec.image)
    inputs = processor.inputs([image] * spec.budget.images, "?")
    request = Request(inputs, spec, prompt="?", processor=processor)
    question = Question(
        "trial", spec.plan_name, request, max_new_tokens=min(2, spec.budget.new), asked=time.monotonic()
    )
    scheduler.waiting.append(Ticket(question, events.append))
    while not (events and isinstance(end := events[-1], Ended)):
        scheduler.turn()
    if end.problem:
        raise end.problem
