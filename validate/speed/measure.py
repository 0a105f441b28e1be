"""Is it as much faster as its FLOPs promise? The bundle, the same backend unpruned, and PyTorch, side by side."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from himap_export.engines.arrays import memory_bytes
from himap_export.engines.bundle import RunSpec
from himap_export.engines.scratch import scratch_folder
from himap_export.engines.weight_file import held_bytes
from himap_export.graphs.flops import BYTES, true_ratio
from himap_export.graphs.plan import PruningPlan
from himap_export.graphs.spec import Dtype
from himap_export.validate.baseline import export_baseline
from himap_export.validate.speed.benchmark import System, Times, benchmark, ratios

PRUNED, UNPRUNED, TORCH = "pruned", "unpruned", "PyTorch SDPA"


@dataclass(frozen=True)
class Speed:
    """Times of all systems, the bundle's first; `ceiling` is the prefill speed-up over unpruned that FLOPs
    allow, `note` what is to be said of the comparison, if anything is."""

    ceiling: float
    times: tuple[Times, ...]
    note: str = ""

    @property
    def others(self) -> tuple[str, ...]:
        """Returns whom the bundle is compared with: itself unpruned, and PyTorch by dtype and device."""
        return tuple(t.name for t in self.times[1:])

    @property
    def first_token_ceiling(self) -> float:
        """Returns the speed-up of the first token over unpruned that FLOPs allow: pruning leaves vision's time as it
        is."""
        unpruned = next(t for t in self.times if t.name == UNPRUNED)
        vision, prefill = unpruned.median("vision"), unpruned.median("prefill")
        return (vision + prefill) / (vision + prefill / self.ceiling)

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
    asked: str | None = None,
    judge: Path | None = None,
    vision_tower: Path | None = None,
) -> Speed:
    """Returns the times of the bundle, of its unpruned baseline, which is its own variant without cuts or exported for
    it in the same dtype, quantised weights included, and of PyTorch: in that dtype and, if it is another, in fp32.

    `device` is what the backend's engines say they run on, `asked` the one that they were opened for, None if any: both
    bundles are opened for it again. PyTorch runs `judge`, if it is not to run `checkpoint`. `vision_tower` as for
    `export_baseline`.
    """
    dtype = run.manifest.dtype
    torchs = torch_device(device)
    compared, note = _dtypes_of_pytorch(run, torchs)
    with scratch_folder("unpruned") as folder:
        unpruned = uncut_variant(run)
        if unpruned is None:
            plans = {"none": (PruningPlan(), run.budget.visual[:1])}
            unpruned = export_baseline(
                checkpoint, run.budget, dtype=dtype, backend=backend, plans=plans, out=folder / "bundle",
                image=run.image, vision_tower=vision_tower, beside=run.bundle,
            ).select()  # fmt: skip
        bundles = ((PRUNED, run), (UNPRUNED, unpruned))
        systems = [System(name, "bundle", each, checkpoint, backend=backend, device=asked) for name, each in bundles]
        systems += (
            System(
                f"{TORCH} {each}, {torchs}",
                "torch",
                run,
                judge or checkpoint,
                device=torchs,
                dtype=each,
                vision_tower=vision_tower,
            )
            for each in compared
        )
        times = tuple(benchmark(systems, iterations=iterations, warm_up=warm_up, threads=threads))
    if torchs == "cpu" != device:
        missing = "no support of it" if device in ("gpu", "npu") else "no CUDA"
        note = f"PyTorch has {missing} here: it ran on the CPU, the engines on {device}{'; ' * bool(note)}{note}"
    return Speed(ceiling(run), times, note)


def uncut_variant(run: RunSpec) -> RunSpec | None:
    """Returns the bundle's own variant without cuts, for the same images and text budget; None if it holds none."""
    like = (run.variant.image, run.budget.text, run.budget.images)
    uncut = (v for v in run.manifest.variants if not v.plan.cuts)
    found = (v for v in uncut if (v.image, v.budget.text, v.budget.images) == like)
    return next((RunSpec(run.bundle, v) for v in found), None)


def _dtypes_of_pytorch(run: RunSpec, torchs: str) -> tuple[tuple[Dtype, ...], str]:
    """Returns the bundle's dtype and fp32, and why fp32 is not among them: all systems are in memory at once."""
    dtype = run.manifest.dtype
    weights = run.manifest.wanted().values()
    numbers = sum(prod(w.shape) for w in weights if not (w.constant and w.dtype in BYTES))  # those are scales
    # On a CPU the engines of both bundles, and PyTorch in two dtypes; a GPU's memory is not known here.
    needed = 2 * sum(map(held_bytes, weights)) + numbers * (BYTES[dtype] + BYTES["fp32"])
    if dtype != "fp32" and torchs == "cpu" and needed > memory_bytes():
        return (dtype,), f"PyTorch in fp32 was left out: with it all systems take {needed / 1e9:.0f} GB"
    return tuple(dict.fromkeys((dtype, "fp32"))), ""


def torch_device(device: str) -> str:
    """Returns where PyTorch runs beside engines on `device`: there too, unless that is one that it cannot use. "gpu" is
    OpenVINO's word for Intel's, "npu" what PyTorch has no name for; any other is NVIDIA's."""
    import torch

    if device == "gpu":
        return "xpu" if torch.xpu.is_available() else "cpu"
    return "cuda" if device not in ("cpu", "npu") and torch.cuda.is_available() else "cpu"
