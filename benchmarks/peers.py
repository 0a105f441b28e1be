"""CPU backends and their peers on the same random decoder, prompt and threads, in turn: prefill, decode, memory, load.

The decoder is `prefill.py`'s: 16 layers of 1024, 35 + 576 + 135 prompt tokens. Everybody decodes behind them. Each
round asks every system once, and ratios are taken within a round. `make peers-env` makes the environment of the peers;
who is missing is said and left out. docs/benchmarks.md says how each is run and what was found.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import peer_bars
from peer_models import ENVIRONMENT, Models
from peer_systems import DECODE, MEMORY, OPENED, PREFILL, QUIET, SYSTEMS, Compared, Running, alone, running
from prefill import work_folder

from himap_export.engines.isolation import child
from himap_export.graphs.errors import HimapError
from himap_export.validate.report.machine import cpu_and_features
from himap_export.validate.speed.benchmark import Times
from himap_export.validate.speed.measure import ceiling

PHASES = (PREFILL, DECODE)
LEAST_MEMORY = 3 * 2**30  # what the largest peer takes while it is opened
BEGAN = time.monotonic()


def say(line: str) -> None:
    print(f"{time.monotonic() - BEGAN:6.0f} s  {line}", file=sys.stderr, flush=True)


def chosen(patterns: Sequence[str]) -> list[Compared]:
    """Returns the systems whose key matches one of `patterns`, all if there are none; HimapError for one that matches
    nothing."""
    for pattern in patterns:
        if not any(fnmatch(system.key, pattern) for system in SYSTEMS):
            raise HimapError(f"no system is called {pattern}", f"there are {', '.join(s.key for s in SYSTEMS)}")
    return [s for s in SYSTEMS if not patterns or any(fnmatch(s.key, pattern) for pattern in patterns)]


@dataclass(frozen=True)
class Opened:
    """A system that runs, its name, and the seconds that it took to open."""

    name: str
    one: Running
    seconds: float


def rounds(
    systems: Mapping[str, Opened], reader: Running, count: int, warm_up: int
) -> tuple[dict[str, Times], list[float]]:
    """Returns the times of systems, by key, over `count` rounds of each phase behind `warm_up` that do not count, and
    `reader`'s answers in the rounds of decode. Phases are not mixed: what is timed is a prefill behind prefills, a
    decode behind decodes."""
    read = list[float]()
    seconds: dict[str, dict[str, list[float]]] = {key: {phase: [] for phase in PHASES} for key in systems}
    for phase in PHASES:
        for number in range(warm_up + count):
            for key, system in systems.items():
                with alone(system.one):
                    seconds[key][phase].append(system.one.ask(phase))
            if phase == DECODE:
                with alone(reader):
                    read.append(reader.ask(phase))
            say(f"{phase}, round {number + 1} of {warm_up + count}")
    found = {}
    for key, system in systems.items():
        counted = {phase: tuple(every[warm_up:]) for phase, every in seconds[key].items()}
        with alone(system.one):
            found[key] = Times(system.name, counted, int(system.one.ask(MEMORY)), system.seconds)
    return found, read[warm_up:]


def measured(
    systems: Sequence[Compared], models: Models, *, count: int, warm_up: int, threads: int
) -> tuple[dict[str, Times], list[float], dict[str, str]]:
    """Returns the times of the systems that can be run here, by key, the seconds that reading a byte took in each
    round, and why the other systems cannot be run."""
    opened: dict[str, Opened] = {}
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        for system in systems:
            say(f"opening {system.name}")
            try:
                check_memory(available_bytes())
                one = stack.enter_context(running(system, models, threads))
                with alone(one):
                    opened[system.key] = Opened(system.name, one, one.ask(OPENED))  # before the next one opens
            except HimapError as problem:
                missing[system.key] = str(problem)
                say(f"{system.name} is left out: {problem}")
        limits = QUIET | {"OMP_NUM_THREADS": str(threads)}
        reader = stack.enter_context(child("reading memory", limits, peer_bars.reading, threads))
        times, read = rounds(opened, reader, count, warm_up)
        return times, read, missing


def check_memory(available: int) -> None:
    """HimapError if there is too little memory for one more system beside those that are open: all stay open."""
    if available < LEAST_MEMORY:
        summary = f"{available / 2**30:.1f} GiB of memory are left beside the systems that are open"
        raise HimapError(summary, f"expected {LEAST_MEMORY / 2**30:.0f}", "choose fewer with --systems")


def available_bytes() -> int:
    """Returns the memory that Linux can give to a new process without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))


def table(times: Mapping[str, Times]) -> Iterator[str]:
    """Yields medians with their spread in ms, peak memory and the second opening, a line for each system."""
    width = max((len(t.name) for t in times.values()), default=0)
    yield f"{'':{width}}  {'prefill, ms':>24}  {'decode, ms a token':>24}  {'peak memory':>12}  {'opens':>7}"
    for t in times.values():
        cells = "  ".join(f"{_spread(t, phase):>24}" for phase in PHASES)
        yield f"{t.name:{width}}  {cells}  {t.peak_bytes / 2**20:>8.0f} MiB  {t.open_seconds:>5.2f} s"


def _spread(t: Times, phase: str) -> str:
    low, middle, high = (1e3 * found for found in (min(t.seconds[phase]), t.median(phase), max(t.seconds[phase])))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def plot(times: Mapping[str, Times], title: str, file: Path) -> None:
    """Draws prefill and decode of every system as bars of medians, with lines from the lowest to the highest round."""
    import altair as alt

    from himap_export.validate.report.theme import chart_config

    panels = []
    for phase, label in ((PREFILL, "prefill of 746 tokens, ms"), (DECODE, "decode behind them, ms a token")):
        rows = [
            {
                "system": t.name, "ms": 1e3 * t.median(phase), "ours": t.name.startswith("ours"),
                "low": 1e3 * min(t.seconds[phase]), "high": 1e3 * max(t.seconds[phase]),
            }
            for t in times.values()
        ]  # fmt: skip
        who = alt.Y("system:N", sort=[t.name for t in times.values()], title=None, axis=alt.Axis(labelLimit=400))
        base = alt.Chart({"values": rows}).encode(who)
        bars = base.mark_bar().encode(alt.X("ms:Q", title=label), color=alt.Color("ours:N", legend=None))
        spread = base.mark_rule().encode(alt.X("low:Q"), alt.X2("high:Q"))
        panels.append((bars + spread).properties(width=360))
    drawn = alt.hconcat(*panels, title=title).configure(**chart_config(variables=False))
    drawn.save(str(file), scale_factor=2)


def results_json(results: peer_bars.Results, cpu: str, threads: int) -> dict[str, Any]:
    """Returns all that was found: seconds of every round, bytes, ceiling, and the verdicts."""
    return {
        "cpu": cpu,
        "features": results.features,
        "threads": threads,
        "seconds_to_read_a_byte": results.byte_seconds,
        "ceiling": results.ceiling,
        "bytes_read_by_a_decode_step": results.read_bytes,
        "systems": {
            key: {"name": t.name, **t.seconds, "peak_bytes": t.peak_bytes, "open_seconds": t.open_seconds}
            for key, t in results.times.items()
        },
        "left_out": results.missing,
        "bars": [{"bar": v.what, "met": v.met, "found": v.found} for v in peer_bars.verdicts(results)],
    }


def report(args: argparse.Namespace, models: Models) -> None:
    """Measures and prints."""
    cpu, features = cpu_and_features(Path("/proc/cpuinfo"))
    print(f"{cpu}, {args.threads} threads; {features}")
    systems = chosen(args.systems)
    times, read, missing = measured(systems, models, count=args.rounds, warm_up=args.warm_up, threads=args.threads)
    ours = {s.key: models.bundle(s.form) for s in systems if s.form and s.key in times}
    found = {key: peer_bars.decode_bytes(run) for key, run in ours.items()}
    promised = next((ceiling(run) for run in ours.values() if run.plan.cuts), 0.0)
    results = peer_bars.Results(
        times, missing, ceiling=promised, read_bytes=found.get(peer_bars.PRUNED), byte_seconds=read, features=features
    )
    print(*table(times), sep="\n")
    slow, middle, fast = (1e-9 / of(read) for of in (max, statistics.median, min))
    print(f"memory is read at {middle:.1f} GB/s ({slow:.1f} to {fast:.1f})")
    for key, size in found.items():
        over, weights = results.over_floor(key, size), ours[key].bundle.tensors.values()
        print(f"decode, {times[key].name}: reads {size / 1e6:.0f} MB of weights and caches, {over[0]:.2f}x that time")
        copies = times[key].peak_bytes / sum(t.nbytes for t in weights)
        print(f"memory, {times[key].name}: {copies:.1f} times its weights at its peak, mapped files included")
    if promised:
        print(f"FLOPs allow {promised:.2f}x over unpruned prefill")
    for key, why in missing.items():
        print(f"left out: {key}: {why}")
    for verdict in peer_bars.verdicts(results):
        if not verdict.found.endswith(peer_bars.NOT_CHOSEN):
            print(verdict.line())
    if args.plot and times:
        plot(times, f"{cpu}, {args.threads} threads", args.plot)
    print(json.dumps(results_json(results, cpu, args.threads)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    keys = ", ".join(system.key for system in SYSTEMS)
    parser.add_argument(
        "--systems", nargs="+", default=[], metavar="KEY", help=f"who is compared, * and ? as in a shell: {keys}"
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before, not counted")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="keep models and exports here (10 GB) for the next run"
    )
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, metavar="DIR", help="the peers' Python")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG of the table")
    args = parser.parse_args()
    try:
        with work_folder(args.work and args.work.absolute()) as work:
            report(args, Models(work, args.environment.absolute()))
    except HimapError as problem:
        print(problem, file=sys.stderr)
        sys.exit(problem.code)


if __name__ == "__main__":
    main()
