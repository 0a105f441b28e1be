"""Importance scores in OpenVINO, graph by graph: drawn ones to the last bit, computed ones in fp32."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from frames import SEEN, give_integers, scoring_context, take
from oracle_criteria import RANKINGS, Layer

from himap_export.engines.extras import required
from himap_export.engines.openvino import run
from himap_export.engines.openvino.run import Compiler, computed
from himap_export.engines.weight_file import as_numbers, as_stored
from himap_export.graphs.build import Frame, StageGraph
from himap_export.graphs.errors import HimapError
from himap_export.graphs.importance import importance
from himap_export.graphs.spec import IMAGE, INSTRUCTION, PADDING, PRIMES, SEEDS, SYSTEM, DecoderSpec, Dtype

SPEC = DecoderSpec(layers=3, hidden=8, ffn=8, heads=6, kv_heads=2, head_dim=16, vocab=8)


def compiled(graph: StageGraph, folder: Path) -> Any:
    """OpenVINO's model of a graph, as an engine is compiled."""
    ir.save(graph.model, folder / "graph.onnx")
    compiler = Compiler("cpu", "fp32", 1)
    return compiler.compile(compiler.read(folder / "graph.onnx"))


def test_random_scores_are_the_oracles_to_the_last_bit(tmp_path: Path) -> None:
    """Seeds as a pipeline gives them, modulo SEEDS, and positions up to 2^20: multiples of both primes, and next to
    them."""
    edges = np.add.outer([0, 2039, 2027, 2**11, 2039 * 500, 2027 * 517, 2**20 - 1], [-1, 0, 1]).flatten()
    positions = np.unique([*range(600), *edges.clip(0, 2**20)])
    seeds = np.array([0, 1, 2, 2026, 2027, 2038, 2039, 2**16, 2**22 % SEEDS, 2039 * 2026, SEEDS - 2, SEEDS - 1])
    seeds = np.concatenate([seeds, np.random.default_rng(0).integers(0, SEEDS, 20)])
    f, shape = Frame("random", "fp32"), (len(seeds), len(positions))
    context = scoring_context(f, SPEC, shape, (), layer=2, visual=len(positions), keep=8, seeded=True)
    take(f, "score", importance("random", context), shape, ir.DataType.FLOAT)
    feeds = {
        "token_type": np.full(shape, IMAGE),
        "position": np.tile(positions, (len(seeds), 1)),
        "seed": seeds[:, None],
    }
    found = compiled(f.finish(), tmp_path)(feeds)["score"]
    nothing = dict.fromkeys((*SEEN[:-1], "attention", "previous", "normed"), np.zeros((1, 1)))
    for row, own in zip(found, seeds.tolist(), strict=True):
        s = Layer(
            **nothing, candidates=np.arange(len(positions)), instruction=positions[:0], last=0, position=positions,
            cut=2, keep=8, seed=own,
        )  # fmt: skip
        np.testing.assert_array_equal(row, RANKINGS["random"](s))


def test_remainders_are_exact_as_far_as_random_scores_divide() -> None:
    """OpenVINO's CPU divides integers as fp32: right for every number below 2^22, whatever the layers compute in."""
    ov, op, numbers = required("openvino"), required("openvino.opset15"), np.arange(2**22)
    x = op.parameter([len(numbers)], np.int64)
    model = ov.Model([op.floor_mod(x, op.constant(np.int64(prime))) for prime in PRIMES], [x])
    for hint in ({}, {"INFERENCE_PRECISION_HINT": "bf16"}):
        found = ov.Core().compile_model(model, "CPU", hint)([numbers])
        for i, prime in enumerate(PRIMES):
            np.testing.assert_array_equal(found[i], numbers % prime)


@pytest.mark.parametrize("divisor", [2**31 - 1, 2**22 + 1, 0, -5, None])
def test_remainders_that_may_be_wrong_are_refused(divisor: int | None, tmp_path: Path) -> None:
    """A graph of an older bundle would score all tokens the same, without a word."""
    f = Frame("remainder", "fp32")
    x = give_integers(f, "x", 4)
    take(f, "y", f.op.Mod(x, give_integers(f, "by", 4) if divisor is None else divisor), (4,), ir.DataType.INT64)
    with pytest.raises(HimapError, match=r"Mod divides by something else than a constant up to 2\^22"):
        compiled(f.finish(), tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_scores_are_fp32_whatever_the_bundle_is(dtype: Dtype, tmp_path: Path) -> None:
    """From the same queries and keys, fp64 differs by fp32's roundings only: bf16 anywhere inside would err by 1e-3."""
    if dtype not in computed():
        pytest.skip(f"this CPU does not compute in {dtype}: OpenVINO says {', '.join(computed())}")
    token_type = np.array([SYSTEM] * 3 + [IMAGE] * 20 + [SYSTEM] + [IMAGE] * 12 + [INSTRUCTION] * 9 + [PADDING] * 4)
    random, f, size = np.random.default_rng(0), Frame("scores", dtype), len(token_type)
    context = scoring_context(f, SPEC, (1, size), ("query", "key"), layer=2, visual=32, keep=8)
    for name in ("instruction", "image"):
        take(f, name, importance(name, context), (1, size), ir.DataType.FLOAT)
    made, ov = compiled(f.finish(), tmp_path), required("openvino")
    request, values = made.create_infer_request(), {}
    for name, heads in (("query", 6), ("key", 2)):
        tensor = ov.Tensor(getattr(ov.Type, run._TYPES[dtype]), [1, heads, size, 16])
        stored = as_stored(2.4 * random.standard_normal((1, heads, size, 16)), dtype)
        tensor.data.view(stored.dtype)[...] = stored
        request.set_tensor(name, tensor)
        values[name] = as_numbers(stored, dtype)[0].astype(np.float64)
    request.set_tensor("token_type", ov.Tensor(token_type[None]))
    request.set_tensor("position", ov.Tensor(np.arange(size)[None]))
    request.infer()
    logits = values["query"] @ np.repeat(values["key"], 3, 0).swapaxes(1, 2) / 4
    probability = np.exp(np.where(np.tri(size, dtype=bool), logits, -np.inf))
    attention = (probability / probability.sum(-1, keepdims=True)).mean(0)
    for name, rows in (("instruction", token_type == INSTRUCTION), ("image", token_type == IMAGE)):
        score = request.get_tensor(name).data
        assert score.dtype == np.float32 and np.isposinf(score[0, token_type != IMAGE]).all()
        truth = attention[rows][:, token_type == IMAGE].sum(0)
        assert np.isfinite(truth).all()
        np.testing.assert_allclose(score[0, token_type == IMAGE], truth, rtol=0, atol=1e-5)
