"""The systems that the peers' benchmark compares, and how each is run: a process of its own that is asked for phases.

Ours and PyTorch are children of `validate/speed/benchmark.py`; peers with a Python API are programs of the peers'
environment (`peer_workers/serving.py`); llama.cpp is its own `llama-bench`, started anew each time.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, Protocol

from peer_models import MISSING, WORKERS, Models

from himap_export.engines.isolation import child
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.spec import Dtype
from himap_export.validate.speed import benchmark

PROMPT, STEPS = 35 + 576 + 135, benchmark.DECODE_STEPS
PREFILL, DECODE, MEMORY, OPENED = "prefill", "decode", benchmark.MEMORY, benchmark.OPENED
QUIET = {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait do not slow the next system
Kind = Literal["ours", "torch", "openvino_export", "openvino_vlm", "ort_genai", "llama"]


@dataclass(frozen=True)
class Compared:
    """A system by the `key` that users choose it with. `backend` of ours; `family` of what OpenVINO GenAI runs;
    `removed`: percent of the image tokens that CDPruner removes."""

    key: str
    name: str
    kind: Kind
    dtype: str
    backend: str = ""
    pruned: bool = False
    family: str = "llava"
    removed: int = 0


def _ours(backend: str, dtype: str) -> tuple[Compared, Compared]:
    short = {"onnxruntime": "ort", "openvino": "ov"}[backend]
    pruned = Compared(f"ours-{short}-{dtype}", f"ours, {backend} {dtype}, pruned", "ours", dtype, backend, pruned=True)
    return pruned, Compared(f"{pruned.key}-unpruned", f"ours, {backend} {dtype}, unpruned", "ours", dtype, backend)


SYSTEMS = (
    *_ours("onnxruntime", "fp32"),
    *_ours("openvino", "fp32"),
    *_ours("openvino", "bf16"),
    Compared("torch-fp32", "PyTorch SDPA fp32", "torch", "fp32"),
    Compared("torch-bf16", "PyTorch SDPA bf16", "torch", "bf16"),
    Compared("optimum-fp32", "optimum-intel's export in OpenVINO, fp32", "openvino_export", "fp32"),
    Compared("optimum-bf16", "optimum-intel's export in OpenVINO, bf16", "openvino_export", "bf16"),
    Compared("genai-fp32", "OpenVINO GenAI fp32", "openvino_vlm", "fp32"),
    Compared("genai-bf16", "OpenVINO GenAI bf16", "openvino_vlm", "bf16"),
    Compared("qwen-bf16", "OpenVINO GenAI bf16, Qwen2-VL", "openvino_vlm", "bf16", family="qwen2_vl"),
    # 62 % at once is 216 image tokens a layer, as 576, 288 and 72 are on average over our 2, 6 and 8 layers.
    Compared(
        "cdpruner-bf16", "OpenVINO GenAI bf16, Qwen2-VL, CDPruner", "openvino_vlm", "bf16", family="qwen2_vl",
        pruned=True, removed=62,
    ),
    Compared("ortgenai-fp32", "onnxruntime-genai fp32", "ort_genai", "fp32"),
    Compared("ortgenai-int4", "onnxruntime-genai int4", "ort_genai", "int4"),
    Compared("llama-fp32", "llama.cpp fp32", "llama", "fp32"),
    Compared("llama-bf16", "llama.cpp bf16", "llama", "bf16"),
)  # fmt: skip


class Running(Protocol):
    """A system that is open. Asked PREFILL or DECODE it answers seconds, of decode per token behind the prompt; asked
    MEMORY, peak resident bytes till then; asked OPENED, the seconds that its last opening took. `pid`: its process, if
    it has one all the time."""

    @property
    def pid(self) -> int | None: ...
    def ask(self, request: str) -> float: ...


@contextmanager
def alone(one: Running) -> Iterator[None]:
    """Lets a system run in here and stops it behind: threads of some runtimes go on spinning in the next one's turn."""
    if one.pid is not None:
        os.kill(one.pid, signal.SIGCONT)
    yield
    if one.pid is not None:
        os.kill(one.pid, signal.SIGSTOP)


@contextmanager
def running(system: Compared, models: Models, threads: int) -> Iterator[Running]:
    """Opens a system twice, the first time to fill caches, and yields it; HimapError if it cannot be run here."""
    start = _prepared(system, models, threads)
    with start() as first:
        first.ask(PREFILL)
        first.ask(DECODE)
    with start() as one:
        yield one


def _prepared(system: Compared, models: Models, threads: int) -> Callable[[], AbstractContextManager[Running]]:
    """Makes what a system needs and returns what opens it."""
    log = models.work / f"{system.key}.log"
    if system.kind in ("ours", "torch"):
        timed, limits = _timed(system, models), QUIET | {"OMP_NUM_THREADS": str(threads)}
        return lambda: child(f"timing {system.key}", limits, benchmark._doing, timed, threads)
    if system.kind == "llama":
        program = [models.llama_bench, "-m", models.gguf(system.dtype), "-t", threads, "-r", 1, "-o", "json"]
        return lambda: nullcontext(LlamaBench([str(word) for word in program], log))
    made = models.onnxruntime_genai(system.dtype) if system.kind == "ort_genai" else models.openvino(system.family)
    task = {"folder": str(made), "precision": system.dtype, "threads": threads, "prompt": PROMPT, "steps": STEPS}
    words = [str(models.python), str(WORKERS / f"{system.kind}.py"), json.dumps(task | {"pruned": system.removed})]
    return lambda: worker(system.key, words, log)


def _timed(system: Compared, models: Models) -> benchmark.System:
    """Returns what `validate/speed` times. PyTorch takes its prompt from a bundle: the one that is always there."""
    dtype: Dtype = "bf16" if system.dtype == "bf16" else "fp32"
    if system.kind == "ours":
        run = models.bundle(system.backend, dtype, system.pruned)
        return benchmark.System(system.name, "bundle", run, models.checkpoint(), backend=system.backend, device="cpu")
    run = models.bundle("onnxruntime", "fp32", pruned=True)
    return benchmark.System(system.name, "torch", run, models.checkpoint(), device="cpu", dtype=dtype)


class Worker:
    """A program that answers as `peer_workers/serving.py` says. Made by `worker`."""

    def __init__(self, name: str, process: "subprocess.Popen[str]", log: Path) -> None:
        self._name, self._process, self._log = name, process, log
        self.pid: int | None = process.pid
        self._opened = self._answer("load")

    def ask(self, request: str) -> float:
        """Returns a `Running`'s answer; HimapError with the program's own words, or if it died."""
        if request == OPENED:
            return self._opened
        assert self._process.stdin is not None
        try:
            print(json.dumps({"ask": request}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._died()
        return self._answer(request)

    def _answer(self, request: str) -> float:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._died()
        found = json.loads(line)
        if "error" in found:
            raise HimapError(f"{self._name} failed", found["error"], f"see {self._log}")
        return float(found[request])

    def _died(self) -> NoReturn:
        raise HimapError(f"{self._name} died", f"exit code {self._process.wait()}", f"see {self._log}")


@contextmanager
def worker(name: str, program: Sequence[str], log: Path) -> Iterator[Worker]:
    """Starts a worker and waits until it is open; HimapError as `Worker.ask`, or if there is no such environment."""
    if not Path(program[0]).exists():
        raise HimapError(f"{program[0]} is not there", hint=MISSING, code=Exit.MISSING)
    with (
        log.open("w") as errors,
        subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            yield Worker(name, process, log)
        finally:
            process.kill()


class LlamaBench:
    """llama.cpp's own benchmark, a process for each answer; its default settings.

    It says no load time: that is the time of the whole process for a prompt of one token, without its warm-up.
    """

    pid: int | None = None

    def __init__(self, program: Sequence[str], log: Path) -> None:
        if not Path(program[0]).exists():
            raise HimapError(f"{program[0]} is not there", hint=MISSING, code=Exit.MISSING)
        self._program, self._log, self._peak = program, log, 0

    def ask(self, request: str) -> float:
        """Returns a `Running`'s answer; HimapError if llama-bench fails."""
        if request == MEMORY:
            return self._peak
        if request == PREFILL:
            return llama_seconds(self._output("-p", str(PROMPT), "-n", "0"))
        if request == DECODE:
            return llama_seconds(self._output("-p", "0", "-n", str(STEPS), "-d", str(PROMPT))) / STEPS
        start = time.perf_counter()
        self._output("-p", "1", "-n", "0", "--no-warmup")
        return time.perf_counter() - start

    def _output(self, *words: str) -> str:
        with self._log.open("a") as errors:
            process = subprocess.Popen([*self._program, *words], stdout=subprocess.PIPE, stderr=errors, text=True)
            while process.poll() is None:
                self._peak = max(self._peak, peak_bytes(process.pid))
                time.sleep(0.02)
            assert process.stdout is not None
            text = process.stdout.read()
        if process.returncode:
            raise HimapError("llama-bench failed", f"exit code {process.returncode}", f"see {self._log}")
        return text


def llama_seconds(output: str) -> float:
    """Returns the seconds of the one repetition of the one test that llama-bench's JSON tells of."""
    (test,) = json.loads(output)
    (nanoseconds,) = test["samples_ns"]
    return float(nanoseconds) / 1e9


def peak_bytes(process: int) -> int:
    """Returns the peak resident memory of a process so far; 0 once it has ended."""
    try:
        lines: Mapping[str, str] = dict(
            line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines()
        )
    except (OSError, ValueError):
        return 0
    return 1024 * int(lines.get("VmHWM", "0 kB").split()[0])
