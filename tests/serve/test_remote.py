"""A service over replicas: what is asked again, what is said to be cut, and that each question has one end."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from himap_export.engines.bundle import Bundle
from himap_export.graphs.errors import HimapError
from himap_export.serve import remote
from himap_export.serve.messages import Began, Ended, Event, Piece, Question
from himap_export.serve.remote import TRIES, Asked, Lost, RemoteService
from himap_export.serve.service import Draining, QueueFull

BEGAN, WORLD = Began({"kept_k1": np.arange(3)}, at=-9.0, queue_s=7.0, prefill_s=0.0), Piece("world", 2, at=-9.0)
WHOLE = (BEGAN, Piece("hello ", 1, at=-9.0), WORLD, Ended("stop", 2, at=-9.0, decode_s=0.5))
FULL = Ended("error", 0, 0.0, problem=QueueFull("1 questions wait already"))
Script = tuple[Event | Exception, ...]


@dataclass
class FakeReplicas:
    """Each question is answered by the next of `scripts`, event by event; an exception is raised; at the end of a
    script that has no end it waits until it is cancelled."""

    scripts: list[Script]
    asked: list[Asked] = field(default_factory=list)
    left: int = 0
    gone: bool = False

    async def answer(self, asked: Asked) -> AsyncGenerator[Event, None]:
        self.asked.append(asked)
        try:
            for event in self.scripts.pop(0):
                await asyncio.sleep(0)
                if isinstance(event, Exception):
                    raise event
                yield event
            await asyncio.sleep(60)
        finally:
            self.left += 1

    async def ping(self) -> None:
        if self.gone:
            raise Lost("ActorDiedError")


@dataclass
class Asking:
    """One service over `scripts`, and what it delivers."""

    service: RemoteService
    replicas: FakeReplicas
    question: Question
    events: list[Event] = field(default_factory=list)
    watched: list[Event] = field(default_factory=list)

    def submit(self, **other: Any) -> Callable[[], None]:
        return self.service.submit(replace(self.question, **other), self.events.append)

    async def ended(self) -> Ended:
        """The end of one question, the only one."""
        while not (self.events and isinstance(self.events[-1], Ended)):
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert sum(isinstance(event, Ended) for event in self.events) == 1
        assert self.watched == self.events and self.service.load.running == self.service.load.waiting == 0
        return self.events[-1]

    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))


@pytest.fixture
def asking(shapes: Bundle, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Asking]:
    monkeypatch.setattr(remote, "PAUSE", 0.0)

    def made(*scripts: Script) -> Asking:
        replicas, watched = FakeReplicas(list(scripts)), list[Event]()
        service = RemoteService(
            shapes, "shapes", watch=lambda question, event: watched.append(event), replicas=replicas, slots=1, queue=1
        )
        request = service.prepare("shapes", [Image.new("RGB", (112, 112))], "what?")
        question = Question("id", "shapes", request, 16, asked=time.monotonic())
        return Asking(service, replicas, question, watched=watched)

    return made


def run(talk: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await talk()

    asyncio.run(bounded())


@pytest.mark.parametrize("streamed", [True, False])
def test_an_answer_comes_in_the_times_of_this_machine(asking: Callable[..., Asking], streamed: bool) -> None:
    one = asking(WHOLE)

    async def talk() -> None:
        one.submit(streamed=streamed)
        ended = await one.ended()
        assert [type(event) for event in one.events] == [Began, Piece, Piece, Ended] and one.text() == "hello world"
        assert all(event.at >= one.question.asked for event in one.events)
        began = one.events[0]
        assert isinstance(began, Began) and 0 <= began.queue_s < 7 and began.kept is BEGAN.kept
        assert (ended.reason, ended.tokens, ended.decode_s) == ("stop", 2, 0.5)
        (asked,) = one.replicas.asked
        assert asked.digest == one.question.request.spec.manifest.digest and asked.variant[2:] == (1, 16)
        assert one.service.ready and one.replicas.left == 1

    run(talk)


@pytest.mark.parametrize(
    ("script", "streamed"),
    [
        ((Lost("ActorDiedError"),), True),
        ((FULL,), True),
        ((Ended("error", 0, 0.0, problem=Draining("it stops")),), True),
        ((BEGAN, Piece("another", 1, 0.0), Lost("ActorDiedError")), False),
    ],
)
def test_what_nobody_has_seen_is_asked_again(asking: Callable[..., Asking], script: Script, streamed: bool) -> None:
    one = asking(script, WHOLE)

    async def talk() -> None:
        one.submit(streamed=streamed)
        assert (await one.ended()).reason == "stop" and one.text() == "hello world"
        assert len(one.replicas.asked) == one.replicas.left == 2

    run(talk)


def test_a_stream_that_was_cut_says_so(asking: Callable[..., Asking]) -> None:
    one = asking((BEGAN, WORLD, Lost("ActorDiedError")), WHOLE)

    async def talk() -> None:
        one.submit()
        ended = await one.ended()
        assert ended.reason == "error" and ended.tokens == 2 and isinstance(ended.problem, Draining)
        assert str(ended.problem) == "the replica that answered was lost: ActorDiedError (ask again)"
        assert one.text() == "world" and len(one.replicas.asked) == 1

    run(talk)


@pytest.mark.parametrize(("last", "kind"), [(Lost("NodeDiedError"), Lost), (FULL, QueueFull)])
def test_tries_are_bounded(asking: Callable[..., Asking], last: Any, kind: type[HimapError]) -> None:
    """A question that ends whoever is asked it ends few replicas."""
    one = asking(*[(last,)] * TRIES, WHOLE)

    async def talk() -> None:
        one.submit(streamed=False)
        assert isinstance((await one.ended()).problem, kind) and len(one.replicas.asked) == TRIES

    run(talk)


def test_what_an_engine_says_is_wrong_is_not_asked_again(asking: Callable[..., Asking]) -> None:
    nan, bug = Ended("error", 0, 0.0, problem=HimapError("the logits are not finite")), ValueError("a bug")

    async def talk() -> None:
        for script, said in ((nan, "the logits are not finite"), (bug, "a replica failed: ValueError: a bug")):
            one = asking((script,), WHOLE)
            one.submit()
            assert str((await one.ended()).problem) == said and len(one.replicas.asked) == 1

    run(talk)


@pytest.mark.parametrize("turns", [0, 1, 5])
def test_a_cancelled_question_leaves_its_replica(asking: Callable[..., Asking], turns: int) -> None:
    one = asking((BEGAN, WORLD))

    async def talk() -> None:
        cancel = one.submit()
        for _ in range(turns):
            await asyncio.sleep(0)
        cancel()
        assert (await one.ended()).reason == "cancelled"
        cancel()
        assert one.replicas.left == len(one.replicas.asked) == bool(turns)

    run(talk)


def test_a_late_answer_is_given_up(asking: Callable[..., Asking]) -> None:
    one = asking((BEGAN, WORLD))

    async def talk() -> None:
        one.submit(deadline=time.monotonic() + 0.05)
        assert (await one.ended()).reason == "timeout" and one.replicas.left == 1
        assert one.replicas.asked[0].seconds <= 0.05

    run(talk)


def test_no_more_questions_than_slots_and_places(asking: Callable[..., Asking]) -> None:
    one = asking((BEGAN,), ())

    async def talk() -> None:
        first, second = one.submit(), one.submit()
        while one.service.load.running != 1:
            await asyncio.sleep(0)
        assert one.service.load.waiting == 1 == one.service.load.slots
        with pytest.raises(QueueFull):
            one.submit()
        first(), second()
        while one.service.load.waiting or one.service.load.running:
            await asyncio.sleep(0)
        one.replicas.scripts.append(WHOLE)
        one.submit()

    run(talk)


def test_it_is_ready_as_long_as_a_replica_is_heard_of(
    asking: Callable[..., Asking], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = asking()

    async def talk() -> None:
        one.replicas.gone = True
        await one.service.look()
        assert not one.service.ready
        one.replicas.gone = False
        await one.service.look()
        assert one.service.ready
        monkeypatch.setattr(remote, "UNHEARD", 0.0)
        assert not one.service.ready

    run(talk)
