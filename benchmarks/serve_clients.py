"""Clients of a server, many in one event loop: one streamed answer, closed loops and open ones.

The protocol is spoken by hand, as the clients share the machine with the server: an answer of 16 tokens costs them less
than a millisecond. Times are of `time.perf_counter`, in seconds.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LONGEST_LINE = 2**20
ROUNDS = 3  # of everybody who has a slot, that must end in a window, or it goes on


@dataclass(frozen=True)
class Answered:
    """One request: when it was due, when each piece of its answer came, when it ended; the HTTP status, how many tokens
    the server says the answer has, and the times that it gives (queue_s, prefill_s, first_token_s, decode_s)."""

    due: float
    pieces: tuple[float, ...]
    ended: float
    status: int
    tokens: int = 0
    timing: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """What a load found: answers per second in its window, and the requests that were due in it."""

    rate: float
    answers: tuple[Answered, ...]


def head(size: int) -> bytes:
    """Returns the headers of a request for an answer, whose body has `size` bytes."""
    lines = (
        "POST /v1/chat/completions HTTP/1.1", "host: 127.0.0.1", "connection: close",
        "content-type: application/json", f"content-length: {size}", "", "",
    )  # fmt: skip
    return "\r\n".join(lines).encode()


async def ask(port: int, body: bytes, due: float | None = None) -> Answered:
    """Returns the streamed answer to one request, which was `due` then or now."""
    due = time.perf_counter() if due is None else due
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LONGEST_LINE)
    try:
        writer.write(head(len(body)) + body)
        status = int((await reader.readline()).split()[1])
        pieces, last = list[float](), b"{}"
        async for line in reader:
            if line.startswith(b"data: {"):
                last = line[6:]
                if b'"content":"' in last and b'"role"' not in last:
                    pieces.append(time.perf_counter())
        ended, told = time.perf_counter(), json.loads(last)
    finally:
        writer.close()
    usage, timing = told.get("usage") or {}, told.get("himap", {}).get("timing", {})
    return Answered(due, tuple(pieces), ended, status, tokens=usage.get("completion_tokens", 0), timing=timing)


async def closed_loop(port: int, bodies: Sequence[bytes], clients: int, seconds: float, *, settled: int) -> Loaded:
    """Has each of `clients` ask again as soon as it has its answer.

    The window begins with an end, when `settled` answers have ended, and lasts `seconds` or, if that is longer, until
    ROUNDS times as many have ended in it: those who began together end together. The clients go on until all that was
    asked in it has ended.
    """
    found, asked, next_body = list[Answered](), dict[int, float](), itertools.cycle(bodies)

    async def client(number: int) -> None:
        while True:
            asked[number] = time.perf_counter()
            found.append(await ask(port, next(next_body)))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(client(number)) for number in range(clients)]
        while len(found) < settled:
            await asyncio.sleep(0.005)
        begin, before = max(answer.ended for answer in found), len(found)
        await asyncio.sleep(seconds)
        while len(found) < before + ROUNDS * settled:
            await asyncio.sleep(0.005)
        end = time.perf_counter()
        while any(begin <= since < end for since in asked.values()):
            await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
    ends = [answer.ended for answer in found if begin < answer.ended < end]
    return Loaded(len(ends) / (max(ends) - begin), tuple(answer for answer in found if begin <= answer.due < end))


async def open_loop(port: int, bodies: Sequence[bytes], rate: float, seconds: float, *, seed: int = 0) -> Loaded:
    """Asks at times that nobody's answer decides: a Poisson process of `rate` requests per second, for `seconds`.

    The same seed gives the same arrivals, counted in mean gaps. A request counts from when it was due.
    """
    draw, next_body, start, at = random.Random(seed), itertools.cycle(bodies), time.perf_counter(), 0.0
    tasks = list[asyncio.Task[Answered]]()
    async with asyncio.TaskGroup() as group:
        while (at := at + draw.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            tasks.append(group.create_task(ask(port, next(next_body), start + at)))
    answers = tuple(task.result() for task in tasks)
    return Loaded(len(answers) / (max(answer.ended for answer in answers) - start) if answers else 0.0, answers)


async def settle(port: int, body: bytes) -> None:
    """Returns when the server has let go of those who left: the answer to one more request has come."""
    answer = await ask(port, body)
    if answer.status != 200:
        raise SystemExit(f"the server answers {answer.status}")
