"""Slots: prompts that come and go, each answered as Hugging Face's modules answer it alone."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from commands import Workshop, greedy
from tiny import Inputs, make_inputs

from himap_export.engines.arrays import Inputs as Prompt
from himap_export.engines.backends import Engines, Opening
from himap_export.engines.backends.onnxruntime import OnnxRuntime
from himap_export.engines.bundle import Bundle
from himap_export.engines.openvino.run import OpenVino
from himap_export.engines.pipeline import Pipeline
from himap_export.engines.slots import Slots
from himap_export.graphs.errors import HimapError
from himap_export.graphs.ports import Place, TensorSpec
from himap_export.validate.reference.criteria import reference_himap

CUTS, ROWS, NEW = reference_himap(2, 4, 0.5, 0.75), 3, 12
Tokens = list[int]


def bundle(work: Workshop, *flags: object, name: str = "gqa2") -> Path:
    return work.bundle(name, "--slots", ROWS, "--text-budget", 24, "--max-new-tokens", NEW, *flags, cuts=CUTS)


def opened(folder: Path, backend: str = "onnxruntime", engines: Engines | None = None) -> Slots:
    return Slots(Bundle.open(folder).select(), backend, Opening(threads=1), engines)


def prompt(inputs: Inputs, n: int) -> Prompt:
    one = inputs.sample(n)
    return Prompt(one.input_ids, one.pixel_values)


def served(slots: Slots, prompts: list[Prompt], lengths: list[int], rows: list[int], seed: int = 0) -> list[Tokens]:
    """Answers of such `lengths`. Prompts come in their order, each into the first of `rows` that is free, one at most
    between two steps; which is free, and who stands beside whom, follows from the lengths."""
    answers: list[Tokens] = [[] for _ in prompts]
    taken: dict[int, int] = {}
    waiting = list(range(len(prompts)))
    while waiting or taken:
        free = [row for row in rows if row not in taken]
        if waiting and free:
            n = waiting.pop(0)
            taken[free[0]] = n
            answers[n].append(int(slots.prefill(free[0], prompts[n], seed).logits[0].argmax()))
        for row, n in list(taken.items()):
            if len(answers[n]) == lengths[n]:
                slots.free(row)
                del taken[row]
        logits = slots.step({row: answers[n][-1] for row, n in taken.items()})
        for row, n in taken.items():
            answers[n].append(int(logits[row].argmax()))
    return answers


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("copied", [False, True])
def test_every_prompt_is_answered_as_by_hugging_face_alone(
    work: Workshop, backend: str, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows bound to views, as on a CPU, and copied into, as where CUDA graphs fix addresses; both are computed here."""
    for engines in (OnnxRuntime, OpenVino):
        monkeypatch.setattr(engines, "binds_often", not copied)
    texts, lengths = [9, 3, 12, 7, 16, 5, 8], [12, 3, 9, 1, 12, 5, 7]
    inputs = make_inputs(work.tiny("gqa2"), texts, [n // 2 for n in texts], seed=3)
    prompts = [prompt(inputs, n) for n in range(len(texts))]
    found = served(opened(bundle(work, "--backend", backend), backend), prompts, lengths, [2, 0, 1])
    reference, told = work.reference("gqa2"), 0
    for n, answer in enumerate(found):
        one = inputs.sample(n)
        arrays = one.input_ids, one.pixel_values, one.attention_mask
        wanted = greedy(reference, *arrays, max_new_tokens=lengths[n], cuts=CUTS)[0].tolist()
        assert answer[: len(wanted)] == wanted, n  # which ends at its end-of-sequence token
        told += len(wanted)
    assert told >= 40


def test_m_rope_turns_each_row_by_its_own_positions(work: Workshop) -> None:
    folder = work.family_bundle("qwen2.5-vl", "--slots", ROWS, "--k1", "2", "--k2", "3")
    run = Bundle.open(folder).select()
    alone = Pipeline(run, "onnxruntime", Opening(threads=1))
    prompts = [drawn(run.bundle, text, seed) for seed, text in enumerate((9, 20, 14, 11))]
    assert served(opened(folder), prompts, [6, 9, 4, 8], [0, 1, 2]) == [
        answer_alone(alone, each, length) for each, length in zip(prompts, [6, 9, 4, 8], strict=True)
    ]


def test_logits_are_the_same_in_every_row_beside_anybody(work: Workshop) -> None:
    """To the last bit: an answer cannot depend on who else is answered."""
    inputs = make_inputs(work.tiny("gqa2"), [9, 3, 12], [4, 1, 6], seed=5)
    slots, found = opened(bundle(work)), list[npt.NDArray[np.float32]]()
    for row, others in ((0, ()), (1, ()), (2, (0,)), (0, (1, 2)), (1, (2, 0))):
        slots.prefill(row, prompt(inputs, 0))
        for n, other in enumerate(others, 1):
            slots.prefill(other, prompt(inputs, n))
        for token in (5, 9):
            logits = slots.step({row: token} | {other: 20 + other for other in others})
        found.append(logits[row].copy())
        for each in (row, *others):
            slots.free(each)
    assert all(np.array_equal(logits, found[0]) for logits in found)


def test_random_cuts_draw_by_the_request_and_not_by_the_row(work: Workshop) -> None:
    folder = work.bundle("gqa2", "--policy", "random", "--slots", ROWS, "--text-budget", 24, "--k1", 2, "--k2", 4)
    inputs, slots = make_inputs(work.tiny("gqa2"), [9], [4], seed=5), opened(folder)
    kept = [[slots.prefill(row, prompt(inputs, 0), seed).kept["kept_k1"] for row in range(ROWS)] for seed in (0, 7)]
    for same in kept:
        assert all(np.array_equal(each, same[0]) for each in same)
    assert not np.array_equal(kept[0][0], kept[1][0])
    alone = work.pipeline(folder)
    for seed, same in zip((0, 7), kept, strict=True):
        one = prompt(inputs, 0)
        prefilled, _ = alone.prefill(one.input_ids, one.pixel_values, seeds=np.array([seed]))
        np.testing.assert_array_equal(prefilled.kept["kept_k1"], same[0])


def test_a_bundle_without_slots_has_one(work: Workshop) -> None:
    folder = work.bundle("gqa2", "--text-budget", 24, "--max-new-tokens", NEW, cuts=CUTS)
    inputs = make_inputs(work.tiny("gqa2"), [9, 3], [4, 1], seed=5)
    slots, prompts = opened(folder), [prompt(inputs, n) for n in range(2)]
    assert slots.rows == 1
    alone = work.pipeline(folder)
    assert served(slots, prompts, [4, 5], [0]) == [
        answer_alone(alone, each, length) for each, length in zip(prompts, [4, 5], strict=True)
    ]


def test_a_bundle_that_answers_several_prompts_together_is_refused(work: Workshop) -> None:
    folder = work.bundle("gqa2", "--batch", 2, "--text-budget", 24, "--max-new-tokens", NEW, cuts=CUTS)
    with pytest.raises(HimapError, match="answers 2 prompts together: each comes alone here"):
        opened(folder)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_row_is_a_view(work: Workshop, backend: str) -> None:
    engines = opened(bundle(work, "--backend", backend), backend).engines
    whole, other = engines.tensor(TensorSpec("fp32", (3, 2, 2))), engines.tensor(TensorSpec("fp32", (1, 2, 2)))
    rows = [whole.row(n) for n in range(3)]
    assert [row.spec.shape for row in rows] == [(1, 2, 2)] * 3
    rows[1].write(np.full((1, 2, 2), 5.0))
    other.write(np.full((1, 2, 2), 7.0))
    rows[2].take(other)
    np.testing.assert_array_equal(whole.read()[:, 0, 0], [0, 5, 7])
    whole.write(np.arange(12.0).reshape(3, 2, 2))
    np.testing.assert_array_equal(rows[1].read(), [[[4, 5], [6, 7]]])
    np.testing.assert_array_equal(rows[1].row(0).read(), rows[1].read())


def test_prefill_writes_its_row_of_decodes_caches_and_nothing_else(work: Workshop) -> None:
    slots = opened(bundle(work))
    place = Place("key", 5)
    slots.prefill(1, prompt(make_inputs(work.tiny("gqa2"), [9], [4], seed=5), 0))
    cache = slots._many[place].read()
    assert not cache[0].any() and cache[1].any() and not cache[2].any()


def drawn(bundle: Bundle, text: int, seed: int) -> Prompt:
    from himap_export.validate.parity.prompts import drawn_inputs

    inputs = drawn_inputs(bundle.select(), 1, seed, fill=True)
    words = np.flatnonzero(~bundle.manifest.model.image.find(inputs.input_ids[0]))
    ids = np.delete(inputs.input_ids, words[text:][::-1], axis=1)  # the last words go; the image stays
    return Prompt(ids, inputs.pixel_values)


def answer_alone(pipeline: Pipeline, inputs: Prompt, length: int) -> Tokens:
    prefilled, layout = pipeline.prefill(inputs.input_ids, inputs.pixel_values)
    tokens, logits = list[int](), prefilled.logits
    for step in range(length):
        tokens.append(int(logits[0].argmax()))
        if step < length - 1:
            logits = pipeline.step(np.array(tokens[-1:]), layout.lengths + step)
    return tokens
