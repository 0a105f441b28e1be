"""Stand-ins of TensorRT's runtime and CUDA's, over host memory: addresses, copies, their order and errors are real."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from unsealed import staged, unsealed

from himap_export.engines.backends import Tensor
from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import EngineRecord, GraphRecord
from himap_export.engines.nvinfer import run
from himap_export.engines.nvinfer.edition import RTX, Edition, log_of
from himap_export.engines.nvinfer.run import open_engines


class FakeCuda(SimpleNamespace):
    """CUDA's runtime, its one stream as late as can be: what is enqueued happens when it is waited for.

    `log` has every call that the stream sees, and every wait for it. A call in `failing` fails.
    """

    cudaError_t = SimpleNamespace(cudaSuccess=0, cudaErrorMemoryAllocation=2)  # noqa: N815  CUDA's own names
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamNonBlocking = 1  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, major: int = 8, minor: int = 9, count: int = 1, limit: int = 1 << 30) -> None:
        self.memory: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.allocated, self.limit = 0, limit
        self.log: list[str] = []
        self.failing: set[str] = set()
        self.queue: list[Callable[[], object]] = []
        self.recording: list[Callable[[], object]] | None = None
        self.graphs: list[int] = []  # not destroyed yet
        name = SimpleNamespace(name=b"NVIDIA Fake", major=major, minor=minor)
        self.cudaGetDeviceCount = lambda: (0 if count else 100, count)
        self.cudaGetDeviceProperties = lambda device: (0, name)
        self.cudaSetDevice = lambda _: (0,)
        self.cudaStreamCreateWithFlags = lambda flags: (0, 77)
        self.cudaGetErrorString = lambda error: (
            0,
            {2: b"out of memory", 100: b"no device", 900: b"unsupported"}[error],
        )
        self.cudaGetLastError = lambda: (900,)
        self.cudaMalloc = self._malloc
        self.cudaFree = lambda address: (*self._wait(), self.memory.pop(address))[:1]
        self.cudaMallocHost = lambda size: (0, self._keep(self.pinned, ctypes.create_string_buffer(size)))
        self.cudaFreeHost = lambda address: (0, self.pinned.pop(address))[:1]
        self.cudaMemcpyAsync = lambda to, source, size, kind, stream: self.enqueue(
            f"copy {kind}", stream, lambda: ctypes.memmove(to, source, size)
        )
        self.cudaMemsetAsync = lambda to, value, size, stream: self.enqueue(
            "set", stream, lambda: ctypes.memset(to, value, size)
        )
        self.cudaStreamSynchronize = lambda stream: self._wait("wait")
        self.cudaStreamBeginCapture = lambda stream, mode: self._begin()
        self.cudaStreamEndCapture = lambda stream: self._end()
        self.cudaGraphInstantiate = lambda graph, flags: self._failed("cudaGraphInstantiate", graph)
        self.cudaGraphDestroy = lambda graph: (self.graphs.remove(id(graph)), 0)[1:]
        self.cudaGraphLaunch = lambda graph, stream: self.enqueue("launch", stream, lambda: [act() for act in graph])
        self.cudaGraphExecDestroy = lambda graph: (self.log.append("destroy") or 0,)

    def enqueue(self, name: str, stream: int, action: Callable[[], object]) -> tuple[int]:
        assert stream == 77
        self.log.append(name)
        (self.queue if self.recording is None else self.recording).append(action)
        return (0,)

    def _wait(self, *name: str) -> tuple[int]:
        assert self.recording is None, "a wait spoils a capture"
        self.log.extend(name)
        while self.queue:
            self.queue.pop(0)()
        return (0,)

    def _failed(self, name: str, *value: object) -> tuple[Any, ...]:
        return (900, *[None for _ in value]) if name in self.failing else (0, *value)

    def _begin(self) -> tuple[int]:
        self.log.append("begin")
        self.recording = None if "cudaStreamBeginCapture" in self.failing else []
        return self._failed("cudaStreamBeginCapture")

    def _end(self) -> tuple[Any, ...]:
        self.log.append("end")
        graph, self.recording = self.recording, None
        if "cudaStreamEndCapture" not in self.failing:
            self.graphs.append(id(graph))
        return self._failed("cudaStreamEndCapture", graph)

    def _malloc(self, size: int) -> tuple[int, int]:
        self.allocated += size
        buffer = ctypes.create_string_buffer(b"\xff" * size, size)
        return (0, self._keep(self.memory, buffer)) if self.allocated <= self.limit else (2, 0)

    def _keep(self, kind: dict[int, Any], buffer: Any) -> int:
        kind[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)


class FakeEngine:
    """One graph's ports as TensorRT shows them; running it writes down its bound addresses, and the first token id."""

    def __init__(self, name: str, record: GraphRecord, cuda: FakeCuda, runs: "Runs") -> None:
        self.name, self.record, self.cuda, self.runs = name, record, cuda, runs
        self.names = [*record.inputs, *record.weights, *record.outputs]
        self.num_io_tensors, self.get_tensor_name = len(self.names), self.names.__getitem__
        self.bound: dict[str, int] = {}
        self.device_memory_size_v2 = 1000
        self.get_engine_stat = lambda kind: {"total": 50}[kind]
        self.capturable = True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.capturable

    def get_tensor_mode(self, name: str) -> str:
        return "out" if name in self.record.outputs else "in"

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.record.outputs[name].updates

    def create_execution_context(self) -> "FakeEngine":
        return self

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.bound[name] = address
        return name in self.names and address > 0

    def execute_async_v3(self, stream: int) -> bool:
        def act() -> None:
            token = ctypes.c_int64.from_address(self.bound["input_ids"]).value if "input_ids" in self.bound else None
            self.runs.append((self.name, dict(self.bound), token))

        self.cuda.enqueue(f"run {self.name}", stream, act)
        return self.bound.keys() == set(self.names)


Runs = list[tuple[str, dict[str, int], int | None]]
Opened = tuple[Bundle, FakeCuda, Runs]


def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """prefix and decode, "built", and a machine with an RTX GPU."""
    model, cuda, runs = staged("bf16"), FakeCuda(), Runs()
    bundle = unsealed(tmp_path / "work", model, (model.stage(0), model.decode()))
    files = {name: f"{name}.engine" for name in bundle.manifest.graphs}
    for name, file in files.items():
        bundle.path(file).write_text(name)
    engines = {"tensorrt-rtx": {name: EngineRecord(file, 0.1) for name, file in files.items()}}
    bundle.manifest.engines.update(engines)  # type: ignore[attr-defined]

    def deserialize(engine: npt.NDArray[np.uint8]) -> FakeEngine | None:
        name = bytes(engine).decode()
        return FakeEngine(name, bundle.manifest.graphs[name], cuda, runs) if name in files else None

    api = RTX.api()
    runtime = SimpleNamespace(
        deserialize_cuda_engine=deserialize,
        get_engine_validity=lambda engine: (api.EngineValidity.SUBOPTIMAL, 64),
        engine_header_size=64,
    )
    fake = SimpleNamespace(
        Runtime=lambda log: runtime, TensorIOMode=SimpleNamespace(OUTPUT="out"), __version__="0", runtime=runtime,
        ILogger=type("ILogger", (), {"ERROR": 1}), EngineStat=SimpleNamespace(TOTAL_WEIGHTS_SIZE="total"),
        EngineValidity=api.EngineValidity, EngineInvalidityDiagnostics=api.EngineInvalidityDiagnostics,
    )  # fmt: skip
    log_of(RTX)
    monkeypatch.setattr(Edition, "api", lambda self: fake)
    monkeypatch.setattr(run, "cuda_runtime", lambda: cuda)
    return bundle, cuda, runs


def bound(opened: Opened) -> tuple[run.NvInferEngines, list[Callable[[], None]], list[dict[str, Tensor]]]:
    """Both graphs on tensors of their own, caches shared between past and present."""
    engines, runs, doors = open_engines(RTX, opened[0]), [], []
    for name, graph in opened[0].manifest.graphs.items():
        tensors: dict[str, Tensor] = {name: engines.tensor(port) for name, port in graph.inputs.items()}
        tensors |= {n: tensors[p.updates] if p.updates else engines.tensor(p) for n, p in graph.outputs.items()}
        runs.append(engines.bind(name, tensors))
        doors.append(tensors)
    return engines, runs, doors
