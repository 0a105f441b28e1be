"""The gather's plugin inside real engines of TensorRT-RTX, built without a GPU, and what it does when it runs."""

import gc
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda.core
import pytest
import tensorrt_rtx as trt
from cuda_stand_ins import CUDAError, checked, like
from unsealed import NEW, PRUNED, SPEC, WHOLE, T, V, staged, unsealed

from himap_export.engines.backends import build_all, onnxruntime, tensorrt_rtx
from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import EngineRecord
from himap_export.engines.plugin import ptx
from himap_export.engines.plugin import tensorrt_rtx as plugin
from himap_export.engines.plugin.ptx import GatherKernel, GatherShape, compile_gather
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import TokenBudget

BUDGET = TokenBudget(PRUNED.kept(V), T, NEW)


@pytest.fixture(scope="module", params=["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Any]:
    model = staged(request.param)
    bundle = unsealed(tmp_path_factory.mktemp("plugin") / "work", model, model.graphs())
    return bundle, build_all("tensorrt-rtx", bundle, list(bundle.manifest.graphs), "plugin")


def test_engines_hold_the_plugin_and_its_kernel(built: tuple[Bundle, dict[str, EngineRecord]]) -> None:
    bundle, records = built
    assert {name: r.gather for name, r in records.items()} == {
        "prefix": "none", "k1": "plugin", "k2": "plugin", "decode": "none"
    }  # fmt: skip
    for stage, name in enumerate(("prefix", "k1", "k2")):
        engine = bundle.path(records[name].file).read_bytes()
        assert ("1x PLUGIN_V3" in records[name].layers) == (stage > 0)
        if stage > 0:
            before, after = BUDGET.total[stage - 1 : stage + 1]
            kernel = compile_gather(GatherShape(1, before, after, SPEC.hidden, bundle.manifest.dtype))
            assert kernel.ptx.encode() in engine
            gathers = [k for k in records[name].kernels if "TopKGather" in k]
            assert gathers == ["1x custom_layer (TopKGather)"]


def test_the_same_file_gives_standard_operators_where_no_plugin_is_asked_for(
    built: tuple[Bundle, dict[str, EngineRecord]],
) -> None:
    bundle, _ = built
    for gather in ("auto", "ops"):
        record = build_all("tensorrt-rtx", bundle, ["k1"], gather)["k1"]  # type: ignore[arg-type]
        assert record.gather == "ops" and not any("PLUGIN" in layer for layer in record.layers)


def test_a_cut_that_removes_nothing_needs_no_plugin(tmp_path: Path) -> None:
    whole = staged("fp16", WHOLE)
    bundle = unsealed(tmp_path / "work", whole, (whole.stage(1),))
    assert build_all("tensorrt-rtx", bundle, ["k1"], "plugin")["k1"].gather == "none"


def test_a_plugin_asked_for_and_not_taken_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = staged("fp16")
    bundle = unsealed(tmp_path / "work", model, (model.stage(1),))
    monkeypatch.setattr(plugin, "register", lambda: None)
    monkeypatch.setattr(plugin, "check_library", lambda: None)
    with pytest.raises(HimapError, match="did not take the gather as plugin: the engine of k1 holds its standard"):
        tensorrt_rtx.build(bundle, "k1", "plugin")


def test_without_the_parsers_library_the_process_is_not_aborted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: no link was made for it before it started."""
    model = staged("fp16")
    bundle = unsealed(tmp_path / "work", model, (model.stage(1),))
    monkeypatch.setattr(plugin, "_libraries", lambda: tmp_path)
    with pytest.raises(HimapError) as caught:
        tensorrt_rtx.build(bundle, "k1", "plugin")
    assert caught.value.code == Exit.MISSING and "LD_LIBRARY_PATH" in caught.value.hint
    assert plugin.link_library(tmp_path) == {"LD_LIBRARY_PATH": str(tmp_path)}
    assert (tmp_path / "libtensorrt_rtx.so").readlink() == tmp_path / "libtensorrt_rtx.so.1"


def test_who_cannot_have_a_plugin_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HimapError, match="onnxruntime has no plugins"):
        onnxruntime.check("fp32", "plugin")
    tensorrt_rtx.check("fp16", "plugin")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(ptx, "find_spec", lambda name: None)
    with pytest.raises(HimapError, match="triton") as caught:
        tensorrt_rtx.check("fp16", "plugin")
    assert caught.value.code == Exit.MISSING


class FakeCore(SimpleNamespace):
    """A cuda.core that writes down what it is asked to do, in calls that its own signatures take.

    `fails`: the call that goes wrong."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

        def call(name: str, value: object, *arguments: Any) -> Any:
            self.calls.append((name, arguments))
            if name == fails:
                raise CUDAError("CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image")
            return value

        @like(cuda.core.ObjectCode)
        class ObjectCode:
            @staticmethod
            def from_ptx(module: bytes, *, name: str = "", symbol_mapping: Any = None) -> "ObjectCode":
                call("from_ptx", None, module)
                return ObjectCode()

            def get_kernel(self, name: str) -> Any:
                return call("get_kernel", "kernel", name)

        self.ObjectCode, self.LaunchConfig = ObjectCode, cuda.core.LaunchConfig
        self.Stream = SimpleNamespace(from_handle=checked(lambda handle: handle, cuda.core.Stream.from_handle))
        self.launch = checked(lambda *given: call("launch", None, *given), cuda.core.launch)


def loaded(kernel: GatherKernel, keep: int) -> Any:
    """The plugin as TensorRT-RTX makes it when it loads an engine: from the fields that were stored."""
    built = plugin._plugin_class(trt)(keep, kernel)
    fields = built.get_fields_to_serialize()
    gc.collect()
    made = plugin._creator().create_plugin("gather", fields, trt.TensorRTPhase.RUNTIME)
    return made.attach_to_context(None)


def test_a_loaded_plugin_launches_the_stored_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, core = compile_gather(GatherShape(2, 40, 32, 64, "fp16")), FakeCore()
    monkeypatch.setitem(sys.modules, "cuda.core", core)
    made = loaded(kernel, 32)
    assert made.kernel == kernel and made.keep == 32 and made.num_outputs == 3
    for _ in range(2):
        made.enqueue([], [], [11, 12, 13, 14], [21, 22, 23], 0, 77)
    assert [name for name, _ in core.calls] == ["from_ptx", "get_kernel", "launch", "launch"]
    assert core.calls[0][1] == (kernel.ptx.encode(),) and core.calls[1][1] == ("top_k_gather",)
    stream, config, function, *arguments = core.calls[2][1]
    assert (stream, function) == (77, "kernel") and arguments == [11, 12, 13, 14, 21, 22, 23]
    assert (config.grid, config.block, config.shmem_size) == (kernel.grid, kernel.block, kernel.shared_bytes)


@pytest.mark.parametrize("fails", ["from_ptx", "launch"])
def test_a_kernel_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", FakeCore(fails))
    made = loaded(compile_gather(GatherShape(1, 8, 4, 16, "bf16")), 4)
    with pytest.raises(RuntimeError, match="no kernel image"):
        made.enqueue([], [], [1, 2, 3, 4], [5, 6, 7], 0, 0)


def test_only_the_kernels_types_are_taken() -> None:
    made = plugin._plugin_class(trt)(4)

    def taken(at: int, *dtypes: Any) -> bool:
        tensors = [
            SimpleNamespace(desc=SimpleNamespace(type=dtype, format=trt.TensorFormat.LINEAR))
            for dtype in (
                *dtypes,
                trt.DataType.INT64,
                trt.DataType.INT64,
                dtypes[0],
                *[trt.DataType.INT64] * 2,
            )
        ]
        return bool(made.supports_format_combination(at, tensors, 4))

    half, full = trt.DataType.HALF, trt.DataType.FLOAT
    assert all(taken(at, half, full) for at in range(7)) and all(taken(at, full, full) for at in range(7))
    assert not taken(0, trt.DataType.INT8, full) and not taken(1, half, half)
    assert [field.name for field in plugin._creator().field_names] == ["keep"]
