"""Grad-CAM against Hugging Face's whole model differentiated at once, and against finite differences."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from commands import Workshop
from tiny import make_inputs
from transformers import LlavaForConditionalGeneration

from himap_export.validate.analysis.gradcam import grad_cams
from himap_export.validate.analysis.sample import Sample


@contextmanager
def kept(modules: list[torch.nn.Module]) -> Iterator[list[torch.Tensor]]:
    """What the modules put out, in order."""
    found: list[torch.Tensor] = []

    def keep(module: Any, arguments: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    hooks = [module.register_forward_hook(keep) for module in modules]
    yield found
    for hook in hooks:
        hook.remove()


def sample_of(work: Workshop, name: str) -> tuple[Any, Sample]:
    """A checkpoint as Hugging Face loads it, in fp64, and a prompt."""
    inputs = make_inputs(work.tiny(name), [7], [3], seed=2)
    model = LlavaForConditionalGeneration.from_pretrained(work.checkpoint(name), dtype=torch.float64)
    return model.eval(), Sample(inputs.input_ids[0], inputs.pixel_values, 17)


def logit(model: Any, sample: Sample) -> torch.Tensor:
    return logits(model, sample, 1)[0]


def logits(model: Any, sample: Sample, copies: int) -> torch.Tensor:
    """Of the label, by each of so many copies of the prompt in one batch."""
    pixels = torch.tensor(sample.pixel_values, dtype=torch.float64).repeat(copies, 1, 1, 1)
    ids = torch.tensor(sample.input_ids[None]).repeat(copies, 1)
    out: torch.Tensor = model(input_ids=ids, pixel_values=pixels).logits
    return out[:, -1, sample.label]


def tower_layers(model: Any) -> list[torch.nn.Module]:
    tower = model.model.vision_tower
    return list(getattr(tower, "vision_model", tower).encoder.layers)


def expected_heat(features: np.ndarray, gradient: np.ndarray, side: int) -> np.ndarray:
    features, gradient = features[-side * side :], gradient[-side * side :]
    weight = np.maximum(gradient, 0).mean(0)
    heat = np.maximum((features * weight).mean(1), 0).reshape(side, side)
    return heat / heat.max() if heat.max() > 0 else heat


@pytest.mark.parametrize("name", ["mha", "gqa2", "biased"])
def test_every_layer_equals_plain_autograd(work: Workshop, name: str) -> None:
    model, sample = sample_of(work, name)
    decoder, tower = list(model.model.language_model.layers), tower_layers(model)
    with kept(tower) as vision, kept(decoder) as hidden:
        y = logit(model, sample)
    gradients = torch.autograd.grad(y, [*hidden, *vision], allow_unused=True)
    cams, tiny = grad_cams(work.reference(name), sample), work.tiny(name)
    side, image = tiny.image_size // tiny.patch_size, np.flatnonzero(sample.input_ids == tiny.image_token)
    for layer, (features, gradient) in enumerate(zip(hidden, gradients, strict=False)):
        wanted = expected_heat(features[0, image].detach().numpy(), gradient[0, image].numpy(), side)
        np.testing.assert_allclose(cams.decoder[layer], wanted, atol=2e-3)
    used = [(f, g) for f, g in zip(vision, gradients[len(hidden) :], strict=True) if g is not None]
    assert len(used) == len(cams.vision) == tiny.vision_layers + 1 + tiny.vision_feature_layer
    for layer, (features, gradient) in enumerate(used):
        wanted = expected_heat(features[0].detach().numpy(), gradient[0].numpy(), side)
        np.testing.assert_allclose(cams.vision[layer], wanted, atol=2e-3)
    assert cams.decoder.max() == cams.vision.max() == 1 and cams.decoder.min() >= 0


def test_the_gradient_is_what_finite_differences_say(work: Workshop) -> None:
    """The whole statement once more without any autograd: G by moving one channel of one image token at a time."""
    model, sample = sample_of(work, "gqa2")
    tiny, layer = work.tiny("gqa2"), 3
    side, image = tiny.image_size // tiny.patch_size, np.flatnonzero(sample.input_ids == tiny.image_token)
    module, step = model.model.language_model.layers[layer], 5e-3  # norms are fp32 in any dtype
    with torch.no_grad():
        with kept([module]) as found:
            logit(model, sample)
        features, gradient = found[0][0, image].numpy(), np.zeros((len(image), tiny.hidden))
        moves = step * torch.cat([torch.eye(tiny.hidden), -torch.eye(tiny.hidden)]).double()  # one a row of a batch
        for token, place in enumerate(image):

            def moved(m: Any, a: Any, output: Any, place: Any = place) -> Any:
                output = output.clone()
                output[:, place] += moves
                return output

            hook = module.register_forward_hook(moved)
            values = logits(model, sample, len(moves))
            hook.remove()
            gradient[token] = (values[: tiny.hidden] - values[tiny.hidden :]) / (2 * step)
    cams = grad_cams(work.reference("gqa2"), sample)
    np.testing.assert_allclose(cams.decoder[layer], expected_heat(features, gradient, side), atol=1e-2)


def test_noise_is_drawn_by_its_seed(work: Workshop) -> None:
    _, sample = sample_of(work, "mha")
    reference = work.reference("mha")
    plain, one, again, other = (
        grad_cams(reference, sample, smooth=n, seed=seed) for n, seed in ((0, 0), (3, 0), (3, 0), (3, 1))
    )
    np.testing.assert_array_equal(one.decoder, again.decoder)
    assert not np.array_equal(one.decoder, other.decoder) and not np.array_equal(one.decoder, plain.decoder)
    still = grad_cams(reference, sample, smooth=3, noise=0.0)
    np.testing.assert_allclose(still.decoder, plain.decoder, atol=1e-6)
