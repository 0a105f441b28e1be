"""Hugging Face's modules with the release's weights compute what the release's own code did."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from himap_export.validate.reference.legacy.qwen_vl import QwenVL, load

TINY = Path(__file__).parents[1] / "fixtures/qwen-vl-tiny"
GOLDEN = np.load(TINY / "golden_k2_5_n128_32.npz")
INPUTS = {name: torch.from_numpy(array) for name, array in np.load(TINY / "inputs.npz").items()}


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> QwenVL:
    return load(TINY, torch.float32, request.param, vision_attention=request.param)


def test_image_features(model: QwenVL) -> None:
    found = model.image_features(INPUTS["pixel_values"])
    np.testing.assert_allclose(found.numpy(), GOLDEN["image_features"], atol=1e-4, rtol=0)
    assert GOLDEN["image_features"].std() > 0.05


def test_logits_without_pruning(model: QwenVL) -> None:
    ids = INPUTS["input_ids"]
    with torch.inference_mode():
        embedded = model.causal.model.embed_tokens(ids)
        embedded[0, model.is_image(ids[0])] = model.image_features(INPUTS["pixel_values"])[0]
        last = model.causal.model(inputs_embeds=embedded).last_hidden_state[:, -1]
        found = model.causal.lm_head(last)
    np.testing.assert_allclose(found.numpy(), GOLDEN["unpruned_last"], atol=1e-3, rtol=0)


def test_tokens(model: QwenVL) -> None:
    image = model.is_image(INPUTS["input_ids"][0])
    assert image.nonzero().flatten().tolist() == list(range(10, 266))  # whatever ids: the path's bytes, then padding
    assert (
        model.is_image(torch.tensor([5, 300, 302, 7, 301, 302, 8])).tolist() == [False] * 2 + [True] * 2 + [False] * 3
    )
    assert model.stop_tokens == (88, 87, 86) and model.pad_token == 86


def test_half_precision() -> None:
    model = load(TINY, torch.float16, "sdpa")
    found = model.image_features(INPUTS["pixel_values"])
    assert found.dtype == model.causal.dtype == torch.float16
    np.testing.assert_allclose(found.float().numpy(), GOLDEN["image_features"], atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("transformer.h.3.attn.c_attn.bias", None),
        ("transformer.visual.transformer.resblocks.1.attn.in_proj.weight", None),
        ("transformer.visual.attn_pool.kv_proj.weight", None),
        ("transformer.h.3.mlp.w1.weight", "transformer.h.3.mlp.w3.weight"),
        ("transformer.visual.proj", "transformer.visual.projection"),
        ("lm_head.weight", "lm_head.bias"),
    ],
)
def test_no_tensor_is_made_up_or_left_over(tmp_path: Path, name: str, renamed: str | None) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors.pop(name)
        if renamed:
            tensors[renamed] = tensor

    with pytest.raises(ValueError, match=r"is not what its config\.json says"):
        load(copied(tmp_path, change), torch.float32, "sdpa")


def test_wrong_shapes_and_configurations_are_refused(tmp_path: Path) -> None:
    def narrower(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.visual.proj"] = tensors["transformer.visual.proj"][:, :64].contiguous()

    folder = copied(tmp_path, narrower)
    with pytest.raises(ValueError, match="size mismatch"):
        load(folder, torch.float32, "sdpa")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="no safetensors"):
        load(folder, torch.float32, "sdpa")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2VLForConditionalGeneration"]}))
    with pytest.raises(ValueError, match="is no Qwen-VL"):
        load(folder, torch.float32, "sdpa")


def copied(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The tiny checkpoint in two files, changed."""
    tensors = load_file(TINY / "model.safetensors")
    change(tensors)
    names = sorted(tensors)
    for i, part in enumerate((names[:40], names[40:])):
        save_file({name: tensors[name] for name in part}, folder / ("model.safetensors" if i else "other.safetensors"))
    shutil.copy(TINY / "config.json", folder)
    return folder
