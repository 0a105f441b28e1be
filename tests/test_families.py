"""Every family through the commands, against Hugging Face's own modules: unpruned, pruned, in batches, by all policies.

The reference is `validate/reference.py` on Hugging Face's layers; unpruned answers also go against its `generate`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Workshop, call, greedy, padded
from families import FAMILIES, family_inputs, hugging_face_answer
from oracle_criteria import coefficients

from himap_export.engines.bundle import Bundle
from himap_export.graphs.importance import SCORES
from himap_export.validate.analysis.attention import prompts
from himap_export.validate.analysis.gradcam import grad_cams
from himap_export.validate.analysis.sample import Sample
from himap_export.validate.cli import main as validate_main
from himap_export.validate.progress import silent
from himap_export.validate.reference.criteria import ReferenceCut, reference_himap
from himap_export.validate.reference.reference import Reference

CUTS = reference_himap(2, 4, 0.5, 0.5)
EARLY = (
    ReferenceCut(1, "image", keep=3),
    ReferenceCut(2, "instruction", keep=2),
)  # in front of the last deepstack layer
TEXT, NEW = 24, 12


def mostly(*repeated: str) -> list[Any]:
    """All families; what `repeated` would show is shown by others, too."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in repeated)) for name in FAMILIES]


def plan_table(name: str, cuts: Sequence[ReferenceCut]) -> str:
    """A plan as TOML."""
    rows = (
        f'{{layer = {c.layer}, criterion = "{c.criterion}", coefficients = {list(c.coefficients)}, '
        + (f"remove = {c.remove}}}" if c.keep is None else f"keep = {c.keep}}}")
        for c in cuts
    )
    return f"[{name}]\ncuts = [{', '.join(rows)}]\n"


def every_criterion(tokens: int) -> list[str]:
    """As few plans as there can be, each cutting before every layer, to even shares of `tokens`."""
    criteria, most, plans = sorted(SCORES), min(5, tokens - 1), list[str]()
    for start in range(0, len(criteria), most):
        chosen = enumerate(criteria[start : start + most], 1)
        cuts = [
            ReferenceCut(layer, c, keep=tokens * (most + 1 - layer) // (most + 1), coefficients=coefficients(c, 0))
            for layer, c in chosen
        ]
        plans.append(plan_table(f"plan{start}", cuts))
    return plans


# Of films test_family_films.py asks more.
@pytest.mark.parametrize("name", mostly("llava-onevision-film", "qwen2.5-vl-film", "qwen3-vl-film"))
def test_unpruned_answers_are_hugging_faces(work: Workshop, name: str) -> None:
    bundle = work.family_bundle(name, "--policy", "none")
    for seed in range(3):
        inputs = family_inputs(name, seed=seed)
        wanted = hugging_face_answer(work.family(name), name, inputs, NEW)
        found = work.answer(bundle, inputs, "--max-new-tokens", NEW)["tokens"]
        np.testing.assert_array_equal(found, wanted)


def cut_early(name: str) -> Any:
    """A case of cuts in front of and between the layers that deepstack adds to: others have none."""
    return pytest.param(name, EARLY, id=f"{name}-early", marks=[pytest.mark.slow] * (name not in ("llava", "qwen3-vl")))


def cut(*repeated: str) -> list[Any]:
    """Every family by HiMAP's cuts, and by early ones."""
    marks = {name: [pytest.mark.slow] * (name in repeated) for name in FAMILIES}
    usual = [pytest.param(name, CUTS, id=f"{name}-himap", marks=marks[name]) for name in FAMILIES]
    return usual + [cut_early(name) for name in FAMILIES]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "cuts"), cut("llava-onevision", "llava-onevision-film", "qwen3-vl-film"))
def test_pruned_prompts_are_the_references(
    work: Workshop, tmp_path: Path, name: str, cuts: tuple[ReferenceCut, ...], batch: int
) -> None:
    """Kept sets identical, logits within 1e-3, 12 tokens equal; one prompt fewer than the batch holds, too."""
    plan = tmp_path / "plan.toml"
    plan.write_text(plan_table("plan", cuts))
    bundle = work.family_bundle(name, "--plan", plan, "--batch", batch, key=f"{cuts}")
    reference = Reference(work.family(name), media=FAMILIES[name].media())
    for lengths in {1: [(9,), (1,)], 3: [(9, 4, 17), (3, 8)]}[batch]:
        inputs = family_inputs(name, lengths, seed=len(lengths))
        arrays = inputs.input_ids, inputs.pixel_values, inputs.attention_mask
        wanted = reference.prefill(*arrays, cuts, seconds=inputs.seconds)
        found = work.answer(bundle, inputs, "--max-new-tokens", NEW)
        for n, kept in enumerate(wanted.kept, 1):
            np.testing.assert_array_equal(found[f"kept_k{n}"], padded(kept, found[f"kept_k{n}"].shape[1]))
        np.testing.assert_allclose(found["logits"], wanted.logits, rtol=0, atol=1e-3)
        said = greedy(reference, *arrays, max_new_tokens=NEW, cuts=cuts, seconds=inputs.seconds)
        np.testing.assert_array_equal(found["tokens"][:, : said.shape[1]], said)


# InternVL with tiles and Qwen3-VL do all that the first do; the others, behind their towers, are LLaVA.
REPEATED = (
    "internvl", "qwen2.5-vl", "llava-next", "llava-onevision", "llava-onevision-film", "qwen2.5-vl-film",
    "qwen3-vl-film",
)  # fmt: skip


@pytest.mark.parametrize("name", mostly(*REPEATED))
def test_every_criterion_passes_validation(work: Workshop, tmp_path: Path, name: str) -> None:
    """As few plans as there can be, each cutting before every layer, to even shares of the image; and unpruned."""
    plans = ["[none]\ncuts = []\n", *every_criterion(FAMILIES[name].tokens)]
    (tmp_path / "plans.toml").write_text("".join(plans))
    bundle = work.family_bundle(name, "--plan", tmp_path / "plans.toml", key=f"{plans}")
    for variant in Bundle.open(bundle).manifest.variants:
        flags = ["--plan", variant.plan_name, "--no-speed", "--prompts", 2, "--threads", 1]
        assert call(validate_main, bundle, "--model", work.family(name), *flags) == 0, variant.plan


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].tiles == 1])
def test_analyses_see_the_same_model(work: Workshop, name: str) -> None:
    """Layer by layer as every analysis runs it: the reference's logits; and Grad-CAM's heat lies as the image does."""
    inputs, reference = family_inputs(name), Reference(work.family(name), media=FAMILIES[name].media())
    sample = Sample(inputs.input_ids[0], inputs.pixel_values, label=30)
    wanted = reference.prefill(inputs.input_ids, inputs.pixel_values).logits[0]
    with prompts(reference, [sample], silent) as each:
        (prompt,) = each
        np.testing.assert_allclose(prompt.logits(prompt.states()[-1]).detach(), wanted, rtol=0, atol=1e-4)
    cams = grad_cams(reference, sample)
    rows, columns = cams.decoder.shape[1:]
    assert rows * columns == FAMILIES[name].tokens and cams.decoder.max() > 0
    assert len(cams.vision) == (2 if name == "llava" else 0)


@pytest.mark.parametrize("name", mostly(*REPEATED))
def test_half_precision_passes_validation(work: Workshop, name: str) -> None:
    bundle = work.family_bundle(name, "--k1", 2, "--k2", 4, "--dtype", "fp16")
    assert call(validate_main, bundle, "--model", work.family(name), "--no-speed", "--threads", 1) == 0
