"""The onnxruntime backend's devices. There is no GPU here: device memory is the CPU's, everything else is real."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from commands import Workshop, call, save_inputs
from tiny import make_inputs

from himap_export.engines.backends import Opening, onnxruntime
from himap_export.engines.bundle import open_bundle
from himap_export.engines.cli import main as run_main
from himap_export.engines.pipeline import Pipeline
from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.criteria import himap

CUTS = himap(1, 3, 0.5, 0.75)


def owned(array: Any) -> Any:
    """As `ortvalue_from_numpy(array, "cuda", 0)`: a copy in memory that the value owns."""
    value = ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, "cpu", 0)
    value.update_inplace(np.ascontiguousarray(array))
    return value


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose onnxruntime has a CUDA provider, played by the CPU's."""
    monkeypatch.setattr(onnxruntime, "_on_device", owned)
    monkeypatch.setitem(onnxruntime._PROVIDERS, "cuda", "CPUExecutionProvider")


def test_sessions_refuse_memory_that_a_value_owns() -> None:
    """Why weights on a device are borrowed: should this ever pass, `_borrowed` can go."""
    value = owned(np.ones((2, 3), np.float16))
    with pytest.raises(Exception, match="must be owned by the user"):
        ort.SessionOptions().add_initializer("w", value)
    borrowed = onnxruntime._borrowed(value)
    ort.SessionOptions().add_initializer("w", borrowed)
    assert borrowed.data_ptr() == value.data_ptr()


@pytest.mark.filterwarnings("ignore:Duplicate provider")  # the CPU's, which plays both
@pytest.mark.parametrize("form", [(), ("--weights", "embedded")])
def test_device_tensors_and_weights_give_the_same_answers(work: Workshop, gpu: None, form: tuple[str, ...]) -> None:
    bundle, inputs = work.bundle("gqa2", *form, cuts=CUTS), make_inputs(work.tiny("gqa2"), [9], [5])
    pipelines = [Pipeline(open_bundle(bundle), "onnxruntime", Opening(1, device)) for device in ("cpu", "cuda")]
    assert pipelines[1].engines.device == "cuda" and isinstance(pipelines[1].tensors["logits"], onnxruntime.CudaTensor)
    results = []
    for pipeline in pipelines:
        prefilled, layout = pipeline.prefill(inputs.input_ids, inputs.pixel_values)
        logits = prefilled.logits.copy()  # played by the CPU, reading is a view
        results.append((logits, np.stack(list(pipeline.generate(prefilled, layout, 8)))))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_the_gpu_is_taken_where_there_is_one(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
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
