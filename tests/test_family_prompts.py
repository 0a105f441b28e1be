"""A picture and a question through `himap-run`, against Hugging Face's processor and `generate`; several sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Workshop, call
from families import FAMILIES, family_inputs, patches_of, processed
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import AutoModelForImageTextToText

from himap_export.engines.bundle import Bundle
from himap_export.engines.cli import main as run_main
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.errors import Exit, HimapError

CHINA = Image.fromarray(load_sample_images().images[0])
QUESTION, NEW = "What is <this>, 你?", 12


def picture(folder: Path, width: int, height: int) -> Path:
    """A photograph of these sides, stored without loss."""
    file = folder / f"{width}x{height}.png"
    CHINA.resize((width, height), Image.Resampling.BICUBIC).save(file)
    return file


@pytest.mark.parametrize("name", [name for name in FAMILIES if not FAMILIES[name].frames])
def test_a_question_is_answered_as_by_hugging_face(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """At a size that the model's own processor leaves as it is, or cuts into as many tiles."""
    row = FAMILIES[name]
    width = 120 if row.tiles > 1 and not row.view else row.size[1]
    file = picture(tmp_path, width, row.size[0])
    given = processed(name, [Image.open(file)], None, QUESTION)
    model = AutoModelForImageTextToText.from_pretrained(work.family(name), dtype=torch.float32).eval()
    wanted = model.generate(**given, max_new_tokens=NEW, do_sample=False)[:, given["input_ids"].shape[1] :]
    bundle = work.family_bundle(name, "--policy", "none", text_budget=120)
    flags = ["--image", file, "--prompt", QUESTION, "--max-new-tokens", NEW, "--threads", "1"]
    capsys.readouterr()
    assert call(run_main, bundle, *flags, "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == wanted.tolist()


def sized(work: Workshop, *sizes: str) -> Path:
    return work.family_bundle("qwen2.5-vl", "--image-size", *sizes, "--k1", 2, "--k2", 4, text_budget=120)


@pytest.mark.parametrize(("sides", "tokens"), [((300, 100), 8), ((100, 90), 9), ((60, 200), 8)])
def test_a_picture_goes_to_the_nearest_of_several_sizes(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], sides: tuple[int, int], tokens: int
) -> None:
    bundle, kept = sized(work, "112x56", "84x84", "56x112"), tmp_path / "kept.png"
    flags = ["--image", picture(tmp_path, *sides), "--prompt", "?", "--threads", "1", "--show-kept", kept]
    capsys.readouterr()
    assert call(run_main, bundle, *flags, "--json") == 0
    assert json.loads(capsys.readouterr().out)["image_tokens"][0] == tokens
    assert Image.open(kept).size[0] > 0


def test_a_plan_and_an_image_size_are_chosen_together(work: Workshop) -> None:
    flags = ("--image-size", "112x56", "84x84", "--policy", "himap", "--policy", "none", "--k1", 2, "--k2", 4)
    bundle = Bundle.open(work.family_bundle("qwen2.5-vl", *flags, text_budget=120))
    for size, tokens in (((56, 112), 8), ((84, 84), 9)):
        for plan, name, stages in (("himap", "custom", 3), ("none", "none", 1)):
            run = bundle.select(plan, image_size=size)
            assert (run.plan_name, run.image.size) == (name, size)
            assert run.image.tokens == run.budget.visual[0] == tokens
            assert len(run.plan.stages) == stages and run.graph("vision").inputs["pixel_values"].shape[2:] == size
    assert bundle.select(image_size=(84, 84)).plan_name == bundle.select().plan_name == "custom"
    with pytest.raises(HimapError, match="no graph for images of 84x56"):
        bundle.select("none", image_size=(56, 84))


def test_several_sizes_share_one_copy_of_the_weights(work: Workshop) -> None:
    one, three = (sized(work, *sizes) for sizes in (("84x84",), ("112x56", "84x84", "56x112")))
    weights = [sum(f.stat().st_size for f in (bundle / "weights").iterdir()) for bundle in (one, three)]
    assert weights[0] == weights[1]
    graphs = json.loads((three / "manifest.json").read_text())["graphs"]
    assert [name for name in graphs if name.startswith("vision")] == ["vision-112x56", "vision-84x84", "vision-56x112"]


def test_an_image_size_that_the_bundle_does_not_hold(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = sized(work, "112x56", "84x84", "56x112")
    file, inputs = tmp_path / "in.npz", family_inputs("qwen2.5-vl")
    np.savez(file, input_ids=inputs.input_ids, pixel_values=inputs.pixel_values)
    for flags in (
        ["--load-inputs", file],
        ["--image", picture(tmp_path, 90, 90), "--prompt", "?", "--image-size", "140x84"],
    ):
        capsys.readouterr()
        assert call(run_main, bundle, *flags) == Exit.USAGE
        said = capsys.readouterr().err
        assert "no graph for images of 140x84" in said and "112x56, 84x84, 56x112" in said


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_patches_as_hugging_face_gives_them(work: Workshop, tmp_path: Path, name: str) -> None:
    """Its processor's arrays answer like the picture; films and mixed sizes are refused."""
    row, inputs = FAMILIES[name], family_inputs(name, (9, 4))
    assert row.patch is not None
    bundle, file, out = work.family_bundle(name, "--k1", 2, "--k2", 4), tmp_path / "in.npz", tmp_path / "out.npz"
    wanted = work.answer(bundle, inputs)
    patches = np.concatenate([patches_of(p, row.patch) for p in inputs.pixel_values])
    grids = np.array([[1, row.size[0] // row.patch, row.size[1] // row.patch]] * 2)
    arrays = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask, "pixel_values": patches}
    np.savez(file, **arrays, image_grid_thw=grids)
    assert call(run_main, bundle, "--load-inputs", file, "--save-outputs", out, "--threads", 1) == 0
    with np.load(out) as found:
        np.testing.assert_array_equal(found["logits"], wanted["logits"])
    odd = np.array([[1, 3, row.size[0] * row.size[1] // row.patch**2 // 3]] * 2)  # as many patches, but none to merge
    for wrong in (grids * [2, 1, 1], grids[:1], grids + np.array([[0, 2, 0], [0, 0, 0]]), grids[:, 1:], odd):
        np.savez(file, **arrays, image_grid_thw=wrong)
        assert call(run_main, bundle, "--load-inputs", file) == Exit.USAGE


@pytest.mark.parametrize(
    ("name", "flags", "told"),
    [
        ("qwen2.5-vl", ("--image-size", "100x84"), "multiples of 28"),
        ("qwen2.5-vl", ("--tiles", "2"), "2 tiles do not fit"),
        ("llava", ("--image-size", "84x84"), "56x56"),
        ("llava", ("--tiles", "4"), "4 tiles do not fit"),
        ("internvl", ("--image-size", "84x84"), "56x56"),
        ("internvl", ("--tiles", "0"), "--tiles: '0' is not"),
        ("llava", ("--image-size", "84by84"), "WIDTHxHEIGHT"),
    ],
)
def test_pictures_that_a_model_cannot_see(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, flags: tuple[str, ...], told: str
) -> None:
    assert call(export_main, work.family(name), *flags, "--out", tmp_path / "bundle") == Exit.USAGE
    assert told in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_two_images_where_the_plan_has_one(work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, file = work.family_bundle("llava", "--k1", 2, "--k2", 4), tmp_path / "in.npz"
    inputs = family_inputs("llava")
    twice = np.concatenate([inputs.input_ids, inputs.input_ids], axis=1)
    np.savez(file, input_ids=twice, pixel_values=inputs.pixel_values)
    assert call(run_main, bundle, "--load-inputs", file) == Exit.USAGE
    assert "prompt 0 holds 32 image tokens, 2 images" in capsys.readouterr().err
    one = picture(tmp_path, 56, 56)
    assert call(run_main, bundle, "--image", one, "--image", one, "--prompt", "?") == Exit.USAGE
    assert "takes no prompt of 2 images: its plan custom is for 1" in capsys.readouterr().err
    assert call(run_main, bundle, "--image", one, "--prompt", "<image> and <image>?") == Exit.USAGE
    assert "contains <image> 2 times: 1 given" in capsys.readouterr().err


def test_an_alias_with_another_models_checkpoint(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named: the first tensor that does not fit, its shape, and the shape that the alias has."""
    out, folder = tmp_path / "bundle", work.family("llava")
    assert call(export_main, "llava-7b", "--checkpoint", folder, "--out", out) == Exit.USAGE
    said = capsys.readouterr().err
    assert "tensor" in said and "its shape is [300, 64]" in said and "[32064, 4096]" in said
    assert call(export_main, folder, "--checkpoint", folder, "--out", out) == Exit.USAGE
    assert not out.exists()
