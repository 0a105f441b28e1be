"""One decoder layer as a graph against Hugging Face's LlamaDecoderLayer, prefill and decode."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from msgspec.structs import replace
from numpy.typing import NDArray
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from himap_export.graphs.build import Frame, StageGraph
from himap_export.graphs.decoder import Decoder, rotary
from himap_export.graphs.ports import Place, WeightRef
from himap_export.graphs.spec import DecoderSpec, Dtype

Floats = NDArray[np.floating]
BASE = DecoderSpec(layers=4, hidden=32, ffn=48, heads=4, kv_heads=4, head_dim=8, vocab=64)
SPECS = {
    "mha": BASE,
    "gqa": replace(BASE, heads=4, kv_heads=2, head_dim=4),  # 4*4 < 32
    "mqa": replace(BASE, kv_heads=1),
    "wide-heads": replace(BASE, hidden=24, heads=4, kv_heads=2, head_dim=16),  # 4*16 > 24
    "odd-sizes": replace(BASE, hidden=27, ffn=53, heads=3, kv_heads=3, head_dim=10),
    "rope-base": replace(BASE, rope_base=5e5),
    "eps": replace(BASE, norm_eps=0.1),
    "qkv-bias": replace(BASE, qkv_bias=True),
    "all-biases": replace(BASE, qkv_bias=True, out_bias=True, mlp_bias=True),
}
LAYER = 3


def hugging_face(spec: DecoderSpec) -> tuple[LlamaDecoderLayer, LlamaRotaryEmbedding]:
    """A layer with weights all of which matter: norms and biases are random too."""
    config = LlamaConfig(
        hidden_size=spec.hidden,
        intermediate_size=spec.ffn,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_base},
        attention_bias=spec.qkv_bias,
        mlp_bias=spec.mlp_bias,
        attn_implementation="eager",
    )
    layer = LlamaDecoderLayer(config, LAYER).eval()
    if spec.qkv_bias and not spec.out_bias:  # as Qwen2 has it
        layer.self_attn.o_proj.bias = None
    generator = torch.Generator().manual_seed(0)
    for name, weight in sorted(layer.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.3 * noise if "layernorm" in name else noise * (0.3 if weight.ndim == 1 else 0.4)
    return layer, LlamaRotaryEmbedding(config)


def layer_graph(spec: DecoderSpec, batch: int, tokens: int, dtype: Dtype) -> StageGraph:
    f = Frame("layer", dtype)
    x = f.input(Place("hidden", cut=1), (batch, tokens, spec.hidden))
    position = f.integers(Place("position_ids"), batch, tokens)
    decoder = Decoder(f, spec, WeightRef, batch, tokens)
    flat = f.op.Reshape(x, [batch * tokens, spec.hidden])
    y, attended = decoder.layer(LAYER, flat, rotary(f, spec, position), decoder.prefill_attention)
    f.output(Place("last_hidden"), f.op.Reshape(y, [batch, tokens, spec.hidden]), (batch, tokens, spec.hidden))
    for place, value in ((Place("key", LAYER), attended.key), (Place("value", LAYER), attended.value)):
        f.output(place, value, (batch, spec.kv_heads, tokens, spec.head_dim))
    return f.finish()


def run(graph: StageGraph, feeds: dict[str, NDArray[np.generic]]) -> list[Floats]:
    session = onnxruntime.InferenceSession(ir.to_proto(graph.model).SerializeToString())
    outputs: list[Floats] = session.run(None, feeds)
    return outputs


def both(spec: DecoderSpec, position: NDArray[np.int64], dtype: Dtype) -> tuple[list[Floats], Floats]:
    """The graph's y, key and value, and Hugging Face's y in fp32, for one random input at `position` [B,S]."""
    batch, tokens = position.shape
    layer, rope = hugging_face(spec)
    graph = layer_graph(spec, batch, tokens, dtype)
    weights = {f"layers.{LAYER}.{name}": weight.numpy() for name, weight in layer.state_dict().items()}
    assert {name: spec.shape for name, spec in graph.weights.items()} == {
        name: weight.shape for name, weight in weights.items()
    }
    x = np.random.default_rng(1).standard_normal((batch, tokens, spec.hidden)).astype(np.float32)
    numpy_type = np.float16 if dtype == "fp16" else np.float32
    outputs = run(
        graph,
        {"hidden_k1": x.astype(numpy_type), "position_ids": position}
        | {k: w.astype(numpy_type) for k, w in weights.items()},
    )
    hidden, place = torch.from_numpy(x), torch.from_numpy(position)
    mask = torch.full((tokens, tokens), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        cos_sin = rope(hidden, place)
        expected = layer(hidden, attention_mask=mask, position_ids=place, position_embeddings=cos_sin)
    return outputs, expected.numpy()


POSITIONS = {
    "in-order": np.tile(np.arange(7), (2, 1)),
    "gaps": np.array([[0, 1, 5, 6, 30, 31, 700], [0, 2, 4, 600, 601, 602, 2000]]),  # as after a cut
    "alone": np.array([[41], [7], [0]]),
}


@pytest.mark.parametrize("place", POSITIONS)
@pytest.mark.parametrize("name", SPECS)
def test_equals_hugging_face(name: str, place: str) -> None:
    (y, _, _), expected = both(SPECS[name], POSITIONS[place], "fp32")
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.5


@pytest.mark.parametrize("name", ["gqa", "all-biases"])
def test_fp16_is_near(name: str) -> None:
    """About 20 roundings of rms 2**-11 / sqrt(3), of numbers as large as the output; and relative errors of attention's
    logits, whose spread is (0.4 sqrt(D))**2 = 5 here, are that much larger in its probabilities. Measured: 0.2 of it.
    """
    (y, _, _), expected = both(SPECS[name], POSITIONS["gaps"], "fp16")
    assert y.dtype == np.float16
    error = np.sqrt(np.mean((y.astype(np.float32) - expected) ** 2) / np.mean(expected**2))
    assert 0 < error < (1 + 0.16 * SPECS[name].hidden) * (20 / 3) ** 0.5 * 2**-11


@pytest.mark.parametrize("name", ["gqa", "wide-heads"])
def test_key_and_value_are_what_a_cache_holds(name: str) -> None:
    """Keys after rotation, by kv head."""
    spec, position = SPECS[name], POSITIONS["gaps"]
    (_, key, value), _ = both(spec, position, "fp32")
    layer, _ = hugging_face(spec)
    x = np.random.default_rng(1).standard_normal((*position.shape, spec.hidden)).astype(np.float32)
    with torch.no_grad():
        n = layer.input_layernorm(torch.from_numpy(x))
        by_head = (*position.shape, spec.kv_heads, spec.head_dim)
        k, v = (p(n).view(by_head).transpose(1, 2).numpy() for p in (layer.self_attn.k_proj, layer.self_attn.v_proj))
    np.testing.assert_allclose(value, v, atol=1e-5)
    half = spec.head_dim // 2
    angle = position[:, None, :, None] * float(spec.rope_base) ** (-np.arange(half) / half)
    first, second = k[..., :half], k[..., half:]
    turned = [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
    np.testing.assert_allclose(key, np.concatenate(turned, -1), atol=2e-3)  # fp32 angles of up to 2000 radians
