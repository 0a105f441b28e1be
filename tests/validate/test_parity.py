"""The gates of himap-validate: they hold for a right bundle, and each one fails for the mistake it is there for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Workshop
from numpy.typing import NDArray

from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.layout import PromptLayout
from himap_export.engines.pipeline import Pipeline
from himap_export.graphs.ports import Place
from himap_export.graphs.spec import Dtype
from himap_export.validate.parity.compare import Load, Parity, compare
from himap_export.validate.parity.limits import WORST, ParityOptions, limit_of
from himap_export.validate.parity.prompts import drawn_inputs
from himap_export.validate.parity.tensors import TensorDiff, tensor_diff
from himap_export.validate.reference.criteria import reference_himap

Floats = NDArray[np.float32]
Edit = Callable[[Floats, int], Floats]  # a tensor, and how often its graph has run
CUTS = reference_himap(2, 4, 0.5, 0.5)
OPTIONS = ParityOptions(new_tokens=8)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Sabotaged(Pipeline):
    """Every time `graph` has run, `tensor` is replaced by what `edit` makes of it; vision's, when all pictures of
    prompts have been looked at."""

    def __init__(self, bundle: Path, graph: str, tensor: Place, edit: Edit) -> None:
        super().__init__(Bundle.open(bundle).select(), "onnxruntime", Opening(threads=1))
        self._edit, self._runs = (graph, tensor, edit), 0

    def load(self, *prompts: Any, **how: Any) -> PromptLayout:
        layout = super().load(*prompts, **how)
        self._spoil("vision")
        return layout

    def run(self, graph: str) -> None:
        super().run(graph)
        self._spoil(graph)

    def _spoil(self, graph: str) -> None:
        when, tensor, edit = self._edit
        if graph == when:
            self._runs += 1
            self.tensors[tensor].write(edit(self.read(*tensor), self._runs))


def loader(work: Workshop, name: str) -> Load:
    return lambda dtype: work.reference(name, DTYPES[dtype])


def judged(work: Workshop, name: str, pipeline: Pipeline, prompts: int = 4, options: ParityOptions = OPTIONS) -> Parity:
    return compare(pipeline, loader(work, name), drawn_inputs(pipeline.spec, prompts, seed=0), options)


def failed(parity: Parity) -> set[str]:
    return {gate.name for gate in parity.gates if not gate.passed}


@pytest.mark.parametrize(("name", "dtype", "batch"), [("mha", "fp32", 1), ("gqa2", "fp32", 3), ("gqa2", "fp16", 1)])
def test_a_right_bundle_passes(work: Workshop, name: str, dtype: str, batch: int) -> None:
    bundle = work.bundle(name, "--dtype", dtype, "--batch", batch, cuts=CUTS)
    parity = judged(work, name, work.pipeline(bundle))
    assert not failed(parity) and parity.prompts == 4
    names = ["vision", "prefix", "score k1", "k1", "score k2", "k2", "logits", "decode"]
    assert [t.name for t in parity.tensors] == names
    assert all(t.cosine > 0.999 and t.max_abs > 0 for t in parity.tensors)
    assert {g.name for g in parity.gates} == {*names, "kept k1", "kept k2", "tokens"}
    assert parity.outputs["logits"].shape == parity.outputs["reference_logits"].shape


def test_nothing_removed_has_no_scores_and_passes(work: Workshop) -> None:
    parity = judged(work, "gqa2", work.pipeline(work.bundle("gqa2", cuts=reference_himap(2, 4, 0.0, 0.0))))
    assert not failed(parity)
    assert [c.verdict for c in parity.cuts] == ["nothing removed"] * 2
    assert not any(t.name.startswith("score") for t in parity.tensors)
    assert parity.answers.equal == parity.answers.total


def test_an_answer_of_one_token_has_no_decode(work: Workshop) -> None:
    parity = judged(work, "mha", work.pipeline(work.bundle("mha", cuts=CUTS)), options=ParityOptions(new_tokens=1))
    assert not failed(parity) and "decode" not in {t.name for t in parity.tensors}


# --- the gates can fail ---


def on_image(change: Callable[[Floats], Floats]) -> Edit:
    """Changes the scores of image tokens; the others' are +inf and stay."""

    def edit(score: Floats, _: int) -> Floats:
        image = np.isfinite(score)
        score[image] = change(score[image])
        return score

    return edit


def noise(scores: Floats) -> Floats:
    return np.random.default_rng(0).random(scores.shape)


# What is spoiled, where, how, and the gate that must notice. Without a gate on scores the first three pass as ties: any
# swap lies within twice the error of the scores that made it.
SABOTAGE: dict[str, tuple[str, Place, Edit, str]] = {
    "ranked backwards": ("prefix", Place("score", cut=1), on_image(np.negative), "score k1"),
    "ranked by noise": ("k1", Place("score", cut=2), on_image(noise), "score k2"),
    "scores off by one token": ("prefix", Place("score", cut=1), on_image(lambda s: np.roll(s, 1)), "score k1"),
    "no scores": ("k1", Place("score", cut=2), on_image(lambda s: s * np.nan), "score k2"),
    "vision off by one patch": ("vision", Place("image_features"), lambda x, _: np.roll(x, 1, axis=1), "vision"),
    "a stage's output scaled": ("prefix", Place("hidden", cut=1), lambda x, _: x * 1.01, "prefix"),
    "logits of one prompt are not numbers": ("k2", Place("logits"), lambda x, n: x * np.nan if n == 3 else x, "logits"),
    "keys of one layer lost": ("k2", Place("key", 5), lambda x, _: x * 0, "decode"),
    "values written one slot late": ("prefix", Place("value", 0), lambda x, _: np.roll(x, 1, axis=2), "decode"),
}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("mistake", SABOTAGE)
def test_a_mistake_fails_its_gate(work: Workshop, mistake: str, dtype: str) -> None:
    if mistake == "a stage's output scaled" and dtype == "fp16":
        pytest.skip("1 % is what fp16 does to these checkpoints")
    graph, tensor, edit, gate = SABOTAGE[mistake]
    bundle = work.bundle("gqa2", "--dtype", dtype, cuts=CUTS)
    assert gate in failed(judged(work, "gqa2", Sabotaged(bundle, graph, tensor, edit)))


def test_an_answer_that_cannot_be_drawn_fails_and_is_no_error(work: Workshop) -> None:
    """Logits that are no numbers: at prefill, and only behind some tokens of the bundle's own answer."""
    bundle = work.bundle("gqa2", cuts=CUTS)
    found = judged(work, "gqa2", Sabotaged(bundle, "k2", Place("logits"), lambda x, n: x * np.nan), prompts=1)
    assert {"logits", "tokens"} <= failed(found)
    np.testing.assert_array_equal(found.outputs["tokens"][:, :1], -1)
    found = judged(work, "gqa2", Later(bundle), prompts=1)
    assert failed(found) == {"tokens"} and found.answers.first == 3 and found.answers.margin == np.inf


class Later(Sabotaged):
    """The logits behind the third token of the first answer overflow."""

    def __init__(self, bundle: Path) -> None:
        super().__init__(bundle, "", "", lambda x, _: x)

    def step(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = super().step(tokens, positions)
        self._runs += 1
        if self._runs == 3:
            logits[0, 5] = np.inf
            self.tensors[Place("logits")].write(logits)
        return logits


def test_tokens_that_the_scores_do_not_explain_fail_the_kept_gate(work: Workshop) -> None:
    """Right scores, wrong gather: the best image token is said to be gone and the worst one there."""
    bundle = work.bundle("gqa2", cuts=CUTS)
    right = work.pipeline(bundle)
    parity = judged(work, "gqa2", right, prompts=1)
    kept = parity.outputs["kept_k1"][0]
    ids = drawn_inputs(right.spec, 1, seed=0).input_ids[0]
    image = np.flatnonzero(ids == right.manifest.model.image.token)
    swap = {int(np.intersect1d(image, kept)[0]): int(np.setdiff1d(image, kept)[0])}
    replace = np.vectorize(lambda position: swap.get(int(position), position), otypes=[np.int64])
    wrong = Sabotaged(bundle, "k1", Place("kept_positions", cut=1), lambda k, _: replace(k))
    found = judged(work, "gqa2", wrong, prompts=1)
    assert "kept k1" in failed(found) and found.cuts[0].verdict == "different" and found.cuts[0].swapped == 1


def test_a_token_that_the_logits_do_not_explain_fails(work: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right logits, and an answer that is not their argmax."""
    generate = Pipeline.generate
    monkeypatch.setattr(Pipeline, "generate", lambda *a, **k: (np.maximum(t - 1, 3) for t in generate(*a, **k)))
    assert failed(judged(work, "gqa2", work.pipeline(work.bundle("gqa2", cuts=CUTS)))) == {"tokens"}


# --- ties ---


def test_a_swap_inside_the_error_is_a_tie_and_is_forced_away(work: Workshop) -> None:
    """The two scores at the threshold change places; in fp16 that is well inside what rounding may do to them."""
    bundle = work.bundle("gqa2", "--dtype", "fp16", cuts=CUTS)
    keep = Bundle.open(bundle).select().budget.visual[1]

    def edit(score: Floats, _: int) -> Floats:
        ranked = np.argsort(np.where(np.isfinite(score[0]), -score[0], np.inf))
        last, first = ranked[keep - 1], ranked[keep]
        score[0, [last, first]] = score[0, [first, last]]
        return score

    parity = judged(work, "gqa2", Sabotaged(bundle, "prefix", Place("score", cut=1), edit), prompts=8)
    swapped = parity.cuts[0]
    assert swapped.verdict == "tie" and swapped.swapped >= 1 and swapped.error >= swapped.margin
    # Behind the cut all is compared with the reference's tokens: the same values as in a bundle that swapped none.
    untouched = judged(work, "gqa2", work.pipeline(bundle), prompts=8)
    for name in ("k2", "logits", "decode"):
        one, other = (next(t for t in p.tensors if t.name == name) for p in (parity, untouched))
        assert one == other
    assert not np.array_equal(parity.outputs["kept_k1"], untouched.outputs["kept_k1"])


# --- tolerances ---


def test_one_value_that_is_no_number_is_infinitely_far() -> None:
    good, bad = np.ones(3, np.float32), np.array([1, np.nan, 1], np.float32)
    for actual in ([good, bad], [bad, good]):
        assert tensor_diff("x", actual, [good, good]).max_abs == np.inf
        assert np.isnan(tensor_diff("x", [good, good], actual).scale)
    assert tensor_diff("x", [good], [good]) == TensorDiff("x", 0, 1, pytest.approx(1))


def test_limits() -> None:
    logits, score = TensorDiff("logits", 0, 40.0, 1), TensorDiff("score k1", 0, 2.0, 1)

    def limit(t: TensorDiff, dtype: Dtype, rounding: float | None, options: ParityOptions = OPTIONS) -> float:
        return limit_of(t, dtype=dtype, layers=32, rounding=rounding, options=options)

    assert limit(logits, "fp32", None) == 1e-3
    assert limit(score, "fp32", None) == pytest.approx(2e-4)
    assert limit(logits, "fp32", 1e-9) == 1e-3 and limit(score, "fp32", 0.1) == pytest.approx(0.4)  # 8-bit activations
    assert limit(logits, "fp32", 1e6) == WORST * 40
    assert limit(logits, "fp16", 0.1) == pytest.approx(0.4)
    assert limit(logits, "fp16", 0.0) == 40 * 2.0**-11  # one rounding is always allowed
    assert limit(logits, "bf16", 1e6) == WORST * 40  # and a model beyond reason allows no more than this
    assert np.isfinite(limit(logits, "fp16", np.inf))  # PyTorch itself overflowed
    assert limit(logits, "fp16", 0.1, ParityOptions(8, 0.5, 0.01)) == pytest.approx(0.9)
    assert limit(score, "fp16", 0.1, ParityOptions(8, 0.5, 0.01)) == pytest.approx(0.4)  # the user's is of logits
