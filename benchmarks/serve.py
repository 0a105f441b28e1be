"""`himap-serve` under load: the pruned plan and the unpruned one of the same bundle on the same server, in turn.

The random LLaVA of `prefill.py` at 35 + 576 + 135 prompt tokens answers over HTTP, 16 questions at a time: closed
loops, open ones, with several prefills between two decode steps; and slots beside static batches, in one process.
docs/benchmarks.md says how and what was found.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import serve_plots
from prefill import work_folder
from serve_clients import Loaded, closed_loop, open_loop, settle
from serve_model import PRUNED, UNPRUNED, Bundles, bodies, pictures
from serve_results import HEAD, Closed, Gate, Point, comparisons, gates, table
from serve_server import Server, serving
from serve_simulation import ASSUMED, simulated
from serve_simulation import HEAD as SIMULATED_HEAD
from serve_slots import LONGEST, side_by_side, told

from himap_export.validate.report.machine import cpu_and_features

PARTS = ("closed", "open", "admission", "slots")
LOADS = (0.5, 0.8, 0.95)  # of what a plan answers in a closed loop
PREFILLS, AT_CLIENTS, AT_LOAD = (1, 2, 4, 8), 16, 0.8  # the admission setting, and where it is tried
PLANS = (PRUNED, UNPRUNED)
BEGAN = time.monotonic()


def say(line: str) -> None:
    print(f"{time.monotonic() - BEGAN:6.0f} s  {line}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Bench:
    """What all parts share: options, bundles, and a server's log."""

    args: argparse.Namespace
    bundles: Bundles
    log: Path

    def server(self, *more: str) -> Any:
        """Returns the context of a server of both plans."""
        options = ("--model-name", "m", "--backend", self.args.backend, "--threads", str(self.args.threads))
        return serving(self.bundles.slots, self.log, *options, *more)

    def closed(self, server: Server, plan: str, tokens: int, clients: int) -> Loaded:
        """Returns one closed loop."""
        asked, args = bodies(f"m:{plan}", tokens, pictures(8)), self.args
        settled = min(clients, args.slots)
        loaded = asyncio.run(closed_loop(server.port, asked, clients, args.seconds, settled=settled))
        asyncio.run(settle(server.port, asked[0]))
        say(f"{tokens} tokens, {clients} clients, {plan}: {loaded.rate:.2f} requests/s")
        return loaded

    def opened(self, server: Server, plan: str, tokens: int, rate: float) -> Loaded:
        """Returns one open loop, in a window three times as long: arrivals are uneven."""
        asked = bodies(f"m:{plan}", tokens, pictures(8))
        loaded = asyncio.run(open_loop(server.port, asked, rate, 3 * self.args.seconds))
        say(f"{tokens} tokens, {rate:.2f}/s, {plan}: {len(loaded.answers)} requests")
        return loaded


def closed_points(bench: Bench, server: Server, clients: Sequence[int]) -> dict[tuple[int, int, str], Point]:
    """Returns every closed loop, pruned and unpruned in turn."""
    found = {}
    for tokens, count in product(bench.args.tokens, clients):
        rounds: dict[str, list[Loaded]] = {plan: [] for plan in PLANS}
        for _ in range(bench.args.rounds):
            for plan in PLANS:
                rounds[plan].append(bench.closed(server, plan, tokens, count))
        for plan in PLANS:
            found[tokens, count, plan] = Point(_clients(count), plan, tokens, tuple(rounds[plan]))
    return found


def open_points(bench: Bench, server: Server, closed: Closed) -> list[Point]:
    """Returns open loops at LOADS of what either plan answers at most; at unpruned's rates both plans are asked, with
    the same arrivals."""
    tokens, found = bench.args.tokens[0], list[Point]()
    most = {p: max(point.rate for (t, _, plan), point in closed.items() if (t, plan) == (tokens, p)) for p in PLANS}
    for load in LOADS:
        for own, plans in ((PRUNED, (PRUNED,)), (UNPRUNED, PLANS)):
            rate = load * most[own]
            label = f"{load:.0%} of {serve_plots.NAMES[own]}'s most, {rate:.2f}/s"
            found += [Point(label, plan, tokens, (bench.opened(server, plan, tokens, rate),)) for plan in plans]
    return found


def admission(bench: Bench) -> dict[int, list[Point]]:
    """Returns by number of prefills between two steps a closed loop and an open one of the pruned plan; servers take
    turns."""
    tokens, rate = bench.args.tokens[0], 0.0
    rounds: dict[int, tuple[list[Loaded], list[Loaded]]] = {prefills: ([], []) for prefills in PREFILLS}
    for _ in range(bench.args.rounds):
        for prefills, (closed, opened) in rounds.items():
            with bench.server("--prefills", str(prefills)) as server:
                say(f"{prefills} prefills between two steps")
                closed.append(bench.closed(server, PRUNED, tokens, AT_CLIENTS))
                rate = rate or AT_LOAD * closed[0].rate  # the first server's: everybody has the same arrivals
                opened.append(bench.opened(server, PRUNED, tokens, rate))
    labels = _clients(AT_CLIENTS), f"{AT_LOAD:.0%} load, {rate:.2f}/s"
    return {
        prefills: [Point(label, PRUNED, tokens, tuple(r)) for label, r in zip(labels, loads, strict=True)]
        for prefills, loads in rounds.items()
    }


def _clients(count: int) -> str:
    return f"{count} client{'s' * (count > 1)}"


def report_load(bench: Bench, flops: float) -> tuple[list[Gate], dict[str, Any]]:
    """Measures closed and open loops, and prints them."""
    with bench.server() as server:
        closed = closed_points(bench, server, bench.args.clients)
        opened = open_points(bench, server, closed) if "open" in bench.args.parts else []
        resident = server.resident()
    points = [*closed.values(), *opened]
    print(table(HEAD, [point.row() for point in points]), end="\n\n")
    print(*comparisons(closed, bench.args.slots, flops), sep="\n")
    print(f"the server's memory at the end: {resident / 2**20:.0f} MiB, mapped files included")
    if bench.args.plot:
        serve_plots.plot_load(closed, _title(bench), bench.args.plot / "serving-load.png")
    return list(gates(closed)), {"points": [point.document() for point in points], "resident_bytes": resident}


def report_admission(bench: Bench) -> dict[str, Any]:
    """Measures and prints what the admission setting trades."""
    points = admission(bench)
    rows = [
        (f"{prefills} prefill{'s' * (prefills > 1)}, {row[0]}", *row[1:])
        for prefills, found in points.items() for row in (point.row() for point in found)
    ]  # fmt: skip
    print(table(HEAD, rows), end="\n\n")
    if bench.args.plot:
        serve_plots.plot_admission(points, _title(bench), bench.args.plot / "serving-admission.png")
    return {"admission": {prefills: [p.document() for p in found] for prefills, found in points.items()}}


def report_slots(bench: Bench) -> dict[str, Any]:
    """Measures slots beside static batches and prints it, and what the costs measured there, or a GPU's, would do under
    load, if asked."""
    args = bench.args
    found, same, costs = side_by_side(
        bench.bundles, args.backend, args.threads, count=args.questions, rounds=args.rounds
    )
    print(*told(found, same, args.questions), sep="\n")
    simulations = {}
    if args.simulate:
        for each in (costs, *ASSUMED):
            head, rows = simulated(each, LONGEST)
            print(head, table(SIMULATED_HEAD, rows), sep="\n\n", end="\n\n")
            simulations[head] = rows
    return {"tokens_per_s": found, "same_answers": same, "costs": asdict(costs), "simulated": simulations}


def _title(bench: Bench) -> str:
    cpu, _ = cpu_and_features(Path("/proc/cpuinfo"))
    return f"{cpu}, {bench.args.threads} threads, {bench.args.backend} {bench.args.dtype}, {bench.args.slots} slots"


def options() -> argparse.Namespace:
    """Returns the command's."""
    parser = argparse.ArgumentParser(description=__doc__)
    _, features = cpu_and_features(Path("/proc/cpuinfo"))
    bf16 = "amx_bf16" in features or "avx512_bf16" in features
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64], help="of every answer; at most 64")
    parser.add_argument(
        "--seconds", type=float, default=12, help="of a closed loop; an open one is three times as long"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--questions", type=int, default=24, help="for slots beside static batches")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="open needs closed")
    parser.add_argument("--simulate", action="store_true", help="extrapolate slots to a GPU's costs, which are assumed")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--backend", default="openvino", help="onnxruntime computes fp32 (default: openvino)")
    parser.add_argument("--dtype", default="bf16" if bf16 else "fp32", help="default: bf16, if the CPU computes it")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the model here for the next run")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write the figures, PNG, into this folder")
    args = parser.parse_args()
    if "open" in args.parts and "closed" not in args.parts:
        parser.error("--parts open needs closed, whose rates it takes")
    return args


def main() -> None:
    from himap_export.engines.bundle import Bundle
    from himap_export.validate.speed.measure import ceiling

    args = options()
    cpu, features = cpu_and_features(Path("/proc/cpuinfo"))
    print(f"{cpu}, {args.threads} threads; {features}")
    print(f"{args.backend} {args.dtype}, {args.slots} slots, prompts of 35 + 576 + 135 tokens\n", flush=True)
    with work_folder(args.work and args.work.absolute()) as work:
        bundles = Bundles.made(work, args.backend, args.dtype, args.slots)
        say("exported")
        bench, verdicts = Bench(args, bundles, work / "server.log"), list[Gate]()
        flops = ceiling(Bundle.open(bundles.slots).select(PRUNED))
        told: dict[str, Any] = {"cpu": cpu, "features": features, "ceiling": flops}
        told |= {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
        if "closed" in args.parts:
            verdicts, found = report_load(bench, flops)
            told |= found
        parts: dict[str, Callable[[Bench], dict[str, Any]]] = {"admission": report_admission, "slots": report_slots}
        for part in (part for part in parts if part in args.parts):
            told |= parts[part](bench)
    print(*(gate.line() for gate in verdicts), sep="\n")
    gate_documents = [{"what": g.what, "found": g.found, "bar": g.bar, "met": g.met} for g in verdicts]
    print(json.dumps(told | {"gates": gate_documents}))


if __name__ == "__main__":
    main()
