"""What debiasing and HAWK weigh with: against trends that are known, and against a checkpoint without the head."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import QUESTIONS_64, SHAPES_64, Workshop, call
from tiny import TINY, make_inputs
from transformers import LlavaForConditionalGeneration

from himap_export.exporter.plans import named_plans
from himap_export.graphs.importance import require_scores
from himap_export.graphs.spec import DecoderSpec
from himap_export.validate.analysis.cli import main
from himap_export.validate.analysis.fit import Fitted, fit, fitted_lines, slope_of
from himap_export.validate.analysis.sample import Sample
from himap_export.validate.progress import silent
from himap_export.validate.reference.reference import Reference

NAME = "gqa2"


def samples() -> list[Sample]:
    """Prompts of different lengths, with text in front of the image or none; labelled with no answer."""
    drawn = (make_inputs(TINY[NAME], (text,), (system,), seed=text) for text, system in ((9, 5), (7, 0), (12, 2)))
    return [Sample(inputs.input_ids[0], inputs.pixel_values, label=-1) for inputs in drawn]


@pytest.mark.parametrize("slope", [0.0022, -0.03, 0.0])
def test_a_trend_is_found_again(slope: float) -> None:
    places = np.array([0, 1, 2, 5, 6, 40])
    assert slope_of(places, 0.01 * np.exp(slope * places)) == pytest.approx(slope, abs=1e-12)
    noise = np.exp(0.1 * np.random.default_rng(0).standard_normal(576))
    assert slope_of(np.arange(576), np.exp(slope * np.arange(576)) * noise) == pytest.approx(slope, abs=1e-4)


def test_slopes_are_of_the_mean_attention_that_the_reference_ranks_by(work: Workshop) -> None:
    reference, given = work.reference(NAME), samples()
    found = fit(reference, given, silent)
    for layer, slope in enumerate(found.slopes):
        scores = []
        for s in given:
            state = reference.advance(reference.start(s.input_ids, s.pixel_values), layer + 1, attention=True)
            scores.append(state.received(state.is_instruction).double().numpy())
        mean, x = np.log(np.mean(scores, 0)), np.arange(len(scores[0])) - (len(scores[0]) - 1) / 2
        assert slope == pytest.approx((x @ mean) / (x @ x), abs=1e-5)


def test_heads_are_worth_the_answers_that_a_checkpoint_without_them_gets_wrong(work: Workshop) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(work.checkpoint(NAME)).eval()
    output = model.model.language_model.layers[0].self_attn.o_proj.weight
    whole, size, heads = output.detach().clone(), TINY[NAME].head_dim, TINY[NAME].heads

    def answers() -> list[int]:
        with torch.no_grad():
            return [
                int(model(torch.tensor(s.input_ids[None]), torch.tensor(s.pixel_values)).logits[0, -1].argmax())
                for s in samples()
            ]

    right, wanted = answers(), []
    for head in range(heads):
        output.data = whole.clone()
        output.data[:, head * size : (head + 1) * size] = 0
        wanted.append(np.mean([a == b for a, b in zip(answers(), right, strict=True)]))
    given = [replace(s, label=label) for s, label in zip(samples(), right, strict=True)]
    found = fit(Reference(work.checkpoint(NAME)), given, silent)
    assert found.right == 1 and found.without == pytest.approx(wanted)
    assert fit(work.reference(NAME), samples(), silent).heads == ()  # nothing is right with or without


def test_weights_are_shares_of_what_is_lost() -> None:
    found = Fitted((0.1, 0.2), 0.9, (0.7, 0.9, 0.8, 0.95))
    assert found.heads == pytest.approx((2 / 3, 0, 1 / 3, 0))
    assert "0.667" in "\n".join(fitted_lines(found))
    none = Fitted((0.1,), 0.9, (0.9, 0.95))
    assert none.heads == () and "all weigh the same" in fitted_lines(none)[-1]


def test_the_command_writes_plans_that_can_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--dataset", QUESTIONS_64, "--out", tmp_path / "fit", "--fit", "--limit", 1, "--threads", 1)
    assert call(main, SHAPES_64, *flags, "--k1", 3, "--k2", 5, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    plans = named_plans([tmp_path / "fit" / "plans.toml"])
    assert [plan.policy for plan in plans.values()] == ["himap-debiased", "hawk"]
    first, second = plans["himap-debiased"].cuts
    assert (first.layer, second.layer) == (3, 5)
    assert first.coefficients == pytest.approx((said["slopes"][2],), rel=1e-5)
    heads = len(said["without"])
    for plan in plans.values():
        require_scores(plan, DecoderSpec(10, 8, 8, heads, heads, 8, 8))
    for wrong, words in ((("--k1", 3, "--k2", 3), "no cuts at 3 and 3"), (("--k1", 99), "no cuts at 99")):
        assert call(main, SHAPES_64, *flags, "--overwrite", *wrong) == 2
        assert words in capsys.readouterr().err
    assert call(main, SHAPES_64, *flags[:4], "--k1", 2) == 2
    assert "go with --fit" in capsys.readouterr().err
