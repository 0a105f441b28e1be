"""Activation-aware scaling by itself: layers stay what they were, and rounding errs less where inputs are large."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Workshop
from families import family_inputs, hugging_face_inputs
from tiny import TINY, make_inputs
from transformers import AutoModelForImageTextToText

from himap_export.engines.weight_file import as_numbers, as_stored
from himap_export.exporter.planning import describe
from himap_export.exporter.quantize.awq import (
    HEAD,
    Activations,
    Floats,
    Folding,
    layer_groups,
    search,
    spread,
    storable,
)
from himap_export.exporter.quantize.rounding import dequantise, quantise
from himap_export.exporter.registry import resolve
from himap_export.graphs.errors import HimapError
from himap_export.graphs.ports import Kind, LinearForm
from himap_export.graphs.quantization import linear_shapes
from himap_export.graphs.spec import DecoderSpec, Dtype

SPEC = DecoderSpec(layers=2, hidden=256, ffn=512, heads=4, kv_heads=2, head_dim=64, vocab=50)
NORM, VALUES = "layers.0.input_layernorm", "layers.0.self_attn.v_proj"


def rounding(kind: Kind, block: int) -> Callable[[Floats], Floats]:
    form = LinearForm(kind, block)
    return lambda weight: dequantise(quantise(weight, form, "fp32"), form, "fp32")


def drawn(outliers: int, seed: int = 0) -> tuple[Floats, Floats]:
    """W [512,256], and inputs x [200,256] of which some channels are 30 times as large as the others."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((200, 256), np.float32)
    x[:, random.permutation(256)[:outliers]] *= 30
    return random.standard_normal((512, 256), np.float32) / 16, x


def seen(x: Floats) -> Activations:
    return Activations(np.abs(x).mean(axis=0), np.abs(x).max(axis=0), x)


@pytest.mark.parametrize(
    ("kind", "block", "factor"), [("int4", 32, 0.8), ("int4", 128, 0.98), ("int8", 0, 0.7), ("int8", 128, 0.75)]
)
def test_outputs_err_less_where_some_channels_are_large(kind: Kind, block: int, factor: float) -> None:
    """Measured here as layers compute, in float64, at rows that the search has not seen. The factors are loose: with
    4 of 256 channels large they were 0.71, 0.95, 0.58 and 0.62."""
    rounded, (weight, x) = rounding(kind, block), drawn(4)
    scales, how = search(SPEC, NORM, seen(x[:100]), weight, rounded)
    assert 0 < how.alpha < 1 and how.after < factor * how.before
    fresh, w = x[100:].astype(np.float64), weight.astype(np.float64)
    exact = fresh @ w.T
    plain = np.linalg.norm(fresh @ rounded(weight).T - exact)
    ours = np.linalg.norm((fresh / scales) @ rounded(weight * scales).T - exact)
    assert ours < factor * plain
    assert how.before == pytest.approx(plain / np.linalg.norm(exact), rel=0.1)  # of other rows


def test_reported_errors_are_those_of_the_rows_seen() -> None:
    rounded, (weight, x) = rounding("int4", 32), drawn(4)
    scales, how = search(SPEC, NORM, seen(x), weight, rounded)
    exact = x @ weight.T
    for error, s in ((how.before, np.ones(256, np.float32)), (how.after, scales)):
        found = (x / s) @ rounded(weight * s).T
        assert error == pytest.approx(np.linalg.norm(found - exact) / np.linalg.norm(exact), rel=1e-4)
    expected = seen(x).mean.astype(np.float64) ** how.alpha
    np.testing.assert_allclose(scales, expected / np.sqrt(expected.max() * expected.min()), rtol=1e-5)


def test_nothing_is_scaled_where_nothing_errs_or_nothing_is_read() -> None:
    weight, x = drawn(4)
    for kept, rounded in ((x, lambda w: w), (np.zeros_like(x), rounding("int4", 32))):
        scales, how = search(SPEC, NORM, seen(kept), weight, rounded)
        assert (how.alpha, how.after) == (0, how.before) and np.all(scales == 1)


def test_a_channel_that_is_never_read_is_not_divided_by_nothing() -> None:
    weight, x = drawn(4)
    x[:, 7] = 0
    scales, how = search(SPEC, NORM, seen(x), weight, rounding("int4", 32))
    assert how.after < how.before and np.isfinite(scales).all() and scales.min() > 1e-3 * scales.max()


def test_scales_whose_weights_do_not_fit_the_dtype_are_passed_over() -> None:
    form, (weight, x) = LinearForm("int8"), drawn(0)
    x[:, 7] *= 3
    weight[:, 7] = 5e4  # fp16 ends at 65504
    scales, how = search(SPEC, NORM, seen(x), weight, lambda w: dequantise(quantise(w, form, "fp16"), form, "fp16"))
    assert 5e4 * scales[7] < 65504 and np.isfinite([how.before, how.after]).all()
    weight[:, 7] = 1e5
    with pytest.raises(HimapError, match=f"what reads the output of {NORM} overflows"):
        search(SPEC, NORM, seen(x), weight, lambda w: dequantise(quantise(w, form, "fp16"), form, "fp16"))


def test_heads_that_share_values_share_their_scales() -> None:
    """o reads 4 heads of 64, v makes 2 of them: heads 0 and 1 read the first."""
    scales = np.arange(1, 129, dtype=np.float32)
    read = spread(SPEC, VALUES, scales)
    np.testing.assert_array_equal(read, np.concatenate([scales[:64], scales[:64], scales[64:], scales[64:]]))
    weight, x = drawn(0)
    x[:, 64 + 5] *= 100  # in head 1, which reads v's head 0
    found, how = search(SPEC, VALUES, seen(x), weight, rounding("int4", 32))
    assert found.shape == (128,) and found.argmax() == 5 and how.after < how.before


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_norm_is_divided_without_error_in_its_own_dtype(dtype: Dtype) -> None:
    random = np.random.default_rng(0)
    norm = as_numbers(as_stored(random.standard_normal(256, np.float32), dtype), dtype).astype(np.float32)
    norm[3] = 0
    scales = np.exp(random.standard_normal(256, np.float32))
    found = storable(norm, scales, dtype)
    np.testing.assert_allclose(found, scales, rtol=2**-8)
    divided = Folding(SPEC, {NORM: found}).fold(f"{NORM}.weight", norm).whole()
    np.testing.assert_allclose(as_numbers(as_stored(divided, dtype), dtype), divided, rtol=3e-7)


def test_which_weights_change() -> None:
    groups = [*layer_groups(0), *layer_groups(1), HEAD]
    roles = linear_shapes(SPEC)
    assert sorted(f"{reader}.weight" for group in groups for reader in group.readers) == sorted(roles)
    folding = Folding(SPEC, {"layers.1.mlp.up_proj": np.ones(512, np.float32), "norm": np.ones(256, np.float32)})
    names = [
        f"layers.{n}.mlp.{m}_proj.{kind}" for n in (0, 1) for m in ("gate", "up", "down") for kind in ("weight", "bias")
    ]
    names += ["norm.weight", "lm_head.weight", "embed_tokens.weight", "layers.1.self_attn.q_norm.weight"]
    changed = {name for name in names if folding.changes(name)}
    assert changed == {
        "layers.1.mlp.up_proj.weight", "layers.1.mlp.up_proj.bias", "layers.1.mlp.down_proj.weight", "norm.weight",
        "lm_head.weight",
    }  # fmt: skip


def test_tiles_are_folded_as_the_whole() -> None:
    random = np.random.default_rng(3)
    scales = {name: np.exp(random.standard_normal(n, np.float32)) for name, n in ((NORM, 256), (VALUES, 128))}
    weight = random.standard_normal((128, 256), np.float32).astype(np.float16)
    folded = Folding(SPEC, scales).fold(f"{VALUES}.weight", weight)
    whole = weight.astype(np.float64) * scales[NORM] / scales[VALUES][:, None]
    np.testing.assert_allclose(folded.whole(), whole, rtol=1e-6)
    np.testing.assert_array_equal(folded[10:30, 100:164], folded.whole()[10:30, 100:164])


@torch.no_grad()
def folded_logits(folder: Path, given: dict[str, torch.Tensor], only: str = "") -> tuple[Floats, Floats]:
    """Logits [1,S,W] of Hugging Face's model, before and after its weights are folded by random scales, those of the
    makers that end with `only`."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    spec, random = describe(resolve(str(folder)))[0], np.random.default_rng(0)
    decoder, before = model.model.language_model, model(**given).logits.numpy()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # it may be the embedding's matrix
    weights = dict(decoder.named_parameters()) | {"lm_head.weight": model.lm_head.weight}
    makers = [group.maker for n in range(spec.layers) for group in layer_groups(n)] + [HEAD.maker]
    sizes = {maker: len(weights[f"{maker}.weight"]) for maker in makers if maker.endswith(only)}
    folding = Folding(spec, {maker: np.exp(random.normal(size=n)).astype(np.float32) for maker, n in sizes.items()})
    for role, weight in weights.items():
        assert (
            folding.changes(role) or only or any(word in role for word in ("embed_tokens", "q_norm", "k_norm", "bias"))
        )
        weight.copy_(torch.from_numpy(folding.fold(role, weight.numpy()).whole()))
    return before, model(**given).logits.numpy()


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "qwen3-vl", "internvl"])
def test_a_folded_model_is_the_same_model(work: Workshop, name: str) -> None:
    given = hugging_face_inputs(name, family_inputs(name))
    before, after = folded_logits(work.family(name), given)
    np.testing.assert_allclose(after, before, atol=1e-4 * float(np.abs(before).max()))


@pytest.mark.parametrize("name", ["biased", "gqa2", "mqa4", "tied"])
def test_biases_of_what_is_divided_are_divided(work: Workshop, name: str) -> None:
    inputs = make_inputs(TINY[name])
    given = {"input_ids": torch.from_numpy(inputs.input_ids), "pixel_values": torch.from_numpy(inputs.pixel_values)}
    before, after = folded_logits(work.checkpoint(name), given)
    np.testing.assert_allclose(after, before, atol=1e-4 * float(np.abs(before).max()))


@pytest.mark.parametrize("maker", ["input_layernorm", "v_proj", "post_attention_layernorm", "up_proj", "norm"])
def test_each_group_by_itself(work: Workshop, maker: str) -> None:
    inputs = make_inputs(TINY["biased"])
    given = {"input_ids": torch.from_numpy(inputs.input_ids), "pixel_values": torch.from_numpy(inputs.pixel_values)}
    before, after = folded_logits(work.checkpoint("biased"), given, only=maker)
    np.testing.assert_allclose(after, before, atol=1e-4 * float(np.abs(before).max()))
