"""Saliency against plain autograd on Hugging Face's whole model, finite differences of the loss, and NumPy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Workshop
from numpy.typing import NDArray
from tiny import TINY, Inputs, make_inputs, make_llava
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, AttentionMaskInterface, LlavaForConditionalGeneration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from himap_export.graphs.errors import HimapError
from himap_export.validate.analysis.saliency import LayerFlow, flow_of, saliency
from himap_export.validate.analysis.sample import Sample, Spans, average, spans_of
from himap_export.validate.reference.reference import Reference

PROMPTS = {  # text and system tokens, runs of image tokens
    "plain": ((9,), (5,), 1),
    "split": ((7,), (3,), 3),
    "image first": ((6,), (0,), 1),
    "image last": ((0,), (4,), 1),
}


def prompt(name: str, shape: str) -> tuple[Inputs, Sample]:
    text, system, runs = PROMPTS[shape]
    inputs = make_inputs(TINY[name], text, system, seed=len(shape), image_runs=runs)
    return inputs, Sample(inputs.input_ids[0], inputs.pixel_values, label=11)


def hugging_face(folder: Path, attention: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


def loss_of(model: Any, inputs: Inputs, label: int, **options: Any) -> tuple[torch.Tensor, Any]:
    ids, pixels = torch.from_numpy(inputs.input_ids), torch.from_numpy(inputs.pixel_values).to(model.dtype)
    out = model(input_ids=ids, pixel_values=pixels, **options)
    return -out.logits[0, -1].log_softmax(-1)[label], out


def by_autograd(model: Any, inputs: Inputs, label: int) -> list[NDArray[np.float64]]:
    """|A * dL/dA| of each layer, averaged over the heads, all layers' graphs at once."""
    loss, out = loss_of(model, inputs, label, output_attentions=True)
    gradients = torch.autograd.grad(loss, out.attentions)
    maps = zip(out.attentions, gradients, strict=True)
    return [(a.detach() * g).abs().mean(1)[0].double().numpy() for a, g in maps]


def summed(found: NDArray[np.float64], ids: NDArray[np.int64], image_token: int) -> LayerFlow:
    """The flow of a map [S,S], token by token."""
    last = max(i for i, token in enumerate(ids) if token == image_token)
    kind = ["image" if t == image_token else "system" if i < last else "instruction" for i, t in enumerate(ids)]
    means = {k: np.mean([found[i].sum() for i in range(len(ids)) if kind[i] == k] or [0.0]) for k in set(kind)}
    total = sum(means.values())
    columns = [j for j in range(len(ids)) if kind[j] == "image"]
    to = {k: sum(found[i, j] for i in range(len(ids)) if kind[i] == k for j in columns) for k in kind}
    system, image, instruction = (means.get(k, 0.0) / total for k in ("system", "image", "instruction"))
    return LayerFlow(system, image, instruction, to["image"], to.get("instruction", 0.0))


def assert_flows(got: tuple[LayerFlow, ...], wanted: list[LayerFlow], rtol: float, atol: float) -> None:
    np.testing.assert_allclose([astuple(f) for f in got], [astuple(f) for f in wanted], rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", PROMPTS)
@pytest.mark.parametrize("name", ["mha", "gqa2"])
def test_equals_plain_autograd(work: Workshop, name: str, shape: str) -> None:
    inputs, sample = prompt(name, shape)
    (got,) = saliency(work.reference(name), [sample])
    maps = by_autograd(hugging_face(work.checkpoint(name)), inputs, sample.label)
    wanted = [summed(found, sample.input_ids, TINY[name].image_token) for found in maps]
    assert len(got) == TINY[name].layers and max(f.visual_to_visual for f in wanted) > 1e-3
    assert_flows(got, wanted, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose([f.system + f.image + f.instruction for f in got], 1.0, atol=1e-12)


@contextmanager
def perturbable(folder: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Hugging Face's model in fp64, and where an attention probability is to be multiplied by 1 + eps."""
    at: dict[str, Any] = {"layer": -1}

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        output, maps = eager_attention_forward(module, query, key, value, mask, **options)
        if getattr(module, "layer_idx", None) == at["layer"]:
            head, row, column = at["entry"]
            own = value[0, head // module.num_key_value_groups, column]
            output[0, row, head] += at["eps"] * maps[0, head, row, column] * own
        return output, maps

    AttentionInterface.register("test_perturbed", attend)
    AttentionMaskInterface.register("test_perturbed", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    yield hugging_face(folder, {"": "eager", "text_config": "test_perturbed"}, torch.float64), at  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_equals_finite_differences_of_the_loss(tmp_path: Path, layer: int) -> None:
    """Every entry of every head's map in one of three layers, two images' worth of text around four image tokens."""
    tiny = make_llava(tmp_path, TINY["gqa2"], image_size=28, layers=3)
    inputs = make_inputs(tiny, (3,), (2,), image_runs=2)
    sample = Sample(inputs.input_ids[0], inputs.pixel_values, label=23)
    (got,) = saliency(Reference(tmp_path), [sample])
    size, eps = len(sample.input_ids), 0.02
    found = np.zeros((tiny.heads, size, size))
    with perturbable(tmp_path) as (model, at), torch.no_grad():
        for entry in zip(*np.nonzero(np.tri(size)[None].repeat(tiny.heads, 0)), strict=True):
            at.update(layer=layer, entry=entry)
            sides = [loss_of(model, inputs, sample.label)[0].item() for at["eps"] in (eps, -eps)]
            found[entry] = (sides[0] - sides[1]) / (2 * eps)
    wanted = summed(np.abs(found).mean(0), sample.input_ids, tiny.image_token)
    assert_flows((got[layer],), [wanted], rtol=1e-3, atol=1e-5)


def test_half_precision_does_not_lose_small_gradients(work: Workshop) -> None:
    """A model so sure of its answer that every other token's probability, 1e-8, is below what fp16 knows."""
    folder = work.checkpoint("gqa2")
    reference, exact = Reference(folder, torch.float16), hugging_face(folder, dtype=torch.float64)
    inputs, sample = prompt("gqa2", "plain")
    with torch.no_grad():
        logits = loss_of(exact, inputs, 0)[1].logits[0, -1]
        label = int(logits.argmax())
        for model in (exact, reference.adapter.whole):
            model.lm_head.weight[label] *= float(18 / logits[label])
        assert 1e-8 < loss_of(exact, inputs, label)[0] < 1e-4
    (got,) = saliency(reference, [Sample(sample.input_ids, sample.pixel_values, label)])
    wanted = [summed(m, sample.input_ids, 255) for m in by_autograd(exact, inputs, label)]
    shares = [[(f.system, f.image, f.instruction) for f in flows] for flows in (got, wanted)]
    np.testing.assert_allclose(*shares, atol=0.01)
    assert_flows(got, wanted, rtol=0.3, atol=0.0)  # a logit of 18 in fp16 is off by 0.2 %, its loss by 20 %
    assert all(f.visual_to_text > 0 for f in got)


def test_leaves_the_reference_as_it_was(work: Workshop) -> None:
    _, sample = prompt("mha", "plain")
    reference = Reference(work.checkpoint("mha"), attn_implementation="sdpa")
    before = reference.decoder.config._attn_implementation
    (got,), (wanted,) = saliency(reference, [sample]), saliency(work.reference("mha"), [sample])
    assert_flows(got, list(wanted), rtol=1e-3, atol=1e-7)  # the tower's attention is not the same
    assert reference.decoder.config._attn_implementation == before
    assert all(p.grad is None for p in reference.adapter.whole.parameters())
    assert not any(layer.self_attn._forward_hooks for layer in reference.decoder.layers)


def test_samples_do_not_mix_and_are_averaged(work: Workshop) -> None:
    samples, told = [prompt("mha", shape)[1] for shape in PROMPTS], list[tuple[int, int]]()
    together = saliency(work.reference("mha"), samples, lambda *counts: told.append(counts))
    assert together == [saliency(work.reference("mha"), [sample])[0] for sample in samples]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    mean = average(together)
    for field in fields(LayerFlow):
        wanted = [np.mean([getattr(found[i], field.name) for found in together]) for i in range(len(mean))]
        np.testing.assert_allclose([getattr(layer, field.name) for layer in mean], wanted)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch's allocations during `work` add up to, by its profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    changes = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum(changes).max())


def test_holds_the_maps_of_one_layer_only(tmp_path: Path) -> None:
    """In units of one layer's maps [H,S,S] of fp32; plain autograd holds several for each of the layers."""
    tiny = make_llava(tmp_path, TINY["gqa2"], layers=12, heads=8, kv_heads=2, head_dim=8)
    inputs = make_inputs(tiny, (150,), (90,))
    sample = Sample(inputs.input_ids[0], inputs.pixel_values, label=11)
    unit = 4 * tiny.heads * len(sample.input_ids) ** 2
    reference, model = Reference(tmp_path), hugging_face(tmp_path)
    assert peak_bytes(lambda: by_autograd(model, inputs, sample.label)) > 24 * unit
    assert peak_bytes(lambda: saliency(reference, [sample])) < 9 * unit


def test_spans_of_a_split_image() -> None:
    ids = np.array([1, 9, 255, 255, 7, 255, 8, 6])
    spans = spans_of(ids == 255)
    assert spans.system.nonzero()[0].tolist() == [0, 1, 4]
    assert spans.image.nonzero()[0].tolist() == [2, 3, 5]
    assert spans.instruction.nonzero()[0].tolist() == [6, 7]


def test_no_image_no_samples_no_saliency() -> None:
    with pytest.raises(HimapError, match="no image"):
        spans_of(np.array([1, 2, 3]) == 255)
    nothing = Spans(*(np.array(rows) for rows in ([True, False, False], [False, True, False], [False, False, True])))
    with pytest.raises(HimapError, match="no attention"):
        flow_of(np.zeros((3, 3)), nothing)


def test_no_samples_is_a_users_error(work: Workshop) -> None:
    with pytest.raises(HimapError, match="nothing to analyse"):
        saliency(work.reference("mha"), [])
