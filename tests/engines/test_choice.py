"""What an export takes where nothing is asked for, and what it says of a dtype that is slow there."""

import json
from collections.abc import Sequence

import pytest
from commands import ORT, Workshop, call

import himap_export as hx
from himap_export.engines import choice
from himap_export.engines.command import BACKENDS, DEVICES
from himap_export.exporter.cli import main
from himap_export.exporter.planning import Request, plan_export
from himap_export.exporter.registry import resolve
from himap_export.graphs.errors import Exit, HimapError, HimapWarning

EVERYTHING = ("tensorrt", "tensorrt_rtx", "onnxruntime", "openvino")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> "Machine":
    return Machine(monkeypatch)


class Machine:
    """A machine as the table sees it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def has(self, *, gpu: int | None = None, modules: Sequence[str] = (), processor: str = "x86_64") -> None:
        self._patch.setattr(choice, "_capability", lambda: gpu)
        self._patch.setattr(choice, "_installed", lambda module: module in modules)
        self._patch.setattr(choice, "_has_cuda_provider", lambda: "onnxruntime-gpu" in modules)
        self._patch.setattr("platform.machine", lambda: processor)


def test_every_backend_is_in_the_table_and_has_its_devices() -> None:
    assert set(BACKENDS) == set(DEVICES) == {row.backend for row in choice._TABLE}


@pytest.mark.parametrize(
    ("gpu", "modules", "processor", "backend"),
    [
        (90, EVERYTHING, "x86_64", "tensorrt"),
        (89, EVERYTHING[1:], "x86_64", "tensorrt-rtx"),
        (90, EVERYTHING[1:], "x86_64", "openvino"),  # TensorRT-RTX knows no Hopper
        (90, (*EVERYTHING[1:], "onnxruntime-gpu"), "x86_64", "onnxruntime"),
        (None, (*EVERYTHING, "onnxruntime-gpu"), "x86_64", "openvino"),
        (None, EVERYTHING, "AMD64", "openvino"),
        (None, EVERYTHING, "aarch64", "onnxruntime"),
        (None, ("onnxruntime",), "x86_64", "onnxruntime"),
        (None, ("openvino",), "x86_64", "openvino"),
    ],
)
def test_the_best_that_is_installed_and_runs_here(
    machine: Machine, gpu: int | None, modules: tuple[str, ...], processor: str, backend: str
) -> None:
    machine.has(gpu=gpu, modules=modules, processor=processor)
    found = choice.best_backend()
    assert found.backend == backend and found.why


@pytest.mark.parametrize(
    ("modules", "processor", "backend"),
    [
        (("onnxruntime-gpu", *EVERYTHING), "x86_64", "openvino"),
        (("onnxruntime-gpu", *EVERYTHING), "aarch64", "onnxruntime"),
        (("tensorrt", "tensorrt_rtx", "onnxruntime"), "x86_64", "onnxruntime"),
    ],
)
def test_the_best_on_a_cpu_whatever_gpu_is_here(
    machine: Machine, modules: tuple[str, ...], processor: str, backend: str
) -> None:
    machine.has(gpu=89, modules=modules, processor=processor)
    assert choice.best_backend(cpu=True).backend == backend
    machine.has(gpu=89, modules=("tensorrt", "tensorrt_rtx"))
    with pytest.raises(HimapError, match="no backend that runs on this machine"):
        choice.best_backend(cpu=True)


@pytest.mark.parametrize(
    ("flags", "fast"), [({"avx2"}, "fp32"), ({"avx512_bf16"}, "bf16"), ({"amx_fp16", "amx_bf16"}, "bf16")]
)
def test_the_dtype_that_a_cpu_computes_fastest(flags: set[str], fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_cpu_flags", lambda: frozenset(flags))
    assert (choice.fast_dtype("openvino"), choice.fast_dtype("onnxruntime")) == (fast, "fp32")


def test_the_best_that_builds_a_dtype(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.has(modules=("onnxruntime", "openvino"))
    monkeypatch.setattr(choice, "_builds", lambda backend, dtype: (backend, dtype) == ("onnxruntime", "fp16"))
    assert [choice.best_backend(dtype).backend for dtype in (None, "fp16")] == ["openvino", "onnxruntime"]
    assert choice.best_backend("bf16").backend == "openvino"  # none: the best one says why
    monkeypatch.undo()
    assert choice._builds("onnxruntime", "fp32") and not choice._builds("onnxruntime", "bf16")


@pytest.mark.parametrize("modules", [(), ("tensorrt", "tensorrt_rtx")])
def test_nothing_that_runs_here(machine: Machine, modules: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    machine.has(modules=modules)
    assert call(main, "llava-7b", "--dry-run") == Exit.MISSING
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "--backend" in err
    assert all(extra in err for extra in ("himap-export[onnxruntime]", "openvino", "tensorrt-rtx", "tensorrt"))
    assert call(main, "llava-7b", "--dry-run", "--backend", "tensorrt-rtx") == 0


def test_this_machine_is_asked_what_it_has() -> None:
    """No stand-ins: onnxruntime is installed wherever the tests run."""
    assert choice._installed("onnxruntime") and not choice._installed("no_such_module")
    assert choice.best_backend().backend in BACKENDS
    assert choice._capability() is None or choice._capability() in range(50, 200)


def test_the_plan_says_what_was_taken_and_why(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.has(modules=("onnxruntime",))
    assert call(main, "llava-7b", "--dry-run", "--dtype", "fp32") == 0
    assert "engines for onnxruntime (installed, and runs on any CPU)\n" in capsys.readouterr().out
    assert call(main, "llava-7b", "--dry-run", "--dtype", "fp32", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["backends"], found["backend_chosen_because"]) == (["onnxruntime"], "installed, and runs on any CPU")
    assert call(main, "llava-7b", "--dry-run", "--dtype", "fp32", "--json", *ORT) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["backends"], found["backend_chosen_because"]) == (["onnxruntime"], None)


@pytest.mark.parametrize(("flags", "warned"), [((), True), (("--dtype", "fp32"), False)])
def test_a_slow_dtype_is_told_before_the_work(
    machine: Machine, flags: tuple[str, ...], warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.has(modules=EVERYTHING)
    assert call(main, "llava-7b", "--dry-run", *ORT, *flags) == 0
    err = capsys.readouterr().err
    assert bool(err) == warned
    assert not warned or (
        "parity only" in err
        and "--dtype fp32 or --backend openvino with another --dtype" in err
        and err.count("\n") == 1
    )


def test_a_slow_dtype_is_told_to_callers(
    machine: Machine, work: Workshop, tmp_path_factory: pytest.TempPathFactory
) -> None:
    machine.has(modules=EVERYTHING)
    out = tmp_path_factory.mktemp("slow") / "bundle"
    plan = {"k1": 2, "k2": 4, "text_budget": 24, "backend": "onnxruntime"}
    with pytest.warns(HimapWarning, match="`dtype` fp32 or `backend` openvino"):
        hx.export(work.checkpoint("half"), out=out, **plan)  # type: ignore[arg-type]
    assert hx.Bundle.open(out).manifest.dtype == "fp16"


def test_no_dtype_is_slow_where_a_gpu_computes_it(machine: Machine) -> None:
    machine.has(modules=("onnxruntime", "onnxruntime-gpu"))
    assert choice.slow_dtype(("onnxruntime",), "fp16") == ""
    machine.has(modules=("onnxruntime",))
    assert choice.slow_dtype(("tensorrt-rtx",), "fp16") == choice.slow_dtype(("onnxruntime",), "fp32") == ""


@pytest.mark.parametrize(
    ("flags", "fast"), [({"avx2"}, "fp32"), ({"avx512_fp16", "amx_bf16"}, "bf16"), ({"amx_fp16", "amx_bf16"}, "")]
)
def test_fp16_is_slow_on_cpus_without_tiles_of_it(flags: set[str], fast: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_cpu_flags", lambda: frozenset(flags))
    told = choice.slow_dtype(("openvino",), "fp16")
    assert (f"`dtype` {fast} is fast there" in told) if fast else told == ""
    assert choice.slow_dtype(("openvino",), "bf16") == choice.slow_dtype(("openvino",), "fp32") == ""


def test_weights_go_in_the_dtype_that_a_backend_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that refuses a dtype gets what holds all of it: no fp16 weight becomes bf16, none of bf16 fp16."""
    from himap_export.engines.backends import onnxruntime

    refused: set[str] = set()

    def check(dtype: str, gather: str) -> None:
        if dtype in refused:
            raise HimapError(f"no {dtype} here", code=Exit.USAGE)

    monkeypatch.setattr(onnxruntime, "check", check)
    asked = Request(backends=("onnxruntime",))
    for name, stored in (("llava-7b", "fp16"), ("qwen3-vl-2b", "bf16")):
        model = resolve(name, weights=False)
        refused.clear()
        assert plan_export(model, asked).dtype == stored
        refused |= {"fp16", "bf16"}
        assert plan_export(model, asked).dtype == "fp32"
