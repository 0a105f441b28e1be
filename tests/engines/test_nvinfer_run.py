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
from himap_export.engines.nvinfer.flavour import RTX, Flavour, log_of
from himap_export.engines.nvinfer.run import open_engines
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

    def __init__(self, major: int = 8, minor: int = 9, count: int = 1, limit: int = 1 << 30) -> None:
        self.memory: dict[int, Any] = {}
        self.allocated = 0
        name = SimpleNamespace(name=b"NVIDIA Fake", major=major, minor=minor)
        self.cudaGetDeviceCount = lambda: (0 if count else 100, count)
        self.cudaGetDeviceProperties = lambda device: (0, name)
        self.cudaSetDevice = self.cudaStreamSynchronize = lambda _: (0,)
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


class FakeEngine:
    """One graph's doors as TensorRT shows them; running it writes its bound addresses down."""

    def __init__(self, record: GraphRecord, runs: list[tuple[int, dict[str, int]]]) -> None:
        self.record, self.runs = record, runs
        self.names = [*record.inputs, *record.weights, *record.outputs]
        self.num_io_tensors, self.get_tensor_name = len(self.names), self.names.__getitem__
        self.bound: dict[str, int] = {}

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

    runtime = SimpleNamespace(deserialize_cuda_engine=deserialize)
    fake = SimpleNamespace(Runtime=lambda log: runtime, TensorIOMode=SimpleNamespace(OUTPUT="out"), __version__="0")
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
