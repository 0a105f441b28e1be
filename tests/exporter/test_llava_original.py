"""LLaVA's original layout: the vision graphs of both towers, names, and tokenizers made from SentencePiece models."""

import io
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tiny import TINY, make_inputs, make_llava
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import import_protobuf

from himap_export.engines.prompt import encode
from himap_export.exporter.families import llava
from himap_export.exporter.families.llava_original import TEMPLATE, LlavaOriginal
from himap_export.exporter.family import ImageOptions
from himap_export.exporter.prompts import default_prompt
from himap_export.exporter.registry import AnyFamily
from himap_export.exporter.vision import vision_graph
from himap_export.graphs.build import StageGraph
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import WeightRef

INTERN = Path(__file__).parents[1] / "fixtures/internvl-v1-tiny"
TOWER = INTERN / "vision_tower_intern_vit_6b"
PROJECTOR = {f"multi_modal_projector.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
Weights = Mapping[str, NDArray[Any]]


def intern(**changes: Any) -> dict[str, Any]:
    """The fixture's configuration with its tower's, as the registry merges them."""
    config: dict[str, Any] = json.loads((INTERN / "config.json").read_text())
    return config | {"vision_config": json.loads((TOWER / "config.json").read_text())} | changes


def intern_weights() -> dict[str, NDArray[Any]]:
    return load_file(INTERN / "model.safetensors") | load_file(TOWER / "model.safetensors")


def original(config: dict[str, Any], weights: Weights, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A Hugging Face LLaVA's configuration and tensors in the original layout, the tower inside the checkpoint."""
    made = {**config["text_config"], "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"}
    made |= {"mm_vision_tower": "openai/clip-vit-tiny", "mm_projector_type": "mlp2x_gelu"}
    made |= {"mm_vision_select_layer": config["vision_feature_layer"], "vision_config": config["vision_config"]}
    renamed = {
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.vision_tower.",
        "multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    }
    tensors = {}
    for name, value in weights.items():
        old, new = next((old, new) for old, new in renamed.items() if name.startswith(old))
        tensors[new + name.removeprefix(old)] = value
    return made | changes, tensors


def features(kind: AnyFamily, config: dict[str, Any], weights: Weights, pixels: NDArray[np.float32]) -> NDArray[Any]:
    """What the vision graph makes of `pixels` [n,3,H,W], one at a time, its weights the tensors that the family
    names."""
    family = kind.parse(config)
    spec, hidden = family.vision(ImageOptions()), family.decoder().hidden
    graph = vision_graph("vision", family, spec, hidden=hidden, dtype="fp32", names=WeightRef)
    feeds = {role: next(weights[n] for n in family.names(role) if n in weights) for role in graph.weights}
    assert {role: value.shape for role, value in feeds.items()} == {
        name: spec.shape for name, spec in graph.weights.items()
    }
    run = session(graph)
    found = np.concatenate([run.run(None, {"pixel_values": one[None], **feeds})[0] for one in pixels])
    assert found.shape == (len(pixels), spec.tokens, hidden)
    return found


def session(graph: StageGraph) -> onnxruntime.InferenceSession:
    data = ir.to_proto(graph.model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


def test_intern_vit_gives_the_authors_features() -> None:
    pixels = np.load(INTERN / "inputs.npz")["pixel_values"]
    golden = np.load(INTERN / "golden_k2_5_n288_72.npz")["image_features"]
    np.testing.assert_allclose(features(LlavaOriginal, intern(), intern_weights(), pixels), golden, atol=1e-4, rtol=0)


def test_intern_vit_inside_the_checkpoint_with_its_class_token() -> None:
    """`cls_patch` puts one token in front; the tensors' published names come first."""
    weights = load_file(INTERN / "model.safetensors")
    inside = {f"model.vision_tower.vision_tower.{n}": t for n, t in load_file(TOWER / "model.safetensors").items()}
    pixels = np.load(INTERN / "inputs.npz")["pixel_values"]
    golden = np.load(INTERN / "golden_k2_5_n288_72.npz")["image_features"]
    config = intern(mm_vision_select_feature="cls_patch")
    spec = LlavaOriginal.parse(config).vision(ImageOptions())
    assert (spec.tokens, spec.grid) == (577, (24, 24))
    found = features(LlavaOriginal, config, weights | inside, pixels)
    np.testing.assert_allclose(found[:, 1:], golden, atol=1e-4, rtol=0)


def test_intern_vit_has_only_the_layers_that_are_read() -> None:
    family = LlavaOriginal.parse(intern())
    spec = family.vision(ImageOptions())
    graph = vision_graph(
        "vision", family, spec, hidden=64, dtype="fp16", names=lambda role: WeightRef(next(family.names(role)))
    )
    prefix = "model.vision_tower.vision_tower."
    layers = {name.removeprefix(prefix).split(".")[2] for name in graph.weights if ".encoder." in name}
    assert layers == {"0", "1", "2"}  # of 6; hidden state -4
    assert {node.op_type for node in graph.model.graph} >= {"Attention", "RMSNormalization", "Gelu"}
    positions = [node for node in graph.model.graph if node.op_type == "MatMul" and "resize" in str(node.inputs[0])]
    assert len(positions) == 2 and all(node.outputs[0].dtype == ir.DataType.FLOAT for node in positions)


@pytest.mark.parametrize(("side", "tower"), [(336, "./intern_vit_6b"), (448, "OpenGVLab/InternViT-6B-448px")])
def test_intern_vit_sees_the_size_that_its_name_tells(side: int, tower: str) -> None:
    config = intern(mm_vision_tower=tower)
    spec = LlavaOriginal.parse(config).vision(ImageOptions())
    how = LlavaOriginal.parse(config).image(spec)
    assert spec.size == how.output_size == (side, side) and how.pad_color == (123, 116, 103)
    assert how.mean == (0.485, 0.456, 0.406) and how.std == (0.229, 0.224, 0.225)
    assert LlavaOriginal.parse(config).tower() == tower


@pytest.fixture(scope="module", params=["mha", "biased", "gqa2"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """One tiny LLaVA: its inputs, its Hugging Face configuration and tensors."""
    folder = tmp_path_factory.mktemp("llava")
    tiny = make_llava(folder, replace(TINY[request.param]))
    return make_inputs(tiny), json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.slow  # test_originals.py compares both layouts through the commands
def test_clip_gives_the_same_graph_in_both_layouts(both: tuple[Any, ...]) -> None:
    inputs, config, weights = both
    made, tensors = original(config, weights)
    wanted = features(llava.Llava, config, weights, inputs.pixel_values)
    assert np.array_equal(features(LlavaOriginal, made, tensors, inputs.pixel_values), wanted)
    # As openai's checkpoints store the tower by itself, with or without its text encoder's siblings.
    apart = {name.replace("model.vision_tower.vision_tower.", ""): value for name, value in tensors.items()}
    nested = made | {"vision_config": {"model_type": "clip", "vision_config": config["vision_config"]}}
    assert np.array_equal(features(LlavaOriginal, nested, apart, inputs.pixel_values), wanted)
    graphs = [
        vision_graph(
            "vision",
            family,
            family.vision(ImageOptions()),
            hidden=wanted.shape[-1],
            dtype="fp32",
            names=WeightRef,
        )
        for family in (llava.Llava.parse(config), LlavaOriginal.parse(made))
    ]
    kinds = ("Conv", "LayerNormalization", "Gemm", "MatMul", "Attention", "Gelu")
    counts = [[sum(node.op_type == kind for node in graph.model.graph) for kind in kinds] for graph in graphs]
    assert counts[0] == counts[1] and graphs[0].weights.keys() - graphs[1].weights.keys() == PROJECTOR


def test_decoder_and_prompt(both: tuple[Any, ...]) -> None:
    _, config, weights = both
    made, tensors = original(config, weights, pad_token_id=0, eos_token_id=2, image_aspect_ratio="pad")
    assert LlavaOriginal.parse(made).decoder() == llava.Llava.parse(config).decoder()
    for role in ("embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "norm.weight", "lm_head.weight"):
        assert next(LlavaOriginal.parse(made).names(role)) in tensors
    rules = LlavaOriginal.parse(made).prompt()
    assert (rules.image_token, rules.eos, rules.pad, rules.positions) == (-200, (2,), 0, 2048)
    spec = LlavaOriginal.parse(made).vision(ImageOptions())
    assert LlavaOriginal.parse(made).image(spec).pad_color == (122, 116, 104)
    assert LlavaOriginal.parse(made | {"image_aspect_ratio": None}).image(spec).pad_color is None


@pytest.mark.parametrize(("kind", "width"), [("linear", 64), ("mlp1x_gelu", 64), ("mlp3x_gelu", 64), ("identity", 64)])
def test_projectors(kind: str, width: int) -> None:
    config = intern(mm_projector_type=kind)
    spec = LlavaOriginal.parse(config).vision(ImageOptions())
    made = LlavaOriginal.parse(config).module(spec, torch.float16)
    found = sorted(name for name, _ in made.named_parameters() if name.startswith("mm_projector"))
    wanted = {
        "linear": ["mm_projector"],
        "mlp1x_gelu": ["mm_projector.0"],
        "mlp3x_gelu": ["mm_projector.0", "mm_projector.2", "mm_projector.4"],
        "identity": [],
    }[kind]
    assert found == [f"{name}.{part}" for name in wanted for part in ("bias", "weight")]
    assert all(parameter.is_meta and parameter.dtype == torch.float16 for parameter in made.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"mm_projector_type": "resampler"},
        {"mm_vision_select_feature": "cls"},
        {"mm_vision_select_layer": -8},
        {"image_aspect_ratio": "anyres"},
        {"mm_hidden_size": 65},
        {"mm_use_im_start_end": True},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"hidden_act": "relu"},
        {"vision_config": {"model_type": "eva"}},
        {"vision_config": intern()["vision_config"] | {"norm_type": "layer_norm"}},
    ],
)
def test_other_variations_are_refused(changes: dict[str, Any]) -> None:
    config = intern(**changes)
    with pytest.raises(HimapError) as caught:
        family = LlavaOriginal.parse(config)
        family.prompt()
        family.decoder()
        family.module(family.vision(ImageOptions()), torch.float32)
    assert caught.value.code == Exit.USAGE


CORPUS = ["A chat between a curious human and an assistant.", "USER: What is in the picture?", "ASSISTANT: a red cat"]


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a tokenizer.model trained as LLaMA's, and SentencePiece itself."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vicuna")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder, sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize(
    "question",
    ["What is in the picture?", "", "  two  spaces ", "\n\ttabs\n", "Ærøskøbing 漢字 🙂 12345", "▁ a▁b", "a" * 50],
)
def test_tokenizer_encodes_as_the_original(sentences: tuple[Path, Any], question: str) -> None:
    """LLaVA's `tokenizer_image_token`: BOS, then each text around the image by itself, as SentencePiece does it."""
    folder, slow = sentences
    made = LlavaOriginal.parse(intern()).tokenizer(folder)
    assert made is not None
    fast, how = Tokenizer.from_buffer(made), default_prompt(LlavaOriginal.parse(intern()).prompt())
    assert how.picture.id == -200 and fast.token_to_id("<image>") == slow.vocab_size()
    for count in (1, 2):
        before, *after = (
            TEMPLATE.replace("{pictures}", "<image>\n" * count).replace("{prompt}", question).split("<image>")
        )
        behind = [token for text in after for token in (*[-200] * 3, *slow.encode(text))]
        found = encode(fast, how, question, ["<image>" * 3] * count)
        assert found.tolist() == [slow.bos_id(), *slow.encode(before), *behind]
    answer = slow.encode(question)
    assert fast.decode(answer) == slow.decode(answer)


def test_tokenizer_keeps_the_ids_of_added_tokens(sentences: tuple[Path, Any], tmp_path: Path) -> None:
    folder, slow = sentences
    family, count = LlavaOriginal.parse(intern()), slow.vocab_size()
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im_end>": count + 1, "[PAD]": count}))
    made = family.tokenizer(tmp_path)
    assert made is not None
    tokenizer = Tokenizer.from_buffer(made)
    found = [tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>", "[PAD]", "<im_end>", "<image>")]
    assert found == [0, 1, 2, count, count + 1, count + 2]
    assert tokenizer.encode("a</s>").ids == [1, *slow.encode("a"), 2]
    for broken in ('{"<im_end>": 5}', "[]", "{"):
        (tmp_path / "added_tokens.json").write_text(broken)
        with pytest.raises(HimapError, match="added_tokens"):
            family.tokenizer(tmp_path)


def test_no_or_a_damaged_tokenizer_model(tmp_path: Path) -> None:
    family = LlavaOriginal.parse(intern())
    assert family.tokenizer(tmp_path) is None
    for broken in (b"", b"\xff\xff not protobuf"):
        (tmp_path / "tokenizer.model").write_bytes(broken)
        with pytest.raises(HimapError, match="tokenizer cannot be loaded"):
            family.tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    os.mkfifo(tmp_path / "tokenizer.model")  # as if there were none, it was once said
    with pytest.raises(HimapError, match="it is not a plain file"):
        family.tokenizer(tmp_path)


def test_pieces_that_cost_too_much_or_are_there_twice(sentences: tuple[Path, Any], tmp_path: Path) -> None:
    """All halves of a piece are looked up: a megabyte has a million."""
    model = import_protobuf().ModelProto()
    for change in ("x" * 1_000_000, "<s>", ""):
        model.ParseFromString((sentences[0] / "tokenizer.model").read_bytes())
        model.pieces[-1].piece = change
        (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
        with pytest.raises(HimapError, match="pieces twice, empty ones, or some of more than 1000 letters"):
            LlavaOriginal.parse(intern()).tokenizer(tmp_path)
