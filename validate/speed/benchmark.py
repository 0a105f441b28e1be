"""An interleaved benchmark: timing that can be compared, one process per system.

A runtime's spinning threads slow its neighbours, so each system lives alone in a process; the machine's speed drifts,
so each repetition of a phase is done by all, one after the other, and ratios are taken within a repetition. All compute
in one dtype, on one device where they can.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from himap_export.engines.bundle import RunSpec
from himap_export.engines.isolation import child

PHASES = ("vision", "prefill", "decode")
MEMORY = "memory"
DECODE_STEPS = 16
LEAST_SECONDS = 0.1  # that a repetition takes
Phases = Mapping[str, Callable[[], float]]  # by name, what does one repetition and returns its seconds


@dataclass(frozen=True)
class System:
    """`kind` "bundle" (`backend` has its engines) or "torch" (the checkpoint, PyTorch SDPA, unpruned; prompts and dtype
    as the bundle's). `device`: "cpu" or "cuda"; None: the backend's choice, PyTorch's is the CPU.

    `vision_tower`: where the checkpoint's tower lies, if elsewhere.
    """

    name: str
    kind: str
    run: RunSpec
    checkpoint: Path
    backend: str = ""
    device: str | None = None
    vision_tower: Path | None = None


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition by phase, of one system, and its peak resident memory in bytes."""

    name: str
    seconds: dict[str, tuple[float, ...]]
    peak_bytes: int

    def median(self, phase: str) -> float:
        return statistics.median(self.seconds[phase])


def ratios(a: Times, b: Times, phase: str) -> tuple[float, float, float]:
    """Returns how many times faster `a` is than `b`, within each repetition: median, lowest, highest."""
    found = [slow / fast for fast, slow in zip(a.seconds[phase], b.seconds[phase], strict=True)]
    return statistics.median(found), min(found), max(found)


def benchmark(
    systems: Sequence[System], *, iterations: int, warm_up: int, threads: int, phases: Sequence[str] = PHASES
) -> list[Times]:
    """Returns the times of all systems over `iterations` repetitions of every phase, those of `warm_up` not counted.

    HimapError if one cannot be opened, or its process dies.
    """
    limits = {"OMP_NUM_THREADS": str(threads), "KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}  # read at its start
    with ExitStack() as stack:
        opened = (child(f"timing {system.name}", limits, _doing, system, threads) for system in systems)
        children = [stack.enter_context(one) for one in opened]
        for one in children:
            one.ask(MEMORY)  # all are open before any is timed
        times = range(warm_up + iterations)
        repeated = {phase: [[one.ask(phase) for one in children] for _ in times] for phase in phases}
        found = []
        for n, (system, one) in enumerate(zip(systems, children, strict=True)):
            seconds = {phase: tuple(row[n] for row in rows[warm_up:]) for phase, rows in repeated.items()}
            found.append(Times(system.name, seconds, int(one.ask(MEMORY))))
        return found


def _doing(system: System, threads: int) -> Callable[[str], float]:
    """Returns what does one repetition of a phase and returns its seconds; asked for MEMORY, bytes of all till then."""
    phases = (_bundle if system.kind == "bundle" else _torch)(system, threads)
    return lambda asked: _peak_bytes() if asked == MEMORY else phases[asked]()


def _peak_bytes() -> float:
    """Peak resident memory of this process's own address space.

    Not `ru_maxrss`: Linux carries the parent's peak across fork and exec, so a large parent's is what workers report.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024


def _clock(work: Callable[[], object], times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def _repeated(work: Callable[[], object]) -> Callable[[], float]:
    """What returns the seconds of one `work`, over as many as take LEAST_SECONDS: what takes 2 ms alone measures who
    else is on the machine.

    How many that are is found in the first repetition, which is warm-up.
    """
    times = 0

    def timed() -> float:
        nonlocal times
        work()  # wakes the runtime's threads
        once = _clock(work)
        times = times or 1 + int(LEAST_SECONDS / once)
        return _clock(work, times) if times > 1 else once

    return timed


def _bundle(system: System, threads: int) -> Phases:
    """Prefill and decode run as they do in an answer: the stages of prefill chained, on a GPU by one launch."""
    from himap_export.engines.backends import Opening
    from himap_export.engines.pipeline import Pipeline
    from himap_export.validate.parity.prompts import drawn_inputs

    run = system.run
    pipeline = Pipeline(run, system.backend, Opening(threads, system.device))
    inputs = drawn_inputs(run, run.budget.batch, 0, fill=True)
    prefilled, layout = pipeline.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
    tokens = prefilled.logits.argmax(axis=1)
    steps, chained = min(DECODE_STEPS, run.budget.new), pipeline.chained(*pipeline.stages)

    def prefill() -> None:
        chained()
        pipeline.read("logits")

    def decode() -> float:
        return _clock(lambda: [pipeline.step(tokens, layout.lengths + i) for i in range(steps)]) / steps

    def vision() -> None:
        pipeline.run("vision")
        pipeline.read("image_features")

    return {"vision": _repeated(vision), "prefill": _repeated(prefill), "decode": decode}


def _torch(system: System, threads: int) -> Phases:
    """Every phase ends with its result in the host's memory, as the bundle's do: nobody's clock stops while a GPU
    is at work."""
    import torch

    from himap_export.validate.checkpoint import load_reference
    from himap_export.validate.parity.prompts import drawn_inputs

    run, device = system.run, system.device or "cpu"
    inputs = drawn_inputs(run, run.budget.batch, 0, fill=True)
    model = load_reference(
        system.checkpoint, run.manifest.dtype, threads,
        attention="sdpa", device=device, vision_tower=system.vision_tower,
    )  # fmt: skip
    quiet = torch.inference_mode()  # as a decorator
    prompts = quiet(model.embed)(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
    steps, length = min(DECODE_STEPS, run.budget.new), prompts.hidden.shape[1]

    def decode() -> float:
        logits, cache = model.forward(prompts)
        tokens = logits.cpu().argmax(-1)
        return _clock(lambda: [model.step(tokens, length + i, cache).cpu() for i in range(steps)]) / steps

    pixels = torch.as_tensor(inputs.pixel_values).to(device, model.dtype)
    return {
        "vision": quiet(_repeated(lambda: model.adapter.see(pixels).features.cpu())),
        "prefill": quiet(_repeated(lambda: model.forward(prompts)[0].cpu())),
        "decode": quiet(decode),
    }
