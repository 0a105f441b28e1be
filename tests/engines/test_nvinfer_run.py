"""Running engines, over stand-ins of TensorRT's runtime and CUDA's: addresses, copies and errors are real."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import cuda.core
import numpy as np
import pytest
from cuda.pathfinder import DynamicLibNotFoundError
from cuda_stand_ins import FakeCuda
from msgspec.structs import replace
from nvinfer_stand_ins import Opened, bound, stand_ins

from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import EngineRecord, QuantisedWeight, Quantization
from himap_export.engines.nvinfer import cuda_memory, run
from himap_export.engines.nvinfer.edition import DATACENTER, RTX, Edition, first_capability, log_of
from himap_export.engines.nvinfer.run import open_engines
from himap_export.engines.plugin import tensorrt_rtx as plugin
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import Kind, TensorSpec


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    return stand_ins(tmp_path, monkeypatch)


def refusal(act: Callable[[], object]) -> HimapError:
    with pytest.raises(HimapError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return caught.value


def test_engines_share_weights_and_update_caches_in_place(opened: Opened) -> None:
    bundle, cuda, seen = opened
    engines, runs, _ = bound(opened)
    assert engines.device == "cuda:0 NVIDIA Fake"
    for each in runs:
        each()
    cuda.wait()
    (_, prefix, _), (_, decode, _) = seen
    for addresses in (prefix, decode):
        caches = [n for n in addresses if n.startswith("present")]
        assert caches and all(addresses[n] == addresses[n.replace("present", "past")] for n in caches)
    shared = set(bundle.manifest.graphs["prefix"].weights)
    assert shared and all(prefix[n] == decode[n] for n in shared)


@pytest.mark.parametrize("piece", [1000, 32 << 20])
def test_weights_are_uploaded_once_whole_and_in_pieces(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    bundle, cuda, _ = opened
    monkeypatch.setattr(cuda_memory, "PIECE", piece)
    engines = open_engines(RTX, bundle)
    stored = bundle.weights()
    assert len(cuda.memory) == len(stored) and cuda.allocated == sum(t.nbytes for t in stored.values())
    assert cuda.log.count("copy in") == sum(-(-t.nbytes // piece) for t in stored.values())
    for name, tensor in stored.items():
        content = ctypes.string_at(engines._weights.addresses[name], tensor.nbytes)
        assert content == tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    assert not cuda.pinned


@pytest.mark.parametrize("name", ["prefix", "decode"])
def test_a_cache_bound_apart_is_a_bug(opened: Opened, name: str) -> None:
    engines, graph = open_engines(RTX, opened[0]), opened[0].manifest.graphs[name]
    tensors = {n: engines.tensor(s) for n, s in {**graph.inputs, **graph.outputs}.items()}
    with pytest.raises(ValueError, match=rf"{name} updates past_key\.0 in place"):
        engines.bind(name, tensors)


def test_tensors_start_as_zeros_keep_what_is_written_and_free_their_memory(opened: Opened) -> None:
    bundle, cuda, _ = opened
    engines = open_engines(RTX, bundle)
    for dtype, value in (("bf16", 1.5), ("fp16", 0.25), ("int64", 7)):
        tensor = engines.tensor(TensorSpec(dtype, (2, 3)))
        assert tensor.read().tolist() == np.zeros((2, 3)).tolist()
        tensor.write(np.full((2, 3), value))
        assert tensor.read().tolist() == np.full((2, 3), value).tolist()
        address = tensor.address
        assert address in cuda.memory
        if dtype == "bf16":
            assert np.frombuffer(cuda.memory[address], np.uint16)[:6].tolist() == [0x3FC0] * 6
        del tensor
        assert address not in cuda.memory


def test_a_row_is_an_address_in_its_tensor_and_takes_another_on_the_device(opened: Opened) -> None:
    """What a slot is on a GPU: prefill's caches, copied into a row of decode's, on the stream, past the host."""
    bundle, cuda, _ = opened
    engines = open_engines(RTX, bundle)
    whole, scratch = (engines.tensor(TensorSpec("bf16", (rows, 2, 3))) for rows in (4, 1))
    row = whole.row(2)
    assert row.spec == scratch.spec and row.address == whole.address + 2 * 2 * 3 * 2
    scratch.write(np.full((1, 2, 3), 1.5))
    before = list(cuda.log)
    row.take(scratch)
    assert cuda.log[len(before) :] == ["copy in"] and cuda.queue  # enqueued, not waited for
    np.testing.assert_array_equal(whole.read()[:, 0, 0], [0, 0, 1.5, 0])
    held = engines._gpu.held
    address = whole.address
    del whole
    assert address in cuda.memory and engines._gpu.held == held - 4 * 2 * 3 * 2  # a row keeps the memory, not the count
    row.write(np.zeros((1, 2, 3)))
    assert not row.read().any()
    del row
    assert address not in cuda.memory


def test_an_engine_that_cannot_be_opened_is_told_in_one_line(opened: Opened) -> None:
    bundle, _, _ = opened
    bundle.path("decode.engine").write_text("of another version")
    engines = open_engines(RTX, bundle)
    assert "cannot open" in str(refusal(lambda: engines.bind("decode", {})))


def test_without_a_driver_engines_are_not_opened(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda.core itself, on a machine that has none."""
    monkeypatch.undo()
    monkeypatch.setattr(cuda.core.Device, "get_all_devices", staticmethod(no_driver))
    error = refusal(lambda: open_engines(RTX, opened[0]))
    assert error.code == Exit.MISSING and "no CUDA driver" in str(error)
    assert all(words in str(error) for words in ("a GPU", "building the engines needed none", "`backend` onnxruntime"))


def no_driver() -> None:
    raise DynamicLibNotFoundError("libcuda.so.1")


def test_without_the_bindings_the_package_is_named(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for name in ("cuda", "cuda.core"):  # imported or not, they are gone
        monkeypatch.setitem(sys.modules, name, None)
    error = refusal(lambda: open_engines(RTX, opened[0]))
    assert error.code == Exit.MISSING and "pip install 'cuda-core" in error.hint


@pytest.mark.parametrize(
    ("cuda", "words"),
    [
        (FakeCuda(9, 0), "SM90"),
        (FakeCuda(7, 5), "SM75"),
        (FakeCuda(count=0), "no CUDA device"),
        (FakeCuda(limit=1), "out of memory"),
    ],
)
def test_a_gpu_that_cannot_do_it_is_told(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, words: str
) -> None:
    monkeypatch.setattr(run, "cuda_core", lambda: cuda)
    error = refusal(lambda: open_engines(RTX, opened[0]))
    assert words in str(error) and error.code == (Exit.FAILURE if cuda.allocated else Exit.MISSING)


@pytest.mark.parametrize("edition", [RTX, DATACENTER])
def test_a_gpu_without_products_of_the_weights_is_told(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, edition: Edition
) -> None:
    """The stand-in is SM89, which has fp8's and not nvfp4's."""

    def held(kind: Kind) -> Bundle:
        quantization = Quantization("random", {"w": QuantisedWeight(kind, 16, error=0.1)})
        return Bundle(opened[0].folder, replace(opened[0].manifest, quantization=quantization))

    error = refusal(lambda: open_engines(edition, held("nvfp4")))
    assert "no products of nvfp4 weights" in str(error) and "SM89; it runs on SM100 and later" in error.details
    assert error.code == Exit.MISSING
    assert open_engines(RTX, held("fp8")).device
    assert [first_capability(kinds) for kinds in ([], ["int4"], ["int4", "nvfp4"])] == [0, 80, 100]


@pytest.mark.parametrize(
    ("flag", "words", "hint"),
    [
        ("VERSION_MISMATCH", "it was built by version 9.9, this is 0", "or install tensorrt-rtx 9.9"),
        ("UNSUPPORTED_CC", "not built for this GPU, SM89", "export again"),
        ("OLD_CUDA_DRIVER", "driver is too old", "update"),
        ("OLD_CUDA_RUNTIME", "runtime is too old", "update"),
        ("INSUFFICIENT_GPU_MEMORY", "too little memory", "`batch`"),
        ("MALFORMED_ENGINE", "damaged", "export again"),
        ("CUDA_ERROR", "CUDA's driver or runtime", "nvidia-smi"),
    ],
)
def test_an_engine_that_cannot_run_here_is_told_before_it_is_loaded(
    opened: Opened, flag: str, words: str, hint: str
) -> None:
    bundle, cuda, _ = opened
    api = RTX.api()
    bundle.manifest.toolchain["tensorrt-rtx"] = "9.9"  # type: ignore[index]
    diagnostics = int(getattr(api.EngineInvalidityDiagnostics, flag))
    api.runtime.get_engine_validity = lambda engine: (api.EngineValidity.INVALID, diagnostics)
    error = refusal(lambda: open_engines(RTX, bundle))
    assert words in str(error) and "prefix.engine" in str(error) and hint in error.hint
    assert not cuda.memory  # before its weights are uploaded, too
    assert set(run._INVALID) == set(api.EngineInvalidityDiagnostics.__members__)


def test_tensorrt_rtx_itself_tells_a_damaged_engine(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    runtime = RTX.api().Runtime(log_of(RTX))
    error = refusal(lambda: run.check_engines(RTX, opened[0], runtime, 89))
    assert "it is no engine, or damaged" in str(error)


def test_an_engine_that_is_invalid_for_no_given_reason_tells_the_log(opened: Opened) -> None:
    api = RTX.api()

    def validity(engine: bytes) -> tuple[object, int]:
        log_of(RTX).errors.append("CUDA {is} old")
        return api.EngineValidity.INVALID, 0

    api.runtime.get_engine_validity = validity
    assert "CUDA {is} old" in str(refusal(lambda: open_engines(RTX, opened[0])))


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        ({"tensorrt": "11.3"}, "built by version 11.3, this is 0"),
        ({"tensorrt": "0", "tensorrt gpu": "9.0"}, "built for SM90, this GPU is SM89"),
        ({"tensorrt gpu": "SM80"}, "built for SM80, this GPU is SM89"),
        ({"platform": "Plan9-4"}, "built on Plan9, this is"),
        ({"tensorrt": "0", "tensorrt gpu": "SM89"}, ""),
        ({}, ""),
    ],
)
def test_tensorrt_runs_engines_of_its_own_version_and_gpu_only(
    opened: Opened, recorded: dict[str, str], words: str
) -> None:
    bundle = opened[0]
    bundle.manifest.engines["tensorrt"] = bundle.manifest.engines["tensorrt-rtx"]  # type: ignore[index]
    bundle.manifest.toolchain.update(recorded)  # type: ignore[attr-defined]
    log_of(DATACENTER)
    del RTX.api().runtime.get_engine_validity, RTX.api().runtime.engine_header_size
    if not words:
        assert open_engines(DATACENTER, bundle).device
        return
    assert words in str(refusal(lambda: open_engines(DATACENTER, bundle)))


def test_an_empty_or_missing_engine_is_told(opened: Opened) -> None:
    path = opened[0].path("decode.engine")
    path.write_bytes(b"")
    assert "decode.engine is empty" in str(refusal(lambda: open_engines(RTX, opened[0])))
    path.unlink()
    assert "No such file" in str(refusal(lambda: open_engines(RTX, opened[0])))


def test_an_engine_with_the_plugin_has_it_registered_before_it_is_loaded(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, order = opened[0], list[str]()
    load = RTX.api().runtime.deserialize_cuda_engine
    monkeypatch.setattr(plugin, "register", lambda: order.append("register"))
    RTX.api().runtime.deserialize_cuda_engine = lambda engine: order.append("load") or load(engine)
    records = bundle.manifest.engines["tensorrt-rtx"]
    for gather, expected in (("ops", ["load"]), ("plugin", ["register", "load"])):
        order.clear()
        records["decode"] = EngineRecord("decode.engine", 0.1, gather)  # type: ignore[index]
        engines = open_engines(RTX, bundle)
        first = engines._engine("decode")
        assert engines._engine("decode") is first and order == expected


def test_device_memory_is_counted_as_long_as_it_is_held(opened: Opened) -> None:
    engines, runs, doors = bound(opened)
    weights = sum(t.nbytes for t in opened[0].weights().values())
    assert engines.memory_bytes() == opened[1].allocated + 2 * (1000 + 50)
    runs.clear()
    doors.clear()
    assert engines.memory_bytes() == weights + 2 * 50
