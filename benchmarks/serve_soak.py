"""A soak of `himap-serve`: thousands of requests, good ones and bad ones, and what must hold of every one of them.

The shipped model answers drawn pictures with three plans and two text budgets, as it is and made to say more. Each
whole answer must be the one of a single run, each request must end with an answer or an error object, the queue must
keep its bound, slots must be free and memory flat at the end. Exit code 1 if any of that fails.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prefill import work_folder
from serve_server import Server, serving
from serve_soak_asks import Ask, Malformed, Picture, Truth, asks, drawn, export_shapes, malformed, request, truths
from serve_soak_clients import PATIENCE_S, Door, Outcome, judged, left, send_malformed

PATH, MODEL, MODELS = "/v1/chat/completions", "shapes", ("shipped", "soft")
QUEUE, BURST = 32, 160  # questions that may wait; requests at once, more than slots and queue hold
SHARES = {"whole": 40, "streamed": 34, "leaves": 12, "malformed": 8, "slow": 4, "stalls": 2}  # percent
LINGERING = 64  # slow and stalled readers at a time, beside the clients
SAMPLE_S, CALM_S = 0.25, 20.0
WARM, GROWTH = 0.1, 0.05  # the share of requests that warm up; how much memory may grow from then on
BEGAN = time.monotonic()


def say(line: str) -> None:
    print(f"{time.monotonic() - BEGAN:6.0f} s  {line}", file=sys.stderr, flush=True)


@dataclass
class Samples:
    """What was seen of the server: questions waiting and running, and memory in bytes by the share of requests done."""

    waiting: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    resident: list[tuple[float, int]] = field(default_factory=list)

    def take(self, server: Server, done: float) -> None:
        """Adds a sample."""
        told = {name.partition("{")[0]: value for name, value in server.metrics().items()}
        self.waiting.append(int(told["himap_num_requests_waiting"]))
        self.running.append(int(told["himap_num_requests_running"]))
        self.resident.append((done, server.resident()))

    def settled(self, begin: float, end: float) -> float:
        """Returns the median memory between two shares."""
        return statistics.median(size for done, size in self.resident if begin <= done <= end)


@dataclass
class Soak:
    """The requests that are sent, and what has become of those that were."""

    door: Door
    asked: Sequence[tuple[Ask, Truth]]
    pictures: Sequence[Picture]
    wrong: Sequence[Malformed]
    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    retries: int = 0

    def plan(self, count: int) -> list[str]:
        """Returns behaviours in order; a burst, as many requests, stands where every tenth begins."""
        draw, found = random.Random(self.seed), list[str]()
        bursts = min(10, count // (3 * BURST))
        single = count - bursts * BURST
        for n in range(single):
            if bursts and n % -(-single // bursts) == 0:
                found.append("burst")
            found += draw.choices(tuple(SHARES), tuple(SHARES.values()))
        return found

    async def run(self, count: int, clients: int) -> None:
        """Sends `count` requests by so many clients, and waits for all."""
        todo, lingering, readers = (
            iter(enumerate(self.plan(count))),
            set[asyncio.Task[None]](),
            asyncio.Semaphore(LINGERING),
        )

        async def linger(number: int, behaviour: str) -> None:
            async with readers:
                await self._one(number, behaviour)

        async def client() -> None:
            for number, behaviour in todo:
                if behaviour in ("slow", "stalls"):
                    lingering.add(asyncio.create_task(linger(number, behaviour)))
                elif behaviour == "burst":
                    same = random.Random(f"{self.seed} {number}").randrange(2**32)  # all ask one plan
                    await asyncio.gather(*(self._one(same + n, behaviour) for n in range(BURST)))
                else:
                    await self._one(number, behaviour)

        await asyncio.gather(*(client() for _ in range(clients)))
        await asyncio.gather(*lingering)

    async def _one(self, number: int, behaviour: str) -> None:
        draw = random.Random(f"{self.seed} {behaviour} {number}")
        try:
            async with asyncio.timeout(PATIENCE_S):
                outcome = await self._sent(draw, behaviour)
        except (TimeoutError, OSError) as problem:
            outcome = Outcome(behaviour, "lost", why=repr(problem))
        self.outcomes.append(outcome)

    async def _sent(self, draw: random.Random, behaviour: str) -> Outcome:
        if behaviour == "malformed":
            return await send_malformed(self.door, draw.choice(self.wrong))
        ask, truth = draw.choice(self.asked)
        stream = behaviour != "whole" and (behaviour != "burst" or draw.random() < 0.5)
        sent = request(PATH, ask.body(self.pictures, MODEL, stream))
        if behaviour == "leaves":
            return left(behaviour, await self.door.leave(sent, draw), truth)
        if behaviour == "stalls":
            return left(behaviour, await self.door.stall(sent), truth)
        send = self.door.crawl if behaviour == "slow" else self.door.wait
        while (outcome := judged(behaviour, await send(sent), truth, stream)).status == 429 and behaviour != "burst":
            self.retries += 1  # as the server asks, by Retry-After; a burst is told once
            await asyncio.sleep(1 + draw.random())
        return outcome


@dataclass(frozen=True)
class Check:
    """What must hold, and what was found."""

    what: str
    holds: bool
    found: str


def checks(soak: Soak, samples: Samples, alive: bool, count: int) -> Iterator[Check]:
    """Yields every verdict."""
    kinds = Counter(outcome.kind for outcome in soak.outcomes)
    refused = Counter(o.status for o in soak.outcomes if o.kind == "error" and o.behaviour != "malformed")
    yield Check("every request has ended", len(soak.outcomes) == count, f"{len(soak.outcomes)} of {count}")
    yield Check(
        "each answer equals a single run", not kinds["wrong"], f"{kinds['right']} right, {kinds['wrong']} wrong"
    )
    yield Check("none lost without an error object", not kinds["lost"], f"{kinds['lost']} lost")
    bursts = sum(outcome.behaviour == "burst" for outcome in soak.outcomes)
    proper = set(refused) <= {429} and bool(refused) == bool(bursts)
    yield Check("only bursts are refused, with 429", proper, f"{dict(refused)} of {bursts}")
    most = max(samples.waiting)
    yield Check(f"at most {QUEUE} wait", most <= QUEUE, f"{most} of {len(samples.waiting)} samples")
    now = samples.running[-1], samples.waiting[-1]
    yield Check("all slots are free at the end", now == (0, 0), f"{now[0]} running, {now[1]} waiting")
    warm, end = samples.settled(WARM, 2 * WARM), samples.settled(1 - WARM, 1)
    growth = end / warm - 1
    yield Check(f"memory grows by at most {GROWTH:.0%}", growth <= GROWTH,
                f"{warm / 2**20:.0f} MiB, then {end / 2**20:.0f}: {growth:+.1%}")  # fmt: skip
    yield Check("the server is alive", alive, str(alive))


async def soaked(soak: Soak, server: Server, samples: Samples, count: int, clients: int) -> None:
    """Runs the soak, and samples the server until it is at rest."""
    sending = asyncio.create_task(soak.run(count, clients))
    told = 0
    while not sending.done():
        await asyncio.to_thread(samples.take, server, len(soak.outcomes) / count)
        await asyncio.wait([sending], timeout=SAMPLE_S)
        if len(soak.outcomes) >= told + count / 10:
            told = len(soak.outcomes)
            say(f"{told} of {count}; {samples.resident[-1][1] / 2**20:.0f} MiB")
    await sending
    end = time.monotonic() + CALM_S
    while time.monotonic() < end:
        await asyncio.to_thread(samples.take, server, 1.0)
        if samples.running[-1] == samples.waiting[-1] == 0:
            return
        await asyncio.sleep(SAMPLE_S)


def summary(soak: Soak, samples: Samples) -> Iterator[str]:
    """Yields a table of behaviours and outcomes, memory by tenths, and what went wrong."""
    kinds = ("right", "wrong", "error", "left", "lost")
    yield f"{'':10}" + "".join(f"{kind:>8}" for kind in kinds) + "  statuses"
    for behaviour in (*SHARES, "burst"):
        mine = [o for o in soak.outcomes if o.behaviour == behaviour]
        found, statuses = Counter(o.kind for o in mine), Counter(o.status for o in mine)
        told = ", ".join(f"{status} {n}" for status, n in sorted(statuses.items()))
        yield f"{behaviour:10}" + "".join(f"{found[kind]:>8}" for kind in kinds) + f"  {told}"
    tenths = (f"{samples.settled(n / 10, (n + 1) / 10) / 2**20:.0f}" for n in range(10) if _sampled(samples, n))
    yield f"memory, MiB, medians of the tenths: {', '.join(tenths)}"
    yield f"running at most {max(samples.running)}, waiting at most {max(samples.waiting)}, {soak.retries} asked again"
    yield from (f"{o.kind}: {o.behaviour}: {o.why}" for o in soak.outcomes if o.kind in ("wrong", "lost"))


def _sampled(samples: Samples, tenth: int) -> bool:
    return any(tenth / 10 <= done <= (tenth + 1) / 10 for done, _ in samples.resident)


def soak_server(args: argparse.Namespace, work: Path, name: str, count: int) -> bool:
    """Exports a model, computes what is right, sends `count` requests; whether all holds."""
    bundle, options = work / name, ["--max-queue", str(QUEUE), "--model-name", MODEL, "--prefills", str(args.prefills)]
    export_shapes(bundle, name == "soft", args.backend)
    pictures, questions = drawn()
    asked = asks(questions, args.distinct, args.seed)
    say(f"{name}: {len(asked)} distinct questions, answered one by one")
    truth = truths(bundle, args.backend, pictures, asked)
    lengths = Counter(t.tokens for t in truth)
    say(f"{len(set(truth))} distinct answers, of {min(lengths)} to {max(lengths)} tokens")
    options += ["--backend", args.backend] if args.backend else []
    samples = Samples()
    with serving(bundle, work / f"{name}.log", *options) as server:
        wrong = malformed(asked[0].body(pictures, MODEL, stream=False))
        soak = Soak(Door(server.port), list(zip(asked, truth, strict=True)), pictures, wrong, args.seed)
        start = time.monotonic()
        asyncio.run(soaked(soak, server, samples, count, args.clients))
        took = time.monotonic() - start
        verdicts = list(checks(soak, samples, server.alive, count))
    print(f"{name}: {count} requests in {took:.0f} s, {count / took:.1f}/s; {len(asked)} distinct questions, "
          f"{len(set(truth))} distinct answers of {min(lengths)} to {max(lengths)} tokens")  # fmt: skip
    print(*summary(soak, samples), sep="\n")
    print(*(f"{'holds' if c.holds else 'FAILS'}  {c.what}: {c.found}" for c in verdicts), sep="\n", flush=True)
    return all(check.holds for check in verdicts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--requests", type=int, default=10_000, help="of all models together; of a few hundred the memory still grows"
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="as shipped, and one that says more"
    )
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--distinct", type=int, default=500, help="different questions of each model")
    parser.add_argument("--prefills", type=int, default=4, help="the server's: more run together")
    parser.add_argument("--backend", help="default: the best that is installed; of the soft one onnxruntime")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the bundles and the servers' logs here")
    args = parser.parse_args()
    share = args.requests // len(args.models)
    counts = dict.fromkeys(args.models[1:], share) | {args.models[0]: args.requests - share * (len(args.models) - 1)}
    with work_folder(args.work and args.work.absolute()) as work:
        held = [soak_server(args, work, name, counts[name]) for name in args.models]
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
