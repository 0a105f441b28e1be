"""Several pictures in a prompt, text between them, against Hugging Face's own modules and its processors."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Workshop, call, greedy, padded
from families import FAMILIES, family_inputs, hugging_face_answer, processed
from PIL import Image
from test_families import CUTS, NEW, every_criterion, plan_table
from test_family_prompts import CHINA, QUESTION
from transformers import AutoModelForImageTextToText

from himap_export.engines.bundle import Bundle
from himap_export.engines.cli import main as run_main
from himap_export.engines.prompt import FILM_MARK, IMAGE_MARK
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.cli import main as validate_main
from himap_export.validate.reference.criteria import ReferenceCut
from himap_export.validate.reference.reference import Reference

PICTURES = [name for name, row in FAMILIES.items() if not row.frames]
OFTEN = ("qwen2.5-vl", "internvl", "internvl-tiles", "llava-next")  # what the others show, once more
MANY = [pytest.param(name, marks=[pytest.mark.slow] * (name in OFTEN)) for name in PICTURES]


@pytest.mark.parametrize("name", MANY)
def test_unpruned_answers_about_several_pictures_are_hugging_faces(work: Workshop, name: str) -> None:
    """As many as the variant is for, and fewer: where nothing is cut, their slots are padding."""
    bundle = work.family_bundle(name, "--policy", "none", "--images", 1, 3)
    for images in (3, 2, 1):
        inputs = family_inputs(name, (7,), seed=images, images=(images,))
        wanted = hugging_face_answer(work.family(name), name, inputs, NEW)
        found = work.answer(bundle, inputs, "--max-new-tokens", NEW)["tokens"]
        np.testing.assert_array_equal(found, wanted)
    graphs = [f for f in bundle.iterdir() if f.name.startswith("vision")]
    assert len(graphs) == (1 if FAMILIES[name].several is None else 2)


def expect_reference(
    work: Workshop, name: str, *, cuts: Sequence[ReferenceCut], images: Sequence[int], flags: Sequence[object]
) -> None:
    """Kept sets identical, logits within 1e-3, 12 tokens equal, of a batch of prompts."""
    bundle = work.family_bundle(name, "--images", max(images), "--batch", len(images), *flags, key=f"{cuts}{images}")
    inputs = family_inputs(name, (9, 4, 13)[: len(images)], seed=len(images), images=images)
    reference = Reference(work.family(name), media=FAMILIES[name].media(max(images)))
    wanted = reference.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask, cuts)
    found = work.answer(bundle, inputs, "--max-new-tokens", NEW)
    for n, kept in enumerate(wanted.kept, 1):
        np.testing.assert_array_equal(found[f"kept_k{n}"], padded(kept, found[f"kept_k{n}"].shape[1]))
    np.testing.assert_allclose(found["logits"], wanted.logits, rtol=0, atol=1e-3)
    arrays = inputs.input_ids, inputs.pixel_values, inputs.attention_mask
    said = greedy(reference, *arrays, max_new_tokens=NEW, cuts=cuts)
    np.testing.assert_array_equal(found["tokens"][:, : said.shape[1]], said)


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MANY)
def test_cuts_rank_the_tokens_of_all_pictures_together(work: Workshop, tmp_path: Path, name: str, batch: int) -> None:
    """HiMAP's: the instruction is the text behind the last picture."""
    plan = tmp_path / "plan.toml"
    plan.write_text(plan_table("plan", CUTS))
    expect_reference(work, name, cuts=CUTS, images=(2,) * batch, flags=("--plan", plan))


@pytest.mark.parametrize("name", ["qwen3-vl", pytest.param("llava", marks=pytest.mark.slow)])
def test_rows_of_a_batch_may_hold_fewer_pictures_where_nothing_is_cut(work: Workshop, name: str) -> None:
    expect_reference(work, name, cuts=(), images=(2, 1, 3), flags=("--policy", "none"))


@pytest.mark.parametrize(
    ("name", "batch"), [("llava", 3), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in PICTURES)]
)
def test_a_quota_keeps_as_many_of_each_picture(work: Workshop, tmp_path: Path, name: str, batch: int) -> None:
    cuts = tuple(ReferenceCut(c.layer, c.criterion, c.remove, images=3) for c in CUTS)
    plan = tmp_path / "plan.toml"
    plan.write_text(plan_table("plan", CUTS))
    flags = ("--plan", plan, "--quota", "per-image")
    expect_reference(work, name, cuts=cuts, images=(3,) * batch, flags=flags)


@pytest.mark.parametrize("quota", ["prompt", pytest.param("per-image", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["llava", *(pytest.param(n, marks=pytest.mark.slow) for n in PICTURES if n != "llava")]
)
def test_every_criterion_over_two_pictures_passes_validation(
    work: Workshop, tmp_path: Path, name: str, quota: str
) -> None:
    """Drawn prompts, text between the pictures; each criterion at a cut, in front of every layer."""
    tokens, _ = FAMILIES[name].seen(2)
    plans = every_criterion(tokens if quota == "per-image" else 2 * tokens)
    (tmp_path / "plans.toml").write_text("".join(plans))
    flags = ("--plan", tmp_path / "plans.toml", "--quota", quota, "--images", 2)
    bundle = work.family_bundle(name, *flags, key=f"{plans}{quota}")
    for variant in Bundle.open(bundle).manifest.variants:
        flags = ("--plan", variant.plan_name, "--no-speed", "--prompts", 2, "--threads", 1)
        assert call(validate_main, bundle, "--model", work.family(name), *flags) == 0, variant.plan


def pictures(folder: Path, name: str, count: int) -> list[Path]:
    """Parts of a photograph, of a size that the model's own processor leaves as it is."""
    row, files = FAMILIES[name], []
    height, width = row.size[0], 120 if row.tiles > 1 and not row.view else row.size[1]
    for n in range(count):
        files.append(folder / f"{n}.png")
        CHINA.crop((90 * n, 50 * n, 90 * n + 3 * width, 50 * n + 3 * height)).resize((width, height)).save(files[-1])
    return files


# Where a question places its pictures; None: one stands there.
PLACED = {"in front": (None, None, QUESTION), "between": ("Of ", None, " and ", None, f", {QUESTION}")}


@pytest.mark.parametrize("placed", ["between", pytest.param("in front", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MANY)
def test_a_question_about_two_pictures_is_answered_as_by_hugging_face(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, placed: str
) -> None:
    files, content = pictures(tmp_path, name, 2), PLACED[placed]
    given = processed(name, [Image.open(file) for file in files], *content)
    model = AutoModelForImageTextToText.from_pretrained(work.family(name), dtype=torch.float32).eval()
    wanted = model.generate(**given, max_new_tokens=NEW, do_sample=False)[:, given["input_ids"].shape[1] :]
    bundle = work.family_bundle(name, "--policy", "none", "--images", 2, text_budget=120)
    prompt = QUESTION if placed == "in front" else "".join(part or IMAGE_MARK for part in content)
    flags = [*(word for file in files for word in ("--image", file)), "--prompt", prompt]
    capsys.readouterr()
    assert call(run_main, bundle, *flags, "--max-new-tokens", NEW, "--threads", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == wanted.tolist()


def test_how_many_pictures_a_bundle_takes(work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too many, too few, placed more often than given, or among films: one line each, with what the bundle holds."""
    bundle = work.family_bundle("llava", "--k1", 2, "--k2", 4, "--images", 2, 4)
    one, two, three = (pictures(tmp_path, "llava", n) for n in (1, 2, 3))

    def said(files: Sequence[Path], prompt: str, *more: object) -> str:
        flags = [word for file in files for word in ("--image", file)]
        capsys.readouterr()
        assert call(run_main, bundle, *flags, "--prompt", prompt, *more) == Exit.USAGE
        return capsys.readouterr().err

    cut = "is for 2 or 4: where tokens are cut, fewer images would be cut otherwise"
    assert f"takes no prompt of 3 images: its plan custom {cut}" in said(three, "?")
    assert f"takes no prompt of one image: its plan custom {cut}" in said(one, "?")
    assert "takes no prompt of 5 images: its plan custom is for 2 or 4" in said([*two, *three], "?")
    assert "the prompt contains <image> 1 times: 2 given" in said(two, "What is <image>?")
    assert "the prompt contains <image> 3 times: 2 given" in said(two, 3 * IMAGE_MARK)
    assert "is for no films" in capture_film(bundle, tmp_path, capsys)
    with Bundle.open(bundle).session() as session, pytest.raises(HimapError, match="there is no image to ask about"):
        session.ask([], "?")


def capture_film(bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    (folder / "clip.mp4").write_bytes(b"")
    capsys.readouterr()
    assert call(run_main, bundle, "--video", folder / "clip.mp4", "--prompt", f"{FILM_MARK}?") == Exit.USAGE
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--images", "0"), "'0' is not a whole number from 1 to 256"),
        (("--images", "2", "--frames", "4"), "--frames and --images exclude each other"),
        (("--frames", "4"), "this model sees pictures, no films"),
        (("--frames", "100000"), "is not a whole number"),
        (("--images", "2", "--quota", "per-image", "--align", "8"), "--align and --quota per-image exclude each other"),
        (("--images", "200"), "the budgets are too long"),
    ],
)
def test_pictures_that_no_bundle_can_hold(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], told: str
) -> None:
    given = ("--k1", 2, "--k2", 4, *flags, "--out", tmp_path / "bundle")
    assert call(export_main, work.family("llava"), *given) == Exit.USAGE
    assert told in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_a_picture_that_was_seen_is_not_looked_at_again(work: Workshop, tmp_path: Path) -> None:
    """Neither as another of the prompt nor in a later question; the answer is that of a fresh session, bit for bit."""
    bundle = Bundle.open(work.family_bundle("llava", "--k1", 2, "--k2", 4, "--images", 1, 2, text_budget=64))
    (first, second), question = pictures(tmp_path, "llava", 2), "What is it?"
    with bundle.session(threads=1) as session:
        asked = ([first], [first, first], [second, first], [first, second])
        answers = [session.ask(files, question) for files in asked]
        seen = session.pipeline(answers[0].request.spec).features
        assert (seen.hits, seen.misses) == (5, 2)
    for files, answer in zip(asked, answers, strict=True):
        with bundle.session(threads=1) as fresh:
            for name, values in fresh.ask(files, question).outputs.items():
                np.testing.assert_array_equal(values, answer.outputs[name])
