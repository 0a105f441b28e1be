"""A service whose engines run elsewhere: questions go to replicas, and events come back.

A question of which nobody has seen a part of the answer is asked again where its replica was lost; a stream that was
cut ends by saying so.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from himap_export.engines.arrays import Inputs
from himap_export.engines.sampling import Sampling
from himap_export.graphs.errors import HimapError
from himap_export.serve.messages import Began, Deliver, Ended, Event, Question
from himap_export.serve.scheduler import Key, key_of
from himap_export.serve.service import Draining, Load, QueueFull, Service

LOG = logging.getLogger(__name__)
TRIES = 3  # of one question: what ends a replica may be the question itself, which must not end them all
PAUSE = 0.2  # seconds before the next; a replica that refuses does so at once
UNHEARD = 10.0  # seconds without a word from any replica, after which there is none


class Lost(Draining):
    """The replica that was asked is gone, or there is no way to it: `why`."""

    def __init__(self, why: str) -> None:
        super().__init__("the replica that answered was lost", why, "ask again")


@dataclass(frozen=True)
class Asked:
    """A question as it travels: its prompt as arrays, which are small beside the pictures' files. `seconds` are left of
    its time, for clocks of two machines share no zero; `digest` and `variant` say what it was prepared for."""

    id: str
    model: str
    digest: str
    inputs: Inputs
    variant: Key
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    seconds: float


def asked_of(question: Question) -> Asked:
    """Returns what a replica needs to know of `question`."""
    spec = question.request.spec
    return Asked(
        question.id, question.model, spec.manifest.digest, question.request.inputs, variant=key_of(spec),
        max_new_tokens=question.max_new_tokens, sampling=question.sampling, stop=question.stop,
        seconds=question.deadline - time.monotonic(),
    )  # fmt: skip


class Replicas(Protocol):
    """The way to those who own engines; each call goes to one of them. Both raise Lost."""

    def answer(self, asked: Asked) -> AsyncGenerator[Event, None]: ...
    async def ping(self) -> None: ...


@dataclass
class Way:
    """A question on its way. `held`: what came of an answer that is read as a whole, and may be dropped again."""

    question: Question
    tell: Deliver
    began: bool = False
    seen: bool = False
    tokens: int = 0
    held: list[Event] = field(default_factory=list)

    def came(self, event: Event) -> None:
        """Passes an event on, or holds it; its times become those of this machine, and the way a part of the wait."""
        now = time.monotonic()
        if isinstance(event, Began):
            self.began = True
            self.held.append(replace(event, at=now, queue_s=max(0.0, now - self.question.asked - event.prefill_s)))
        else:
            self.tokens = event.tokens
            self.held.append(replace(event, at=now))
        if self.question.streamed or isinstance(event, Ended):
            self.seen = True
            for one in self.held:
                self.tell(one)
            self.held.clear()

    def drop(self) -> None:
        """Forgets what came, and nobody saw."""
        self.began, self.tokens = False, 0
        self.held.clear()


class RemoteService(Service):
    """A service that is never opened: it prepares questions itself, so that a mistake is answered at once, and leaves
    the answers to `replicas`. It lives on the event loop that calls it.

    `slots` questions run at a time and `queue` wait; `about` is what Service takes.
    """

    def __init__(self, *about: Any, replicas: Replicas, slots: int, queue: int, **more: Any) -> None:
        super().__init__(*about, **more)
        self._replicas, self._slots, self._queue = replicas, slots, queue
        self._ways: dict[asyncio.Task[Ended], Way] = {}
        self._heard = -math.inf

    @property
    def ready(self) -> bool:
        """Whether a replica has been heard of lately."""
        return time.monotonic() - self._heard < UNHEARD

    @property
    def load(self) -> Load:
        running = sum(way.began for way in self._ways.values())
        return Load(running, len(self._ways) - running, self._slots)

    async def look(self) -> None:
        """Looks whether there is a replica, for `ready`."""
        try:
            await asyncio.wait_for(self._replicas.ping(), UNHEARD / 2)
        except (Lost, TimeoutError):
            return
        self._heard = time.monotonic()

    def submit(self, question: Question, deliver: Deliver) -> Callable[[], None]:
        """Sends a question to a replica and returns what cancels it. QueueFull if all have enough to do."""
        if len(self._ways) >= self._slots + self._queue:
            running = f"{self._slots} of them run at a time"
            raise QueueFull(f"{len(self._ways)} questions are under way", running, "ask again later")

        def tell(event: Event) -> None:
            self._watch(question, event)
            deliver(event)

        way = Way(question, tell)
        task = asyncio.get_running_loop().create_task(self._answer(way))
        self._ways[task] = way
        task.add_done_callback(self._ended)

        def cancel() -> None:
            task.cancel()

        return cancel

    async def _answer(self, way: Way) -> Ended:
        left = way.question.deadline - time.monotonic()
        try:
            async with asyncio.timeout(None if math.isinf(left) else left):
                return await self._asked_until_answered(way)
        except TimeoutError:
            return Ended("timeout", way.tokens, time.monotonic())

    async def _asked_until_answered(self, way: Way) -> Ended:
        """Asks one replica after the other, TRIES times at most, unless somebody has seen a part; returns the end."""
        problem: HimapError | None = None
        for _ in range(TRIES):
            if problem is not None:
                await asyncio.sleep(PAUSE)
            try:
                ended = await self._asked_once(way)
            except Lost as lost:
                problem = lost
            else:
                if not isinstance(ended.problem, QueueFull | Draining):
                    return ended
                problem = ended.problem
            if way.seen:
                break
            LOG.warning("%s is asked again: %s", way.question.id, problem)
            way.drop()
        return Ended("error", way.tokens, time.monotonic(), problem=problem)

    async def _asked_once(self, way: Way) -> Ended:
        async with aclosing(self._replicas.answer(asked_of(way.question))) as events:
            async for event in events:
                self._heard = time.monotonic()
                if isinstance(event, Ended):
                    return event
                way.came(event)
        raise Lost("it stopped in the middle")

    def _ended(self, task: asyncio.Task[Ended]) -> None:
        """Tells the end, even of a question that was cancelled before its task began."""
        way, now = self._ways.pop(task), time.monotonic()
        if task.cancelled():
            way.came(Ended("cancelled", way.tokens, now))
        elif found := task.exception():
            problem = HimapError("a replica failed", f"{type(found).__name__}: {found}")
            way.came(Ended("error", way.tokens, now, problem=problem))
        else:
            way.came(task.result())
