"""A service that answers as it is told: what real engines cannot do on demand."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from himap_export.engines.answer import Request
from himap_export.engines.arrays import Inputs
from himap_export.engines.bundle import Bundle
from himap_export.graphs.errors import HimapError
from himap_export.serve.messages import Began, Deliver, Ended, Piece, Question
from himap_export.serve.service import Draining, Load, QueueFull

NOTHING = Inputs(np.zeros((1, 7), np.int64), np.zeros((1, 3, 2, 2), np.float32))


@dataclass
class FakeService:
    """Follows the contract of `Service`, in a thread for each question; `script` tells it what an answer is."""

    bundle: Bundle
    script: Callable[["Talk"], None]
    name: str = "fake"
    max_new_tokens: int = 16
    ready: bool = True
    refuses: HimapError | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    taken: list[Question] = field(default_factory=list)
    _talks: list["Talk"] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    @property
    def models(self) -> Mapping[str, str]:
        return {self.name: self.bundle.manifest.variants[0].plan_name}

    @property
    def load(self) -> Load:
        return Load(0, 0, 1)

    def open(self) -> None:
        """Has nothing to open."""

    def check_images(self, model: str, count: int) -> None:
        assert count > 0

    def prepare(self, model: str, images: Sequence[Image.Image], prompt: str) -> Request:
        assert model in self.models
        sizes = tuple(image.size for image in images)
        return Request(NOTHING, self.bundle.select(self.models[model]), prompt=prompt, sizes=sizes)

    def submit(self, question: Question, deliver: Deliver) -> Callable[[], None]:
        if self.refuses is not None:
            raise self.refuses
        if not self.ready:
            raise Draining("the server takes no questions now")
        self.taken.append(question)
        talk = Talk(question, deliver, threading.Event())
        thread = threading.Thread(target=self._answer, args=(talk,), daemon=True)
        self._talks.append(talk)
        self._threads.append(thread)
        thread.start()

        return talk.left.set

    def _answer(self, talk: "Talk") -> None:
        self.script(talk)
        if talk.left.is_set() and not talk.over:
            talk.end("cancelled")
            self.cancelled.set()

    def drain(self) -> None:
        self.ready = False
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        self.ready = False
        for talk in self._talks:
            talk.left.set()


@dataclass
class Talk:
    """One question, and what is delivered of its answer."""

    question: Question
    deliver: Deliver
    left: threading.Event
    over: bool = False
    tokens: int = 0

    def begin(self) -> None:
        self.deliver(Began({}, time.monotonic(), queue_s=0.25, prefill_s=0.5))

    def say(self, *texts: str) -> None:
        for text in texts:
            self.tokens += 1
            self.deliver(Piece(text, self.tokens, time.monotonic()))

    def end(self, reason: Any = "stop", problem: HimapError | None = None) -> None:
        self.over = True
        self.deliver(Ended(reason, self.tokens, time.monotonic(), decode_s=0.125, problem=problem))


def queue_full(seconds: int) -> QueueFull:
    """Returns the error of a full queue."""
    problem = QueueFull("3 questions wait already")
    problem.retry_after_s = seconds
    return problem
