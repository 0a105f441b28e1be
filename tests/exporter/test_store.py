"""Weights on their way into a bundle: converted within a type's range, or refused."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from himap_export.engines.weight_file import StoredTensor, read_header
from himap_export.exporter import store
from himap_export.exporter.store import store_weights, write_weights
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.spec import Dtype

KINDS: dict[Dtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TOO_LARGE: dict[tuple[Dtype, Dtype], tuple[float, str]] = {
    ("bf16", "fp16"): (1e5, "it holds 99840, fp16 ends at 65504"),
    ("fp32", "fp16"): (-65520.0, "it holds -65520, fp16 ends at 65504"),
    ("fp32", "bf16"): (3.4e38, r"it holds 3.4e\+38, bf16 ends at 3.38953e\+38"),
}


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def saved(file: Path, dtype: Dtype, **values: list[float]) -> list[StoredTensor]:
    file.parent.mkdir(exist_ok=True)
    save_file({name: torch.tensor(v, dtype=KINDS[dtype]) for name, v in values.items()}, file)
    return list(read_header(file).values())


@pytest.fixture(params=["whole", "in small pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in small pieces":
        monkeypatch.setattr(store, "_PIECE", 2)


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_what_fits_is_rounded_as_pytorch_does(tmp_path: Path, pieces: None, source: Dtype, target: Dtype) -> None:
    values = [0.1, -2.5, 65504.0 if source != "bf16" else 65280.0, 1e-7, -0.0, 3.0, 1 / 3]
    tensors = saved(tmp_path / "in" / "w.safetensors", source, a=values, none=[], b=[7.0])
    assert store_weights(tensors, tmp_path / "out", target) == ["w.safetensors"]
    found = load_file(tmp_path / "out" / "w.safetensors")
    for name, expected in load_file(tmp_path / "in" / "w.safetensors").items():
        assert torch.equal(found[name], expected.to(KINDS[target])) and found[name].dtype == KINDS[target]


@pytest.mark.parametrize(("source", "target"), TOO_LARGE)
def test_what_does_not_fit_is_refused_with_its_value(
    tmp_path: Path, pieces: None, source: Dtype, target: Dtype
) -> None:
    value, words = TOO_LARGE[source, target]
    tensors = saved(tmp_path / "in" / "w.safetensors", source, fine=[1.0], large=[1.0, 2.0, 3.0, value, 4.0])
    with pytest.raises(HimapError, match=f"tensor large does not fit {target}: {words} .*`allow_overflow`") as caught:
        store_weights(tensors, tmp_path / "out", target)
    assert caught.value.code == Exit.USAGE


@pytest.mark.parametrize(("source", "target"), TOO_LARGE)
def test_on_request_it_becomes_the_largest_number(tmp_path: Path, pieces: None, source: Dtype, target: Dtype) -> None:
    value, _ = TOO_LARGE[source, target]
    tensors = saved(tmp_path / "w.safetensors", source, large=[1.0, value, -value, 0.5])
    write_weights(tensors, tmp_path / "out.safetensors", target, allow_overflow=True)
    found, largest = load_file(tmp_path / "out.safetensors")["large"].tolist(), torch.finfo(KINDS[target]).max
    assert found == [1.0, largest if value > 0 else -largest, -largest if value > 0 else largest, 0.5]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("allow", [False, True])
def test_what_is_no_number_is_not_taken_for_a_large_one(tmp_path: Path, value: float, allow: bool) -> None:
    tensors = saved(tmp_path / "w.safetensors", "fp32", a=[1.0, value])
    with pytest.raises(HimapError, match="tensor a is not finite") as caught:
        write_weights(tensors, tmp_path / "out.safetensors", "fp16", allow_overflow=allow)
    assert caught.value.code == Exit.FAILURE


def test_files_of_one_name_stay_apart(tmp_path: Path) -> None:
    """A checkpoint's, its tower's, and one whose name is what the tower's would become."""
    files = ("model/model", "model/tower-model", "tower/model")
    for n, file in enumerate(files):
        saved(tmp_path / f"{file}.safetensors", "fp32", **{f"t{n}": [float(n)]})
    tensors = [t for file in files for t in read_header(tmp_path / f"{file}.safetensors").values()]
    names = store_weights(tensors, tmp_path / "out", "fp32")
    held = {name: value.item() for file in names for name, value in load_file(tmp_path / "out" / file).items()}
    assert len(names) == 3 and held == {"t0": 0.0, "t1": 1.0, "t2": 2.0}
