"""The reference against the authors' numbers, Hugging Face's `forward` and `generate`, and an explicit computation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import greedy
from numpy.typing import NDArray
from tiny import TINY, Inputs, Tiny, make_inputs, make_llava
from transformers import LlavaForConditionalGeneration

from himap_export.validate.reference.criteria import Cuts, reference_himap
from himap_export.validate.reference.reference import Prefill, Reference

HIMAP_TINY = Path(__file__).parents[1] / "fixtures" / "himap-tiny"
GOLDEN = {
    "golden_k2_5_n8_2.npz": reference_himap(2, 5, 0.5, 0.75),
    "golden_k1_4_n8_4.npz": reference_himap(1, 4, 0.5, 0.5),
}
CUTS = reference_himap(2, 4, 0.5, 0.75)

Ints = NDArray[np.int64]
Made = Callable[[str], tuple[Tiny, Path, Reference]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The named tiny checkpoint, its folder, and its reference; each is made once."""
    cache: dict[str, tuple[Tiny, Path, Reference]] = {}

    def make(name: str) -> tuple[Tiny, Path, Reference]:
        if name not in cache:
            folder = tmp_path_factory.mktemp(name)
            cache[name] = (make_llava(folder, TINY[name]), folder, Reference(folder))
        return cache[name]

    return make


def golden_inputs() -> Inputs:
    stored = np.load(HIMAP_TINY / "inputs.npz")
    return Inputs(stored["input_ids"], np.ones_like(stored["input_ids"]), stored["pixel_values"])


def prefill(reference: Reference, inputs: Inputs, cuts: Cuts = (), **options: Any) -> Prefill:
    return reference.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask, cuts, **options)


def generate(reference: Reference, inputs: Inputs, count: int, cuts: Cuts = ()) -> Ints:
    ids, pixels, mask = inputs.input_ids, inputs.pixel_values, inputs.attention_mask
    return greedy(reference, ids, pixels, mask, max_new_tokens=count, cuts=cuts)


def hugging_face(folder: Path, attention: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


def tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    arrays = (inputs.input_ids, inputs.attention_mask, inputs.pixel_values)
    return dict(zip(("input_ids", "attention_mask", "pixel_values"), map(torch.from_numpy, arrays), strict=True))


# --- the authors' numbers ---


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_himap_tiny_equals_the_authors_results(name: str, attention: str) -> None:
    golden, inputs, reference = (
        np.load(HIMAP_TINY / name),
        golden_inputs(),
        Reference(HIMAP_TINY, torch.float32, attention),
    )
    got = prefill(reference, inputs, GOLDEN[name])
    np.testing.assert_array_equal(got.kept[0][0], golden["kept1"])
    np.testing.assert_array_equal(got.kept[1][0], golden["kept2"])
    np.testing.assert_allclose(got.scores[0][0], golden["score1"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.scores[1][0], golden["score2"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.logits, golden["logits_last"], atol=1e-4)
    with torch.no_grad():
        rows = reference.adapter.head(reference.decoder.norm(torch.from_numpy(got.hidden[-1][0])))
    np.testing.assert_allclose(rows.numpy(), golden["logits"][0], atol=1e-4)
    assert generate(reference, inputs, 1, GOLDEN[name]).tolist() == [[int(golden["logits_last"].argmax())]]
    np.testing.assert_allclose(prefill(reference, inputs).logits, golden["unpruned_last"], atol=1e-4)


# --- the unpruned model is Hugging Face's ---


@pytest.mark.parametrize("name", ["mha", "gqa2", "mqa4", "biased", "tied", "sharded"])
def test_unpruned_prefill_equals_hugging_face_forward(made: Made, name: str) -> None:
    tiny, folder, reference = made(name)
    inputs = make_inputs(tiny, [9, 3, 14], [5, 1, 2], image_runs=2)
    with torch.no_grad():
        output = hugging_face(folder)(**tensors(inputs), output_hidden_states=True)
    got = prefill(reference, inputs)
    for sample, length in enumerate(inputs.attention_mask.sum(1).tolist()):
        np.testing.assert_allclose(got.logits[sample], output.logits[sample, length - 1], atol=2e-5)
        assert len(got.hidden[0][sample]) == length
    assert got.kept == got.scores == () and len(got.hidden) == 1


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gqa2", "tied"])
def test_unpruned_greedy_answers_equal_hugging_face_generate(made: Made, name: str, attention: str) -> None:
    tiny, folder, _ = made(name)
    reference, model = Reference(folder, torch.float32, attention), hugging_face(folder, attention)
    inputs = make_inputs(tiny, [9, 3], [5, 1], seed=1)
    free = generate(reference, inputs, 32)
    # Stop at a token that only one row is known to say early: the rows end at different lengths, one of them padded.
    stop = int(next(token for token in free[0, 5:] if token not in free[1]))
    for stops in ([2], [2, stop]):
        reference.stop_tokens, model.generation_config.eos_token_id = tuple(stops), stops
        expected = model.generate(**tensors(inputs.left_padded()), max_new_tokens=32, do_sample=False)
        expected = expected[:, inputs.input_ids.shape[1] :].numpy()
        np.testing.assert_array_equal(generate(reference, inputs, 32), expected)
    assert generate(reference, inputs, 32)[0, -1] == reference.pad_token == 0
    alone = generate(reference, inputs.sample(0), 32)
    assert alone.shape[1] < 32 and alone[0, -1] == stop  # N ends where the last row ends


def test_forward_and_step_on_a_batch_equal_one_by_one(made: Made) -> None:
    tiny, folder, _ = made("mqa4")
    reference = Reference(folder, attn_implementation="sdpa")
    inputs = make_inputs(tiny, [6, 6], [3, 3])
    prompts = reference.embed(inputs.input_ids, inputs.pixel_values)
    logits, cache = reference.forward(prompts)
    single = prefill(reference, inputs)
    np.testing.assert_allclose(logits, single.logits, atol=2e-5)
    tokens = logits.argmax(-1)
    following = reference.answer(single, 2, np.stack([tokens.numpy()] * 2, 1))[1]
    np.testing.assert_allclose(following[:, 0], single.logits)
    np.testing.assert_allclose(reference.step(tokens, prompts.hidden.shape[1], cache), following[:, 1], atol=2e-5)


# --- pruned: an independent computation without a cache, in which every layer's visible set is explicit ---


def visible_forward(model: Any, inputs: Inputs, answer: list[int], alive: list[Ints]) -> tuple[torch.Tensor, list[Any]]:
    """Logits [S+N,W] and each layer's attention [H,S+N,S+N] of one prompt and its answer, nobody ever removed.

    In layer i a token sees the tokens before it that are in `alive[i]`, the answer's, and itself. Removed tokens go
    on computing, but nobody looks at them.
    """
    prompt = torch.from_numpy(inputs.input_ids[0])
    embeds = model.get_input_embeddings()(torch.cat([prompt, torch.tensor(answer, dtype=torch.int64)]))
    features = torch.cat(model.get_image_features(pixel_values=torch.from_numpy(inputs.pixel_values)).pooler_output)
    embeds[: len(prompt)][prompt == model.config.image_token_id] = features
    hidden, size, attentions = embeds[None], len(embeds), []
    decoder, places = model.model.language_model, torch.arange(len(embeds))[None]
    for layer, kept in zip(decoder.layers, alive, strict=True):
        columns = torch.zeros(size, dtype=torch.bool)
        columns[torch.from_numpy(kept)] = columns[len(prompt) :] = True
        visible = columns[None].expand(size, size).tril() | torch.eye(size, dtype=torch.bool)
        mask = torch.zeros(size, size).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
        handle = layer.self_attn.register_forward_hook(lambda _, __, output: attentions.append(output[1][0]))
        hidden = layer(hidden, attention_mask=mask, position_embeddings=decoder.rotary_emb(hidden, places))
        handle.remove()
    return model.lm_head(decoder.norm(hidden[0])), attentions


@pytest.mark.parametrize("cuts", [CUTS, reference_himap(1, 5, 0.4, 0.3)], ids=["coarse", "fine"])
@pytest.mark.parametrize(("name", "runs"), [("mha", 1), ("gqa2", 3), ("mqa4", 2), ("biased", 1), ("sharded", 4)])
@torch.no_grad()
def test_pruning_and_cached_decoding_equal_explicit_visibility(made: Made, name: str, runs: int, cuts: Cuts) -> None:
    tiny, folder, reference = made(name)
    inputs = make_inputs(tiny, [8], [4], seed=7, image_runs=runs)
    length, image = inputs.input_ids.shape[1], np.flatnonzero(inputs.input_ids[0] == tiny.image_token)
    got = prefill(reference, inputs, cuts)
    alive = [np.arange(length)] * cuts[0].layer + [got.kept[0][0]] * (cuts[1].layer - cuts[0].layer)
    alive += [got.kept[1][0]] * (tiny.layers - cuts[1].layer)
    answer = generate(reference, inputs, 12, cuts)[0].tolist()
    logits, attentions = visible_forward(hugging_face(folder), inputs, answer, alive)

    first, second = attentions[cuts[0].layer - 1].mean(0).numpy(), attentions[cuts[1].layer - 1].mean(0).numpy()
    score = first[image[-1] + 1 : length, image].sum(0)
    np.testing.assert_allclose(got.scores[0][0], score, rtol=1e-4, atol=1e-5)
    survivors = np.sort(np.argsort(-score, kind="stable")[: len(image) - int(cuts[0].remove * len(image))])
    kept = image[survivors]
    assert sorted({*range(length)} - {*image} | {*kept}) == got.kept[0][0].tolist()
    score = second[np.ix_(kept, kept)].sum(0)
    np.testing.assert_allclose(got.scores[1][0], score, rtol=1e-4, atol=1e-5)
    kept = kept[np.argsort(-score, kind="stable")[: len(kept) - int(cuts[1].remove * len(kept))]]
    assert sorted({*range(length)} - {*image} | {*kept}) == got.kept[1][0].tolist()

    np.testing.assert_allclose(got.logits[0], logits[length - 1], atol=5e-5)
    assert logits[length - 1 : -1].argmax(-1).tolist() == answer
    replayed = reference.answer(got, len(answer), np.array([answer]))[1][0]
    np.testing.assert_allclose(replayed, logits[length - 1 : -1], atol=5e-5)
    assert [got.caches[0].get_seq_length(layer) for layer in range(tiny.layers)] == [
        len(kept) + len(answer) - 1 for kept in alive
    ]


@pytest.mark.parametrize(
    ("name", "cuts", "left"),
    [
        ("sharded", CUTS, (5, 2)),
        ("mqa4", CUTS, (18, 5)),
        ("mha", reference_himap(1, 2, 0.3, 0.0), (12, 12)),
        ("gqa2", CUTS, (8, 2)),
    ],
)
def test_removed_is_the_floor(made: Made, name: str, cuts: Cuts, left: tuple[int, int]) -> None:
    tiny, _, reference = made(name)
    got = prefill(reference, make_inputs(tiny, [8], [4]), cuts)
    assert (got.kept[0].shape[1] - 12, got.kept[1].shape[1] - 12) == left
    assert (got.scores[0].shape[1], got.scores[1].shape[1]) == (tiny.image_tokens, left[0])
    assert [len(stage[0]) for stage in got.hidden] == [12 + tiny.image_tokens, 12 + left[0], 12 + left[1]]


def test_equals_go_to_the_lowest_position(made: Made) -> None:
    """With no text behind the image, no row scores at K1: all are equal."""
    tiny, _, reference = made("mha")
    got = prefill(reference, make_inputs(tiny, [0], [4]), reference_himap(2, 4, 0.5, 0.0))
    assert not got.scores[0].any()
    assert got.kept[0][0].tolist() == list(range(4 + 8))


# --- batches and padding ---


@pytest.mark.parametrize("name", ["gqa2", "mqa4"])
def test_padding_and_neighbours_change_nothing(made: Made, name: str) -> None:
    tiny, _, reference = made(name)
    inputs = make_inputs(tiny, [9, 3, 14], [5, 1, 2], seed=3, image_runs=2)
    right, left = prefill(reference, inputs, CUTS), prefill(reference, inputs.left_padded(), CUTS)
    answers = generate(reference, inputs, 6, CUTS)
    np.testing.assert_array_equal(answers, generate(reference, inputs.left_padded(), 6, CUTS))
    for there, here in zip(*((p.lengths, p.logits, *p.kept, *p.scores) for p in (right, left)), strict=True):
        np.testing.assert_array_equal(there, here)
    for index in range(3):
        alone = prefill(reference, inputs.sample(index), CUTS)
        assert alone.lengths.tolist() == [right.lengths[index]]
        for padded, single in zip(right.kept, alone.kept, strict=True):
            np.testing.assert_array_equal(padded[index][padded[index] >= 0], single[0])
        np.testing.assert_allclose(right.scores[0][index], alone.scores[0][0], rtol=1e-5)
        np.testing.assert_allclose(right.scores[1][index], alone.scores[1][0], rtol=1e-5)
        np.testing.assert_allclose(right.logits[index], alone.logits[0], atol=2e-5)
        for stage, single in zip(right.hidden, alone.hidden, strict=True):
            np.testing.assert_allclose(stage[index], single[0], atol=5e-5)
        single_answer = generate(reference, inputs.sample(index), 6, CUTS)[0]
        np.testing.assert_array_equal(answers[index, : len(single_answer)], single_answer)


def test_text_only_and_two_images_per_prompt(made: Made) -> None:
    tiny, _, reference = made("mha")
    inputs = make_inputs(tiny, [6, 6], [3, 3])
    text = reference.prefill(inputs.input_ids[:, -6:], None, cuts=CUTS)
    assert text.scores[0].shape == (2, 0) and text.kept[1][0].tolist() == list(range(6))
    np.testing.assert_allclose(text.logits, reference.prefill(inputs.input_ids[:, -6:], None).logits, atol=1e-5)
    both = reference.prefill(inputs.input_ids.reshape(1, -1), inputs.pixel_values, cuts=CUTS)
    assert both.scores[0].shape == (1, 2 * tiny.image_tokens)


# --- forced keep sets ---


def test_forced_sets_replace_the_ranking_and_nothing_else(made: Made) -> None:
    tiny, _, reference = made("gqa2")
    inputs = make_inputs(tiny, [9, 4], [5, 2])
    ranked = prefill(reference, inputs, CUTS)
    same = prefill(reference, inputs, CUTS, forced=(ranked.kept[0], ranked.kept[1]))
    np.testing.assert_array_equal(ranked.logits, same.logits)
    np.testing.assert_array_equal(ranked.scores[1], same.scores[1])
    everything = prefill(reference, inputs)
    all_kept = np.where(inputs.attention_mask, np.arange(inputs.attention_mask.shape[1]), -1)
    full = prefill(reference, inputs, CUTS, forced=(all_kept, all_kept))
    np.testing.assert_allclose(full.logits, everything.logits, atol=2e-5)
    np.testing.assert_array_equal(full.scores[0], ranked.scores[0])
    assert np.abs(full.logits - ranked.logits).max() > 0.1  # so the comparisons above could have failed


# --- precision, misuse ---


def test_half_precision_scores_are_fp32_and_near(made: Made) -> None:
    tiny, folder, wide = made("half")
    inputs = make_inputs(tiny, [9], [5])
    half, full = prefill(Reference(folder, torch.float16), inputs, CUTS), prefill(wide, inputs, CUTS)
    assert half.scores[0].dtype == half.logits.dtype == half.hidden[0][0].dtype == np.float32
    np.testing.assert_allclose(half.scores[0], full.scores[0], atol=0.02)
    assert not np.array_equal(half.scores[0], half.scores[0].astype(np.float16))


def test_misuse_is_a_value_error() -> None:
    inputs, reference = golden_inputs(), Reference(HIMAP_TINY)
    ids, pixels = inputs.input_ids, inputs.pixel_values
    for cuts in (
        reference_himap(0, 5, 0.5, 0.5),
        reference_himap(5, 5, 0.5, 0.5),
        reference_himap(2, 10, 0.5, 0.5),
        reference_himap(2, 5, 1.5, 0.5),
    ):
        with pytest.raises(ValueError, match="out of range"):
            reference.prefill(ids, pixels, cuts=cuts)
    with pytest.raises(ValueError, match="of 2 cuts for 0 cuts"):
        reference.prefill(ids, pixels, forced=(ids, ids))
    for kept, words in (
        ([[3, 2, 29]], "ascending subset"),
        ([[0, 30]], "ascending subset"),
        ([[0, 28]], "last prompt"),
    ):
        with pytest.raises(ValueError, match=words):
            reference.prefill(ids, pixels, cuts=CUTS, forced=(np.array(kept), np.array(kept)))
    with pytest.raises(ValueError, match="16 image tokens, the images give 0"):
        reference.prefill(ids, None)
    with pytest.raises(ValueError, match="no tokens"):
        reference.prefill(ids, pixels, np.zeros_like(ids))
    with pytest.raises(ValueError, match="attn_implementation"):
        Reference(HIMAP_TINY, attn_implementation="psychic")


def test_a_missing_weight_is_refused(tmp_path: Path) -> None:
    make_llava(tmp_path, TINY["gqa2"])
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 6', '"num_hidden_layers": 7'))
    with pytest.raises(ValueError, match=r"layers\.6"):
        Reference(tmp_path)
