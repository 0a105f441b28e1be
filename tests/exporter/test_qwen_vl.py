"""Qwen-VL's row: its tower sees what the release's code sees, its tokenizer reads as tiktoken does."""

import base64
import json
import os
import random
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import regex
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rtx_builds import expect_rtx_build, serialized
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from torch.nn import functional

from himap_export.exporter.bind import WeightNames
from himap_export.exporter.families import tiktoken as ranks_file
from himap_export.exporter.families.qwen_vl import QwenVl
from himap_export.exporter.families.resize import interpolation
from himap_export.exporter.family import ImageOptions
from himap_export.exporter.vision import vision_graph
from himap_export.graphs.build import StageGraph
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import Rows, WeightRef
from himap_export.graphs.spec import Dtype

TINY = Path(__file__).parents[1] / "fixtures/qwen-vl-tiny"
CONFIG: dict[str, Any] = json.loads((TINY / "config.json").read_text())
GOLDEN = np.load(TINY / "golden_k2_5_n128_32.npz")["image_features"]
RELEASED = {"heads": 16, "image_size": 448, "image_start_id": 151857, "layers": 48, "mlp_ratio": 4.9231}
RELEASED |= {"output_dim": 4096, "patch_size": 14, "width": 1664}


def graph(visual: dict[str, Any], dtype: Dtype) -> StageGraph:
    config = {**CONFIG, "hidden_size": visual["output_dim"], "visual": visual}
    family = QwenVl.parse(config)
    spec = family.vision(ImageOptions())
    return vision_graph("vision", family, spec, hidden=visual["output_dim"], dtype=dtype, names=WeightRef)


def stored(tensors: dict[str, NDArray[Any]], family: QwenVl, role: str) -> NDArray[Any]:
    """The tensor, or the rows of it, that `role` is."""
    whole, rows = tensors[next(family.names(role))], family.rows(role)
    return whole if rows is None else whole[slice(*rows)]


def test_image_features_are_the_releases() -> None:
    made = graph(CONFIG["visual"], "fp32")
    tensors = load_file(TINY / "model.safetensors")
    weights = {role: stored(tensors, QwenVl.parse(CONFIG), role) for role in made.weights}
    assert {role: weight.shape for role, weight in weights.items()} == {
        name: spec.shape for name, spec in made.weights.items()
    }
    pixels = np.load(TINY / "inputs.npz")["pixel_values"]
    session = onnxruntime.InferenceSession(serialized(made), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixel_values": pixels, **weights})
    assert found.shape == (1, 256, 128)
    np.testing.assert_allclose(found, GOLDEN, atol=1e-4, rtol=0)
    (other,) = session.run(None, {"pixel_values": np.ascontiguousarray(pixels[:, :, ::-1]), **weights})
    assert np.abs(other - GOLDEN).max() > 0.1


def test_one_attention_a_layer_and_the_resizing_in_fp32() -> None:
    made = graph(CONFIG["visual"], "fp16")
    assert Counter(node.op_type for node in made.model.graph)["Attention"] == 3 + 1
    tables = {name: v for name, v in made.model.graph.initializers.items() if name.endswith("_resize")}
    assert {name: v.dtype for name, v in tables.items()} == dict.fromkeys(
        ("visual.patch_resize", "visual.key_resize"), ir.DataType.FLOAT
    )
    same = graph({**CONFIG["visual"], "image_size": 224}, "fp16")
    assert not any(name.endswith("_resize") for name in same.model.graph.initializers)
    assert same.weights == made.weights


def test_every_tensor_of_the_release_has_one_role() -> None:
    """Fused tensors are used whole, by rows that do not overlap."""
    spec, used = QwenVl.parse(CONFIG).decoder(), Counter[str]()
    tensors = load_file(TINY / "model.safetensors")
    parts = ["input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.o_proj.weight"]
    parts += [f"self_attn.{which}_proj.{kind}" for which in "qkv" for kind in ("weight", "bias")]
    parts += [f"mlp.{which}_proj.weight" for which in ("gate", "up", "down")]
    roles = [f"layers.{i}.{part}" for i in range(spec.layers) for part in parts]
    roles += ["embed_tokens.weight", "norm.weight", "lm_head.weight", *graph(CONFIG["visual"], "fp32").weights]
    family = QwenVl.parse(CONFIG)
    names = [(name, family.rows(role)) for role in roles for name in family.names(role)]
    assert len(set(names)) == len(names) == len(roles)
    for role in roles:
        used[next(family.names(role))] += stored(tensors, family, role).size
    assert used == {name: tensor.size for name, tensor in tensors.items()}


def test_names_of_the_release() -> None:
    config = {**CONFIG, "kv_channels": 128, "num_attention_heads": 32, "visual": RELEASED}
    known = WeightNames((), family := QwenVl.parse(config))
    wanted = {
        "layers.31.self_attn.k_proj.bias": "transformer.h.31.attn.c_attn.bias[4096:8192]",
        "layers.0.self_attn.q_proj.weight": "transformer.h.0.attn.c_attn.weight[0:4096]",
        "layers.0.mlp.gate_proj.weight": "transformer.h.0.mlp.w2.weight",
        "layers.0.mlp.up_proj.weight": "transformer.h.0.mlp.w1.weight",
        "visual.attn_pool.attn.v_proj.bias": "transformer.visual.attn_pool.attn.in_proj_bias[8192:12288]",
        "visual.attn_pool.attn.out_proj.bias": "transformer.visual.attn_pool.attn.out_proj.bias",
        "visual.conv1.weight": "transformer.visual.conv1.weight",
    }
    assert {role: known(role).name for role in wanted} == wanted
    parts = {role: known(role).rows for role in wanted}
    assert [role for role, rows in parts.items() if rows] == [role for role, name in wanted.items() if "[" in name]
    assert parts["layers.31.self_attn.k_proj.bias"] == Rows("transformer.h.31.attn.c_attn.bias", 4096, 8192)
    assert all(len(list(family.names(role))) == 1 for role in wanted)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_tensorrt_rtx_builds_heads_of_the_published_width(dtype: Dtype) -> None:
    """Heads of 104 in the tower, of 128 in the resampler with more keys than queries: fused, or the build fails."""
    made = graph({**RELEASED, "layers": 1, "width": 208, "heads": 2, "output_dim": 256}, dtype)
    expect_rtx_build(made)


def test_decoder() -> None:
    spec = QwenVl.parse(CONFIG).decoder()
    assert (spec.layers, spec.hidden, spec.ffn, spec.heads, spec.kv_heads, spec.head_dim) == (8, 128, 256, 4, 4, 32)
    assert (spec.vocab, spec.norm_eps, spec.rope_base) == (320, 1e-6, 10000.0)
    assert spec.qkv_bias and not spec.out_bias and not spec.mlp_bias


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"no_bias": False}, "unsupported bias of linear layers"),
        ({"rotary_pct": 0.5}, "unsupported part of a head that is rotated"),
        ({"hidden_size": 256}, "unsupported width of vision features 128"),
        ({"visual": {**CONFIG["visual"], "n_queries": 200}}, "200 queries are no square"),
        ({"visual": {**CONFIG["visual"], "image_size": 225}}, "images of 225 pixels are no whole patches of 14"),
        (
            {"visual": {**CONFIG["visual"], "output_dim": 64}, "hidden_size": 64},
            "64 channels are no whole heads of 128",
        ),
    ],
)
def test_other_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    config = {**CONFIG, **change}
    with pytest.raises(HimapError, match=message) as caught:
        QwenVl.parse(config).decoder(), QwenVl.parse(config).vision(ImageOptions())
    assert caught.value.code == Exit.USAGE


def test_pictures_have_one_size() -> None:
    spec = QwenVl.parse(CONFIG).vision(ImageOptions())
    assert (spec.size, spec.tokens, spec.grid, spec.tiles) == ((280, 280), 256, (16, 16), 1)
    with pytest.raises(HimapError, match="an image size of 448x448"):
        QwenVl.parse(CONFIG).vision(ImageOptions((448, 448)))
    how = QwenVl.parse(CONFIG).image(spec)
    assert how.output_size == (280, 280) and how.crop is None and how.pad_color is None and how.resample == "bicubic"


def test_prompt() -> None:
    rules = QwenVl.parse({**CONFIG, "visual": RELEASED}).prompt()
    assert (rules.image_token, rules.between) == (151859, (151857, 151858))
    assert (rules.eos, rules.pad, rules.positions) == ((151645, 151644, 151643), 151643, 2048)
    assert rules.lead.count(rules.image_text) == rules.lead.count("{n}") == 1
    assert all(rules.template.count(part) == 1 for part in ("{pictures}", "{prompt}"))
    assert rules.turn.count("{prompt}") == 1
    fixed = QwenVl.parse({**CONFIG, "use_dynamic_ntk": False, "use_logn_attn": False}).prompt()
    assert (fixed.eos, fixed.pad, fixed.positions) == ((88, 87, 86), 86, 8192)
    tiny = QwenVl.parse({**CONFIG, "visual": {**CONFIG["visual"], "image_start_id": 60}}).prompt()
    assert (tiny.eos, tiny.pad) == ((60,), 60)


@pytest.mark.parametrize(("old", "new"), [(16, 32), (16, 24), (16, 16), (4, 7), (32, 16), (1, 3)])
def test_interpolation_is_torchs(old: int, new: int) -> None:
    matrix = torch.from_numpy(interpolation(old, new))
    assert matrix.shape == (new, old) and matrix.dtype == torch.float32
    grid = torch.randn(1, 3, old, old, generator=torch.Generator().manual_seed(0))
    wanted = functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    torch.testing.assert_close(matrix @ grid @ matrix.T, wanted, atol=1e-5, rtol=0)


TEXT = (
    Path(__file__).parents[2] / "README.md"
).read_text() + "Größe naïve Ünïcödé 日本語 こんにちは ελληνικά  \n\n\t x  " * 20


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """A byte-level BPE trained on some text: the 256 bytes and 600 merges, the most frequent pair first."""
    table = {bytes([byte]): byte for byte in range(256)}
    words = Counter(tuple(bytes([b]) for b in word.encode()) for word in regex.findall(ranks_file.PATTERN, TEXT))
    while len(table) < 856:
        pairs = Counter[tuple[bytes, bytes]]()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        (left, right), _ = pairs.most_common(1)[0]
        table.setdefault(left + right, len(table))
        words = Counter({merged(word, left, right): count for word, count in words.items()})
    return table


def merged(word: tuple[bytes, ...], left: bytes, right: bytes) -> tuple[bytes, ...]:
    made: list[bytes] = []
    for part in word:
        if made and made[-1] == left and part == right:
            made[-1] = left + right
        else:
            made.append(part)
    return tuple(made)


@pytest.fixture(scope="module")
def both(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, tiktoken.Encoding]:
    folder = tmp_path_factory.mktemp("tiktoken")
    write(folder, ranks)
    specials = {token: len(ranks) + i for i, token in enumerate(ranks_file.SPECIALS)}
    made = starting_at(specials["<img>"]).tokenizer(folder)
    assert made is not None
    truth = tiktoken.Encoding("qwen", pat_str=ranks_file.PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    return Tokenizer.from_buffer(made), truth


def starting_at(image: int) -> QwenVl:
    """The model whose <img> has the id `image`."""
    return QwenVl.parse({**CONFIG, "visual": {**CONFIG["visual"], "image_start_id": image}})


def write(folder: Path, ranks: dict[bytes, int]) -> Path:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (folder / "qwen.tiktoken").write_text("".join(lines))
    return folder / "qwen.tiktoken"


def same(both: tuple[Tokenizer, tiktoken.Encoding], text: str) -> None:
    ours, truth = both
    normal = unicodedata.normalize("NFC", text)  # as tokenization_qwen.py does before it encodes
    ids = ours.encode(text).ids
    assert ids == truth.encode(normal, allowed_special="all")
    if not any(token in text for token in ranks_file.SPECIALS):
        assert ours.decode(ids) == normal


AWKWARD = [
    "", " ", "\n", "\r\n \r\n", "  a  b  ", "I'Ve it'S we'll THEY'D", "x1234567890", "e\u0301 \u1e9b\u0323 가 \ufb01",
    "🇩🇪👩\u200d👩\u200d👧 \u200d\ufe0f", "a\u00a0b\u3000c\u2028d\x85e\x1cf\x0bg", "aaaaaaaaaaaaaaaaaaaaaaa",
    "\x00\x7f\ufffd\U0010ffff", "\u017f'\u017f '\u017f \u212a", "_-_''\"\"``  \t\t\n\t", "e<img>\u0301", "<|im_start|",
    "Picture 1: <img><imgpad><imgpad></img>\nWhat?<|im_end|>\n<|im_start|>assistant\n", "<|extra_204|><|extra_205|>",
    "\u2460\u00b2\u0661\u216b", "हिन्दी ไทย العربية עברית",
]  # fmt: skip


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_is_read_as_tiktoken_does(both: tuple[Tokenizer, tiktoken.Encoding], text: str) -> None:
    same(both, text)


@given(st.text(max_size=80))
def test_any_text_is_read_as_tiktoken_does(both: tuple[Tokenizer, tiktoken.Encoding], text: str) -> None:
    same(both, text)


def test_long_text_is_read_as_tiktoken_does(both: tuple[Tokenizer, tiktoken.Encoding]) -> None:
    same(both, TEXT)
    pieces = [*ranks_file.SPECIALS, *AWKWARD, *TEXT.split(), *TEXT[:400]]
    chosen = random.Random(0)
    for _ in range(300):
        same(both, "".join(chosen.choices(pieces, k=chosen.randint(1, 30))))


def test_special_tokens_stand_behind_the_ranks(both: tuple[Tokenizer, tiktoken.Encoding]) -> None:
    ours, count = both[0], 856
    known = {token: ours.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>", "<img>", "<imgpad>")}
    assert known == {"<|endoftext|>": count, "<|im_end|>": count + 2, "<img>": count + 214, "<imgpad>": count + 216}
    assert len(ranks_file.SPECIALS) == 217


def test_damaged_ranks_are_refused(ranks: dict[bytes, int], tmp_path: Path) -> None:
    family = starting_at(856 + 214)
    assert family.tokenizer(tmp_path) is None
    file = write(tmp_path, ranks)
    content = file.read_bytes()
    refused(tmp_path, starting_at(857 + 214), "<imgpad> is 1072 behind its 856 tokens, 1073 in the model's config")
    half = b"\n".join(content.splitlines()[:200])
    cases = [
        (half, "56 of the 256 bytes"), (b"", "256 of the 256 bytes"), (b"version https://git-lfs", "line 1 is no"),
        (content.replace(b" 700\n", b" 7OO\n"), "7OO"), (content[:5000] + content[5100:], "damaged"),
        (content.replace(b" 700\n", b" 701\n"), "rank 701, expected a new token and 700"), (b"\xff\xfe 0\n", "damaged"),
        (content + b"AAE= 856 x\n", "line 857 is no token"), (content + b"A 856\n", "line 857 is no token"),
        (content + b"AA== 856\n", "expected a new token"), (content + b"QUFB" * 900 + b" 856\n", "expected a new"),
    ]  # fmt: skip
    for damaged, message in cases:
        file.write_bytes(damaged)
        refused(tmp_path, family, message)
    os.truncate(file, 10**9)
    refused(tmp_path, family, "too large")
    file.unlink()
    os.mkfifo(file)
    refused(tmp_path, family, "it is not a plain file")


def refused(folder: Path, family: QwenVl, message: str) -> None:
    with pytest.raises(HimapError) as caught:
        family.tokenizer(folder)
    assert message in str(caught.value) and "qwen.tiktoken" in str(caught.value)
