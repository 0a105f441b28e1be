"""Which variant a question or arrays get: of how many pictures, of which size, or a film; and why there is none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from himap_export.engines.arrays import Inputs
from himap_export.engines.bundle import Bundle
from himap_export.engines.film import Film
from himap_export.engines.fitting import batches, fitting_variant
from himap_export.engines.image import ImagePreprocessing
from himap_export.engines.layout import ImageTokens
from himap_export.engines.manifest import ImageSpec, Manifest, ModelRecord, Variant
from himap_export.engines.prompt import Expansion, Segment
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import Cut, PruningPlan, TokenBudget
from himap_export.graphs.spec import DecoderSpec

TOKEN, WORD = 9, 1
CUT = PruningPlan((Cut(1, "last", 0.5),))


def picture(side: int, tokens: int = 4, **more: Any) -> ImageSpec:
    how = ImagePreprocessing((side, side), None)
    return ImageSpec((side, side), more.pop("tiles", 1), tokens, (1, 1), how, Expansion((Segment("", tokens),)), **more)


FILM = picture(8, 6, tiles=2, film=Film(frames=2, steps=1, sampling="arange", fps=1.0))
IMAGES = {"8x8": picture(8), "16x16": picture(16), "film": FILM, "several": picture(8, 2, several=True)}


def variant(name: str, image: str, images: int, text: int = 10, batch: int = 1) -> Variant:
    plan, whole = CUT if name == "cut" else PruningPlan(), IMAGES[image].tokens * images
    visual = (whole, whole // 2) if name == "cut" else (whole,)
    return Variant(name, plan, TokenBudget(visual, text, 4, batch, images=images), image, {})


def bundle(*variants: Variant) -> Bundle:
    """Of variants alone: graphs are none of its business."""
    held = {v.image: IMAGES[v.image] for v in variants}
    manifest = Manifest(
        model=ModelRecord("tiny", "tiny", "tiny", ImageTokens(TOKEN), (2,), 0),
        decoder=DecoderSpec(2, 8, 8, 1, 1, 8, 16), variants=variants, dtype="fp32", graphs={}, engines={},
        weight_form="shared", weights=(), images=held, prompt=None, tokenizer=None, toolchain={}, command=(),
    )  # fmt: skip
    return Bundle(Path("b"), manifest)


def refused(words: str, asked: Any, *arguments: Any, **more: Any) -> None:
    with pytest.raises(HimapError) as found:
        asked(*arguments, **more)
    assert words in str(found.value) and found.value.code == Exit.USAGE and "\n" not in str(found.value)


# --- by what a question is about ---


def test_variants_are_for_so_many_pictures_exactly() -> None:
    found = bundle(*(variant(plan, "8x8", n) for plan in ("cut", "none") for n in (2, 4)))
    for plan in ("cut", "none"):
        for n in (2, 4):
            assert [(v.plan_name, v.budget.images) for v in found.variants(plan, n)] == [(plan, n)]
    assert [(v.plan_name, v.budget.images) for v in found.variants()] == [("cut", 2)]


def test_fewer_pictures_fit_where_nothing_is_cut() -> None:
    """The next larger number: what is cut of more pictures would be cut otherwise of fewer."""
    found = bundle(*(variant(plan, "8x8", n) for plan in ("none", "cut") for n in (2, 4)))
    assert [v.budget.images for n in (1, 2, 3, 4) for v in found.variants("none", n)] == [2, 2, 4, 4]
    why = "its plan cut is for 2 or 4: where tokens are cut, fewer images would be cut otherwise"
    refused(
        f"b takes no prompt of one image: {why} (give as many, or export with `images` 1)", found.variants, "cut", 1
    )
    refused(f"b takes no prompt of 3 images: {why}", found.variants, "cut", 3)
    for plan in ("none", "cut"):
        details = (
            f"b takes no prompt of 5 images: its plan {plan} is for 2 or 4 (give as many, or export with `images` 5)"
        )
        refused(details, found.variants, plan, 5)
    refused("for 2, 3 or 4", bundle(*(variant("cut", "8x8", n) for n in (2, 3, 4))).variants, None, 9)


def test_one_picture_is_not_seen_as_several_are() -> None:
    """Two of them are, in a bundle for three; a picture alone would be seen more closely."""
    found = bundle(variant("none", "several", 3))
    assert [v.budget.images for v in found.variants(images=2)] == [3]
    refused("b takes no prompt of one image: its plan none is for 3", found.variants, images=1)


def test_films_and_pictures_are_apart() -> None:
    both = bundle(variant("none", "8x8", 2), variant("none", "film", 1))
    assert [v.image for v in both.variants(film=True)] == ["film"] and [v.image for v in both.variants()] == ["8x8"]
    assert both.variants(images=1) == both.variants(images=2, film=False)
    refused("b is for no films (export with `frames`)", bundle(variant("none", "8x8", 1)).variants, film=True)
    only = bundle(variant("none", "film", 1))
    assert [v.image for v in only.variants()] == ["film"]
    refused("b is for no images (export without `frames`)", only.variants, film=False)
    refused("b holds no plan x", both.variants, "x")


def test_of_those_one_is_for_the_size_and_the_text() -> None:
    sizes, texts = ("16x16", "8x8"), (30, 10, 20)
    found = bundle(*(variant("cut", s, n, t) for s in sizes for n in (1, 2) for t in texts))
    run = found.select(image_size=(8, 8), images=2, text_tokens=11)
    assert (run.variant.image, run.budget.images, run.budget.text) == ("8x8", 2, 20)
    run = found.select(text_tokens=99)
    assert (run.variant.image, run.budget.images, run.budget.text) == ("16x16", 1, 30)
    assert found.select(text_budget=10, images=2).budget.text == 10
    refused("b holds no text budget of 15: it holds 10, 20, 30", found.select, text_budget=15)
    refused("b holds no graph for images of 9x8 pixels: it holds 16x16, 8x8", found.select, image_size=(8, 9))


# --- by arrays ---


def prompts(*tokens: int, pixels: int = 1, side: int = 8, words: int = 3) -> Inputs:
    """Prompts of so many image tokens each, padded with more of them, which the mask hides."""
    width = max(tokens) + words
    ids, mask = np.full((len(tokens), width), TOKEN), np.zeros((len(tokens), width), np.int64)
    for row, count in enumerate(tokens):
        ids[row, count : count + words], mask[row, : count + words] = WORD, 1
    return Inputs(ids, np.zeros((pixels, 3, side, side), np.float32), mask)


MANY = bundle(
    variant("cut", "16x16", 1), variant("cut", "8x8", 1), variant("cut", "8x8", 3), variant("cut", "film", 1),
    variant("none", "8x8", 3),
)  # fmt: skip


@pytest.mark.parametrize(
    ("inputs", "plan", "image", "images"),
    [
        (prompts(4, side=16), None, "16x16", 1),
        (prompts(4), None, "8x8", 1),
        (prompts(12, pixels=3), None, "8x8", 3),
        (prompts(6, pixels=2), None, "film", 1),
        (prompts(6, 6, pixels=4), None, "film", 1),
        (prompts(4, 12, pixels=4), "none", "8x8", 3),
        (prompts(4, pixels=1), "none", "8x8", 3),
    ],
)
def test_arrays_say_of_what_they_are(inputs: Inputs, plan: str | None, image: str, images: int) -> None:
    """Tokens and pixels together: a film of two frames and two pictures have as many pixels."""
    found = fitting_variant(MANY, inputs, plan)
    assert (found.variant.image, found.budget.images) == (image, images)


def test_the_text_decides_on_the_budget() -> None:
    found = bundle(*(variant("none", "8x8", 1, text) for text in (10, 20)))
    assert [fitting_variant(found, prompts(4, words=n)).budget.text for n in (3, 10, 11, 99)] == [10, 10, 20, 20]
    assert fitting_variant(found, prompts(4), text_budget=20).budget.text == 20


def test_arrays_that_no_variant_is_for() -> None:
    refused("b holds no graph for images of 7x7 pixels: it holds 16x16, 8x8", fitting_variant, MANY, prompts(4, side=7))
    refused("b takes no prompt of 2 images: its plan cut is for 1 or 3", fitting_variant, MANY, prompts(8, pixels=2))
    refused("b takes no prompt of 4 images: its plan none", fitting_variant, MANY, prompts(16, pixels=4), "none")


@pytest.mark.parametrize("inputs", [prompts(5), prompts(4, pixels=2), prompts(4, 4, pixels=1)])
def test_arrays_that_disagree_get_a_variant_that_says_so(inputs: Inputs) -> None:
    """Image tokens of no whole picture, pixels of more or fewer than there are: the first of that size."""
    found = fitting_variant(MANY, inputs)
    assert (found.variant.image, found.budget.images) == ("8x8", 1)
    given = list(batches(inputs, found))
    assert sum(len(part.pixel_values) for part in given) == len(inputs.pixel_values)


def test_batches_hold_each_prompts_pictures() -> None:
    inputs = prompts(4, 12, 8, pixels=6)
    pixels = np.broadcast_to(np.arange(6, dtype=np.float32)[:, None, None, None], inputs.pixel_values.shape)
    run = fitting_variant(bundle(variant("none", "8x8", 3, batch=2)), inputs := replace(inputs, pixel_values=pixels))
    first, second = batches(inputs, run)
    assert first.pixel_values[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert second.pixel_values[:, 0, 0, 0].tolist() == [4, 5] and len(second.input_ids) == 1
