"""Running engines, over stand-ins of TensorRT's runtime and CUDA's: addresses, copies and errors are real."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from unsealed import staged, unsealed

from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import EngineRecord, GraphRecord, TensorSpec
from himap_export.engines.nvinfer import run
from himap_export.engines.nvinfer.flavour import DATACENTER, RTX, Flavour, log_of
from himap_export.engines.nvinfer.run import open_engines
from himap_export.engines.plugin import tensorrt_rtx as plugin
from himap_export.graphs.errors import Exit, HimapError


def refusal(act: Callable[[], object]) -> HimapError:
    with pytest.raises(HimapError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return caught.value


class FakeCuda(SimpleNamespace):
    """CUDA's runtime over host memory: enough of it that addresses, copies and errors are real."""

    cudaError_t = SimpleNamespace(cudaSuccess=0, cudaErrorMemoryAllocation=2)  # noqa: N815  CUDA's own names
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamNonBlocking = 1  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815

    def __init__(self, major: int = 8, minor: int = 9, count: int = 1, limit: int = 1 << 30) -> None:
        self.memory: dict[int, Any] = {}
        self.allocated = 0
        name = SimpleNamespace(name=b"NVIDIA Fake", major=major, minor=minor)
        self.cudaGetDeviceCount = lambda: (0 if count else 100, count)
        self.cudaGetDeviceProperties = lambda device: (0, name)
        self.cudaSetDevice = lambda _: (0,)
        self.cudaStreamCreateWithFlags = lambda flags: (0, 77)
        self.cudaGetErrorString = lambda error: (0, {2: b"out of memory", 100: b"no device"}[error])
        self.cudaFree = lambda address: (0, self.memory.pop(address))[:1]
        self.cudaMemcpyAsync = lambda to, source, size, kind, stream: (0, ctypes.memmove(to, source, size))[:1]
        self.cudaMemsetAsync = lambda to, value, size, stream: (0, ctypes.memset(to, value, size))[:1]

        def malloc(size: int) -> tuple[int, int]:
            self.allocated += size
            buffer = ctypes.create_string_buffer(b"\xff" * size, size)
            self.memory[ctypes.addressof(buffer)] = buffer
            return (0, ctypes.addressof(buffer)) if self.allocated <= limit else (2, 0)

        self.cudaMalloc = malloc
        self.log: list[str] = []  # what a stream sees of graphs, and every wait for it
        self.capture_fails = False
        for call, value in (
            ("cudaStreamBeginCapture", None), ("cudaStreamEndCapture", 5), ("cudaGraphInstantiate", 6),
            ("cudaGraphDestroy", None), ("cudaGraphLaunch", None), ("cudaGraphExecDestroy", None),
            ("cudaStreamSynchronize", None),
        ):  # fmt: skip
            setattr(self, call, self._logged(call, value))

    def _logged(self, name: str, value: int | None) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.log.append(name)
            error = 100 if self.capture_fails and name == "cudaStreamEndCapture" else 0
            return (error,) if value is None else (error, value)

        return call


class FakeEngine:
    """One graph's doors as TensorRT shows them; running it writes its bound addresses down."""

    def __init__(self, record: GraphRecord, runs: list[tuple[int, dict[str, int]]]) -> None:
        self.record, self.runs = record, runs
        self.names = [*record.inputs, *record.weights, *record.outputs]
        self.num_io_tensors, self.get_tensor_name = len(self.names), self.names.__getitem__
        self.bound: dict[str, int] = {}
        self.device_memory_size_v2 = 1000
        self.capturable = True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.capturable

    def get_tensor_mode(self, name: str) -> str:
        return "out" if name in self.record.outputs else "in"

    def get_aliased_input_tensor(self, name: str) -> str | None:
        past = name.replace("present", "past")
        return past if past in self.record.inputs and past != name else None

    def create_execution_context(self) -> "FakeEngine":
        return self

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.bound[name] = address
        return name in self.names and address > 0

    def execute_async_v3(self, stream: int) -> bool:
        self.runs.append((stream, dict(self.bound)))
        return self.bound.keys() == set(self.names)


Opened = tuple[Bundle, FakeCuda, list[tuple[int, dict[str, int]]]]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """prefix and decode, "built", and a machine with an RTX GPU."""
    model, cuda, runs = staged("bf16"), FakeCuda(), list[tuple[int, dict[str, int]]]()
    bundle = unsealed(tmp_path / "work", model, (model.prefix(), model.decode()))
    files = {name: f"{name}.engine" for name in bundle.manifest.graphs}
    for name, file in files.items():
        bundle.path(file).write_text(name)
    engines = {"tensorrt-rtx": {name: EngineRecord(file, 0.1) for name, file in files.items()}}
    bundle.manifest.engines.update(engines)  # type: ignore[attr-defined]

    def deserialize(engine: bytes) -> FakeEngine | None:
        return FakeEngine(bundle.graph(engine.decode()), runs) if engine.decode() in files else None

    api = RTX.api()
    runtime = SimpleNamespace(
        deserialize_cuda_engine=deserialize, get_engine_validity=lambda engine: (api.EngineValidity.VALID, 0)
    )
    fake = SimpleNamespace(
        Runtime=lambda log: runtime, TensorIOMode=SimpleNamespace(OUTPUT="out"), __version__="0", runtime=runtime,
        ILogger=type("ILogger", (), {"ERROR": 1}),
        EngineValidity=api.EngineValidity, EngineInvalidityDiagnostics=api.EngineInvalidityDiagnostics,
    )  # fmt: skip
    log_of(RTX)
    monkeypatch.setattr(Flavour, "api", lambda self: fake)
    monkeypatch.setattr(run, "cuda_runtime", lambda: cuda)
    return bundle, cuda, runs


def test_engines_share_weights_and_update_caches_in_place(opened: Opened) -> None:
    bundle, cuda, runs = opened
    engines = open_engines(RTX, bundle)
    assert engines.device == "cuda:0 NVIDIA Fake"
    assert cuda.allocated == sum(t.nbytes for t in bundle.tensors.values())
    doors = {name: {**g.inputs, **g.outputs} for name, g in bundle.manifest.graphs.items()}
    for name, specs_ in doors.items():
        tensors = {n: engines.tensor(s) for n, s in specs_.items()}
        tensors |= {n: tensors[n.replace("present", "past")] for n in specs_ if n.replace("present", "past") in tensors}
        engines.bind(name, tensors)()
    (stream, prefix), (again, decode) = runs
    assert stream == again == 77
    assert all(decode[n] == decode[n.replace("present", "past")] for n in decode)
    shared = set(bundle.graph("prefix").weights)
    assert shared and all(prefix[n] == decode[n] for n in shared)
    stored = bundle.tensors["model.norm.weight"]
    content = ctypes.string_at(decode["model.norm.weight"], stored.nbytes)
    assert content == stored.file.read_bytes()[stored.offset : stored.offset + stored.nbytes]


def test_a_cache_bound_apart_is_a_bug(opened: Opened) -> None:
    bundle, _, _ = opened
    engines, graph = open_engines(RTX, bundle), bundle.graph("decode")
    tensors = {n: engines.tensor(s) for n, s in {**graph.inputs, **graph.outputs}.items()}
    with pytest.raises(ValueError, match=r"decode updates past_key\.0 in place"):
        engines.bind("decode", tensors)


def test_tensors_start_as_zeros_keep_what_is_written_and_free_their_memory(opened: Opened) -> None:
    bundle, cuda, _ = opened
    engines = open_engines(RTX, bundle)
    for dtype, value in (("bf16", 1.5), ("fp16", 0.25), ("int64", 7)):
        tensor = engines.tensor(TensorSpec(dtype, (2, 3)))
        assert tensor.read().tolist() == np.zeros((2, 3)).tolist()
        tensor.write(np.full((2, 3), value))
        expected = np.full((2, 3), 0x3FC0 if dtype == "bf16" else value)
        assert tensor.read().tolist() == expected.tolist()
        address = tensor.address
        assert address in cuda.memory
        del tensor
        assert address not in cuda.memory


def test_an_engine_that_cannot_be_opened_is_told_in_one_line(opened: Opened) -> None:
    bundle, _, _ = opened
    bundle.path("decode.engine").write_text("of another version")
    engines = open_engines(RTX, bundle)
    assert "cannot open" in str(refusal(lambda: engines.bind("decode", {})))


def without_a_driver(library: str) -> None:
    raise OSError(f"{library}: cannot open shared object file")


def test_without_a_driver_engines_are_not_opened(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(ctypes, "CDLL", without_a_driver)
    error = refusal(lambda: open_engines(RTX, opened[0]))
    assert error.code == Exit.MISSING and "no CUDA driver" in str(error)
    assert all(words in str(error) for words in ("a GPU", "building the engines needed none", "--backend onnxruntime"))


def test_without_the_bindings_the_package_is_named(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(ctypes, "CDLL", lambda library: None)
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):  # imported or not, they are gone
        monkeypatch.setitem(sys.modules, name, None)
    error = refusal(lambda: open_engines(RTX, opened[0]))
    assert error.code == Exit.MISSING and "pip install 'cuda-bindings" in error.hint


@pytest.mark.parametrize(
    ("cuda", "words"),
    [
        (FakeCuda(9, 0), "SM90"),
        (FakeCuda(7, 5), "SM75"),
        (FakeCuda(count=0), "no device"),
        (FakeCuda(limit=1), "out of memory"),
    ],
)
def test_a_gpu_that_cannot_do_it_is_told(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, words: str
) -> None:
    monkeypatch.setattr(run, "cuda_runtime", lambda: cuda)
    error = refusal(lambda: open_engines(RTX, opened[0]))
    assert words in str(error) and error.code == (Exit.FAILURE if cuda.allocated else Exit.MISSING)


def bound(opened: Opened) -> tuple[run.NvInferEngines, list[Callable[[], None]]]:
    """Both graphs on tensors of their own, caches shared between past and present."""
    engines = open_engines(RTX, opened[0])
    runs = []
    for name, graph in opened[0].manifest.graphs.items():
        doors = {**graph.inputs, **graph.outputs}
        tensors = {n: engines.tensor(s) for n, s in doors.items()}
        tensors |= {n: tensors[n.replace("present", "past")] for n in doors if n.startswith("present")}
        runs.append(engines.bind(name, tensors))
    return engines, runs


def test_a_chain_is_enqueued_once_captured_once_and_launched_ever_after(opened: Opened) -> None:
    _, cuda, enqueued = opened
    engines, runs = bound(opened)
    chain = engines.chain(runs)
    cuda.log.clear()
    chain()
    assert len(enqueued) == 2 and cuda.log == [] and not chain.captured  # no wait between the graphs, nor behind them
    chain()
    begin = ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphDestroy"]
    assert len(enqueued) == 4 and cuda.log == [*begin, "cudaGraphLaunch"] and chain.captured
    chain()
    assert len(enqueued) == 4 and cuda.log == [*begin, "cudaGraphLaunch", "cudaGraphLaunch"]
    del chain
    assert cuda.log[-1] == "cudaGraphExecDestroy"


def test_a_chain_that_cannot_be_captured_goes_on_one_by_one(opened: Opened) -> None:
    _, cuda, enqueued = opened
    engines, runs = bound(opened)
    cuda.capture_fails = True
    chain = engines.chain(runs)
    for _ in range(3):
        chain()
    assert not chain.captured and "cudaGraphLaunch" not in cuda.log
    assert len(enqueued) == 2 + 4 + 2  # what was captured in vain has not run, and is enqueued again
    cuda.log.clear()
    runs[1].context.capturable = False  # type: ignore[attr-defined]
    other = engines.chain(runs)
    other()
    other()
    assert not other.captured and cuda.log == []


def test_a_run_that_fails_while_it_is_captured_ends_the_capture(opened: Opened) -> None:
    _, cuda, _ = opened
    engines, runs = bound(opened)
    chain = engines.chain(runs)
    chain()
    runs[0].context.bound.clear()  # type: ignore[attr-defined]
    with pytest.raises(HimapError, match="cannot run prefix"):
        chain()
    assert cuda.log[-2:] == ["cudaStreamBeginCapture", "cudaStreamEndCapture"]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("VERSION_MISMATCH", "it was built by version 9.9, this is 0"),
        ("UNSUPPORTED_CC", "not built for this GPU"),
        ("OLD_CUDA_DRIVER", "driver is too old"),
        ("OLD_CUDA_RUNTIME", "runtime is too old"),
        ("INSUFFICIENT_GPU_MEMORY", "too little memory"),
        ("MALFORMED_ENGINE", "damaged"),
        ("CUDA_ERROR", "CUDA reports"),
    ],
)
def test_an_engine_that_cannot_run_here_is_told_before_it_is_loaded(opened: Opened, flag: str, words: str) -> None:
    bundle, api = opened[0], RTX.api()
    bundle.manifest.toolchain["tensorrt-rtx"] = "9.9"  # type: ignore[index]
    engines = open_engines(RTX, bundle)
    api.runtime.get_engine_validity = lambda engine: (
        api.EngineValidity.INVALID, getattr(api.EngineInvalidityDiagnostics, flag)
    )  # fmt: skip
    api.runtime.deserialize_cuda_engine = lambda engine: pytest.fail("it was loaded")
    error = refusal(lambda: engines.bind("decode", {}))
    assert words in str(error) and "decode.engine" in str(error) and "export again" in error.hint
    assert set(run._INVALID) == set(api.EngineInvalidityDiagnostics.__members__)


def test_tensorrt_loads_engines_of_its_own_version_only(opened: Opened) -> None:
    bundle = opened[0]
    bundle.manifest.engines["tensorrt"] = bundle.manifest.engines["tensorrt-rtx"]  # type: ignore[index]
    log_of(DATACENTER)
    bundle.manifest.toolchain["tensorrt"] = "11.3"  # type: ignore[index]
    engines = open_engines(DATACENTER, bundle)
    assert "built by tensorrt 11.3, this is 0" in str(refusal(lambda: engines.bind("decode", {})))


def test_an_engine_with_the_plugin_has_it_registered_before_it_is_loaded(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, engines, order = opened[0], open_engines(RTX, opened[0]), []
    load = RTX.api().runtime.deserialize_cuda_engine
    monkeypatch.setattr(plugin, "register", lambda: order.append("register"))
    RTX.api().runtime.deserialize_cuda_engine = lambda engine: order.append("load") or load(engine)
    records = bundle.manifest.engines["tensorrt-rtx"]
    for gather, expected in (("ops", ["load"]), ("plugin", ["register", "load"])):
        order.clear()
        records["decode"] = EngineRecord("decode.engine", 0.1, gather)  # type: ignore[index]
        engines._engine("decode")
        assert order == expected


def test_device_memory_is_counted(opened: Opened) -> None:
    engines, _ = bound(opened)
    assert engines.memory_bytes() == opened[1].allocated + 2 * 1000
