"""TensorRT-RTX: engines really built, without a GPU; running them, over stand-ins of CUDA and of TensorRT's runtime."""

import ctypes
import json
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from himap_export.engines.backends import tensorrt_rtx
from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import EngineRecord, GraphRecord, Manifest, ModelRecord, TensorSpec
from himap_export.engines.weight_file import read_header
from himap_export.exporter.bind import bind
from himap_export.graphs.build import IR_DTYPE, StageGraph
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import PruningPlan, TokenBudget
from himap_export.graphs.spec import DecoderSpec, Dtype
from himap_export.graphs.stages import StagedModel

SPEC, V, T, NEW = DecoderSpec(4, 64, 128, 4, 2, 16, 96), 16, 24, 8
PRUNED, WHOLE = PruningPlan(1, 3, 0.5, 0.75), PruningPlan(1, 3, 0, 0)
LAYERS = {"prefix": 1, "k1": 2, "k2": 1, "decode": 4}
_NAMES = {code: name for name, code in IR_DTYPE.items()} | {ir.DataType.INT64: "int64"}


def staged(dtype: Dtype, plan: PruningPlan = PRUNED) -> StagedModel:
    return StagedModel(SPEC, plan, TokenBudget(plan.kept(V), T, NEW), dtype, lambda role: f"model.{role}")


def vision(dtype: Dtype) -> StageGraph:
    """A CLIP tower whose heads are wide enough to fuse, and its projector."""
    from himap_export.exporter.vision import vision_graph

    tower = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "image_size": 56}
    tower |= {"num_attention_heads": 4, "num_hidden_layers": 3, "patch_size": 14, "projection_dim": 64}
    text = {"model_type": "llama", "hidden_size": SPEC.hidden, "intermediate_size": SPEC.ffn, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "vocab_size": SPEC.vocab}
    config = {"model_type": "llava", "image_token_index": 95, "text_config": text, "vision_config": tower}
    return vision_graph(config, SPEC, TokenBudget((V, 8, 2), T, NEW), dtype)


def store(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: Dtype) -> None:
    """Random weights as a safetensors file."""
    random, header, data = np.random.default_rng(0), {}, b""
    for name, shape in shapes.items():
        values = (0.1 * random.standard_normal(shape)).astype(np.float32)
        raw = {
            "fp32": values,
            "fp16": values.astype(np.float16),
            "bf16": (values.view(np.uint32) >> 16).astype(np.uint16),
        }
        content = raw[dtype].tobytes()
        kind = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[dtype]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def specs(values: list[ir.Value]) -> dict[str, TensorSpec]:
    found = {}
    for v in values:
        assert v.name and v.dtype and v.shape
        found[v.name] = TensorSpec(_NAMES[v.dtype], tuple(int(n) for n in v.shape.numpy()))
    return found


def unsealed(folder: Path, model: StagedModel, graphs: tuple[StageGraph, ...]) -> Bundle:
    """A work folder as the exporter leaves it before it compiles."""
    (folder / "weights").mkdir(parents=True)
    store(folder / "weights/w.safetensors", {n: s for g in graphs for n, s in g.weights.items()}, model.dtype)
    tensors, records = read_header(folder / "weights/w.safetensors"), {}
    for graph in graphs:
        inputs = specs([v for v in graph.model.graph.inputs if v.name not in graph.weights])
        bound, names = bind(graph, tensors, lambda t: f"weights/{t.file.name}", str)
        ir.save(bound, folder / f"{graph.name}.onnx")
        records[graph.name] = GraphRecord(f"{graph.name}.onnx", inputs, specs(list(bound.graph.outputs)), names)
    manifest = Manifest(
        ModelRecord("tiny", "tiny", "tiny", 95, (2,), 0), model.spec, model.plan, model.budget, model.dtype,
        records, {}, ("weights/w.safetensors",), None, None, None, {}, (),
    )  # fmt: skip
    return Bundle(folder, manifest)


Built = tuple[Bundle, dict[str, EngineRecord]]


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    model = staged(request.param)
    bundle = unsealed(tmp_path_factory.mktemp("rtx") / "work", model, (*model.graphs(), vision(request.param)))
    return bundle, {name: tensorrt_rtx.build(bundle, name) for name in bundle.manifest.graphs}


def count(kernels: tuple[str, ...], *words: str) -> int:
    """Kernels whose name or operators hold all `words`."""
    return sum(int(k.partition("x ")[0]) for k in kernels if all(word in k for word in words))


def test_every_graph_becomes_an_engine_with_fused_attention(built: Built) -> None:
    bundle, records = built
    assert records.keys() == {*LAYERS, "vision"}
    for name, layers in LAYERS.items():
        assert count(records[name].kernels, "_mha_", "(Attention)") == layers, records[name].kernels
        assert count(records[name].kernels, "RotaryEmbedding"), records[name].kernels
    assert count(records["vision"].kernels, "_mha_", "(Attention)") == 2  # feature layer -2: the third is not computed
    assert count(records["decode"].kernels, "Scat", "TensorScatter") >= 1
    for name, record in records.items():
        assert record.file == f"tensorrt-rtx/{name}.engine" and record.seconds > 0
        assert bundle.path(record.file).stat().st_size > 10_000


def test_engines_hold_no_weight_matrix(built: Built) -> None:
    bundle, records = built
    for name, record in records.items():
        engine = bundle.path(record.file).read_bytes()
        for weight in bundle.graph(name).weights:
            stored = bundle.tensors[weight]
            with stored.file.open("rb") as f:
                f.seek(stored.offset)
                content = f.read(stored.nbytes)
            if len(stored.shape) > 1:
                assert weight.encode() in engine and content[:32] not in engine, f"{weight} in {name}"


def test_gather_is_recorded_in_the_form_it_has(built: Built, tmp_path: Path) -> None:
    gathers = {name: record.gather for name, record in built[1].items()}
    assert gathers == {"prefix": "none", "k1": "ops", "k2": "ops", "decode": "none", "vision": "none"}
    assert count(built[1]["k1"].kernels, "TopKGather") > 0
    whole = staged("fp16", WHOLE)
    bundle = unsealed(tmp_path / "work", whole, (whole.k1(), whole.k2()))
    assert [tensorrt_rtx.build(bundle, name).gather for name in ("k1", "k2")] == ["none", "none"]


def test_building_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = staged("fp16")
    tensorrt_rtx.build(unsealed(tmp_path / "work", model, (model.decode(),)), "decode")
    assert capfd.readouterr() == ("", "")


def test_kernels_are_counted_by_name_and_operators() -> None:
    log = """Layers:
Name: __myl_Cast_myl0_0, LayerType: kgen, Inputs: [], Metadata: [ONNX Layer: n1][ONNX Layer: node_x | call_0 (Topk)]
Name: __mye1_myl0_1, LayerType: signal, Inputs: [], EventId: 1, Metadata:\x20
Name: n2_myl0_2, LayerType: gemm, Inputs: [], TacticName: x, Metadata: [ONNX Layer: n2]
Name: n3_myl0_3, LayerType: gemm, Inputs: [], TacticName: x, Metadata: [ONNX Layer: n3]

I/O Tensors:
"""
    found = tensorrt_rtx.kernels(log, {"n1": "Cast", "n2": "Gemm", "n3": "Gemm"})
    assert found == ("1x Cast (Cast, Topk)", "2x gemm (Gemm)")


def refusal(act: Callable[[], object]) -> HimapError:
    with pytest.raises(HimapError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return caught.value


def test_fp32_and_a_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_rtx.check("fp16")
    tensorrt_rtx.check("bf16")
    assert tensorrt_rtx.version()["tensorrt-rtx"].startswith("1.")
    fp32 = refusal(lambda: tensorrt_rtx.check("fp32"))
    assert fp32.code == Exit.USAGE and "--dtype fp16 or bf16" in fp32.hint
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    missing = refusal(lambda: tensorrt_rtx.check("fp16"))
    assert missing.code == Exit.MISSING and "pip install" in missing.hint


def test_what_tensorrt_cannot_build_is_told_in_one_line(tmp_path: Path) -> None:
    model = staged("fp32")
    bundle = unsealed(tmp_path / "work", model, (model.k2(),))
    assert "no fused kernel for one of its Attention" in str(refusal(lambda: tensorrt_rtx.build(bundle, "k2")))
    path = bundle.path("k2.onnx")
    bound = ir.load(path)
    next(node for node in bound.graph if node.op_type == "Attention").op_type = "Inattention"
    ir.save(bound, path)
    assert "Inattention" in str(refusal(lambda: tensorrt_rtx.build(bundle, "k2")))
    path.write_bytes(b"not a graph")
    assert "k2.onnx: not a readable ONNX file" in str(refusal(lambda: tensorrt_rtx.build(bundle, "k2")))
    assert not bundle.path("tensorrt-rtx/k2.engine").exists()


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
    tensorrt_rtx._log()
    monkeypatch.setattr(tensorrt_rtx, "_tensorrt", lambda: fake)
    monkeypatch.setattr(tensorrt_rtx, "cuda_runtime", lambda: cuda)
    return bundle, cuda, runs


def test_engines_share_weights_and_update_caches_in_place(opened: Opened) -> None:
    bundle, cuda, runs = opened
    engines = tensorrt_rtx.open_engines(bundle)
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
    engines, graph = tensorrt_rtx.open_engines(bundle), bundle.graph("decode")
    tensors = {n: engines.tensor(s) for n, s in {**graph.inputs, **graph.outputs}.items()}
    with pytest.raises(ValueError, match=r"decode updates past_key\.0 in place"):
        engines.bind("decode", tensors)


def test_tensors_start_as_zeros_keep_what_is_written_and_free_their_memory(opened: Opened) -> None:
    bundle, cuda, _ = opened
    engines = tensorrt_rtx.open_engines(bundle)
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
    engines = tensorrt_rtx.open_engines(bundle)
    assert "cannot open" in str(refusal(lambda: engines.bind("decode", {})))


def without_a_driver(library: str) -> None:
    raise OSError(f"{library}: cannot open shared object file")


def test_without_a_driver_engines_are_not_opened(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", without_a_driver)
    error = refusal(lambda: tensorrt_rtx.open_engines(built[0]))
    assert error.code == Exit.MISSING and "no CUDA driver" in str(error)
    assert all(
        words in str(error) for words in ("RTX GPU", "building the engines needed none", "--backend onnxruntime")
    )


def test_without_the_bindings_the_package_is_named(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda library: None)
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):  # imported or not, they are gone
        monkeypatch.setitem(sys.modules, name, None)
    error = refusal(lambda: tensorrt_rtx.open_engines(built[0]))
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
    monkeypatch.setattr(tensorrt_rtx, "cuda_runtime", lambda: cuda)
    error = refusal(lambda: tensorrt_rtx.open_engines(opened[0]))
    assert words in str(error) and error.code == (Exit.FAILURE if cuda.allocated else Exit.MISSING)
