"""Is it as much faster as its FLOPs promise? The bundle, the same backend unpruned, and PyTorch, side by side."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from himap_export.engines.bundle import Bundle
from himap_export.graphs.flops import true_ratio
from himap_export.graphs.plan import PruningPlan
from himap_export.validate.twin import export_twin
from himap_export.validate.workers import Contender, Times, race, ratios

PRUNED, UNPRUNED, TORCH = "pruned", "unpruned", "PyTorch SDPA"


@dataclass(frozen=True)
class Speed:
    """Times of the three contenders; `ceiling` is the prefill speed-up over unpruned that FLOPs allow."""

    ceiling: float
    times: tuple[Times, ...]

    def over(self, name: str, act: str) -> tuple[float, float, float]:
        """Speed-up of the bundle over contender `name`: median, lowest, highest of all rounds."""
        return ratios(self.times[0], next(t for t in self.times if t.name == name), act)


def ceiling(bundle: Bundle) -> float:
    """1 / FLOPs kept in decoder prefill, every slot of the text budget filled."""
    return 1 / true_ratio(bundle.manifest.decoder, bundle.plan, bundle.budget.visual, bundle.budget.text)


def measure(bundle: Bundle, checkpoint: Path, backend: str, iterations: int, warm_up: int, threads: int) -> Speed:
    """Exports the unpruned twin, then lets all three take turns."""
    with tempfile.TemporaryDirectory(prefix="himap-unpruned-") as folder:
        unpruned = {"none": (PruningPlan(), bundle.budget.visual[:1])}
        twin = export_twin(
            checkpoint, bundle.budget, bundle.manifest.dtype, backend, unpruned, Path(folder) / "bundle", bundle.picture
        )
        contenders = (
            Contender(PRUNED, "bundle", bundle, checkpoint, backend),
            Contender(UNPRUNED, "bundle", twin, checkpoint, backend),
            Contender(TORCH, "torch", bundle, checkpoint),
        )
        return Speed(ceiling(bundle), tuple(race(contenders, iterations, warm_up, threads)))
