"""The onnxruntime backend's devices and threads. There is no GPU here: device memory is the CPU's, all else is real."""

import json
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from commands import Workshop, call, save_inputs
from msgspec import structs
from tiny import make_inputs

from himap_export.engines import backends
from himap_export.engines.answer import STEADY
from himap_export.engines.backends import Opening, build_all, onnxruntime
from himap_export.engines.bundle import Bundle
from himap_export.engines.cli import main as run_main
from himap_export.engines.pipeline import Pipeline
from himap_export.engines.scratch import scratch_place
from himap_export.engines.session import open_pipeline
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.flops import stage_costs
from himap_export.graphs.ports import Place
from himap_export.validate.reference.criteria import reference_himap

CUTS = reference_himap(1, 3, 0.5, 0.75)


def owned(array: Any) -> Any:
    """As `ortvalue_from_numpy(array, "cuda", 0)`: a copy in memory that the value owns."""
    value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, "cpu", 0)
    value.update_inplace(np.ascontiguousarray(array))
    return value


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """A machine whose onnxruntime has a CUDA provider, played by the CPU's; the addresses of its device's memory."""
    addresses = set[int]()

    def on_device(array: npt.NDArray[Any]) -> Any:
        addresses.add((value := owned(array)).data_ptr())
        return value

    monkeypatch.setattr(onnxruntime, "_on_device", on_device)
    monkeypatch.setitem(onnxruntime._PROVIDERS, "cuda", "CPUExecutionProvider")
    return addresses


def test_sessions_refuse_memory_that_a_value_owns() -> None:
    """Why weights on a device are borrowed: should this ever pass, `_borrowed` can go."""
    value = owned(np.ones((2, 3), np.float16))
    with pytest.raises(Exception, match="must be owned by the user"):
        ort.SessionOptions().add_initializer("w", value)
    borrowed = onnxruntime._borrowed(value)
    ort.SessionOptions().add_initializer("w", borrowed)
    assert borrowed.data_ptr() == value.data_ptr()


@pytest.mark.filterwarnings("ignore:Duplicate provider")  # the CPU's, which plays both
@pytest.mark.parametrize("form", [(), ("--weight-form", "embedded")])
def test_device_tensors_and_weights_give_the_same_answers(work: Workshop, gpu: set[int], form: tuple[str, ...]) -> None:
    bundle, inputs = work.bundle("gqa2", *form, cuts=CUTS), make_inputs(work.tiny("gqa2"), [9], [5])
    pipelines = [
        Pipeline(Bundle.open(bundle).select(), "onnxruntime", Opening(1, device)) for device in ("cpu", "cuda")
    ]
    assert pipelines[1].engines.device == "cuda"
    logits = [cast(onnxruntime.OrtTensor, pipeline.tensors[Place("logits")]) for pipeline in pipelines]
    assert [tensor.value.data_ptr() in gpu for tensor in logits] == [False, True]
    results = []
    for pipeline in pipelines:
        prefilled, layout = pipeline.prefill(inputs.input_ids, inputs.pixel_values)
        results.append((prefilled.logits, np.stack(list(pipeline.generate(prefilled, layout, 8)))))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_the_gpu_is_taken_where_there_is_one(gpu: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [onnxruntime._device(asked) for asked in (None, "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    monkeypatch.undo()
    assert onnxruntime._device(None) == "cpu"
    with pytest.raises(HimapError, match="no CUDA provider") as caught:
        onnxruntime._device("cuda")
    assert caught.value.code == Exit.MISSING


def test_asked_for_a_gpu_that_is_not_there_it_leaves_with_4(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_inputs(tmp_path / "in.npz", make_inputs(work.tiny("gqa2"), [9], [5]))
    assert call(run_main, work.bundle("gqa2", cuts=CUTS), "--load-inputs", file, "--device", "cuda") == 4
    assert "no CUDA provider" in capsys.readouterr().err


@dataclass(frozen=True)
class Node:
    """As onnxruntime tells where a node runs."""

    op_type: str
    name: str
    domain: str = ""


@dataclass(frozen=True)
class Part:
    ep_name: str
    nodes: list[Node]

    def get_nodes(self) -> list[Node]:
        return self.nodes


@dataclass(frozen=True)
class Session:
    parts: list[Part]

    def get_provider_graph_assignment_info(self) -> list[Part]:
        return self.parts


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_a_session_tells_where_its_nodes_run(work: Workshop, gpu: set[int]) -> None:
    """The real one: should a version of onnxruntime stop telling, this is where it shows."""
    bundle = Bundle.open(work.bundle("gqa2", cuts=CUTS))
    weights = onnxruntime._values(bundle.weights(), "cuda")
    session = onnxruntime._session(bundle, "k1", "k1.onnx", weights, Opening(1), "cuda")
    parts = session.get_provider_graph_assignment_info()
    nodes = [node for part in parts for node in part.get_nodes()]
    assert {part.ep_name for part in parts} == {CPU} and {"Attention", "Gemm"} <= {node.op_type for node in nodes}
    assert onnxruntime._elsewhere(session, CPU) == ""
    told = onnxruntime._elsewhere(session, CUDA)
    assert told.startswith(f"{len(nodes)} of {len(nodes)} nodes, {nodes[0].op_type} {nodes[0].name}")
    assert len(told) < 600 and "\n" not in told


def test_nodes_that_a_gpu_leaves_to_the_cpu_are_named() -> None:
    parts = [
        Part(CUDA, [Node("Gemm", "a"), Node("Gemm", "b")]),
        Part(CPU, [Node("TopK", "rank"), Node("Gather", "")]),
        Part(CUDA, [Node("Add", "c")]),
    ]
    assert onnxruntime._elsewhere(Session(parts), CUDA) == "2 of 5 nodes, TopK rank, Gather"
    assert onnxruntime._elsewhere(Session(parts[::2]), CUDA) == ""
    many = Session([Part(CPU, [Node("Gather", f"layer.{n}") for n in range(1000)])])
    assert onnxruntime._elsewhere(many, CUDA).startswith("1000 of 1000 nodes, Gather layer.0, Gather layer.1")


@pytest.mark.filterwarnings("ignore:Duplicate provider")
def test_they_are_told_when_a_gpu_session_opens(
    work: Workshop, gpu: set[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxruntime, "_elsewhere", lambda session, provider: "2 of 5 nodes, TopK rank, Gather")
    Pipeline(Bundle.open(work.bundle("gqa2", cuts=CUTS)).select(), "onnxruntime", Opening(1, "cuda"))
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("onnxruntime: ")]
    assert said.out == "" and len(lines) == 5  # one for each graph
    assert "onnxruntime: k1 runs partly on the CPU: 2 of 5 nodes, TopK rank, Gather" in lines


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_nobody_starts_threads_without_end(threads: int) -> None:
    with pytest.raises(HimapError, match=f"cannot use {threads} threads: expected 1 to") as caught:
        Opening(threads)
    assert caught.value.code == Exit.USAGE


def test_a_build_leaves_its_temporary_folder_where_leftovers_are_cleared(
    work: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(onnxruntime, "environment", lambda gather, scratch: seen.append(scratch))
    assert build_all("onnxruntime", Bundle.open(work.bundle("gqa2", cuts=CUTS)), [], "auto") == {}
    assert scratch_place() in seen[0].parents and not seen[0].exists()


def test_threads_are_as_many_as_gain_anything(work: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    bundle = Bundle.open(work.bundle("gqa2", cuts=CUTS))
    assert Opening().cpu_threads(bundle) == 1
    assert Opening(threads=3).cpu_threads(bundle) == 3
    m = bundle.manifest
    flops = sum(c.flops for c in stage_costs(m.decoder, m.variants[0].plan, m.variants[0].budget, m.dtype))
    for worth, threads in ((flops // 2, 2), (flops // 200, 64)):
        monkeypatch.setattr(backends, "WORTH_A_THREAD", worth)
        assert Opening().cpu_threads(bundle) == threads


def test_idle_threads_of_one_graph_leave_the_cores_to_the_next(work: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[ort.SessionOptions] = []
    run, real = Bundle.open(work.bundle("gqa2", cuts=CUTS)).select(), ort.InferenceSession
    monkeypatch.setattr(
        ort, "InferenceSession", lambda path, options, **more: opened.append(options) or real(path, options, **more)
    )
    Pipeline(run, "onnxruntime", Opening(threads=2))
    assert len(opened) == 5 and {options.intra_op_num_threads for options in opened} == {2}
    assert {options.get_session_config_entry("session.force_spinning_stop") for options in opened} == {"1"}


@pytest.mark.parametrize(("backend", "device"), [("onnxruntime", "npu"), ("tensorrt-rtx", "cpu"), ("tensorrt", "gpu")])
def test_a_device_that_is_none_of_the_backends(work: Workshop, backend: str, device: str) -> None:
    bundle = Bundle.open(work.bundle("gqa2", cuts=CUTS))
    with pytest.raises(HimapError, match=f"{backend} does not run on `device` {device}: it runs on c") as refused:
        backends.open_backend(backend, bundle, Opening(device=device))
    assert refused.value.code == Exit.USAGE


def test_the_first_backend_that_knows_the_device_is_opened(work: Workshop) -> None:
    bundle = Bundle.open(work.bundle("gqa2", cuts=CUTS))
    engines = {"tensorrt-rtx": bundle.manifest.engines["onnxruntime"], **bundle.manifest.engines}
    found = replace(bundle, manifest=structs.replace(bundle.manifest, engines=engines)).select()
    with warnings.catch_warnings(action="error"):  # of a backend that was tried in vain
        pipeline = open_pipeline(found, opening=Opening(1, "cpu"))
    assert pipeline.backend == "onnxruntime"
    with pytest.raises(HimapError, match="tensorrt-rtx does not run on `device` gpu") as refused:
        open_pipeline(found, opening=Opening(1, "gpu"))
    assert refused.value.code == Exit.USAGE


@pytest.mark.parametrize(("new", "told"), [(STEADY, False), (STEADY + 1, True)])
def test_a_rate_is_told_of_eight_steps_or_more(
    work: Workshop, new: int, told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first token is prefill's: `new` tokens take a step less."""
    bundle = work.bundle("gqa2", cuts=CUTS)
    inputs = save_inputs(tmp_path / "in.npz", make_inputs(work.tiny("gqa2"), [9], [5], seed=1))
    asked = (bundle, "--load-inputs", inputs, "--max-new-tokens", new, "--threads", 1)
    capsys.readouterr()
    assert call(run_main, *asked, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["tokens"][0]) == new and (found["tokens_per_s"] is not None) == told
    assert call(run_main, *asked) == 0
    out, err = capsys.readouterr()
    assert not out and ("tokens/s" in err) == told and (f", {new} tokens," in err) != told
