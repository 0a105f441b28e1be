"""A peer as a process of its own environment: a line of JSON asks, a line of JSON answers.

The parent (`peer_systems.py`) starts it with its task; the first answer is `{"load": seconds}`, or `{"error": why}`.
Asked a phase, it answers the seconds of one repetition, of decode per token; asked "memory", its peak in bytes. It ends
when its standard input does. Nothing here may import himap_export: the environment is the peers'.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Phases = Mapping[str, Callable[[], float]]


@dataclass(frozen=True)
class Task:
    """A model in `folder`, run in `precision` ("fp32", "bf16", ..): `prompt` tokens, then `steps` behind them.

    `pruned`: percent of the image tokens that the peer is told to remove.
    """

    folder: Path
    precision: str
    threads: int
    prompt: int
    steps: int
    pruned: int = 0


def serve(opened: Callable[[Task], Phases]) -> None:
    """Answers the parent until it leaves; `opened` loads the model, and what it takes is the load time."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print

    def answer(**said: float | str) -> None:
        print(json.dumps(said), file=answers, flush=True)

    try:
        told = json.loads(sys.argv[1])
        task = Task(**{**told, "folder": Path(told["folder"])})
        start = time.perf_counter()
        phases = opened(task)
        answer(load=time.perf_counter() - start)
        for line in sys.stdin:
            asked = json.loads(line)["ask"]
            if asked == "prefill":
                phases[asked]()  # wakes the runtime's threads, as ours are
            answer(**{asked: peak_bytes() if asked == "memory" else phases[asked]()})
    except Exception as problem:
        traceback.print_exc()
        answer(error=" ".join(f"{type(problem).__name__}: {problem}".split()))


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024


def clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
