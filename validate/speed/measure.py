"""Is it as much faster as its FLOPs promise? The bundle, the same backend unpruned, and PyTorch, side by side."""

from dataclasses import dataclass
from pathlib import Path

from himap_export.engines.bundle import RunSpec
from himap_export.engines.scratch import scratch_folder
from himap_export.graphs.flops import true_ratio
from himap_export.graphs.plan import PruningPlan
from himap_export.validate.baseline import export_baseline
from himap_export.validate.speed.benchmark import System, Times, benchmark, ratios

PRUNED, UNPRUNED, TORCH = "pruned", "unpruned", "PyTorch SDPA"


@dataclass(frozen=True)
class Speed:
    """Times of the three systems, the bundle's first; `ceiling` is the prefill speed-up over unpruned that FLOPs
    allow, `note` what is to be said of the comparison, if anything is."""

    ceiling: float
    times: tuple[Times, ...]
    note: str = ""

    @property
    def others(self) -> tuple[str, ...]:
        """Returns whom the bundle is compared with: itself unpruned, and PyTorch with its dtype and device."""
        return tuple(t.name for t in self.times[1:])

    def over(self, name: str, phase: str) -> tuple[float, float, float]:
        """Returns the speed-up of the bundle over system `name`: median, lowest, highest of all repetitions."""
        return ratios(self.times[0], next(t for t in self.times if t.name == name), phase)


def ceiling(run: RunSpec) -> float:
    """Returns 1 / FLOPs kept in decoder prefill, every slot of the text budget filled."""
    return 1 / true_ratio(run.manifest.decoder, run.plan, run.budget.visual, run.budget.text)


def measure(
    run: RunSpec,
    checkpoint: Path,
    backend: str,
    device: str,
    *,
    iterations: int,
    warm_up: int,
    threads: int,
    vision_tower: Path | None = None,
) -> Speed:
    """Returns the times of the bundle, of its unpruned baseline, exported for it, and of PyTorch, in one dtype.

    `device` is what the backend's engines say they run on: "cpu", "cuda", or a GPU's name. `vision_tower` as for
    `export_baseline`.
    """
    dtype = run.manifest.dtype
    asked = device if device in ("cpu", "cuda") else None  # a GPU's name: the backend knows no other device
    torchs = torch_device(device)
    with scratch_folder("unpruned") as folder:
        plans = {"none": (PruningPlan(), run.budget.visual[:1])}
        unpruned = export_baseline(
            checkpoint, run.budget, dtype=dtype, backend=backend, plans=plans, out=folder / "bundle",
            image=run.image, vision_tower=vision_tower,
        )  # fmt: skip
        torch_name = f"{TORCH} {dtype}, {torchs}"
        systems = (
            System(PRUNED, "bundle", run, checkpoint, backend=backend, device=asked),
            System(UNPRUNED, "bundle", unpruned.select(), checkpoint, backend=backend, device=asked),
            System(torch_name, "torch", run, checkpoint, device=torchs, vision_tower=vision_tower),
        )
        times = tuple(benchmark(systems, iterations=iterations, warm_up=warm_up, threads=threads))
    apart = device != "cpu" and torchs == "cpu"
    note = f"PyTorch has no CUDA here: it ran on the CPU, the engines on {device}" if apart else ""
    return Speed(ceiling(run), times, note)


def torch_device(device: str) -> str:
    """Returns where PyTorch runs beside engines on `device`: there too, unless that is a GPU that it cannot use."""
    import torch

    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
