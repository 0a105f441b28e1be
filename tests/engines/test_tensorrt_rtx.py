"""Real engines of tiny graphs, built by TensorRT-RTX without a GPU, and what the manifest says of them."""

import sys
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from unsealed import WHOLE, staged, unsealed, vision

from himap_export.engines.backends import tensorrt_rtx
from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import EngineRecord
from himap_export.engines.nvinfer.kernels import kernels
from himap_export.graphs.errors import Exit, HimapError

LAYERS = {"prefix": 1, "k1": 2, "k2": 1, "decode": 4}
Built = tuple[Bundle, dict[str, EngineRecord]]


@pytest.fixture(scope="module", params=["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
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
        # Query and key are rotated, key and value cached, layer by layer, in prefill as in decode.
        found = {kind: count(records[name].layers, kind) for kind in ("ROTARY_EMBEDDING", "KV_CACHE_UPDATE")}
        assert set(found.values()) == {2 * layers} and f"{layers}x ATTENTION_INPUT" in records[name].layers
    assert count(records["vision"].kernels, "_mha_", "(Attention)") == 2  # feature layer -2: the third is not computed
    assert all(count(records[name].kernels, "Scat", "TensorScatter") for name in LAYERS)
    for name, record in records.items():
        assert record.file == f"tensorrt-rtx/{name}.engine" and record.seconds > 0
        assert bundle.path(record.file).stat().st_size > 10_000


def test_engines_take_every_weight_as_an_input(built: Built) -> None:
    """Vectors too, and without kernels that only copy a bias, which have no ONNX operator of their own."""
    bundle, records = built
    assert not count(records["vision"].kernels, "()")
    for name, record in records.items():
        engine = bundle.path(record.file).read_bytes()
        for weight in bundle.manifest.graphs[name].weights:
            stored = bundle.tensors[weight]
            with stored.file.open("rb") as f:
                f.seek(stored.offset)
                content = f.read(stored.nbytes)
            assert weight.encode() in engine and content[:32] not in engine, f"{weight} in {name}"


def test_embedded_engines_hold_every_weight(tmp_path: Path) -> None:
    """TensorRT may store a matrix in another order, but not in fewer bytes; inputs take some room of their own."""
    model = staged("fp16")
    bundle = unsealed(tmp_path / "work", model, model.graphs(), "embedded")
    shared = unsealed(tmp_path / "shared", model, model.graphs())
    for name in bundle.manifest.graphs:
        inside, outside = (b.path(tensorrt_rtx.build(b, name).file).read_bytes() for b in (bundle, shared))
        size = sum(bundle.tensors[weight].nbytes for weight in bundle.manifest.graphs[name].weights)
        assert len(inside) > len(outside) + 0.8 * size
        assert b"model.norm.weight" not in inside


def test_gather_is_recorded_in_the_form_it_has(built: Built, tmp_path: Path) -> None:
    gathers = {name: record.gather for name, record in built[1].items()}
    assert gathers == {"prefix": "none", "k1": "ops", "k2": "ops", "decode": "none", "vision": "none"}
    assert count(built[1]["k1"].kernels, "TopKGather") > 0
    whole = staged("fp16", WHOLE)
    bundle = unsealed(tmp_path / "work", whole, (whole.stage(1), whole.stage(2)))
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
    found = kernels(log, {"n1": "Cast", "n2": "Gemm", "n3": "Gemm"})
    assert found == ("1x Cast (Cast, Topk)", "2x gemm (Gemm)")


def refusal(act: Callable[[], object]) -> HimapError:
    with pytest.raises(HimapError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return caught.value


def test_fp32_and_a_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_rtx.check("fp16", "auto")
    tensorrt_rtx.check("bf16", "ops")
    assert tensorrt_rtx.version()["tensorrt-rtx"].startswith("1.")
    fp32 = refusal(lambda: tensorrt_rtx.check("fp32", "auto"))
    assert fp32.code == Exit.USAGE and "`dtype` fp16 or bf16" in fp32.hint
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    missing = refusal(lambda: tensorrt_rtx.check("fp16", "auto"))
    assert missing.code == Exit.MISSING and "pip install" in missing.hint


def test_what_tensorrt_cannot_build_is_told_in_one_line(tmp_path: Path) -> None:
    model = staged("fp32")
    bundle = unsealed(tmp_path / "work", model, (model.stage(2),))
    assert "no fused kernel for one of its Attention" in str(refusal(lambda: tensorrt_rtx.build(bundle, "k2")))
    path = bundle.path("k2.onnx")
    bound = ir.load(path)
    next(node for node in bound.graph if node.op_type == "Attention").op_type = "Inattention"
    ir.save(bound, path)
    assert "Inattention" in str(refusal(lambda: tensorrt_rtx.build(bundle, "k2")))
    path.write_bytes(b"not a graph")
    assert "k2.onnx: not a readable ONNX file" in str(refusal(lambda: tensorrt_rtx.build(bundle, "k2")))
    assert not bundle.path("tensorrt-rtx/k2.engine").exists()
