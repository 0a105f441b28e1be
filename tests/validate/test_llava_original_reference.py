"""The reference of LLaVA's original layout against the authors' numbers and against Hugging Face's layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, Inputs, make_inputs, make_llava
from transformers import LlavaForConditionalGeneration

from himap_export.validate.reference.legacy.llava_original import LlavaOriginal, load

INTERN = Path(__file__).parents[1] / "fixtures/internvl-v1-tiny"


def last_logits(model: LlavaOriginal, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Unpruned logits [W] at the last of `ids` [S], whose image tokens are `features` [V,D]."""
    image = model.is_image(ids)
    with torch.no_grad():
        embedded = model.causal.model.embed_tokens(torch.where(image, 0, ids))
        embedded[image] = features
        found: torch.Tensor = model.causal(inputs_embeds=embedded[None]).logits[0, -1]
    return found


@pytest.mark.parametrize("inside", [False, True])
def test_intern_vit_gives_the_authors_numbers(inside: bool, tmp_path: Path) -> None:
    """`inside`: the tower's tensors are in the checkpoint, its folder holds only the configuration."""
    folder = INTERN
    if inside:
        folder = tmp_path / "model"
        shutil.copytree(INTERN, folder)
        tower = folder / "vision_tower_intern_vit_6b/model.safetensors"
        stored = {f"model.vision_tower.vision_tower.{name}": value for name, value in load_file(tower).items()}
        save_file(stored, folder / "tower.safetensors")
        tower.unlink()
    model = load(folder, torch.float32, "eager", "sdpa")
    inputs, golden = np.load(INTERN / "inputs.npz"), np.load(INTERN / "golden_k2_5_n288_72.npz")
    features = model.image_features(torch.from_numpy(inputs["pixel_values"]))
    np.testing.assert_allclose(features.detach().numpy(), golden["image_features"], atol=1e-4, rtol=0)
    ids = torch.from_numpy(inputs["input_ids"][0])
    assert int(model.is_image(ids).sum()) == features.shape[1] == 576
    np.testing.assert_allclose(last_logits(model, ids, features[0]), golden["unpruned_last"][0], atol=1e-3, rtol=0)
    assert (model.stop_tokens, model.pad_token) == ((2,), 0)
    assert len(model.tower.encoder.layer) == 3 and not model.training


def original(folder: Path, source: Path, inside: bool) -> None:
    """The Hugging Face LLaVA of `source` in the original layout, its tower in a folder of its own unless `inside`."""
    config = json.loads((source / "config.json").read_text())
    made = config["text_config"] | {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}
    made |= {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": config["vision_feature_layer"]}
    made |= {"mm_vision_tower": "tower"}
    home = "model.vision_tower.vision_tower." if inside else ""
    renamed = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "vision_tower.": home}
    renamed |= {f"multi_modal_projector.linear_{i}.": f"model.mm_projector.{2 * i - 2}." for i in (1, 2)}
    parts: dict[Path, dict[str, torch.Tensor]] = {folder: {}, folder / "tower": {}}
    for name, value in load_file(source / "model.safetensors").items():
        old = next(old for old in renamed if name.startswith(old))
        apart = old == "vision_tower." and not inside
        parts[folder / "tower" if apart else folder][renamed[old] + name.removeprefix(old)] = value
    for home_folder, content in ((folder, made), (folder / "tower", config["vision_config"])):
        home_folder.mkdir()
        (home_folder / "config.json").write_text(json.dumps(content))
        if parts[home_folder]:
            save_file(parts[home_folder], home_folder / "model.safetensors")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Inputs]:
    folder = tmp_path_factory.mktemp("llava")
    return folder, make_inputs(make_llava(folder, TINY["biased"], vision_feature_layer=-2))


@pytest.mark.parametrize("inside", [False, True])
def test_clip_is_the_same_model_in_both_layouts(source: tuple[Path, Inputs], inside: bool, tmp_path: Path) -> None:
    folder, inputs = source
    original(tmp_path / "model", folder, inside)
    model = load(tmp_path / "model", torch.float32, "eager", "eager")
    there: Any = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    ids, pixels = torch.from_numpy(inputs.input_ids), torch.from_numpy(inputs.pixel_values)
    with torch.no_grad():
        wanted = there(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[0, -1]
        features = there.model.get_image_features(pixel_values=pixels).pooler_output[0]
    assert torch.equal(model.image_features(pixels)[0], features)
    ours = torch.where(ids[0] == there.config.image_token_id, -200, ids[0])
    torch.testing.assert_close(last_logits(model, ours, features), wanted, atol=1e-5, rtol=0)


def test_dtype_and_attention_are_the_asked_ones() -> None:
    model = load(INTERN, torch.float16, "sdpa", "eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.causal.config._attn_implementation == "sdpa" and model.tower.config._attn_implementation == "eager"
    assert model.causal.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.up_proj.weight",
        "lm_head.weight",
        "model.mm_projector.2.bias",
        "encoder.layers.2.attn.qkv.weight",
        "encoder.layers.0.ls1",
        "embeddings.position_embedding",
    ],
)
def test_a_missing_tensor_is_no_random_one(name: str, tmp_path: Path) -> None:
    shutil.copytree(INTERN, tmp_path / "model")
    tower = name.startswith(("encoder", "embeddings"))
    file = tmp_path / "model" / ("vision_tower_intern_vit_6b" if tower else "") / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="does not hold"):
        load(tmp_path / "model", torch.float32, "eager", "eager")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"mm_vision_tower": "nobody/nothing"}, OSError, "nobody/nothing"),
        ({"mm_vision_tower": None}, ValueError, "mm_vision_tower"),
        ({"mm_vision_tower": "/etc"}, OSError, "`vision_tower`"),
        ({"mm_vision_tower": "../model/../elsewhere"}, OSError, "`vision_tower`"),
        ({"mm_projector_type": "resampler"}, ValueError, "resampler"),
        ({"mm_projector_type": "mlp1000000000x_gelu"}, ValueError, "unknown mm_projector_type"),
        ({"mm_vision_select_layer": -8}, ValueError, "6 layers"),
        ({"mm_vision_select_feature": "cls"}, ValueError, "cls_patch"),
    ],
)
def test_other_variations_are_refused(
    changes: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    shutil.copytree(INTERN, tmp_path / "model")
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(error, match=words):
        load(tmp_path / "model", torch.float32, "eager", "eager")
