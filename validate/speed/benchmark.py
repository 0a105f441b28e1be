"""An interleaved benchmark: timing that can be compared, one process per system.

A runtime's spinning threads slow its neighbours, so each system lives alone in a process; the machine's speed drifts,
so each repetition of a phase is done by all, one after the other, and ratios are taken within a repetition. All run on
one device where they can.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import add
from pathlib import Path

from himap_export.engines.bundle import RunSpec
from himap_export.engines.isolation import Child, child
from himap_export.graphs.spec import Dtype

PHASES = ("vision", "prefill", "decode")
FIRST_TOKEN = "first token"  # what an answer waits for: vision and prefill
TIMED = (FIRST_TOKEN, *PHASES)
MEMORY, OPENED = "memory", "opened"  # what else a child is asked for: bytes, seconds
DECODE_STEPS = 16
LEAST_SECONDS = 0.1  # that a repetition takes
Phases = Mapping[str, Callable[[], float]]  # by name, what does one repetition and returns its seconds


@dataclass(frozen=True)
class System:
    """`kind` "bundle" (`backend` has its engines) or "torch" (the checkpoint, PyTorch SDPA, unpruned; prompts as the
    bundle's). `device`: one of the backend's or PyTorch's; None: the backend's choice, PyTorch's is the CPU.

    `dtype`: what PyTorch computes in; None: the bundle's, as its engines do. `vision_tower`: where the checkpoint's
    tower lies, if elsewhere.
    """

    name: str
    kind: str
    run: RunSpec
    checkpoint: Path
    backend: str = ""
    device: str | None = None
    dtype: Dtype | None = None
    vision_tower: Path | None = None


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition by phase, of one system, its peak resident memory in bytes, and the seconds in which
    it opened: weights and engines, not the libraries' import, till it could answer."""

    name: str
    seconds: dict[str, tuple[float, ...]]
    peak_bytes: int
    open_seconds: float

    def of(self, phase: str) -> tuple[float, ...]:
        """Returns the seconds of each repetition of a phase, or of FIRST_TOKEN."""
        return self.seconds[phase] if phase != FIRST_TOKEN else tuple(map(add, self.of("vision"), self.of("prefill")))

    def median(self, phase: str) -> float:
        return statistics.median(self.of(phase))


def ratios(a: Times, b: Times, phase: str) -> tuple[float, float, float]:
    """Returns how many times faster `a` is than `b`, within each repetition: median, lowest, highest."""
    found = [slow / fast for fast, slow in zip(a.of(phase), b.of(phase), strict=True)]
    return statistics.median(found), min(found), max(found)


def benchmark(
    systems: Sequence[System], *, iterations: int, warm_up: int, threads: int, phases: Sequence[str] = PHASES
) -> list[Times]:
    """Returns the times of all systems over `iterations` repetitions of every phase, those of `warm_up` not counted.

    HimapError if one cannot be opened, or its process dies.
    """
    limits = {"OMP_NUM_THREADS": str(threads), "KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}  # read at its start
    with ExitStack() as stack:
        children, opened = list[Child[str, float]](), list[float]()
        for system in systems:  # each opens alone, and all are open before any is timed
            children.append(stack.enter_context(child(f"timing {system.name}", limits, _doing, system, threads)))
            opened.append(children[-1].ask(OPENED))
        times = range(warm_up + iterations)
        repeated = {phase: [[one.ask(phase) for one in children] for _ in times] for phase in phases}
        found = []
        for n, (system, one) in enumerate(zip(systems, children, strict=True)):
            seconds = {phase: tuple(row[n] for row in rows[warm_up:]) for phase, rows in repeated.items()}
            found.append(Times(system.name, seconds, int(one.ask(MEMORY)), opened[n]))
        return found


def _doing(system: System, threads: int) -> Callable[[str], float]:
    """Returns what does one repetition of a phase and returns its seconds; asked for MEMORY, bytes of all till then;
    for OPENED, the seconds in which the system opened."""
    opened, phases = (_bundle if system.kind == "bundle" else _torch)(system, threads)
    facts: Phases = {MEMORY: _peak_bytes, OPENED: lambda: opened}
    return lambda asked: (facts.get(asked) or phases[asked])()


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


def _bundle(system: System, threads: int) -> tuple[float, Phases]:
    """Returns the seconds in which the engines opened, and what runs them as an answer does.

    An answer's prefill is vision, once for each new picture, and the chain of all stages, on a GPU by one launch
    each. Vision is timed of all pictures, and the chain of the stages, which is what FLOPs are counted of and what
    PyTorch's prefill does.
    """
    from himap_export.engines.backends import Opening, load_backend
    from himap_export.engines.pipeline import Pipeline
    from himap_export.validate.parity.prompts import drawn_inputs

    load_backend(system.backend).version()  # imports its library
    start, run = time.perf_counter(), system.run
    pipeline = Pipeline(run, system.backend, Opening(threads, system.device))
    opened = time.perf_counter() - start
    inputs = drawn_inputs(run, run.budget.batch, 0, fill=True)
    prefilled, layout = pipeline.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
    tokens, chained = prefilled.logits.argmax(axis=1), pipeline.chained(*pipeline.stages)

    def prefill() -> None:
        chained()
        pipeline.read("logits")

    def decode() -> float:
        places = [layout.lengths + step % run.budget.new for step in range(DECODE_STEPS)]
        chained()  # as in an answer, and as PyTorch below: caches and clocks are warm
        return _clock(lambda: [pipeline.step(tokens, place) for place in places]) / DECODE_STEPS

    def vision() -> None:
        for _ in range(run.budget.batch * run.budget.images):
            pipeline.run("vision")
        pipeline.read("seen_features")

    return opened, {"vision": _repeated(vision), "prefill": _repeated(prefill), "decode": decode}


def _torch(system: System, threads: int) -> tuple[float, Phases]:
    """Returns the seconds in which the model loaded, and what runs it. Every phase ends with its result in the host's
    memory, as the bundle's do: nobody's clock stops while a GPU is at work."""
    import torch

    from himap_export.validate.checkpoint import load_reference
    from himap_export.validate.parity.prompts import drawn_inputs
    from himap_export.validate.reference import reference  # noqa: F401  transformers: seconds to import

    run, device = system.run, system.device or "cpu"
    inputs = drawn_inputs(run, run.budget.batch, 0, fill=True)
    start = time.perf_counter()
    model = load_reference(
        system.checkpoint, system.dtype or run.manifest.dtype, threads,
        attention="sdpa", device=device, vision_tower=system.vision_tower, image=run.image,
    )  # fmt: skip
    opened = time.perf_counter() - start
    quiet = torch.inference_mode()  # as a decorator
    prompts = quiet(model.embed)(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
    length = prompts.hidden.shape[1]

    def decode() -> float:
        logits, cache = model.forward(prompts)
        tokens = logits.cpu().argmax(-1)
        positions = [length + step % run.budget.new for step in range(DECODE_STEPS)]
        return _clock(lambda: [model.step(tokens, place, cache).cpu() for place in positions]) / DECODE_STEPS

    pixels = torch.as_tensor(inputs.pixel_values).to(device, model.dtype)
    return opened, {
        "vision": quiet(_repeated(lambda: model.adapter.see(pixels).features.cpu())),
        "prefill": quiet(_repeated(lambda: model.forward(prompts)[0].cpu())),
        "decode": quiet(decode),
    }
