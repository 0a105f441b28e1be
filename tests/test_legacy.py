"""The releases that transformers cannot load: goldens of their own code, and random checkpoints of other sizes.

A golden proves the reference and the bundle; other sizes go against the reference, which is Hugging Face's modules.
"""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from commands import ORT, Workshop, call, golden_inputs, padded, plan_flags, save_inputs
from legacy import FIXTURES, make_both_layouts, make_internvl_v1, make_qwen_vl
from PIL import Image
from tiny import TINY, make_inputs

from himap_export.engines.cli import main as run_main
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.errors import Exit
from himap_export.validate.cli import main as validate_main
from himap_export.validate.reference.criteria import Cuts, reference_himap
from himap_export.validate.reference.reference import Reference

GOLDEN = {
    ("qwen-vl-tiny", "golden_k2_5_n128_32.npz"): reference_himap(2, 5, 0.5, 0.75),
    ("qwen-vl-tiny", "golden_k1_4_n128_64.npz"): reference_himap(1, 4, 0.5, 0.5),
    ("internvl-v1-tiny", "golden_k2_5_n288_72.npz"): reference_himap(2, 5, 0.5, 0.75),
}
SMALL = ("--text-budget", "40", "--max-new-tokens", "8", *ORT)


def export(folder: Path, checkpoint: Path, *flags: object) -> Path:
    assert call(export_main, checkpoint, *SMALL, *flags, "--out", folder) == 0
    return folder


@pytest.mark.parametrize(("fixture", "name"), GOLDEN)
def test_kept_positions_and_logits_are_the_releases(work: Workshop, tmp_path: Path, fixture: str, name: str) -> None:
    golden, cuts = np.load(FIXTURES / fixture / name), GOLDEN[fixture, name]
    inputs = golden_inputs(FIXTURES / fixture)
    pruned = work.answer(export(tmp_path / "pruned", FIXTURES / fixture, *plan_flags(cuts)), inputs)
    for got, wanted in (("kept_k1", "kept1"), ("kept_k2", "kept2")):
        np.testing.assert_array_equal(pruned[got], padded(golden[wanted][None], pruned[got].shape[1]))
    np.testing.assert_allclose(pruned["logits"], golden["logits_last"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(pruned["image_features"], golden["image_features"], rtol=0, atol=1e-3)
    whole = work.answer(export(tmp_path / "whole", FIXTURES / fixture, "--policy", "none"), inputs)
    np.testing.assert_allclose(whole["logits"], golden["unpruned_last"], rtol=0, atol=1e-3)
    assert np.abs(golden["logits_last"] - golden["unpruned_last"]).max() > 0.05
    reference = Reference(FIXTURES / fixture).prefill(inputs.input_ids, inputs.pixel_values, cuts=cuts)
    np.testing.assert_allclose(reference.logits, golden["logits_last"], rtol=0, atol=1e-3)
    for found, score in zip(reference.scores, ("score1", "score2"), strict=True):
        np.testing.assert_allclose(found[0], golden[score], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("dtype", "batch"), [("fp32", 3), pytest.param("fp16", 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "make",
    [
        lambda folder: make_qwen_vl(folder, seed=1),
        lambda folder: make_qwen_vl(folder, seed=2, layers=6, heads=4, side=224, width=64),
        lambda folder: make_internvl_v1(folder, seed=3),
        lambda folder: make_internvl_v1(folder, seed=4, layers=7, heads=4, tower=8, width=48),
    ],
    ids=["qwen", "qwen-without-resizing", "internvl", "internvl-deeper"],
)
def test_other_sizes_pass_validation(tmp_path: Path, make: object, dtype: str, batch: int) -> None:
    assert callable(make)
    make(tmp_path / "model")
    flags = ["--k1", 2, "--k2", 4, "--dtype", dtype, "--batch", batch]
    bundle = export(tmp_path / "bundle", tmp_path / "model", *flags)
    assert call(validate_main, bundle, "--no-speed", "--threads", 1, "--prompts", 3) == 0


def test_a_question_to_qwen_vl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own tokenizer, its chat, and pictures stretched to its square; 256 tokens between <img> and </img>."""
    model, picture = tmp_path / "model", tmp_path / "picture.png"
    make_qwen_vl(model, seed=5)
    Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 20).convert("RGB").save(picture)
    bundle = export(tmp_path / "bundle", model, "--text-budget", 200, *plan_flags(reference_himap(2, 4, 0.5, 0.75)))
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["model"]["image"]["between"] == [470, 471] and manifest["model"]["eos_tokens"] == [258, 257, 256]
    flags = ["--image", picture, "--prompt", "What is this, 你?", "--show-kept", tmp_path / "kept.png"]
    capsys.readouterr()
    assert call(run_main, bundle, *flags, "--json", "--threads", 1) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"][0]) >= 1
    assert call(validate_main, bundle, "--image", picture, "--prompt", "And?", "--no-speed", "--threads", 1) == 0
    assert call(export_main, model, "--k2", 4, "--text-budget", 2000, "--out", tmp_path / "long") == Exit.USAGE
    assert "the model has 2048" in capsys.readouterr().err


def test_a_question_to_llava_in_its_own_layout(tmp_path: Path) -> None:
    """Its SentencePiece tokenizer knows no <image>; ids say -200 there, as the release's code does."""
    model, picture = io.BytesIO(), tmp_path / "picture.png"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["USER: what is this? ASSISTANT: a picture of a cat"] * 40), model_writer=model,
        vocab_size=320, model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    _, folder = make_both_layouts(tmp_path, replace(TINY["mha"], vision_feature_layer=-2, vocab=400, image_token=399))
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 20).convert("RGB").save(picture)
    bundle = export(tmp_path / "bundle", folder, *plan_flags(reference_himap(2, 4, 0.5, 0.75)), "--text-budget", 250)
    asked = ["--image", picture, "--prompt", "what is this?", "--threads", 1]
    assert call(run_main, bundle, *asked) == 0
    assert call(validate_main, bundle, *asked, "--no-speed") == 0


@pytest.mark.parametrize("cuts", [(), reference_himap(2, 4, 0.5, 0.75)], ids=["unpruned", "himap"])
@pytest.mark.parametrize("name", ["mha", "gqa2"])
def test_both_layouts_of_llava_make_the_same_bundle(work: Workshop, tmp_path: Path, name: str, cuts: Cuts) -> None:
    """Bit for bit: the same graphs over the same numbers."""
    tiny = replace(TINY[name], vision_feature_layer=-2)
    inputs, plan = make_inputs(tiny, [9], [5]), plan_flags(cuts) if cuts else ("--policy", "none")
    answers = []
    for folder, token in zip(make_both_layouts(tmp_path, tiny), (tiny.image_token, -200), strict=True):
        ids = np.where(inputs.input_ids == tiny.image_token, token, inputs.input_ids)
        bundle = export(tmp_path / f"bundle{token}", folder, *plan)
        answers.append(work.answer(bundle, replace(inputs, input_ids=ids)))
    assert answers[0].keys() == answers[1].keys()
    for key, value in answers[0].items():
        np.testing.assert_array_equal(value, answers[1][key])


def test_engines_take_the_weights_of_a_checkpoint_and_its_tower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--weights` twice: the tower lies elsewhere. Fused tensors are bound by rows. Without the tower: named."""
    for name, make in (("qwen", make_qwen_vl), ("intern", make_internvl_v1)):
        model, file = tmp_path / name, tmp_path / f"{name}.npz"
        make(model)
        plan = plan_flags(reference_himap(2, 4, 0.5, 0.75))
        whole = export(tmp_path / f"{name}-whole", model, *plan)
        bare = export(tmp_path / f"{name}-bare", model, *plan, "--engines-only")
        fixture = {"qwen": "qwen-vl-tiny", "intern": "internvl-v1-tiny"}[name]
        inputs = golden_inputs(FIXTURES / fixture)
        ids = inputs.input_ids
        if name == "qwen":
            ids = np.where(ids >= 300, ids + 170, ids)
            inputs = replace(inputs, pixel_values=inputs.pixel_values[:, :, :112, :112])
        save_inputs(file, replace(inputs, input_ids=ids))
        towers = [w for f in model.iterdir() if f.is_dir() for w in ("--weights", f)]
        out = [tmp_path / f"{name}-{n}-out.npz" for n in (0, 1)]
        for bundle, weights, answer in ((whole, [], out[0]), (bare, ["--weights", model, *towers], out[1])):
            assert (
                call(run_main, bundle, *weights, "--load-inputs", file, "--save-outputs", answer, "--threads", 1) == 0
            )
        first, second = (np.load(f) for f in out)
        for key in first.files:
            np.testing.assert_array_equal(first[key], second[key])
    capsys.readouterr()
    assert call(run_main, bare, "--weights", model, "--load-inputs", file) == Exit.USAGE
    assert "no tensor embeddings.class_embedding" in capsys.readouterr().err


def test_a_tower_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named by a path, by a tower without weights, and by one that holds another tower's."""
    model, out = tmp_path / "model", tmp_path / "bundle"
    make_internvl_v1(model)
    tower = model / "tower_intern_vit_6b"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "./gone"}))
    assert call(export_main, model, "--out", out) == Exit.MISSING
    assert "./gone" in capsys.readouterr().err
    (model / "config.json").write_text(json.dumps(config))
    (tower / "model.safetensors").rename(tower / "pytorch_model.bin")
    assert call(export_main, model, "--k2", 4, "--out", out) == Exit.MISSING
    assert "weights_only=True" in capsys.readouterr().err  # the one command that converts it
    make_internvl_v1(tmp_path / "other", width=48)
    (tmp_path / "other" / "tower_intern_vit_6b" / "model.safetensors").rename(tower / "model.safetensors")
    assert call(export_main, model, "--k2", 4, "--out", out) == Exit.USAGE
    said = capsys.readouterr().err
    assert "tensor embeddings." in said and "its shape is [" in said and not out.exists()
