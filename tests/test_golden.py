"""Golden parity: the authors' own decoder on himap-tiny, against `himap-export` and `himap-run` in fp32.

Matching these is the definition of "this is HiMAP" (tests/fixtures/README.md).
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import HIMAP_TINY, ORT, Workshop, golden_inputs, greedy, padded, plan_flags, spawn
from transformers import LlavaForConditionalGeneration

from himap_export.validate.reference.criteria import reference_himap

GOLDEN = {
    "golden_k2_5_n8_2.npz": reference_himap(2, 5, 0.5, 0.75),
    "golden_k1_4_n8_4.npz": reference_himap(1, 4, 0.5, 0.5),
}
NOTHING_CUT = reference_himap(2, 5, 0.0, 0.0)
TEXT = 14  # text tokens of the golden prompt: 14 fits exactly, the others leave padding


@pytest.mark.parametrize("text_budget", [TEXT, TEXT + 1, 40])
@pytest.mark.parametrize("name", GOLDEN)
def test_kept_positions_and_logits_are_the_authors(work: Workshop, name: str, text_budget: int) -> None:
    golden, cuts = np.load(HIMAP_TINY / name), GOLDEN[name]
    bundle = work.bundle("golden", "--text-budget", text_budget, cuts=cuts)
    answer = work.answer(bundle, golden_inputs())
    for got, wanted in (("kept_k1", "kept1"), ("kept_k2", "kept2")):
        image_tokens = len(golden[wanted]) - TEXT
        assert answer[got].dtype == np.int64
        np.testing.assert_array_equal(answer[got], padded(golden[wanted][None], image_tokens + text_budget))
    assert answer["logits"].dtype == np.float32
    np.testing.assert_allclose(answer["logits"], golden["logits_last"], rtol=0, atol=1e-3)
    assert answer["tokens"][0, 0] == golden["logits_last"].argmax()
    assert np.abs(golden["logits_last"] - golden["unpruned_last"]).max() > 0.1  # or a run that cuts nothing would pass


@pytest.mark.parametrize("text_budget", [TEXT, 40])
@pytest.mark.parametrize("name", GOLDEN)
def test_answers_follow_the_cached_contract(work: Workshop, name: str, text_budget: int) -> None:
    cuts, inputs = GOLDEN[name], golden_inputs()
    answer = work.answer(work.bundle("golden", "--text-budget", text_budget, cuts=cuts), inputs)
    expected = greedy(work.reference("golden"), inputs.input_ids, inputs.pixel_values, max_new_tokens=32, cuts=cuts)
    np.testing.assert_array_equal(answer["tokens"], expected)


@pytest.mark.parametrize("text_budget", [TEXT, 40])
def test_cutting_nothing_is_hugging_face_generate(work: Workshop, text_budget: int) -> None:
    inputs = golden_inputs()
    answer = work.answer(work.bundle("golden", "--text-budget", text_budget, cuts=NOTHING_CUT), inputs)
    model = LlavaForConditionalGeneration.from_pretrained(HIMAP_TINY, dtype=torch.float32).eval()
    ids, pixels = torch.from_numpy(inputs.input_ids), torch.from_numpy(inputs.pixel_values)
    expected = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=32, do_sample=False)
    np.testing.assert_array_equal(answer["tokens"], expected[:, ids.shape[1] :].numpy())
    assert answer["tokens"].shape == (1, 32)
    unpruned = np.load(HIMAP_TINY / "golden_k2_5_n8_2.npz")["unpruned_last"]
    np.testing.assert_allclose(answer["logits"], unpruned, rtol=0, atol=1e-3)
    everything = padded(np.arange(ids.shape[1])[None], 16 + text_budget)
    np.testing.assert_array_equal(answer["kept_k1"], everything)
    np.testing.assert_array_equal(answer["kept_k2"], everything)


def test_the_installed_commands_give_the_authors_answer(tmp_path: Path) -> None:
    """Nothing in this process: two commands, as a shell runs them."""
    golden, cuts = np.load(HIMAP_TINY / "golden_k2_5_n8_2.npz"), GOLDEN["golden_k2_5_n8_2.npz"]
    bundle, outputs = tmp_path / "bundle", tmp_path / "out.npz"
    flags = ("--text-budget", TEXT, "--max-new-tokens", 4, *ORT, *plan_flags(cuts))
    exported = spawn("himap-export", HIMAP_TINY, *flags, "--out", bundle)
    assert exported.returncode == 0, exported.stderr
    assert str(bundle) in exported.stdout
    ran = spawn("himap-run", bundle, "--load-inputs", HIMAP_TINY / "inputs.npz", "--save-outputs", outputs)
    assert ran.returncode == 0, ran.stderr
    answer = np.load(outputs)
    np.testing.assert_array_equal(answer["kept_k1"], golden["kept1"][None])
    np.testing.assert_array_equal(answer["kept_k2"], golden["kept2"][None])
    np.testing.assert_allclose(answer["logits"], golden["logits_last"], rtol=0, atol=1e-3)
    assert answer["tokens"].shape == (1, 4) and answer["tokens"][0, 0] == golden["logits_last"].argmax()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]  # no partial files beside the results
