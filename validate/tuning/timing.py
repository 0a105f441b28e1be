"""How long prefill takes: each plan as engines in a process of its own, interleaved with the unpruned model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from himap_export.engines.backends import Opening
from himap_export.engines.scratch import scratch_folder
from himap_export.graphs.plan import PruningPlan, TokenBudget
from himap_export.graphs.spec import Dtype
from himap_export.validate.accuracy.systems import UNPRUNED
from himap_export.validate.baseline import export_baseline
from himap_export.validate.speed.benchmark import System, benchmark, ratios

WARM_UP = 2


@dataclass(frozen=True)
class Timed:
    """Prefill's median seconds, and its speed-up over unpruned within a repetition: median, lowest, highest."""

    seconds: float
    speed_up: tuple[float, float, float]


@dataclass(frozen=True)
class Timing:
    """What was timed, by name; on which backend, with how many CPU threads."""

    plans: Mapping[str, Timed]
    backend: str
    threads: int


def measure(
    checkpoint: Path,
    plans: Mapping[str, PruningPlan],
    *,
    image_tokens: int,
    text: int,
    dtype: Dtype,
    backend: str,
    threads: int | None,
    iterations: int,
) -> Timing:
    """Returns the times of `plans` and of the unpruned model. Every slot of the text budget is filled; `threads`: as
    of an Opening."""
    everyone = {UNPRUNED: PruningPlan(), **plans}
    kept = {name: (plan, plan.kept(image_tokens)) for name, plan in everyone.items()}
    with scratch_folder("tune") as folder:
        budget, out = TokenBudget((image_tokens,), text, 1), folder / "bundle"
        bundle = export_baseline(checkpoint, budget, dtype=dtype, backend=backend, plans=kept, out=out)
        systems = [System(name, "bundle", bundle.select(name), checkpoint, backend=backend) for name in everyone]
        used = Opening(threads).cpu_threads(bundle)
        times = benchmark(systems, iterations=iterations, warm_up=WARM_UP, threads=used, phases=("prefill",))
    timed = {t.name: Timed(t.median("prefill"), ratios(t, times[0], "prefill")) for t in times}
    return Timing(timed, backend, used)
