"""The ONNX files of a bundle are ordinary ones: any reader finds their weights in the safetensors files beside them."""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from commands import Workshop
from safetensors.numpy import load_file
from tiny import make_inputs

from himap_export.engines.bundle import Bundle
from himap_export.validate.reference.criteria import reference_himap

GRAPHS = ("vision", "prefix", "k1", "k2", "decode")
CUTS = reference_himap(2, 4, 0.5, 0.75)
KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "one-file": ("gqa2", ()),
    "sharded": ("sharded", ()),
    "tied": ("tied", ()),
    "converted": ("biased", ("--dtype", "fp16")),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bundle(work: Workshop, kind: str) -> Path:
    name, flags = KINDS[kind]
    return work.bundle(name, *flags, cuts=CUTS)


@pytest.fixture
def elsewhere(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The graphs and weights alone, moved, seen from a third folder: nothing may hang on where an export happened."""
    moved = tmp_path / "moved"
    shutil.copytree(bundle, moved, ignore=lambda _, names: [n for n in names if n.endswith(".json")])
    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    return moved


def cpu_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_five_graphs_of_opset_24(bundle: Path) -> None:
    assert sorted(path.stem for path in bundle.glob("*.onnx")) == sorted(GRAPHS)
    for name in GRAPHS:
        model = onnx.load(bundle / f"{name}.onnx", load_external_data=False)
        assert {entry.domain: entry.version for entry in model.opset_import}[""] == 24
        assert {entry.domain for entry in model.opset_import} <= {"", "himap"}
        assert model.ir_version == 12
        onnx.checker.check_model(bundle / f"{name}.onnx", full_check=True)
        gathers = [node.op_type for node in model.graph.node if node.domain == "himap"]
        assert gathers == (["TopKGather"] if name in ("k1", "k2") else [])
        assert [(f.domain, f.name) for f in model.functions] == [("himap", kind) for kind in gathers]


def test_onnx_finds_every_weight_and_it_is_the_checkpoints(bundle: Path, elsewhere: Path) -> None:
    """Each weight once, in safetensors files that its own library reads; nothing of size inside the graphs."""
    manifest = Bundle.open(bundle).manifest
    stored = {name: array for file in manifest.weights for name, array in load_file(elsewhere / file).items()}
    for name in GRAPHS:
        bare = onnx.load(elsewhere / f"{name}.onnx", load_external_data=False)
        outside = [t for t in bare.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        inside = [t for t in bare.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert sum(t.ByteSize() for t in inside) < 4000
        assert sorted(t.name for t in outside) == sorted(manifest.graphs[name].weights) != []
        entries = [entry for t in outside for entry in t.external_data]
        assert {entry.value for entry in entries if entry.key == "location"} <= set(manifest.weights)
        full = onnx.load(elsewhere / f"{name}.onnx")
        assert stored.keys() >= {t.name for t in outside}
        for tensor in full.graph.initializer:
            if tensor.name in stored:
                np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), stored[tensor.name])
        onnx.checker.check_model(elsewhere / f"{name}.onnx", full_check=True)
    for file in manifest.weights:
        assert not (bundle / file).is_symlink() and (bundle / file).is_file()


def test_onnxruntime_opens_each_file_by_its_path_and_gives_the_pipelines_numbers(
    work: Workshop, kind: str, bundle: Path, elsewhere: Path
) -> None:
    """No weight passed in, no code of ours: graph by graph on what the pipeline fed it."""
    inputs = make_inputs(work.tiny(KINDS[kind][0]), [9], [5])
    pipeline = work.pipeline(bundle)
    pipeline.prefill(inputs.input_ids, inputs.pixel_values)
    for name in GRAPHS[:-1]:
        session = cpu_session(elsewhere / f"{name}.onnx")
        graph = pipeline.spec.graph(name)
        ports = {**graph.inputs, **graph.outputs}
        held = {n: pipeline.tensors[port.place].read() for n, port in ports.items()}
        outputs = session.run(None, {i.name: held[i.name] for i in session.get_inputs()})
        for output, found in zip(session.get_outputs(), outputs, strict=True):
            wanted = held[output.name]
            if found.dtype == np.float16:  # another session may fuse otherwise: a few roundings of the largest number
                np.testing.assert_allclose(found, wanted, rtol=0, atol=8 * 2**-11 * np.abs(wanted).max())
            else:
                np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    decode = cpu_session(elsewhere / "decode.onnx")
    caches = pipeline.spec.graph("decode").inputs.items()
    feeds = {name: pipeline.read(port.role, port.layer) for name, port in caches if port.layer is not None}
    step = {"input_ids": np.array([[9]]), "position_ids": np.array([[inputs.input_ids.shape[1]]])}
    (logits,) = decode.run(["logits"], feeds | step)
    wanted = pipeline.step(np.array([9]), np.array([inputs.input_ids.shape[1]]))
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-3 if pipeline.manifest.dtype == "fp32" else 0.05)


@pytest.mark.parametrize("kind", ["one-file"], indirect=True)
def test_polygraphy_reads_every_graph(elsewhere: Path) -> None:
    script = Path(sys.executable).with_name("polygraphy")
    for name in GRAPHS:
        command = [str(script), "inspect", "model", str(elsewhere / f"{name}.onnx"), "--show", "layers"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert f"Name: {name} | ONNX Opset: 24" in done.stdout
        assert ("TopKGather" in done.stdout) == (name in ("k1", "k2"))
