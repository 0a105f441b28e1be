"""The answer's attention shares against Hugging Face's own `output_attentions`."""

from dataclasses import astuple

import numpy as np
import pytest
import torch
from commands import Workshop
from tiny import TINY, make_inputs
from transformers import LlavaForConditionalGeneration

from himap_export.validate.analysis.saliency import LayerShares, shares
from himap_export.validate.analysis.sample import Sample, average
from himap_export.validate.reference.reference import Reference

PROMPTS = {"plain": ((9,), (5,), 1), "split": ((7,), (3,), 3), "image first": ((6,), (0,), 1)}


def sample(name: str, shape: str) -> Sample:
    text, system, runs = PROMPTS[shape]
    inputs = make_inputs(TINY[name], text, system, seed=len(shape), image_runs=runs)
    return Sample(inputs.input_ids[0], inputs.pixel_values, label=0)


@pytest.mark.parametrize("shape", PROMPTS)
@pytest.mark.parametrize("name", ["mha", "gqa2"])
def test_equals_hugging_face(work: Workshop, name: str, shape: str) -> None:
    asked = sample(name, shape)
    (got,) = shares(work.reference(name), [asked])
    model = LlavaForConditionalGeneration.from_pretrained(work.checkpoint(name), attn_implementation="eager").eval()
    ids, pixels = torch.from_numpy(asked.input_ids)[None], torch.from_numpy(asked.pixel_values)
    with torch.no_grad():
        maps = model(input_ids=ids, pixel_values=pixels, output_attentions=True).attentions
    last = int(np.flatnonzero(asked.input_ids == TINY[name].image_token)[-1])
    is_image = asked.input_ids == TINY[name].image_token
    assert len(got) == len(maps) == TINY[name].layers
    for found, attention in zip(got, maps, strict=True):
        row = attention[0, :, -1].mean(0).double().numpy()
        wanted = (row[: last + 1][~is_image[: last + 1]].sum(), row[is_image].sum(), row[last + 1 :].sum())
        np.testing.assert_allclose(astuple(found), wanted, atol=1e-6)
        assert found.image > 0.01


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_sums_to_one(work: Workshop, dtype: torch.dtype, atol: float) -> None:
    reference = Reference(work.checkpoint("gqa2"), dtype, attn_implementation="sdpa")
    found = shares(reference, [sample("gqa2", shape) for shape in PROMPTS])
    np.testing.assert_allclose(np.sum([[astuple(layer) for layer in layers] for layers in found], -1), 1, atol=atol)
    assert all(layer.system == 0 for layer in found[2])
    np.testing.assert_allclose(np.sum([astuple(layer) for layer in average(found)], -1), 1, atol=atol)


def test_average_is_per_layer_and_field() -> None:
    one, two = (LayerShares(0.2, 0.3, 0.5), LayerShares(1, 0, 0)), (LayerShares(0.4, 0.5, 0.1), LayerShares(0, 0, 1))
    got = average([one, two])
    assert [type(layer) for layer in got] == [LayerShares, LayerShares]
    np.testing.assert_allclose([astuple(layer) for layer in got], [(0.3, 0.4, 0.3), (0.5, 0, 0.5)])
