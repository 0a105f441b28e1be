"""OpenVINO over quantised weights: which stay packed, where activations are rounded, and files that lie about them."""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from commands import OPENVINO, Workshop
from msgspec.structs import replace
from tiny import make_inputs

from himap_export.engines.backends import Opening, open_backend
from himap_export.engines.backends import openvino as backend
from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import Manifest, finalised, manifest_json, read_manifest
from himap_export.engines.openvino import quantised
from himap_export.engines.openvino.quantised import TURNED, read_turned
from himap_export.engines.session import open_pipeline
from himap_export.engines.weight_file import read_header, write_safetensors
from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.reference.criteria import reference_himap

CUTS = reference_himap(2, 4, 0.5, 0.5)
INT4 = ("--quantize", "int4", *OPENVINO)
Held = dict[str, tuple[str, tuple[int, ...], npt.NDArray[Any]]]  # type and shape in safetensors' words, and content


def packed(bundle: Path, graph: str) -> int:
    """How many products of a graph's engine read 4-bit weights."""
    kernels = Bundle.open(bundle).manifest.engines["openvino"][graph].kernels
    return sum(int(kernel.partition("x ")[0]) for kernel in kernels if kernel.endswith(", i4)"))


# --- what stays packed ---


@pytest.mark.slow
def test_decode_of_many_prompts_multiplies_weights_out(work: Workshop) -> None:
    """In 16 bits its rows are as a prefill's then; of 16 prompts they are few enough."""
    linears = 7 * work.tiny("tied").layers
    for batch, kept in ((16, linears), (17, 0)):
        bundle = work.bundle("tied", *INT4, "--dtype", "bf16", "--batch", batch, cuts=CUTS)
        assert packed(bundle, "decode") == kept and packed(bundle, "k1") == 0


def test_prefill_of_a_large_model_is_proved_to_stay_packed(
    work: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(shutil.copytree(work.bundle("tied", *INT4, "--dtype", "bf16", cuts=CUTS), tmp_path / "copy"))
    assert not any("i4" in kernel for kernel in backend.build(bundle, "k1").kernels)
    monkeypatch.setattr(quantised, "memory_bytes", lambda: 1)
    assert any("i4" in kernel for kernel in backend.build(bundle, "k1").kernels)
    monkeypatch.setattr(backend, "_nodes", lambda engine: [("FullyConnected", "gemm", "bf16")])
    with pytest.raises(HimapError, match="OpenVINO multiplies quantised weights of k1 out"):
        backend.build(bundle, "k1")


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_prefill_in_fp32_never_rounds(work: Workshop, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Whatever memory the machine has: what is kept is the same on all. In 16 bits, where weights stay packed."""
    bundle = Bundle.open(work.bundle("tied", *INT4, "--dtype", dtype, cuts=CUTS))
    inputs, found = make_inputs(work.tiny("tied"), [9], [5]), []
    monkeypatch.setattr(quantised, "memory_bytes", lambda: 1)
    for exact in (False, True):
        pipeline = open_pipeline(bundle.select(), "openvino", Opening(1, exact=exact))
        prefilled, _ = pipeline.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
        found.append(prefilled.logits.copy())
    assert np.array_equal(*found) == (dtype == "fp32")


# --- files and manifests that lie ---


def contents(file: Path) -> Held:
    words = {"fp32": "F32"}
    return {
        name: (words.get(t.dtype, t.dtype), t.shape, np.fromfile(file, np.uint8, t.nbytes, offset=t.offset))
        for name, t in read_header(file).items()
    }


def retyped(held: Held, name: str) -> None:
    """Scales as many bytes long, of another type: read as fp32 they would be numbers, too."""
    _, shape, raw = held[name]
    held[name] = "BF16", (shape[0], 2 * shape[1]), raw


def halved(held: Held, name: str) -> None:
    _, shape, raw = held[name]
    values = raw.view(np.float32).astype(ml_dtypes.bfloat16)
    held[name] = "BF16", shape, values.view(np.uint8)


def reshaped(held: Held, name: str) -> None:
    kind, (out, wide), raw = held[name]
    held[name] = kind, (wide, out), raw


def unsigned(held: Held, name: str) -> None:
    _, shape, raw = held[name]
    held[name] = "I8", shape, raw


def emptied(held: Held, name: str) -> None:
    held[name] = held[name][0], (0, 8), np.zeros(0, np.uint8)


@pytest.mark.parametrize(
    ("suffix", "spoil"),
    [("scale", retyped), ("scale", halved), ("scale", reshaped), ("scale", emptied), ("int4", unsigned),
     ("int4", reshaped), ("int4", emptied), ("int4", lambda held, name: held.pop(name))],
)  # fmt: skip
def test_turned_weights_are_what_the_manifest_says(
    work: Workshop, tmp_path: Path, suffix: str, spoil: Callable[[Held, str], object]
) -> None:
    bundle, file = Bundle.open(work.bundle("tied", *INT4, cuts=CUTS)), tmp_path / TURNED
    held = contents(bundle.path(TURNED))
    spoil(held, next(name for name in held if name.endswith(f"gate_proj.weight.{suffix}")))
    write_safetensors(
        file, {name: (kind, shape) for name, (kind, shape, _) in held.items()}, [raw for *_, raw in held.values()]
    )
    with pytest.raises(HimapError, match=r"does not hold .*gate_proj.weight as it should"):
        read_turned(file, bundle.manifest)


def of_kind(kind: str) -> Callable[[Manifest], Manifest]:
    def change(m: Manifest) -> Manifest:
        assert m.quantization is not None
        weights = {name: replace(weight, kind=kind, block=0) for name, weight in m.quantised().items()}
        return replace(m, quantization=replace(m.quantization, weights=weights))

    return change


def with_weight(name: str, **facts: object) -> Callable[[Manifest], Manifest]:
    """The weight whose name ends so, with other facts, in all graphs."""

    def change(m: Manifest) -> Manifest:
        graphs = {
            graph: replace(
                r, weights={w: replace(spec, **facts) if w.endswith(name) else spec for w, spec in r.weights.items()}
            )
            for graph, r in m.graphs.items()
        }
        return replace(m, graphs=graphs)

    return change


def with_engine(**facts: object) -> Callable[[Manifest], Manifest]:
    def change(m: Manifest) -> Manifest:
        engines = {name: replace(e, **facts) for name, e in m.engines["openvino"].items()}
        return replace(m, engines={"openvino": engines})

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (of_kind("fp8"), "no graph reads .* in fp8"),
        (of_kind("int8"), "no graph reads .* in int8"),
        (of_kind("nvfp4"), "no graph reads .* in nvfp4"),
        (with_weight("norm.weight", dtype="int64"), r"norm.weight is of int64"),
        (with_weight("q_proj.weight.int4", dtype="int64"), r"q_proj.weight.int4 is of int64"),
        (with_weight("q_proj.weight.int4", constant=False), r"no graph reads .*q_proj.weight in int4"),
        (with_weight("q_proj.weight.int4", shape=(64,)), r"q_proj.weight is \[64\], quantised in blocks"),
        (with_weight("q_proj.weight.int4", shape=(0, 64)), r"q_proj.weight is \[0, 64\], quantised in blocks"),
        (with_weight("q_proj.weight.int4", shape=(33, 64)), r"q_proj.weight is \[33, 64\], quantised in blocks"),
    ],
)  # fmt: skip
def test_a_manifest_says_nothing_that_cannot_be_so(
    work: Workshop, tmp_path: Path, change: Callable[[Manifest], Manifest], words: str
) -> None:
    """With a digest that fits: whoever changed it made it so."""
    manifest = Bundle.open(work.bundle("tied", *INT4, cuts=CUTS)).manifest
    (tmp_path / "manifest.json").write_bytes(manifest_json(finalised(change(manifest))))
    with pytest.raises(HimapError, match="is damaged") as refused:
        read_manifest(tmp_path)
    assert re.search(words, refused.value.details), refused.value.details


@pytest.mark.parametrize(
    ("name", "kind"),
    [("openvino", "int8-dynamic"), ("openvino", "fp8"), ("onnxruntime", "fp8"), ("tensorrt-rtx", "int8-dynamic")],
)
def test_kinds_that_a_backend_has_no_kernels_for(work: Workshop, name: str, kind: str) -> None:
    bundle = Bundle.open(work.bundle("tied", *INT4, cuts=CUTS))
    lying = Bundle(bundle.folder, of_kind(kind)(bundle.manifest))
    with pytest.raises(HimapError, match=f"{name} has no {kind} weights, which .* says") as refused:
        open_backend(name, lying)
    assert refused.value.code == Exit.FAILURE and refused.value.hint == "export the bundle again"


@pytest.mark.parametrize("facts", [{"weights": None}, {"weights": "weights/quantised.safetensors"}])
def test_engines_name_their_own_weights(work: Workshop, facts: Mapping[str, object]) -> None:
    bundle = Bundle.open(work.bundle("tied", *INT4, cuts=CUTS))
    lying = Bundle(bundle.folder, with_engine(**facts)(bundle.manifest))
    with pytest.raises(HimapError, match=r"do not name their weights|does not hold .* as it should"):
        open_backend("openvino", lying)
