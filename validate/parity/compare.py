"""A bundle against the PyTorch reference: every stage, both scores and kept sets, the logits, the answer.

A kept set may differ where the reference's own scores lie closer together than the scores' numerical error. That is
reported as a tie, and everything behind the cut is then compared with the reference's kept set forced, by writing the
score that crosses the stage boundary. The error itself has a gate: any swap whatever lies within twice the error of the
scores that made it, so without one a bundle that ranks by noise would pass as one long tie.

Letters as in docs/architecture.md: B prompts, S tokens, V image tokens, D hidden, W vocabulary, N tokens of an answer.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import inf, isfinite, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.arrays import Inputs
from himap_export.engines.pipeline import Pipeline
from himap_export.graphs.errors import HimapError
from himap_export.graphs.plan import PruningPlan, Visual
from himap_export.graphs.spec import IMAGE, Dtype
from himap_export.validate.reference.criteria import Cut
from himap_export.validate.reference.reference import Prefill, Reference

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.int64]
Tensors = dict[str, list[Floats]]  # by name, one array per prompt, real tokens only
Load = Callable[[Dtype], Reference]

ROUNDOFF: dict[Dtype, float] = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 2.0**-24}
FP32_LOGITS = 1e-3  # absolute: the project's definition of parity (docs: "this is HiMAP")
FP32_SCORES = 1e-4  # of the largest score; measured 1e-6 to 7e-6
ROUNDING_FACTOR = 4.0  # 33 random tiny checkpoints in fp16, ours over PyTorch's error: median 0.8 to 1.0, largest 3.0
UNDRAWN = -1  # the token that follows logits which are no numbers: no token's id
WORST = 0.25  # of the largest value: however badly a model is conditioned, a wrong graph must fail


@dataclass(frozen=True)
class Asked:
    """What to compare: answers of `new_tokens`, and the user's own tolerance of logits, atol + rtol * the largest."""

    new_tokens: int
    atol: float | None = None
    rtol: float | None = None


@dataclass(frozen=True)
class TensorDiff:
    """Two tensors: largest difference (inf if one is not finite), largest reference value, cosine of the whole."""

    name: str
    max_abs: float
    scale: float
    cosine: float


@dataclass(frozen=True)
class CutParity:
    """One cut. `swapped` of `kept` tokens differ, `outside` of them by more than the error explains; `margin`: least
    gap between the reference's last kept and first dropped score; `error`: largest error of a score."""

    name: str
    kept: int
    swapped: int
    outside: int
    margin: float
    error: float
    verdict: str


@dataclass(frozen=True)
class Answers:
    """Greedy tokens: `equal` of `total`, the first step at which one parts from the reference's (None: none does), and
    the widest margin between the reference's best two logits where they part (0: none does)."""

    equal: int
    total: int
    first: int | None
    margin: float


@dataclass(frozen=True)
class Gate:
    """Passed if `value` <= `limit`."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Parity:
    """What was compared, what came out, the gates it had to pass, and what else is to be said."""

    prompts: int
    tensors: tuple[TensorDiff, ...]
    cuts: tuple[CutParity, ...]
    answers: Answers
    gates: tuple[Gate, ...]
    outputs: dict[str, npt.NDArray[Any]]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)


def limit_of(t: TensorDiff, dtype: Dtype, layers: int, rounding: float | None, asked: Asked) -> float:
    """How far tensor `t` may lie from the reference in fp32.

    fp32: 1e-3 on logits, the project's definition; 1e-4 of the largest on scores; elsewhere 1e-3 or, for large values,
    2 u sqrt(8 L) of the largest (8 tensors a layer rounded by the unit roundoff u, errors adding like a random walk).

    Half precision: how far rounding carries values depends on the model, through the conditioning of its attention, by
    an order of magnitude; no formula in u and L knows that. So the measure is measured: `rounding`, the distance of
    PyTorch's own run in the bundle's dtype, same prompts, same tokens kept. Ours may be 4 times that: two roundings of
    one computation, neither the better one. Never above a quarter of the largest value, whatever PyTorch does.
    """
    if t.name in ("logits", "decode") and (asked.atol is not None or asked.rtol is not None):
        return (asked.atol or 0.0) + (asked.rtol or 0.0) * t.scale
    walk = 2 * ROUNDOFF[dtype] * sqrt(8 * layers) * t.scale
    if dtype == "fp32":
        return FP32_SCORES * t.scale if t.name.startswith("score") else max(FP32_LOGITS, walk)
    measured = walk if rounding is None or not isfinite(rounding) else ROUNDING_FACTOR * rounding
    return min(max(measured, ROUNDOFF[dtype] * t.scale), WORST * t.scale)


class Comparison:
    """One batch through both. `found` and `exact` hold the same tensors, the pipeline's and the reference's."""

    def __init__(self, pipeline: Pipeline, reference: Reference, batch: Inputs, asked: Asked, seeds: Integers) -> None:
        self.pipeline, self.rows, self.seeds = pipeline, len(batch.input_ids), seeds.tolist()
        self.arrays = (batch.input_ids, batch.pixel_values, batch.attention_mask)
        self.cuts = reference_cuts(pipeline.spec.plan, pipeline.spec.budget.visual)
        self.layout = pipeline.load(*self.arrays, seeds)  # first: it refuses prompts that are none
        self.truth = reference.prefill(*self.arrays, cuts=self.cuts, seeds=self.seeds)
        self.kept = self.truth.kept
        self.said = reference.generate(*self.arrays, max_new_tokens=asked.new_tokens, cuts=self.cuts, forced=self.kept)
        self.exact = self._reference_tensors(reference, self.truth)
        self.truth = replace(self.truth, caches=())  # of large models hundreds of megabytes a prompt
        self.found: Tensors = {}
        self.outputs: dict[str, npt.NDArray[Any]] = {}
        self.cut_parity = self._stages()
        self.told = self._answer(asked.new_tokens)

    def rounding(self, reference: Reference) -> Tensors:
        """The same tensors of a reference in another dtype, with the same tokens kept and said."""
        start = reference.prefill(*self.arrays, cuts=self.cuts, forced=self.kept, seeds=self.seeds)
        return self._reference_tensors(reference, start)

    def _reference_tensors(self, reference: Reference, start: Prefill) -> Tensors:
        """`start` is used up: replaying the answer appends to its caches."""
        seen = reference.image_features(self.arrays[1], self.rows)
        found: Tensors = {
            name: list(features.float().cpu().numpy()) for name, features in zip(self._seen(), seen, strict=True)
        }
        for stage, name in enumerate(self.pipeline.stages):
            if f"score_{name}" in self.pipeline.tensors:
                found[f"score {name}"] = list(start.scores[stage - 1])
            found[name] = list(start.hidden[stage])
        found["logits"] = list(start.logits)
        if self.said.shape[1] > 1:
            found["decode"] = list(reference.replay(start, self.said)[:, 1:])
        return found

    def _stages(self) -> list[CutParity]:
        """Prefill; kept sets that differ are replaced by the reference's before the stage behind them is compared."""
        p, found = self.pipeline, list[CutParity]()
        p.run("vision")
        for name, tensor in self._seen().items():
            self._record(name, list(p.read(tensor)[: self.rows]))
        for stage, name in enumerate(p.stages):
            p.run(name)
            if stage > 0:
                kept = self.outputs[f"kept_{name}"] = p.kept(name)[: self.rows]
                found.append(self._cut(stage, kept))
                if found[-1].swapped:
                    self._force(stage)
                    p.run(name)
            hidden = p.read("hidden" if name == p.stages[-1] else f"hidden_{p.stages[stage + 1]}")
            self._record(name, [hidden[row, : len(truth)] for row, truth in enumerate(self.truth.hidden[stage])])
        self._record("logits", list(p.read("logits")[: self.rows]))
        return found

    def _seen(self) -> dict[str, str]:
        """The vision graph's outputs, as they are called here and there."""
        deepstack = range(self.pipeline.manifest.decoder.deepstack)
        return {"vision": "image_features"} | {f"vision {i}": f"deepstack_{i}" for i in deepstack}

    def _cut(self, stage: int, kept: Integers) -> CutParity:
        """Compares `kept`, the positions that open `stage`, with the reference's, in the light of both scores."""
        cut, visual = self.pipeline.stages[stage], self.pipeline.spec.budget.visual
        total, candidates = self.rows * visual[stage], self._candidates(stage)
        if f"score_{cut}" not in self.pipeline.tensors:
            return CutParity(cut, total, 0, 0, inf, 0.0, "nothing removed")
        scores, swapped, outside, margins, errors = self.pipeline.read(f"score_{cut}"), 0, 0, [], []
        self._record(f"score {cut}", [scores[row][image] for row, (image, _) in enumerate(candidates)])
        for row, (image, positions) in enumerate(candidates):
            mine, his = self.found[f"score {cut}"][row], self.exact[f"score {cut}"][row]
            in_mine, in_his = (np.isin(positions[image], k[row]) for k in (kept, self.kept[stage - 1]))
            threshold, differs = his[in_his].min(initial=inf), in_mine != in_his
            errors.append(_worst(np.abs(mine - his)))
            margins.append(float(threshold - his[~in_his].max()))
            swapped += -(-int(differs.sum()) // 2)
            # A swap needs the gap between two scores to be closed by an error in each of them.
            outside += int((np.abs(his[differs] - threshold) > 2 * errors[-1]).sum())
        verdict = "different" if outside else "tie" if swapped else "identical"
        return CutParity(cut, total, swapped, outside, min(margins), max(errors), verdict)

    def _candidates(self, stage: int) -> list[tuple[npt.NDArray[np.bool_], Integers]]:
        """Per prompt: which tokens before the cut are image tokens [S], and all tokens' original positions [S]."""
        before = self.pipeline.stages[stage - 1]
        kinds, positions = ("token_type", "position_ids") if stage == 1 else (f"type_{before}", f"kept_{before}")
        kind, position = self.pipeline.read(kinds), self.pipeline.read(positions)
        return [(kind[row] == IMAGE, position[row]) for row in range(self.rows)]

    def _force(self, stage: int) -> None:
        """Writes a score that keeps what the reference kept: 1 for those image tokens, 0 for the others."""
        cut = self.pipeline.stages[stage]
        score = self.pipeline.read(f"score_{cut}")
        for row, (image, positions) in enumerate(self._candidates(stage)):
            score[row][image] = np.isin(positions[image], self.kept[stage - 1][row])
        self.pipeline.tensors[f"score_{cut}"].write(score)

    def _answer(self, new_tokens: int) -> Integers:
        """The pipeline's own greedy answer [b,N]; then the logits behind every prefix of the reference's answer.

        The second pass needs no new prefill: decode writes a token's slot before it reads it, and sees none beyond.
        """
        p, told = self.pipeline, list[Integers]()
        try:
            for tokens in p.generate(p.prefilled(self.rows), self.layout, new_tokens):
                told.append(tokens)
        except HimapError:
            if np.isfinite(p.read("logits")[: self.rows]).all():
                raise
            told.append(np.full(self.rows, UNDRAWN))
        batch, steps = len(self.layout.lengths), list[Floats]()
        for n in range(self.said.shape[1] - 1):
            steps.append(p.step(np.resize(self.said[:, n], batch), self.layout.lengths + n)[: self.rows].copy())
        if steps:
            self._record("decode", list(np.stack(steps, axis=1)))
        return np.stack(told, axis=1)

    def _record(self, name: str, rows: list[Floats]) -> None:
        self.found[name] = [row.copy() for row in rows]

    def answers(self) -> Answers:
        width, pad = max(self.told.shape[1], self.said.shape[1]), self.pipeline.manifest.model.pad_token
        mine, his = (np.pad(t, ((0, 0), (0, width - t.shape[1])), constant_values=pad) for t in (self.told, self.said))
        firsts, margins = [], [0.0]
        for row in np.flatnonzero((mine != his).any(axis=1)):
            first = int((mine[row] != his[row]).argmax())
            logits = [self.exact["logits"][row], *self.exact.get("decode", [[]] * self.rows)[row]]
            drawn = first < len(logits) and mine[row, first] != UNDRAWN
            best = np.sort(logits[first])[-2:] if drawn else np.array([0.0, inf])
            firsts.append(first)
            margins.append(float(best[1] - best[0]))
        return Answers(int((mine == his).sum()), mine.size, min(firsts, default=None), _worst(np.array(margins)))


def reference_cuts(plan: PruningPlan, visual: Visual) -> tuple[Cut, ...]:
    """The plan in the reference's words; it rounds for itself unless the budget keeps more than the plan asks for."""
    aligned = plan.kept(visual[0]) != visual
    counts = visual[1:] if aligned else [cut.keep for cut in plan.cuts]
    return tuple(
        Cut(cut.layer, cut.criterion, cut.remove or 0.0, keep) for cut, keep in zip(plan.cuts, counts, strict=True)
    )


def compare(
    pipeline: Pipeline, load: Load, inputs: Inputs, asked: Asked, progress: Callable[[str], None] = lambda line: None
) -> Parity:
    """Parity over all prompts of `inputs`. `load` gives the reference in a dtype; one is held at a time.

    Prompt n draws its random cuts by seed n.
    """
    m, runs, seeds = pipeline.manifest, list[Comparison](), np.arange(len(inputs.input_ids))
    progress("PyTorch reference in fp32")
    reference = load("fp32")
    done = 0
    for batch in inputs.batches(pipeline.spec.budget.batch):
        rows = slice(done, done := done + len(batch.input_ids))
        runs.append(Comparison(pipeline, reference, batch, asked, seeds[rows]))
        progress(f"compared {done} of {len(inputs.input_ids)} prompts")
    rounding: dict[str, float] = {}
    if m.dtype != "fp32":
        del reference
        progress(f"PyTorch reference in {m.dtype}: how far rounding alone carries it")
        reference = load(m.dtype)
        rounded = [run.rounding(reference) for run in runs]
        rounding = {t.name: t.max_abs for t in _closest(rounded, [run.exact for run in runs])}
    return _conclude(runs, m.dtype, m.decoder.layers, rounding, asked)


def _conclude(runs: list[Comparison], dtype: Dtype, layers: int, rounding: dict[str, float], asked: Asked) -> Parity:
    tensors = _closest([run.found for run in runs], [run.exact for run in runs])
    cuts = tuple(_merge(parts) for parts in zip(*(run.cut_parity for run in runs), strict=True))
    parts = [run.answers() for run in runs]
    firsts = [a.first for a in parts if a.first is not None]
    margin = _worst(np.array([a.margin for a in parts]))
    answers = Answers(sum(a.equal for a in parts), sum(a.total for a in parts), min(firsts, default=None), margin)
    gates = [Gate(t.name, t.max_abs, limit_of(t, dtype, layers, rounding.get(t.name), asked)) for t in tensors]
    gates += [Gate(f"kept {c.name}", c.outside, 0) for c in cuts]
    # Where two logits lie closer than twice their error, either may be the larger one. The error is the measured one,
    # which has its own gates: a flip it does not explain is a mistake in choosing tokens, not in computing logits.
    slack = max(min(g.value, g.limit) for g in gates if g.name in ("logits", "decode"))
    gates.append(Gate("tokens", answers.margin, 2 * slack))
    return Parity(sum(r.rows for r in runs), tensors, cuts, answers, tuple(gates), _outputs(runs))


def _closest(found: list[Tensors], exact: list[Tensors]) -> tuple[TensorDiff, ...]:
    """Every tensor over all batches, in the order of the reference's."""
    return tuple(
        closeness(name, [p for f, e in zip(found, exact, strict=True) for p in zip(f[name], e[name], strict=True)])
        for name in exact[0]
    )


def closeness(name: str, pairs: list[tuple[Floats, Floats]]) -> TensorDiff:
    """Of (found, reference) pairs of arrays, taken as one long vector."""
    mine, his = (np.concatenate([p[i].ravel() for p in pairs]).astype(np.float64) for i in (0, 1))
    norms = float(np.linalg.norm(mine) * np.linalg.norm(his))
    cosine = float(mine @ his) / norms if norms else float(np.array_equal(mine, his))
    return TensorDiff(name, _worst(np.abs(mine - his)), float(np.abs(his).max()), cosine)


def _worst(values: Floats) -> float:
    """The largest, or inf if one is no number: Python's `max` may drop a NaN."""
    return float(values.max()) if np.isfinite(values).all() else inf


def _merge(parts: Iterable[CutParity]) -> CutParity:
    found = list(parts)
    worst = max((c.verdict for c in found), key=("nothing removed", "identical", "tie", "different").index)
    kept, swapped, outside = (sum(getattr(c, what) for c in found) for what in ("kept", "swapped", "outside"))
    margin, error = min(c.margin for c in found), max(c.error for c in found)
    return CutParity(found[0].name, kept, swapped, outside, margin, error, worst)


def _outputs(runs: list[Comparison]) -> dict[str, npt.NDArray[Any]]:
    """himap-run's arrays and the reference's. Kept sets are the bundle's own; behind one that differs, logits and
    tokens are those with the reference's forced."""
    cuts = [f"kept_{cut}" for cut in runs[0].pipeline.stages[1:]]
    pairs: dict[str, list[npt.NDArray[Any]]] = {
        "image_features": [np.stack(r.found["vision"]) for r in runs],
        **{name: [r.outputs[name] for r in runs] for name in cuts},
        "logits": [np.stack(r.found["logits"]) for r in runs],
        "tokens": [r.told for r in runs],
        "reference_image_features": [np.stack(r.exact["vision"]) for r in runs],
        **{f"reference_{name}": [r.truth.kept[n] for r in runs] for n, name in enumerate(cuts)},
        "reference_logits": [r.truth.logits for r in runs],
        "reference_tokens": [r.said for r in runs],
    }
    pad = runs[0].pipeline.manifest.model.pad_token
    return {name: _joined(rows, pad if name.endswith("tokens") else -1) for name, rows in pairs.items()}


def _joined(rows: list[npt.NDArray[Any]], fill: int) -> npt.NDArray[Any]:
    """Rows of different lengths filled up on the right; image features all have one shape."""
    width = max(r.shape[1] for r in rows)
    tail = [(0, 0)] * (rows[0].ndim - 2)
    return np.concatenate([np.pad(r, [(0, 0), (0, width - r.shape[1]), *tail], constant_values=fill) for r in rows])
