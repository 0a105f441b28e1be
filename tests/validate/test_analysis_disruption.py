"""Blocked attention against Hugging Face's whole model with hooks on the attention of the chosen layers."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Workshop
from numpy.typing import NDArray
from tiny import TINY, make_inputs
from transformers import LlavaForConditionalGeneration

from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.analysis.disruption import (
    KINDS,
    Disruption,
    agreement,
    allowed_by,
    bias_ratio,
    disruption,
)
from himap_export.validate.analysis.sample import Sample, spans_of

PROMPTS = (((9,), (5,), 1), ((7,), (3,), 3), ((6,), (0,), 1))  # text and system tokens, runs of image tokens
Rows = Sequence[int]


def asked(name: str) -> list[Sample]:
    made = [make_inputs(TINY[name], text, system, seed=i, image_runs=r) for i, (text, system, r) in enumerate(PROMPTS)]
    return [Sample(inputs.input_ids[0], inputs.pixel_values, label=0) for inputs in made]


def hugging_face(folder: Path) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()


@contextmanager
def blocked(model: Any, layers: Rows, rows: Rows, columns: Rows) -> Iterator[None]:
    """Inside, the attention of `layers` gets the model's own mask with -inf where one of `rows` sees a column."""

    def hook(module: Any, arguments: Any, options: dict[str, Any]) -> Any:
        mask = options["attention_mask"].clone()
        mask[..., torch.tensor(rows, dtype=torch.int64)[:, None], torch.tensor(columns)] = torch.finfo(mask.dtype).min
        for row in rows:
            if not len(set(range(row + 1)) - set(columns)):
                mask[..., row, row] = 0
        return arguments, {**options, "attention_mask": mask}

    attention = [model.model.language_model.layers[layer].self_attn for layer in layers]
    hooks = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in attention]
    yield
    for each in hooks:
        each.remove()


def logits(model: Any, sample: Sample) -> NDArray[np.float32]:
    ids, pixels = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.pixel_values)
    with torch.no_grad():
        found: NDArray[np.float32] = model(input_ids=ids, pixel_values=pixels).logits[0, -1].numpy()
    return found


def rows_of(kind: str, sample: Sample, image_token: int, seed: tuple[int, int, int]) -> Rows:
    """Which rows a disruption blocks; the drawn ones are asked for, and judged by another test."""
    image = np.flatnonzero(sample.input_ids == image_token).tolist()
    if kind == "image-to-image":
        return image
    if kind == "image-to-text":
        return range(image[-1] + 1, len(sample.input_ids))
    spans = spans_of(sample.input_ids == image_token)
    allowed = allowed_by("random", spans, np.random.default_rng(seed))
    seen = np.tri(len(allowed), dtype=bool) & ~allowed
    return np.flatnonzero(seen.any(1)).tolist()


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("name", ["mha", "gqa2"])
def test_equals_hooks_on_hugging_face(work: Workshop, name: str, width: int) -> None:
    model, samples, token = hugging_face(work.checkpoint(name)), asked(name), TINY[name].image_token
    got = disruption(work.reference(name), samples, width=width, seed=5)
    plain = [logits(model, sample) for sample in samples]
    firsts = range(TINY[name].layers - width + 1)
    assert [(g.kind, g.first, g.width, g.samples) for g in got] == [(k, f, width, 3) for k in KINDS for f in firsts]
    for found in got:
        same, jaccard = [], []
        for index, sample in enumerate(samples):
            rows = rows_of(found.kind, sample, token, (5, index, found.first))
            columns = np.flatnonzero(sample.input_ids == token).tolist()
            with blocked(model, range(found.first, found.first + width), rows, columns):
                disturbed = logits(model, sample)
            before, after = (set(np.argsort(-each)[:5].tolist()) for each in (plain[index], disturbed))
            same.append(plain[index].argmax() == disturbed.argmax())
            jaccard.append(len(before & after) / len(before | after))
        np.testing.assert_allclose(found.label_consistency, np.mean(same))
        np.testing.assert_allclose(found.score_consistency, np.mean(jaccard), err_msg=f"{found}")
    for kind in KINDS:  # what is compared is not always the same
        assert len({g.score_consistency for g in got if g.kind == kind}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layer_s_window_only_matters_to_the_last_row(work: Workshop, kind: str) -> None:
    """In the last layer, image rows have nobody left to tell."""
    (got,) = disruption(work.reference("mha"), asked("mha"), firsts=[TINY["mha"].layers - 1], kinds=[kind])
    assert kind != "image-to-image" or (got.label_consistency, got.score_consistency) == (1.0, 1.0)
    assert kind != "image-to-text" or got.score_consistency < 1.0


@pytest.mark.parametrize("shape", range(len(PROMPTS)))
def test_drawn_rows(shape: int) -> None:
    """As many as the instruction has, image and instruction rows alike, other columns untouched, by the seed."""
    sample, token = asked("mha")[shape], TINY["mha"].image_token
    spans, causal = spans_of(sample.input_ids == token), np.tri(len(sample.input_ids), dtype=bool)
    seen = np.zeros(len(causal), int)
    for seed in range(300):
        allowed = allowed_by("random", spans, np.random.default_rng(seed))
        lost = causal & ~allowed
        rows = np.flatnonzero(lost.any(1))
        assert allowed.any(1).all() and not (allowed & ~causal).any() and not lost[:, ~spans.image].any()
        # A drawn image row that sees nothing but itself keeps itself: it is drawn all the same.
        assert len(rows) in (spans.instruction.sum(), spans.instruction.sum() - 1 * (not spans.system[0]))
        for row in rows:
            kept = np.flatnonzero(allowed[row] & spans.image)
            assert kept.tolist() in ([], [row])
        seen[rows] += 1
    assert not seen[spans.system].any() and spans.system.sum() + (seen > 0).sum() >= len(causal) - 1
    drawn = seen[spans.image | spans.instruction][1:]
    expected = 300 * spans.instruction.sum() / (spans.image | spans.instruction).sum()
    assert abs(drawn.mean() - expected) < 0.1 * expected and drawn.max() < 2 * expected


def test_image_at_the_start_sees_itself(work: Workshop) -> None:
    """Without a system token, image-to-image leaves image rows nothing else; the numbers stay finite."""
    sample = asked("mha")[2]
    spans = spans_of(sample.input_ids == TINY["mha"].image_token)
    allowed = allowed_by("image-to-image", spans, np.random.default_rng(0))
    count = int(spans.image.sum())
    np.testing.assert_array_equal(allowed[:count, :count], np.eye(count, dtype=bool))
    np.testing.assert_array_equal(allowed[count:], np.tri(len(allowed), dtype=bool)[count:])
    for found in disruption(work.reference("mha"), [sample], firsts=[0, 4], width=2):
        assert 0 <= found.score_consistency <= 1 and math.isfinite(found.label_consistency)


def test_the_seed_decides(work: Workshop) -> None:
    reference, samples = work.reference("mha"), asked("mha")
    runs = [disruption(reference, samples, kinds=["random"], seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_agreement_by_hand() -> None:
    plain = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2])
    assert agreement(plain, plain) == (True, 1.0)
    other = torch.tensor([9.0, 8, 7, 1, 0, 6, 5, 2])  # the five likeliest: 0, 1, 2, 5, 6
    assert agreement(plain, other) == (True, 3 / 7)
    assert agreement(plain, -plain) == (False, 2 / 8)


def test_bias_ratio() -> None:
    scores = {("image-to-image", 0): 0.2, ("image-to-text", 0): 0.6, ("image-to-image", 1): 1.0}
    scores |= {("image-to-text", 1): 0.5, ("image-to-image", 2): 0.5, ("image-to-text", 2): 1.0}
    scores |= {("random", 0): 0.1, ("image-to-image", 3): 0.1}
    found = bias_ratio([Disruption(kind, first, 1, 1.0, score, 4) for (kind, first), score in scores.items()])
    assert found == {0: pytest.approx(math.log(2)), 1: None, 2: None}


@pytest.mark.parametrize(
    "options",
    [{"firsts": [9], "width": 2}, {"firsts": [-1]}, {"width": 0}, {"width": 11}, {"kinds": ["text-to-image"]}],
)
def test_windows_and_kinds_are_checked(work: Workshop, options: dict[str, Any]) -> None:
    with pytest.raises(HimapError) as caught:
        disruption(work.reference("mha"), asked("mha"), **options)
    assert caught.value.code == Exit.USAGE


def test_undisturbed_layers_stay_eager_only_inside(work: Workshop) -> None:
    reference = work.reference("mha")
    before = reference.decoder.config._attn_implementation
    disruption(reference, asked("mha")[:1], firsts=[0])
    assert reference.decoder.config._attn_implementation == before
