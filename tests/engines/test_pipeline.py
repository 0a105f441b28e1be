"""The pipeline: choosing tokens, ending answers, budgets, caches that stay in place from question to question."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Workshop, call, save_inputs
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from numpy.typing import NDArray
from tiny import Inputs, make_inputs
from transformers import LlavaForConditionalGeneration

from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.cli import main as run_main
from himap_export.engines.pipeline import Pipeline
from himap_export.engines.prefill import Prefilled
from himap_export.engines.sampling import Sampler, Sampling
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import Place
from himap_export.validate.reference.criteria import reference_himap

Ints = NDArray[np.int64]
CUTS, NEW = reference_himap(2, 4, 0.5, 0.75), 12


def two_prompts(work: Workshop, seed: int = 0) -> Inputs:
    return make_inputs(work.tiny("gqa2"), [9, 3], [5, 1], seed)


@pytest.fixture
def bundle(work: Workshop) -> Path:
    return work.bundle("gqa2", "--batch", 2, "--text-budget", 16, "--max-new-tokens", NEW, cuts=CUTS)


@pytest.fixture
def pipeline(work: Workshop, bundle: Path) -> Pipeline:
    return work.pipeline(bundle)


def prefill(pipeline: Pipeline, inputs: Inputs) -> Prefilled:
    return pipeline.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)[0]


def answer(pipeline: Pipeline, inputs: Inputs, count: int = NEW, sampling: Sampling | None = None) -> Ints:
    """Tokens [B,N]."""
    prefilled, layout = pipeline.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
    return np.stack(list(pipeline.generate(prefilled, layout, count, sampling)), axis=1)


def with_stops(pipeline: Pipeline, eos: tuple[int, ...], pad: int = 0) -> Pipeline:
    model = structs.replace(pipeline.manifest.model, eos_tokens=eos, pad_token=pad)
    pipeline.manifest = structs.replace(pipeline.manifest, model=model)
    return pipeline


# --- choosing tokens ---

LOGITS = np.array([[0.0, 2.0, 1.0, -3.0], [5.0, 5.0, 4.9, -1.0]], np.float32)


def draws(how: Sampling, count: int, logits: NDArray[np.float32] = LOGITS) -> Ints:
    sampler = Sampler(how, range(len(logits)))
    return np.stack([sampler(logits) for _ in range(count)])


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert draws(Sampling(), 3).tolist() == [[1, 0]] * 3
    assert draws(Sampling(temperature=0.0, top_p=0.1, seed=9), 1).tolist() == [[1, 0]]


def test_a_seed_says_it_all() -> None:
    how = Sampling(temperature=1.0, seed=7)
    np.testing.assert_array_equal(draws(how, 50), draws(how, 50))
    assert not np.array_equal(draws(how, 50), draws(replace(how, seed=8), 50))


def test_frequencies_are_those_of_the_softmax() -> None:
    """20000 draws: a frequency's standard deviation is at most 0.0035; five of them are allowed."""
    for temperature in (0.5, 1.0, 3.0):
        found = draws(Sampling(temperature, seed=1), 20000)
        for row, logits in enumerate(LOGITS.astype(np.float64) / temperature):
            p = np.exp(logits) / np.exp(logits).sum()
            np.testing.assert_allclose(np.bincount(found[:, row], minlength=4) / 20000, p, atol=0.018)


def test_a_tiny_top_p_is_greedy() -> None:
    assert draws(Sampling(temperature=5.0, top_p=1e-9), 20).tolist() == [[1, 0]] * 20


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05: each p names the tokens that can come."""
    logits = np.log(np.array([[0.15, 0.5, 0.05, 0.3]], np.float32))
    for top_p, allowed in (
        (0.4, {1}),
        (0.6, {1, 3}),
        (0.79, {1, 3}),
        (0.9, {0, 1, 3}),
        (0.96, {0, 1, 2, 3}),
        (1, {0, 1, 2, 3}),
    ):
        assert set(draws(Sampling(1.0, top_p), 400, logits)[:, 0].tolist()) == allowed


def test_the_last_bits_of_logits_move_no_draw() -> None:
    """Tokens that are as likely as each other change places when they are ranked: a decode over one row or over eight
    may then draw another."""
    logits = np.random.default_rng(0).choice(np.linspace(0, 0.5, 20, dtype=np.float32), (1, 500))
    noise = np.random.default_rng(1).uniform(-1e-6, 1e-6, logits.shape).astype(np.float32)
    how = Sampling(temperature=1.5, seed=3)
    np.testing.assert_array_equal(draws(how, 200, logits), draws(how, 200, logits + noise))


def test_a_low_temperature_does_not_overflow() -> None:
    logits = np.array([[-3e4, 3e4, 0.0]], np.float32)
    assert draws(Sampling(temperature=1e-6), 5, logits).tolist() == [[1]] * 5


ROWS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=9)


@given(st.floats(0.1, 10), st.floats(0.01, 1), st.integers(0, 2**32), ROWS)
def test_a_drawn_token_is_among_those_that_top_p_allows(t: float, top_p: float, seed: int, row: list[float]) -> None:
    token = int(draws(Sampling(t, top_p, seed), 1, np.array([row], np.float32))[0, 0])
    logits = np.array(row, np.float32).astype(np.float64) / t
    p = np.exp(logits - logits.max())
    p /= p.sum()
    assert p[p > p[token]].sum() < top_p + 1e-9  # what is more likely alone does not reach top_p


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-0.1, 1.0), "temperature -0.1"),
        ((np.nan, 1.0), "temperature nan"),
        ((np.inf, 1.0), "temperature inf"),
        ((1.0, 0.0), "top_p 0.0"),
        ((1.0, 1.1), "top_p 1.1"),
        ((1.0, -1), "top_p -1"),
        ((1.0, np.nan), "top_p nan"),
    ],
)
def test_impossible_sampling_is_refused(arguments: tuple[float, float], words: str) -> None:
    with pytest.raises(HimapError, match=words) as found:
        Sampling(*arguments)
    assert found.value.code == Exit.USAGE


def test_sampling_flags_reach_the_answer(work: Workshop, bundle: Path, pipeline: Pipeline) -> None:
    inputs = two_prompts(work)
    flags = ("--temperature", 1.5, "--top-p", 0.9, "--seed", 3)
    sampled = work.answer(bundle, inputs, *flags)["tokens"]
    np.testing.assert_array_equal(sampled, work.answer(bundle, inputs, *flags)["tokens"])
    np.testing.assert_array_equal(sampled, answer(pipeline, inputs, NEW, Sampling(1.5, 0.9, 3)))
    for other in ((), ("--temperature", 1.5, "--top-p", 0.9, "--seed", 4)):
        assert not np.array_equal(sampled, work.answer(bundle, inputs, *other)["tokens"])


def test_what_a_request_draws_does_not_depend_on_its_batch(work: Workshop) -> None:
    """Four equal prompts, answered one by one and two at a time: each its own answer, the same both ways."""
    prompt = make_inputs(work.tiny("gqa2"), [9], [5])
    four = Inputs(
        *(np.repeat(part, 4, axis=0) for part in (prompt.input_ids, prompt.attention_mask, prompt.pixel_values))
    )
    shape = ("--text-budget", 16, "--max-new-tokens", NEW)
    one, two = (work.bundle("gqa2", "--batch", b, *shape, cuts=CUTS) for b in (1, 2))
    alone, paired = (work.answer(b, four, "--temperature", 1.5, "--seed", 3)["tokens"] for b in (one, two))
    np.testing.assert_array_equal(alone, paired)
    assert len(np.unique(alone, axis=0)) == 4
    in_first, in_second = (Sampler(Sampling(1.0, seed=1), requests)(LOGITS) for requests in ((0, 5), (5, 9)))
    again = Sampler(Sampling(1.0, seed=1), (5,))(LOGITS[1:])
    assert in_first[1] == again[0] and len(in_second) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_no_answer(pipeline: Pipeline, work: Workshop, bad: float) -> None:
    logits = LOGITS.copy()
    logits[1, 2] = bad
    with pytest.raises(HimapError, match="1 of 4 logits of prompt 7 are NaN or infinite"):
        Sampler(Sampling(), (3, 7))(logits)
    inputs = two_prompts(work)
    prefilled, layout = pipeline.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
    prefilled.logits[0, 5] = bad
    with pytest.raises(HimapError, match="the model gives no answer"):
        next(pipeline.generate(prefilled, layout, 1))


def test_pixels_are_numbers_that_the_graph_can_hold(pipeline: Pipeline, work: Workshop) -> None:
    inputs = two_prompts(work)
    for bad in (np.nan, np.inf):
        inputs.pixel_values[1, 0, 0, 0] = bad
        with pytest.raises(HimapError, match="pixel_values are out of range"):
            pipeline.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)


def test_a_bundle_larger_than_the_machine_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("himap_export.engines.prefill.memory_bytes", lambda: 1 << 16)
    with pytest.raises(HimapError, match="is too large for this machine"):
        Pipeline(Bundle.open(bundle).select(), "onnxruntime", Opening(threads=1))


# --- the end of an answer ---


def test_answers_end_and_are_padded_as_hugging_face_does_it(work: Workshop) -> None:
    """Unpruned, a stop token that one row says early, another that both say: lengths and padding as in `generate`."""
    inputs, name = make_inputs(work.tiny("gqa2"), [9, 3], [5, 1], seed=1), "gqa2"
    pipeline = work.pipeline(work.bundle(name, "--batch", 2, cuts=reference_himap(2, 4, 0.0, 0.0)))
    model = LlavaForConditionalGeneration.from_pretrained(work.checkpoint(name), dtype=torch.float32).eval()
    left = inputs.left_padded()
    ids, mask, pixels = map(torch.from_numpy, (left.input_ids, left.attention_mask, left.pixel_values))
    free = answer(with_stops(pipeline, ()), inputs, 32)
    only_first = int(next(token for token in free[0, 3:] if token not in free[1]))
    only_second = int(next(token for token in free[1, 6:] if token not in free[0]))
    lengths = []
    for stops in ((only_first,), (only_first, only_second), (int(free[0, 0]), only_second)):
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = list(stops), 7
        given = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
        expected = model.generate(**given, max_new_tokens=32, do_sample=False)
        got = answer(with_stops(pipeline, stops, pad=7), inputs, 32)
        np.testing.assert_array_equal(got, expected[:, ids.shape[1] :].numpy())
        assert (got == 7).any()
        lengths.append(got.shape[1])
    assert lengths[0] == 32 > lengths[1]  # one row goes on to the end; both rows end early


def test_an_answer_that_starts_with_its_end(work: Workshop, pipeline: Pipeline) -> None:
    inputs = two_prompts(work).sample(0)
    first = int(prefill(pipeline, inputs).logits.argmax())
    assert answer(with_stops(pipeline, (first,)), inputs).tolist() == [[first]]


def test_fewer_tokens_than_the_budget(work: Workshop, bundle: Path, pipeline: Pipeline) -> None:
    inputs = two_prompts(work)
    whole = answer(with_stops(pipeline, ()), inputs)
    assert whole.shape == (2, NEW)
    for count in (1, 5):
        short = work.answer(bundle, inputs, "--max-new-tokens", count)["tokens"]
        np.testing.assert_array_equal(short, whole[:, :count])


# --- budgets ---


@pytest.mark.parametrize("count", [NEW + 1, 10**6, 0, -1])
def test_more_new_tokens_than_the_budget(
    work: Workshop, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    asked, answered = save_inputs(tmp_path / "in.npz", two_prompts(work)), tmp_path / "out.npz"
    arguments = ("--load-inputs", asked, "--save-outputs", answered, "--max-new-tokens", count)
    assert call(run_main, bundle, *arguments) == Exit.USAGE
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert "--max-new-tokens" in captured.err and str(count) in captured.err and "1 to " in captured.err
    assert not answered.exists()


def twice(i: Inputs) -> Inputs:
    return Inputs(np.repeat(i.input_ids, 2, 1), np.repeat(i.attention_mask, 2, 1), i.pixel_values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: replace(i, input_ids=np.where(i.input_ids == 255, 9, i.input_ids)), "prompt 0 holds no image"),
        (lambda i: replace(i, input_ids=np.where(i.input_ids == 1, 255, i.input_ids)), "prompt 0 holds 17 image"),
        (twice, "prompt 0 holds 32 image"),
        (
            lambda i: replace(i, pixel_values=i.pixel_values[:1]),
            r"are \[1, 3, 56, 56\]: expected \[2, 3, 56, 56\], of 2 images",
        ),
        (
            lambda i: replace(i, pixel_values=i.pixel_values[..., 1:]),
            r"are \[2, 3, 56, 55\]: expected \[2, 3, 56, 56\], of 2 images",
        ),
    ],
    ids=["no-image", "one-too-many", "two-images", "an-image-short", "wrong-size"],
)
def test_prompts_that_do_not_fit(
    work: Workshop, pipeline: Pipeline, change: Callable[[Inputs], Inputs], words: str
) -> None:
    with pytest.raises(HimapError, match=words) as found:
        prefill(pipeline, change(two_prompts(work)))
    assert found.value.code == Exit.USAGE


def test_more_text_than_the_budget(work: Workshop, pipeline: Pipeline) -> None:
    fits, over = (make_inputs(work.tiny("gqa2"), [3, text], [1, 5]) for text in (11, 12))
    assert prefill(pipeline, fits).logits.shape == (2, 256)
    with pytest.raises(HimapError, match=r"prompt 1 has 17 text tokens: the budget is 16 .*`text_budget` 17") as found:
        prefill(pipeline, over)
    assert found.value.code == Exit.USAGE


def test_what_one_pipeline_saw_another_need_not_look_at(work: Workshop, bundle: Path, pipeline: Pipeline) -> None:
    """And it does not: of other pixels, given what was seen in the first ones, it says what it says of those."""
    first, other = two_prompts(work, 0), two_prompts(work, 1)
    expected = prefill(pipeline, first)
    second = work.pipeline(bundle)
    found, _ = second.prefill(first.input_ids, pipeline.seen(), first.attention_mask)
    np.testing.assert_array_equal(found.logits, expected.logits)
    for cut, kept in expected.kept.items():
        np.testing.assert_array_equal(found.kept[cut], kept)
    assert not np.array_equal(prefill(second, replace(first, pixel_values=other.pixel_values)).logits, found.logits)


# --- caches ---


def test_every_question_is_answered_as_if_it_were_the_first(work: Workshop, bundle: Path) -> None:
    """What a longer answer, another prompt, or an answer broken off left in the caches is never seen again."""
    questions = [two_prompts(work, seed) for seed in range(3)]
    first = [answer(work.pipeline(bundle), q) for q in questions]
    assert not np.array_equal(first[0], first[1])
    pipeline = work.pipeline(bundle)
    for index in (0, 1, 2, 1, 1, 0):
        np.testing.assert_array_equal(answer(pipeline, questions[index]), first[index])
        other = questions[2]
        begun = pipeline.prefill(other.input_ids, other.pixel_values, other.attention_mask)
        broken_off = pipeline.generate(*begun, NEW)
        next(broken_off), next(broken_off)
    short = questions[0].sample(1)
    np.testing.assert_array_equal(answer(pipeline, short), first[0][1:])


def test_caches_stay_where_they_are(work: Workshop, pipeline: Pipeline) -> None:
    """Each layer has one cache: prefill writes it, decode appends to it in place, and never moves it."""
    caches = {place: t for place, t in pipeline.tensors.items() if place.role in ("key", "value")}
    assert len(caches) == 2 * work.tiny("gqa2").layers
    decode, stage = (pipeline.spec.graph(name) for name in ("decode", "k1"))
    assert decode.inputs["past_key.3"].place == stage.outputs["present_key.3"].place == Place("key", 3)
    assert stage.outputs["present_key.3"].updates == "past_key.3"
    inputs = two_prompts(work)
    prefilled, layout = pipeline.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
    before = {place: t.read() for place, t in caches.items()}
    tokens = pipeline.generate(prefilled, layout, 3)
    next(tokens), next(tokens)
    assert {place: pipeline.tensors[place] for place in caches} == caches
    stages, removed = (range(2), range(2, 4), range(4, 6)), (0, 8, 14)
    for layers, gone in zip(stages, removed, strict=True):
        for at in (Place(what, i) for i in layers for what in ("key", "value")):
            after = caches[at].read()
            changed = np.argwhere((after != before[at]).any(axis=(1, 3)))
            slots = [(sample, length - gone) for sample, length in enumerate(layout.lengths)]
            assert [tuple(place) for place in changed.tolist()] == slots  # one slot a sample: over its first padding


def test_two_pipelines_do_not_disturb_each_other(work: Workshop, bundle: Path) -> None:
    """Steps of two pipelines on one bundle, and of a third on another, in turn."""
    other = work.bundle("gqa2", "--batch", 2, "--text-budget", 24, cuts=reference_himap(1, 3, 0.25, 0.5))
    jobs = [(bundle, two_prompts(work, 0)), (bundle, two_prompts(work, 1)), (other, two_prompts(work, 0))]
    alone = [answer(work.pipeline(b), q, 8).T.tolist() for b, q in jobs]
    streams = []
    for b, q in jobs:
        pipeline = work.pipeline(b)
        prefilled, layout = pipeline.prefill(q.input_ids, q.pixel_values, q.attention_mask)
        streams.append(pipeline.generate(prefilled, layout, 8))
    together = [[t.tolist() for t in step] for step in zip(*streams, strict=True)]
    assert [list(stream) for stream in zip(*together, strict=True)] == alone
    assert alone[0] != alone[1] != alone[2] != alone[0]


def test_a_backend_that_the_bundle_does_not_hold(bundle: Path) -> None:
    with pytest.raises(HimapError, match="holds no tensorrt-rtx engines: it holds onnxruntime") as found:
        Pipeline(Bundle.open(bundle).select(), "tensorrt-rtx")
    assert found.value.code == Exit.MISSING
