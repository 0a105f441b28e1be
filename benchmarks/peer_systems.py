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

from peer_models import MISSING, WORKERS, Form, Models, Quantized

from himap_export.engines.isolation import child
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.spec import Dtype
from himap_export.validate.report.machine import cpu_and_features
from himap_export.validate.speed import benchmark

PROMPT, STEPS = 35 + 576 + 135, benchmark.DECODE_STEPS
PREFILL, DECODE, MEMORY, OPENED = "prefill", "decode", benchmark.MEMORY, benchmark.OPENED
QUIET = {"KMP_BLOCKTIME": "0", "OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait do not slow the next system
Kind = Literal["ours", "torch", "openvino_export", "openvino_vlm", "ort_genai", "llama"]


@dataclass(frozen=True)
class Compared:
    """A system by the `key` that users choose it with. `form` of ours; `family` of what OpenVINO GenAI runs; `removed`:
    percent of the image tokens that CDPruner removes."""

    key: str
    name: str
    kind: Kind
    dtype: str
    form: Form | None = None
    family: str = "llava"
    removed: int = 0


def _ours(key: str, backend: str, dtype: Dtype, quantize: Quantized = "", head: bool = False) -> Iterator[Compared]:
    """Yields our bundle of a form, pruned and not."""
    what = f"{quantize} over {dtype}{', head too' * head}" if quantize else dtype
    for pruned in (True, False):
        word = "pruned" if pruned else "unpruned"
        form = Form(backend, dtype, pruned, quantize, head)
        yield Compared(f"{key}{'' if pruned else '-unpruned'}", f"ours, {backend} {what}, {word}", "ours", dtype, form)


def _quantized(key: str, backend: str, dtype: Dtype) -> Iterator[Compared]:
    for kind in ("int8", "int4"):
        yield from _ours(f"{key}-{kind}", backend, dtype, kind)
    yield from _ours(f"{key}-int4-head", backend, dtype, "int4", head=True)


FAST_BF16 = ("amx_bf16", "avx512_bf16")  # CPU features: without one of them bf16 is computed in fp32
# What OpenVINO computes in, over quantised weights.
OVER: Dtype = "bf16" if set(FAST_BF16) & set(cpu_and_features(Path("/proc/cpuinfo"))[1].split(", ")) else "fp32"
SYSTEMS = (
    *_ours("ours-ort-fp32", "onnxruntime", "fp32"),
    *_ours("ours-ov-fp32", "openvino", "fp32"),
    *_ours("ours-ov-bf16", "openvino", "bf16"),
    *_quantized("ours-ort", "onnxruntime", "fp32"),
    *_ours("ours-ort-int8-dynamic", "onnxruntime", "fp32", "int8-dynamic"),
    *_quantized("ours-ov", "openvino", OVER),
    Compared("torch-fp32", "PyTorch SDPA fp32", "torch", "fp32"),
    Compared("torch-bf16", "PyTorch SDPA bf16", "torch", "bf16"),
    Compared("optimum-fp32", "optimum-intel's export in OpenVINO, fp32", "openvino_export", "fp32"),
    Compared("optimum-bf16", "optimum-intel's export in OpenVINO, bf16", "openvino_export", "bf16"),
    Compared("optimum-int4", "optimum-intel's export in OpenVINO, int4", "openvino_export", "int4"),
    Compared("genai-fp32", "OpenVINO GenAI fp32", "openvino_vlm", "fp32"),
    Compared("genai-bf16", "OpenVINO GenAI bf16", "openvino_vlm", "bf16"),
    Compared("genai-int4", "OpenVINO GenAI int4", "openvino_vlm", "int4"),
    Compared("qwen-bf16", "OpenVINO GenAI bf16, Qwen2-VL", "openvino_vlm", "bf16", family="qwen2_vl"),
    # 62 % at once is 216 image tokens a layer, as 576, 288 and 72 are on average over our 2, 6 and 8 layers.
    Compared(
        "cdpruner-bf16", "OpenVINO GenAI bf16, Qwen2-VL, CDPruner", "openvino_vlm", "bf16", family="qwen2_vl",
        removed=62,
    ),
    Compared("ortgenai-fp32", "onnxruntime-genai fp32", "ort_genai", "fp32"),
    Compared("ortgenai-int4", "onnxruntime-genai int4", "ort_genai", "int4"),
    Compared("llama-fp32", "llama.cpp fp32", "llama", "fp32"),
    Compared("llama-bf16", "llama.cpp bf16", "llama", "bf16"),
    Compared("llama-q8_0", "llama.cpp Q8_0", "llama", "q8_0"),
    Compared("llama-q4_0", "llama.cpp Q4_0", "llama", "q4_0"),
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
    if system.kind in ("ours", "torch"):
        timed, limits = _timed(system, models), QUIET | {"OMP_NUM_THREADS": str(threads)}
        return lambda: child(f"timing {system.key}", limits, benchmark._doing, timed, threads)
    if system.kind == "llama":
        gguf = models.gguf(system.dtype)
        return lambda: nullcontext(llama_bench(system.key, models, gguf, threads))
    if system.kind == "ort_genai":
        made = models.onnxruntime_genai(system.dtype)
    else:
        made = models.openvino(system.family, "int4" if system.dtype == "int4" else "fp32")
    task = {"folder": str(made), "precision": system.dtype, "threads": threads, "pruned": system.removed}
    return lambda: peer(system.key, system.kind, models, task)


def _timed(system: Compared, models: Models) -> benchmark.System:
    """Returns what `validate/speed` times. PyTorch takes its prompt from a bundle: the one that is always there."""
    if form := system.form:
        run = models.bundle(form)
        return benchmark.System(system.name, "bundle", run, models.checkpoint(), backend=form.backend, device="cpu")
    run, dtype = models.bundle(Form("onnxruntime", "fp32", pruned=True)), "bf16" if system.dtype == "bf16" else "fp32"
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


def peer(key: str, kind: str, models: Models, task: Mapping[str, object]) -> AbstractContextManager[Worker]:
    """Returns what opens a peer that has a worker; `task` is its `Task` but for the sizes, which are everybody's."""
    words = [models.python, WORKERS / f"{kind}.py", json.dumps({**task, "prompt": PROMPT, "steps": STEPS})]
    return worker(key, [str(word) for word in words], models.work / f"{key}.log")


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


def llama_bench(key: str, models: Models, gguf: Path, threads: int) -> LlamaBench:
    program = (models.llama_bench, "-m", gguf, "-t", threads, "-r", 1, "-o", "json")
    return LlamaBench([str(word) for word in program], models.work / f"{key}.log")


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
