"""Slots beside static batches and beside one after the other, in one process, on the same questions: tokens per second.

Answers are of 5 to 64 tokens. A static batch goes on until its longest answer has ended; a slot is taken anew.
"""

import queue
import statistics
import time
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from serve_model import PRUNED, Bundles, pictures, question
from serve_simulation import Costs

from himap_export.engines.answer import Request
from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.image import decode_image
from himap_export.engines.pipeline import Pipeline
from himap_export.serve.messages import Ended, Event, Piece, Question
from himap_export.serve.service import Service, Settings

SHORTEST, LONGEST = 5, 64
Answers = list[str]


@dataclass(frozen=True)
class Asked:
    """The same requests for everybody, and how many tokens each answer has."""

    requests: tuple[Request, ...]
    lengths: tuple[int, ...]

    def text(self, number: int, tokens: list[int]) -> str:
        """Returns what the tokens of an answer say."""
        processor = self.requests[number].processor
        assert processor is not None
        return processor.text(tokens[: self.lengths[number]], ())


class Together:
    """A pipeline that answers as many prompts at a time as it was exported for, and what its calls took."""

    def __init__(self, bundle: Bundle, backend: str, opening: Opening) -> None:
        self.pipeline = Pipeline(bundle.select(PRUNED), backend, opening)
        self.batch = self.pipeline.spec.budget.batch
        self.prefills, self.steps = list[float](), list[float]()

    def answers(self, asked: Asked) -> Answers:
        """Answers all, in batches in their order."""
        found = Answers()
        for at in range(0, len(asked.requests), self.batch):
            numbers = range(at, min(at + self.batch, len(asked.requests)))
            tokens = self._batch([asked.requests[n] for n in numbers], max(asked.lengths[n] for n in numbers))
            found += [asked.text(n, column) for n, column in zip(numbers, tokens, strict=True)]
        return found

    def _batch(self, requests: list[Request], longest: int) -> list[list[int]]:
        ids = np.concatenate([request.inputs.input_ids for request in requests])
        pixels = np.concatenate([request.inputs.pixel_values for request in requests])
        start = time.perf_counter()
        prefilled, layout = self.pipeline.prefill(ids, pixels)
        self.prefills.append(time.perf_counter() - start)
        logits, found = prefilled.logits, list[list[int]]()
        for step in range(longest):
            tokens = logits[: len(ids)].argmax(axis=1)
            found.append(tokens.tolist())
            if step < longest - 1:
                start = time.perf_counter()
                logits = self.pipeline.step(np.resize(tokens, self.batch), layout.lengths + step)
                self.steps.append(time.perf_counter() - start)
        return [list(column) for column in zip(*found, strict=True)]


def by_service(service: Service, asked: Asked) -> Answers:
    """Returns the answers of a service that has all questions at once."""
    ends, texts = queue.SimpleQueue[Ended](), [list[str]() for _ in asked.requests]

    def listener(number: int) -> Callable[[Event], None]:
        def hear(event: Event) -> None:
            if isinstance(event, Piece):
                texts[number].append(event.text)
            elif isinstance(event, Ended):
                ends.put(event)

        return hear

    for n, (request, length) in enumerate(zip(asked.requests, asked.lengths, strict=True)):
        service.submit(Question(str(n), service.name, request, length, asked=time.monotonic()), listener(n))
    tokens = sum(ends.get().tokens for _ in asked.requests)
    assert tokens == sum(asked.lengths), "an answer was cut short"
    return ["".join(pieces) for pieces in texts]


def requests(service: Service, count: int) -> Asked:
    """Returns `count` questions with answers uniform in length."""
    images = [decode_image(b64decode(uri.partition(",")[2]), "a picture") for uri in pictures(8)]
    found = [service.prepare(service.name, [images[n % len(images)]], question(n)) for n in range(count)]
    lengths = np.random.default_rng(1).integers(SHORTEST, LONGEST + 1, count)
    return Asked(tuple(found), tuple(int(length) for length in lengths))


def side_by_side(
    bundles: Bundles, backend: str, threads: int, *, count: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, int], Costs]:
    """Returns tokens per second of each way, round by round, how many of its answers are those of one after the other,
    and the least costs that were measured on the way."""
    opening, held = Opening(threads), {p: Bundle.open(p) for p in (bundles.slots, bundles.static)}
    settings = Settings(max_queue=count)
    service = Service(held[bundles.slots], PRUNED, plans=[PRUNED], backend=backend, opening=opening, settings=settings)
    service.open()
    single, batched = (Together(held[path], backend, opening) for path in (bundles.slots, bundles.static))
    asked = requests(service, count)
    ways: dict[str, Callable[[], Answers]] = {
        "one after the other": lambda: single.answers(asked),
        f"static batches of {batched.batch}": lambda: batched.answers(asked),
        f"{service.load.slots} slots": lambda: by_service(service, asked),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Answers] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way()
            speeds[name].append(sum(asked.lengths) / (time.perf_counter() - start))
    service.close()
    wanted = found["one after the other"]
    same = {name: sum(a == b for a, b in zip(answers, wanted, strict=True)) for name, answers in found.items()}
    costs = Costs(
        "costs measured on this CPU", batched.batch, min(single.prefills), prefill_rows=min(batched.prefills),
        step=min(single.steps), step_rows=min(batched.steps),
    )  # fmt: skip
    return speeds, same, costs


def told(speeds: dict[str, list[float]], same: dict[str, int], count: int) -> list[str]:
    """Returns a line for each way."""
    base = statistics.median(next(iter(speeds.values())))
    return [
        f"{name}: {statistics.median(found):.0f} tokens/s ({min(found):.0f} to {max(found):.0f}), "
        f"{statistics.median(found) / base:.2f}x one after the other; {same[name]} of {count} answers the same"
        for name, found in speeds.items()
    ]
