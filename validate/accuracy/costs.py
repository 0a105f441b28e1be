"""What an answer costs: the engines that answered, timed beside each other, each system in a process of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from himap_export.engines.arrays import memory_bytes
from himap_export.engines.backends import Opening
from himap_export.engines.weight_file import held_bytes
from himap_export.validate.accuracy.systems import PlanSystem
from himap_export.validate.speed.benchmark import System, Times, benchmark, ratios
from himap_export.validate.speed.results import ratio

PHASES = ("prefill", "decode")
HEAD = ("prefill", "over unpruned", "decode", "peak memory")


@dataclass(frozen=True)
class Costs:
    """The `times` of each system by its name, beside which stands the unpruned one, `beside`; none if they were not
    measured. `note` says on what they were, or why they were not."""

    note: str
    beside: str = ""
    times: Mapping[str, Times] = field(default_factory=dict)

    def over(self, name: str, phase: str) -> tuple[float, float, float]:
        """Returns the speed-up of system `name` over the unpruned one: median, lowest, highest of all repetitions."""
        return ratios(self.times[name], self.times[self.beside], phase)

    def cells(self, name: str) -> tuple[str, ...]:
        """Returns what a table says of system `name` below HEAD; nothing where nothing was measured."""
        if name not in self.times:
            return ()
        t = self.times[name]
        faster = ratio(self.over(name, "prefill")) if name != self.beside else ""
        milliseconds = (f"{1e3 * t.median(phase):.1f} ms" for phase in PHASES)
        prefill, decode = milliseconds
        return prefill, faster, decode, f"{t.peak_bytes / 2**20:.0f} MiB"

    def to_json(self) -> dict[str, Any]:
        """Returns medians in seconds, peak memory in bytes, speed-ups as [median, lowest, highest]."""
        found = {
            name: {
                **{phase: t.median(phase) for phase in PHASES},
                "over_unpruned": {phase: self.over(name, phase) for phase in PHASES},
                "peak_bytes": t.peak_bytes,
            }
            for name, t in self.times.items()
        }
        return {"note": self.note, "systems": found}


def measure_costs(
    systems: Sequence[PlanSystem], checkpoint: Path, opening: Opening, iterations: int, warm_up: int
) -> Costs:
    """Returns the times and the memory of all systems over `iterations` repetitions of prefill and decode, those of
    `warm_up` not counted; the seeds of a random plan are one system. Batches are as exported, and full.

    Each opens the files of its engines again, so that all are in memory at once: where they would not fit, nothing is
    measured. `opening` as of the systems' engines, its threads a number. HimapError as `benchmark`.
    """
    pipelines = {s.name: s.pipeline for s in systems}
    first = next(iter(pipelines.values()))
    if first.engines.device == "cpu":  # a GPU's memory is not known here
        weights = (sum(map(held_bytes, p.spec.manifest.wanted().values())) for p in pipelines.values())
        if (needed := sum(weights)) > memory_bytes():
            return Costs(f"Times were left out: {len(pipelines)} processes of their own take {needed / 1e9:.0f} GB.")
    timed = [
        System(name, "bundle", p.spec, checkpoint, backend=p.backend, device=opening.device)
        for name, p in pipelines.items()
    ]
    threads = opening.cpu_threads(first.spec.bundle)
    found = benchmark(timed, iterations=iterations, warm_up=warm_up, threads=threads, phases=PHASES)
    batch, where = first.spec.budget.batch, f"{first.backend}, {first.engines.device}, CPU threads: {threads}"
    beside = next(name for name, p in pipelines.items() if not p.spec.plan.cuts)  # the bundle's own, not its original
    return Costs(
        f"Times are medians of {iterations} interleaved repetitions ({where}), prefill of a batch of {batch} without "
        "its vision, decode of one token of each. Over unpruned: how many times faster prefill is in the same "
        "repetition, with the least and the most. Peak memory is of a process with this system alone.",
        beside,
        {t.name: t for t in found},
    )
