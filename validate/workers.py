"""Timing that can be compared: one process per contender, taking turns.

A runtime's spinning threads slow its neighbours, so each contender lives alone in a process; the machine's speed
drifts, so they take turns, round by round, and ratios are taken within a round.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from himap_export.engines.bundle import Bundle
from himap_export.engines.isolation import environment
from himap_export.graphs.errors import Exit, HimapError

ACTS = ("vision", "prefill", "decode")
DECODE_STEPS = 16
TURN = 0.1  # seconds that a turn lasts at least


@dataclass(frozen=True)
class Contender:
    """`kind` "bundle" (`backend` has its engines) or "torch" (the checkpoint, PyTorch SDPA, unpruned; prompts as the
    bundle's)."""

    name: str
    kind: str
    bundle: Bundle
    checkpoint: Path
    backend: str = ""


@dataclass(frozen=True)
class Times:
    """Seconds per round by act, of one contender, and its peak resident memory in bytes."""

    name: str
    seconds: dict[str, tuple[float, ...]]
    peak_bytes: int

    def median(self, act: str) -> float:
        return statistics.median(self.seconds[act])


def ratios(a: Times, b: Times, act: str) -> tuple[float, float, float]:
    """How many times faster `a` is than `b`, within each round: median, lowest, highest."""
    found = [his / mine for mine, his in zip(a.seconds[act], b.seconds[act], strict=True)]
    return statistics.median(found), min(found), max(found)


def race(
    contenders: Sequence[Contender], iterations: int, warm_up: int, threads: int, acts: Sequence[str] = ACTS
) -> list[Times]:
    """Every contender does every act `iterations` times, one after the other within a round."""
    with ExitStack() as stack:
        doors = [stack.enter_context(_worker(c, threads)) for c in contenders]
        rounds: list[dict[str, list[float]]] = [{act: [] for act in acts} for _ in contenders]
        for act in acts:
            for n in range(warm_up + iterations):
                for door, times in zip(doors, rounds, strict=True):
                    seconds = _ask(door, act)
                    if n >= warm_up:
                        times[act].append(seconds)
        return [
            Times(c.name, {act: tuple(s) for act, s in times.items()}, int(_ask(door, "memory")))
            for c, door, times in zip(contenders, doors, rounds, strict=True)
        ]


def _ask(door: Connection, act: str) -> float:
    door.send(act)
    answer = door.recv()
    if isinstance(answer, HimapError):
        raise answer
    return float(answer)


@contextmanager
def _worker(contender: Contender, threads: int) -> Iterator[Connection]:
    context = get_context("spawn")
    mine, his = context.Pipe()
    limits = {"OMP_NUM_THREADS": str(threads), "KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    process = context.Process(target=_serve, args=(his, contender, threads), daemon=True)
    with environment(limits):  # read when the child loads its runtime
        process.start()
    his.close()
    try:
        _ask(mine, "ready")
        yield mine
    except (EOFError, ConnectionError):
        raise HimapError(f"the worker of {contender.name} died", hint="is there enough memory?") from None
    finally:
        with suppress(OSError):
            mine.send("stop")
        process.join(5)
        process.terminate()  # one that is stuck, or still at work after a Ctrl-C
        process.join()


def _serve(door: Connection, contender: Contender, threads: int) -> None:
    try:
        acts = (_bundle if contender.kind == "bundle" else _torch)(contender, threads)
    except HimapError as problem:
        door.send(HimapError(problem.summary, problem.details, problem.hint, problem.code))
        return
    while True:
        act = door.recv()
        if act == "stop":
            return
        if act == "ready":
            door.send(0.0)
        elif act == "memory":
            door.send(_peak_bytes())
        else:
            door.send(acts[act]())


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


def _bundle(contender: Contender, threads: int) -> dict[str, Callable[[], float]]:
    from himap_export.engines.backends import Opening
    from himap_export.engines.pipeline import Pipeline
    from himap_export.validate.questions import drawn_inputs

    bundle = contender.bundle
    pipeline = Pipeline(bundle, contender.backend, Opening(threads))
    inputs = drawn_inputs(bundle, bundle.budget.batch, 0, fill=True)
    prefilled, layout = pipeline.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
    tokens = prefilled.logits.argmax(axis=1)
    steps = min(DECODE_STEPS, bundle.budget.new)

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


def _torch(contender: Contender, threads: int) -> dict[str, Callable[[], float]]:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from himap_export.validate.questions import drawn_inputs
    from himap_export.validate.reference import Reference

    torch.set_num_threads(threads)
    disable_progress_bar()
    bundle = contender.bundle
    inputs = drawn_inputs(bundle, bundle.budget.batch, 0, fill=True)
    try:
        model = Reference(contender.checkpoint, attn_implementation="sdpa")
    except (OSError, ValueError) as problem:
        raise HimapError(
            f"cannot load {contender.checkpoint}", str(problem).splitlines()[0], code=Exit.MISSING
        ) from None
    with torch.inference_mode():
        prompts = model.embed(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
        steps, length = min(DECODE_STEPS, bundle.budget.new), prompts.hidden.shape[1]

        def decode() -> float:
            logits, cache = model.forward(prompts)
            tokens = logits.argmax(-1)
            with torch.inference_mode():
                return _clock(lambda: [model.step(tokens, length + i, cache) for i in range(steps)]) / steps

    def quiet(work: Callable[[], object]) -> Callable[[], float]:
        turn = _turn(work)

        def timed() -> float:
            with torch.inference_mode():
                return turn()

        return timed

    return {
        "vision": quiet(lambda: model.image_features(inputs.pixel_values)),
        "prefill": quiet(lambda: model.forward(prompts)),
        "decode": decode,
    }
