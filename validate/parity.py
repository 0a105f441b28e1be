"""A bundle against the PyTorch reference: every stage, both kept sets, the logits, the answer.

A kept set may differ where the reference's own scores lie closer together than the scores' measured numerical error.
That is reported as a tie, and everything behind the cut is then compared with the reference's kept set forced, by
writing the score that crosses the stage boundary.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.arrays import Inputs
from himap_export.engines.pipeline import PREFILL, Pipeline
from himap_export.graphs.spec import IMAGE, Dtype
from himap_export.validate.reference import Cuts, Prefill, Reference

Floats = npt.NDArray[np.floating[Any]]
ROUNDOFF: dict[Dtype, float] = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 2.0**-24}


def tolerance(dtype: Dtype, layers: int) -> float:
    """How far values may lie from fp32's, as a share of the largest: 2 u sqrt(8 L).

    About 8 tensors a layer are rounded, each by at most the unit roundoff u; independent errors add like a random walk,
    and 2 allows for what that forgets. In fp32 that is 1e-6 to 1e-5, below what a change of summation order does: there
    the project's own bound, 1e-3 absolute on the logits, holds instead.
    """
    return 2 * ROUNDOFF[dtype] * sqrt(8 * layers)


@dataclass(frozen=True)
class Closeness:
    """Two tensors, over real tokens: largest difference, largest reference value, cosine of the whole."""

    name: str
    max_abs: float
    scale: float
    cosine: float


@dataclass(frozen=True)
class CutParity:
    """One cut over all prompts. `swapped` tokens of `kept` differ; `margin`: smallest gap between the reference's last
    kept and first dropped score; `error`: largest error of a score; `verdict`: identical, tie or different."""

    name: str
    kept: int
    swapped: int
    margin: float
    error: float
    verdict: str


@dataclass(frozen=True)
class Gate:
    name: str
    passed: bool
    found: str
    limit: str


@dataclass(frozen=True)
class Parity:
    """What was compared, what came out, and the gates it had to pass."""

    prompts: int
    tensors: tuple[Closeness, ...]
    cuts: tuple[CutParity, ...]
    tokens: tuple[int, int]
    gates: tuple[Gate, ...]

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)


class Comparison:
    """One batch through both; `results` of several batches are merged by `conclude`."""

    def __init__(self, pipeline: Pipeline, reference: Reference, batch: Inputs, new_tokens: int) -> None:
        self.pipeline, self.batch = pipeline, batch
        plan, arrays = pipeline.manifest.plan, (batch.input_ids, batch.pixel_values, batch.attention_mask)
        self.cuts = Cuts(plan.k1, plan.k2, plan.r1, plan.r2)
        self.truth: Prefill = reference.prefill(*arrays, cuts=self.cuts)
        self.rows, self.pairs = len(batch.input_ids), dict[str, list[tuple[Floats, Floats]]]()
        self.layout = pipeline.load(*arrays)
        self.cut_parity = self._stages()
        features = pipeline.read("image_features")[: self.rows]
        self._pair("vision", features, np.asarray(reference.image_features(batch.pixel_values).float()))
        tokens = np.stack(list(pipeline.generate(pipeline.prefilled(self.rows), self.layout, new_tokens)), axis=1)
        kept = (self.truth.kept_k1, self.truth.kept_k2)
        self.told = tokens
        self.said = reference.generate(*arrays, max_new_tokens=new_tokens, cuts=self.cuts, forced=kept)
        self.after = reference.replay(self.truth, self.said)

    def _stages(self) -> list[CutParity]:
        p, found = self.pipeline, list[CutParity]()
        p.run("vision")
        for stage, name in enumerate(PREFILL):
            p.run(name)
            if stage > 0:
                cut = f"k{stage}"
                found.append(self._cut(cut, self.truth.score_k1 if stage == 1 else self.truth.score_k2))
                if found[-1].swapped:
                    self._force(cut)
                    p.run(name)
            self._hidden(stage, name)
        self._pair("logits", p.read("logits")[: self.rows], self.truth.logits)
        return found

    def _hidden(self, stage: int, name: str) -> None:
        found = self.pipeline.read(("hidden_k1", "hidden_k2", "hidden")[stage])
        for row, truth in enumerate(self.truth.hidden[stage]):
            self._pair(name, found[row, : len(truth)], truth)

    def _cut(self, cut: str, truth: Floats) -> CutParity:
        """Compares the kept sets just made at `cut`; `truth` [B,V] are the reference's scores of the candidates."""
        p, error, margin, outside, swapped = self.pipeline, 0.0, float("inf"), False, 0
        visual, stage = p.manifest.budget.visual, int(cut[1])
        kept_truth = self.truth.kept_k1 if stage == 1 else self.truth.kept_k2
        if f"score_{cut}" not in p.tensors:
            return CutParity(cut, self.rows * visual[stage], 0, float("inf"), 0.0, "nothing removed")
        candidates = self._candidates(stage)
        scores, kept = p.read(f"score_{cut}"), p.read(f"kept_{cut}")
        for row in range(self.rows):
            image, positions = candidates[row]
            mine, his = scores[row][image], truth[row, : image.sum()]
            in_mine, in_his = np.isin(positions[image], kept[row]), np.isin(positions[image], kept_truth[row])
            his_error = float(np.abs(mine - his).max())
            threshold, runner_up = his[in_his].min(), his[~in_his].max()
            differs = in_mine != in_his
            swapped += int(differs.sum()) // 2
            # A swap needs the gap between two scores to be closed by an error in each of them.
            outside |= bool((np.abs(his[differs] - threshold) > 2 * his_error).any())
            error, margin = max(error, his_error), min(margin, float(threshold - runner_up))
        verdict = "different" if outside else "tie" if swapped else "identical"
        return CutParity(cut, self.rows * visual[stage], swapped, margin, error, verdict)

    def _candidates(self, stage: int) -> list[tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]]:
        """Per prompt: which tokens before the cut are image tokens [S], and all tokens' original positions [S]."""
        kinds, positions = ("token_kind", "position_ids") if stage == 1 else ("kind_k1", "kept_k1")
        kind, position = self.pipeline.read(kinds), self.pipeline.read(positions)
        return [(kind[row] == IMAGE, position[row]) for row in range(self.rows)]

    def _force(self, cut: str) -> None:
        """Writes a score that keeps what the reference kept: 1 for those image tokens, 0 for the others."""
        truth = self.truth.kept_k1 if cut == "k1" else self.truth.kept_k2
        score = self.pipeline.read(f"score_{cut}")
        for row, (image, positions) in enumerate(self._candidates(int(cut[1]))):
            score[row][image] = np.isin(positions[image], truth[row])
        self.pipeline.tensors[f"score_{cut}"].write(score)

    def _pair(self, name: str, found: Floats, truth: Floats) -> None:
        self.pairs.setdefault(name, []).append((found.astype(np.float64), truth.astype(np.float64)))

    def divergence(self) -> tuple[int, int, float]:
        """Tokens that agree, tokens in all, and the reference's margin between its best two where an answer parts.

        The widest over all prompts; 0 if none parts.
        """
        width = max(self.told.shape[1], self.said.shape[1])
        mine, his = (np.pad(t, ((0, 0), (0, width - t.shape[1])), constant_values=-1) for t in (self.told, self.said))
        agree, margin = int((mine == his).sum()), 0.0
        for row in np.flatnonzero((mine != his).any(axis=1)):
            first = int((mine[row] != his[row]).argmax())
            if first < self.after.shape[1]:
                best = np.sort(self.after[row, first])[-2:]
                margin = max(margin, float(best[1] - best[0]))
            else:
                margin = float("inf")
        return agree, mine.size, margin


def compare(pipeline: Pipeline, reference: Reference, inputs: Inputs, new_tokens: int, atol: float | None) -> Parity:
    """Parity over all prompts of `inputs`; `atol` overrides the logits' tolerance."""
    size, runs = pipeline.manifest.budget.batch, []
    for at in range(0, len(inputs.input_ids), size):
        rows = slice(at, at + size)
        mask = None if inputs.attention_mask is None else inputs.attention_mask[rows]
        batch = Inputs(inputs.input_ids[rows], inputs.pixel_values[rows], mask)
        runs.append(Comparison(pipeline, reference, batch, new_tokens))
    return _conclude(runs, pipeline.manifest.dtype, pipeline.manifest.decoder.layers, atol)


def _conclude(runs: list[Comparison], dtype: Dtype, layers: int, atol: float | None) -> Parity:
    tensors = tuple(_closeness(name, [p for run in runs for p in run.pairs[name]]) for name in runs[0].pairs)
    cuts = tuple(_merge([run.cut_parity[i] for run in runs]) for i in range(2))
    parts = [run.divergence() for run in runs]
    agree, asked, margin = sum(p[0] for p in parts), sum(p[1] for p in parts), max(p[2] for p in parts)
    share, gates = tolerance(dtype, layers), list[Gate]()
    for t in tensors:
        limit = max(share * t.scale, 1e-3) if t.name != "logits" or atol is None else atol
        gates.append(Gate(t.name, t.max_abs <= limit, f"max-abs {t.max_abs:.2e}", f"at most {limit:.2e}"))
        if t.name == "logits":
            told = f"{agree} of {asked} equal" + (f", margin where they part {margin:.2e}" if agree < asked else "")
            within = f"part only where two logits lie within {2 * limit:.2e}"
            gates.append(Gate("tokens", margin <= 2 * limit, told, within))
    for c in cuts:
        told = f"{c.verdict}, {c.swapped} of {c.kept} swapped"
        gates.append(
            Gate(f"kept after {c.name}", c.verdict != "different", told, "differ only inside the scores' error")
        )
    return Parity(sum(r.rows for r in runs), tensors, cuts, (agree, asked), tuple(gates))


def _closeness(name: str, pairs: list[tuple[Floats, Floats]]) -> Closeness:
    difference = max(float(np.abs(a - b).max()) for a, b in pairs)
    scale = max(float(np.abs(b).max()) for _, b in pairs)
    dot, mine, his = (sum(float((x * y).sum()) for x, y in which) for which in (
        pairs, [(a, a) for a, _ in pairs], [(b, b) for _, b in pairs])
    )  # fmt: skip
    return Closeness(name, difference if np.isfinite(difference) else float("inf"), scale, dot / (mine * his) ** 0.5)


def _merge(parts: list[CutParity]) -> CutParity:
    worst = max((p.verdict for p in parts), key=("nothing removed", "identical", "tie", "different").index)
    return CutParity(
        parts[0].name, sum(p.kept for p in parts), sum(p.swapped for p in parts),
        min(p.margin for p in parts), max(p.error for p in parts), worst,
    )  # fmt: skip
