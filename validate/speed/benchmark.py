"""Timing that can be compared: one process per system, taking turns.

A runtime's spinning threads slow its neighbours, so each system lives alone in a process; the machine's speed
drifts, so they take turns, round by round, and ratios are taken within a round. All compute in one dtype, on one device
where they can.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from himap_export.engines.bundle import RunSpec
from himap_export.engines.isolation import Child, child

PHASES = ("vision", "prefill", "decode")
MEMORY = "memory"
DECODE_STEPS = 16
TURN = 0.1  # seconds that a turn lasts at least
Acts = Mapping[str, Callable[[], float]]  # by name, what does it and says how many seconds it took


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
    """Seconds per round by phase, of one system, and its peak resident memory in bytes."""

    name: str
    seconds: dict[str, tuple[float, ...]]
    peak_bytes: int

    def median(self, phase: str) -> float:
        return statistics.median(self.seconds[phase])


def ratios(a: Times, b: Times, phase: str) -> tuple[float, float, float]:
    """How many times faster `a` is than `b`, within each round: median, lowest, highest."""
    found = [his / mine for mine, his in zip(a.seconds[phase], b.seconds[phase], strict=True)]
    return statistics.median(found), min(found), max(found)


def race(
    systems: Sequence[System], iterations: int, warm_up: int, threads: int, phases: Sequence[str] = PHASES
) -> list[Times]:
    """Every system does every phase `iterations` times, one after the other within a round.

    HimapError if one cannot be opened, or its process dies.
    """
    with ExitStack() as stack:
        children = [stack.enter_context(_child(c, threads)) for c in systems]
        for one in children:
            one.ask(MEMORY)  # all are open before any is timed
        rounds: list[dict[str, list[float]]] = [{phase: [] for phase in phases} for _ in systems]
        for phase in phases:
            for n in range(warm_up + iterations):
                for one, times in zip(children, rounds, strict=True):
                    seconds = one.ask(phase)
                    if n >= warm_up:
                        times[phase].append(seconds)
        return [
            Times(c.name, {phase: tuple(s) for phase, s in times.items()}, int(one.ask(MEMORY)))
            for c, one, times in zip(systems, children, rounds, strict=True)
        ]


def _child(system: System, threads: int) -> AbstractContextManager[Child[str, float]]:
    limits = {"OMP_NUM_THREADS": str(threads), "KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}  # read at its start
    return child(f"timing {system.name}", limits, _doing, system, threads)


def _doing(system: System, threads: int) -> Callable[[str], float]:
    """Does a phase and says how many seconds it took; asked for MEMORY, how many bytes everything took."""
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


def _turn(work: Callable[[], object]) -> Callable[[], float]:
    """Seconds of one `work`, over as many as fill a turn: what takes 2 ms alone measures who else is on the machine.

    How many that are is found in the first turn, which is warm-up.
    """
    times = 0

    def timed() -> float:
        nonlocal times
        work()  # wakes the runtime's threads
        once = _clock(work)
        times = times or 1 + int(TURN / once)
        return _clock(work, times) if times > 1 else once

    return timed


def _bundle(system: System, threads: int) -> Acts:
    from himap_export.engines.backends import Opening
    from himap_export.engines.pipeline import Pipeline
    from himap_export.validate.parity.prompts import drawn_inputs

    run = system.run
    pipeline = Pipeline(run, system.backend, Opening(threads, system.device))
    inputs = drawn_inputs(run, run.budget.batch, 0, fill=True)
    prefilled, layout = pipeline.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
    tokens = prefilled.logits.argmax(axis=1)
    steps = min(DECODE_STEPS, run.budget.new)

    def prefill() -> None:
        for stage in pipeline.stages:
            pipeline.run(stage)
        pipeline.read("logits")

    def decode() -> float:
        return _clock(lambda: [pipeline.step(tokens, layout.lengths + i) for i in range(steps)]) / steps

    def vision() -> None:
        pipeline.run("vision")
        pipeline.read("image_features")

    return {"vision": _turn(vision), "prefill": _turn(prefill), "decode": decode}


def _torch(system: System, threads: int) -> Acts:
    """Every phase ends with its result in the host's memory, as the bundle's do: nobody's clock stops while a GPU
    is at work."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from himap_export.validate.parity.prompts import drawn_inputs
    from himap_export.validate.reference.reference import Reference

    torch.set_num_threads(threads)
    disable_progress_bar()
    run, device = system.run, system.device or "cpu"
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[run.manifest.dtype]
    inputs = drawn_inputs(run, run.budget.batch, 0, fill=True)
    model = Reference(system.checkpoint, dtype, "sdpa", device, system.vision_tower)
    with torch.inference_mode():
        pixels = torch.as_tensor(inputs.pixel_values).to(device, dtype)
        prompts = model.embed(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
        steps, length = min(DECODE_STEPS, run.budget.new), prompts.hidden.shape[1]

        def decode() -> float:
            logits, cache = model.forward(prompts)
            tokens = logits.cpu().argmax(-1)
            with torch.inference_mode():
                return _clock(lambda: [model.step(tokens, length + i, cache).cpu() for i in range(steps)]) / steps

    def quiet(work: Callable[[], object]) -> Callable[[], float]:
        turn = _turn(work)

        def timed() -> float:
            with torch.inference_mode():
                return turn()

        return timed

    return {
        "vision": quiet(lambda: model.adapter.see(pixels).features.cpu()),
        "prefill": quiet(lambda: model.forward(prompts)[0].cpu()),
        "decode": decode,
    }
