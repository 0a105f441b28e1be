"""A stand-in of TensorRT's runtime, over that of cuda.core."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
from cuda_stand_ins import FakeCuda
from unsealed import staged, unsealed

from himap_export.engines.backends import Tensor
from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import EngineRecord, GraphRecord
from himap_export.engines.nvinfer import run
from himap_export.engines.nvinfer.edition import RTX, Edition, log_of
from himap_export.engines.nvinfer.run import open_engines


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

        assert stream == 77
        self.cuda.enqueue(f"run {self.name}", act)
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
    monkeypatch.setattr(run, "cuda_core", lambda: cuda)
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
