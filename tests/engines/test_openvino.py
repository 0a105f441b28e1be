"""The OpenVINO backend itself: its rules, caches and workarounds, and what it says of what it cannot use."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import pytest
from commands import OPENVINO, ORT, Workshop, blocked_python, call, save_inputs
from msgspec import structs
from tiny import make_inputs

from himap_export.engines.backends import openvino as backend
from himap_export.engines.bundle import Bundle
from himap_export.engines.cli import main as run_main
from himap_export.engines.extras import required
from himap_export.engines.manifest import finalised, manifest_json
from himap_export.engines.openvino import run
from himap_export.engines.openvino.run import Compiler, OvTensor
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import Place
from himap_export.validate.reference.criteria import reference_himap

CUTS, NEW = reference_himap(2, 4, 0.5, 0.75), 12
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def bundle(work: Workshop) -> Path:
    """On both backends: where one does not open, it is not the other that answers."""
    budgets = ("--batch", 2, "--text-budget", 16, "--max-new-tokens", NEW)
    return work.bundle("gqa2", *OPENVINO, *ORT, *budgets, cuts=CUTS)


@pytest.fixture
def inputs(work: Workshop, tmp_path: Path) -> Path:
    return save_inputs(tmp_path / "in.npz", make_inputs(work.tiny("gqa2"), [9, 3], [5, 1]))


# --- caches ---


def test_caches_are_one_memory_that_a_step_changes_in_one_slot(work: Workshop, bundle: Path) -> None:
    """Prefill fills a cache's head and leaves zeros behind it, whatever was there; decode appends a token a sample."""
    pipeline = work.pipeline(bundle, "openvino")
    caches = {place: cast(OvTensor, t) for place, t in pipeline.tensors.items() if place.role in ("key", "value")}
    addresses = {place: t.value.data.ctypes.data for place, t in caches.items()}
    for tensor in caches.values():
        tensor.write(np.full(tensor.spec.shape, 7, np.float32))
    inputs = make_inputs(work.tiny("gqa2"), [9, 3], [5, 1])
    prefilled, layout = pipeline.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
    assert len(caches) == 2 * work.tiny("gqa2").layers and len(set(layout.lengths.tolist())) == 2
    stages, removed = (range(2), range(2, 4), range(4, 6)), (0, 8, 14)
    before = {place: t.read() for place, t in caches.items()}
    for layers, total in zip(stages, pipeline.spec.budget.total, strict=True):
        for at in (Place(what, i) for i in layers for what in ("key", "value")):
            assert not before[at][:, :, total:].any() and before[at].shape[2] == total + NEW
            assert before[at][:, :, :total].any(axis=(1, 3)).all()
    tokens = pipeline.generate(prefilled, layout, 3)
    next(tokens), next(tokens)
    for layers, gone in zip(stages, removed, strict=True):
        for at in (Place(what, i) for i in layers for what in ("key", "value")):
            changed = np.argwhere((caches[at].read() != before[at]).any(axis=(1, 3)))
            slots = [[sample, length - gone] for sample, length in enumerate(layout.lengths)]
            assert changed.tolist() == slots  # over its first padding
    assert {place: t.value.data.ctypes.data for place, t in caches.items()} == addresses


def test_decode_reads_the_memory_that_prefill_wrote(work: Workshop, bundle: Path) -> None:
    """No copy in between: what is written into the tensor between two steps is what the next one attends to."""
    pipeline = work.pipeline(bundle, "openvino")
    inputs = make_inputs(work.tiny("gqa2"), [9, 3], [5, 1])
    _, layout = pipeline.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
    once, again = (pipeline.step(np.array([9, 9]), layout.lengths) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    cast(OvTensor, pipeline.tensors[Place("value", 3)]).view[0] *= 2
    changed = pipeline.step(np.array([9, 9]), layout.lengths)
    assert np.abs(changed[0] - once[0]).max() > 1e-3
    np.testing.assert_array_equal(changed[1], once[1])


# --- threads ---


def test_threads_are_tied_to_cores_only_where_they_take_all(bundle: Path) -> None:
    """Two processes of one thread each would share the first core, and leave the second idle."""
    cores = len(os.sched_getaffinity(0))
    for threads in {1, cores}:
        compiler = Compiler("cpu", "fp32", threads)
        model = compiler.compile(compiler.read(bundle / "k1.openvino.onnx"))
        assert model.get_property("ENABLE_CPU_PINNING") == (threads == cores)


# --- canaries: when a workaround can go ---


def test_openvino_still_reads_no_tensor_scatter(bundle: Path) -> None:
    """Should it: see whether its own appends work in place; then rule 1 and the appends outside the graph can go."""
    onnx_frontend = required("openvino.frontend").FrontEndManager().load_by_framework("onnx")
    with pytest.raises(Exception, match=r"No conversion rule found for operations: .*TensorScatter"):
        onnx_frontend.convert(onnx_frontend.load(str(bundle / "decode.openvino.onnx")))


def test_openvino_still_reads_no_functions_of_a_models_own(bundle: Path) -> None:
    """Should it: engines are the bundle's own ONNX files, as onnxruntime's are."""
    with pytest.raises(HimapError, match=r"No conversion rule found for operations: himap\.TopKGather"):
        Compiler("cpu", "fp32", 1).read(bundle / "k1.onnx")


def test_openvino_still_has_no_integers_of_64_bits() -> None:
    """Should it: `random_score` may multiply as it likes."""
    ov, op = required("openvino"), required("openvino.opset15")
    x = op.parameter([1], np.int64)
    made = ov.Core().compile_model(ov.Model([op.multiply(x, x)], [x]), "CPU")
    assert made([np.array([2**31])])[0].tolist() != [2**62]


# --- what is missing ---


def refused(capsys: Capture, code: Exit, words: str, main: Callable[[list[str]], object], *arguments: object) -> None:
    """The command leaves with `code` and says `words` in its one line of error."""
    capsys.readouterr()
    assert call(main, *arguments) == code
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "not verified" not in line]
    assert len(lines) == 1 and "error: " in lines[0] and words in lines[0] and not said.out, said.err


def exported(work: Workshop, out: Path, *flags: object) -> tuple[object, ...]:
    return (export_main, work.checkpoint("gqa2"), *OPENVINO, "--k2", 4, "--json", *flags, "--out", out)


@pytest.mark.parametrize("age", ["absent", "old"])
def test_openvino_missing_or_too_old(
    work: Workshop,
    bundle: Path,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    age: str,
) -> None:
    if age == "absent":
        monkeypatch.setitem(sys.modules, "openvino", None)
        words = "openvino is not installed (pip install 'himap-export[openvino]'; in a checkout: pip install -e "
    else:
        monkeypatch.setattr(required("openvino"), "__version__", "2026.3.0-12345-abc")
        words = "openvino 2026.3.0 is too old: expected 2026.4 or newer (pip install 'himap-export[openvino]'"
    asked = (run_main, bundle, "--load-inputs", inputs, "--threads", 1)
    refused(capsys, Exit.MISSING, words, *asked, "--backend", "openvino")  # type: ignore[arg-type]
    refused(capsys, Exit.MISSING, words, *exported(work, tmp_path / "out"))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert call(*asked, "--json") == 0  # the bundle's other backend, and why
    assert words in capsys.readouterr().err


def test_devices_that_are_not_here(bundle: Path, inputs: Path, capsys: Capture) -> None:
    asked = (run_main, bundle, "--load-inputs", inputs, "--backend", "openvino", "--device")
    for device in ("gpu", "npu"):
        if device.upper() not in required("openvino").Core().available_devices:
            refused(capsys, Exit.MISSING, f"OpenVINO sees no device {device} here: it sees cpu", *asked, device)
    refused(capsys, Exit.USAGE, "openvino does not run on --device cuda: it runs on cpu or gpu or npu", *asked, "cuda")


def test_dtypes_that_this_cpu_lacks(
    work: Workshop, bundle: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Refused where a bundle is made, with what it computes; one that was made elsewhere is not opened in another."""
    monkeypatch.setattr(run, "_computed", lambda core, device: ("fp32",))
    words = "this CPU does not compute in bf16 (use --dtype fp32, or export where it does)"
    refused(capsys, Exit.USAGE, words, *exported(work, tmp_path / "out", "--dtype", "bf16"))  # type: ignore[arg-type]
    monkeypatch.setattr(run, "_computed", lambda core, device: ("bf16", "fp16"))
    asked = (run_main, bundle, "--load-inputs", inputs, "--backend", "openvino")
    refused(capsys, Exit.MISSING, "does not compute in fp32: it computes in bf16, fp16 (export with another", *asked)
    assert not (tmp_path / "out").exists()


def test_plugins_are_refused(work: Workshop, tmp_path: Path, capsys: Capture) -> None:
    words = "OpenVINO has no plugins (leave --gather out"
    refused(capsys, Exit.USAGE, words, *exported(work, tmp_path / "out", "--gather", "plugin"))  # type: ignore[arg-type]


# --- engines that are not what they were ---


def edited(change: Callable[[onnx.ModelProto], object]) -> Callable[[bytes], bytes]:
    def spoil(content: bytes) -> bytes:
        model = onnx.load_from_string(content)
        change(model)
        return model.SerializeToString()

    return spoil


def attribute(op_type: str, name: str, value: object) -> Callable[[bytes], bytes]:
    """The first node of a type, with another attribute."""

    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == op_type)
        for old in [a for a in node.attribute if a.name == name]:
            node.attribute.remove(old)
        node.attribute.append(onnx.helper.make_attribute(name, value))

    return edited(change)


def retyped(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "Attention").op_type = "Inattention"


def widened(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value += 1


def elsewhere(location: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for entry in (e for t in model.graph.initializer for e in t.external_data if e.key == "location"):
            entry.value = location

    return change


def renamed(side: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        port = getattr(model.graph, side)[0]
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = ["another" if name == port.name else name for name in names]
        port.name = "another"

    return change


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda content: content[:-1], "Model can't be parsed (check openvino's version against the manifest's)"),
        (lambda content: b"node { }", "Model can't be parsed"),  # of no other frontend's format either
        (lambda content: b"", "cannot bind k1: "),
        (edited(retyped), "No conversion rule found for operations: Inattention"),
        (attribute("Attention", "softcap", 30.0), "Attention has caches, flat heads or a cap"),
        (attribute("Gemm", "alpha", 2.0), "Gemm scales its factors"),
        (attribute("TensorScatter", "axis", 1), "TensorScatter writes neither at a cache's head nor one token"),
        (edited(widened), "cannot bind k1: Can't set the input tensor"),
        (edited(renamed("input")), "cannot bind k1: it reads another, which the manifest does not name"),
        (edited(renamed("output")), "cannot bind k1: Port for tensor name"),
        (edited(elsewhere("../outside.safetensors")), "outside the base directory"),
        (edited(elsewhere("/etc/passwd")), "outside the base directory"),
        (edited(elsewhere("weights/none.safetensors")), "externally stored data"),
    ],
    ids=[
        "cut", "of no format", "empty", "operator", "cap", "scale", "axis", "shape", "input", "output", "climbing",
        "absolute", "absent",
    ],
)  # fmt: skip
def test_damaged_engines_are_one_line(
    bundle: Path, inputs: Path, tmp_path: Path, capsys: Capture, spoil: Callable[[bytes], bytes], words: str
) -> None:
    """With their content unchecked, as if the manifest listed it: else it is the digest that refuses them."""
    copy, shared = tmp_path / "copy", ("manifest.json", "k1.openvino.onnx")
    shutil.copytree(
        bundle, copy, copy_function=lambda old, new: None if Path(old).name in shared else Path(new).hardlink_to(old)
    )
    shutil.copy(bundle / "manifest.json", copy)
    (tmp_path / "outside.safetensors").write_bytes(next((bundle / "weights").iterdir()).read_bytes())
    (copy / "k1.openvino.onnx").write_bytes(spoil((bundle / "k1.openvino.onnx").read_bytes()))
    asked = (run_main, copy, "--load-inputs", inputs, "--backend", "openvino", "--threads", 1)
    refused(capsys, Exit.FAILURE, words, *asked, "--no-verify")
    refused(capsys, Exit.FAILURE, "k1.openvino.onnx has changed since export", *asked)


def test_a_bundle_made_elsewhere_answers_the_same(bundle: Path, inputs: Path, tmp_path: Path) -> None:
    """An engine is a graph, which is compiled when it is opened: what made it is a report."""
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    manifest = Bundle.open(bundle).manifest
    other = {
        name: structs.replace(e, kernels=("9x FullyConnected (jit_sve_512)",))
        for name, e in manifest.engines["openvino"].items()
    }
    toolchain = manifest.toolchain | {"openvino": "2031.1.0-1-other", "platform": "Linux-7-aarch64"}
    changed = structs.replace(manifest, engines={"openvino": other}, toolchain=toolchain)
    (copy / "manifest.json").write_bytes(manifest_json(finalised(changed)))
    answers = []
    for folder in (bundle, copy):
        out = tmp_path / f"{folder.name}.npz"
        asked = ("--load-inputs", inputs, "--save-outputs", out, "--threads", 1, "--backend", "openvino")
        assert call(run_main, folder, *asked) == 0
        answers.append(np.load(out))
    for name in answers[0].files:
        np.testing.assert_array_equal(answers[0][name], answers[1][name])


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("Exception from src/inference/a.cpp:75:\nCheck 'x' failed at b.cpp:3:\nNo such thing \n\n", "No such thing"),
        (" \n", "RuntimeError"),
    ],
)
def test_openvinos_errors_become_one_line(said: str, line: str) -> None:
    assert run._line(RuntimeError(said)) == line


# --- what it leaves alone ---


def test_building_and_running_print_nothing(work: Workshop, bundle: Path, tmp_path: Path, capfd: Capture) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    record = backend.build(Bundle.open(copy), "k1")
    pipeline, given = work.pipeline(bundle, "openvino"), make_inputs(work.tiny("gqa2"), [9], [5])
    prefilled, layout = pipeline.prefill(given.input_ids, given.pixel_values)
    assert len(list(pipeline.generate(prefilled, layout, 3))) == 3
    assert capfd.readouterr() == ("", "")
    assert (
        record.file == "k1.openvino.onnx"
        and record.gather == "ops"
        and any("FullyConnected" in k for k in record.kernels)
    )


def test_telemetry_is_never_loaded(tmp_path: Path) -> None:
    """openvino imports it where it is installed, and it then calls a server and writes into the home."""
    (tmp_path / "openvino_telemetry.py").write_text("import pathlib\npathlib.Path(__file__).with_name('told').touch()")
    head = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
    ours = "from himap_export.engines.extras import required\nrequired('openvino.frontend.onnx')"
    done = blocked_python(f"{head}{ours}\nprint('openvino_telemetry' in sys.modules)", [])
    assert done.stdout == "False\n" and not (tmp_path / "told").exists(), done.stderr
    blocked_python(f"{head}import openvino", [])
    assert (tmp_path / "told").exists()  # else this test would see nothing


def test_somebody_elses_telemetry_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino_telemetry", own := object())  # type: ignore[arg-type]
    required("openvino")
    assert sys.modules["openvino_telemetry"] is own
