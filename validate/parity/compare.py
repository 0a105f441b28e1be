"""A bundle against the PyTorch reference: every stage, both scores and kept sets, the logits, the answer.

A kept set may differ where the reference's own scores lie closer together than the scores' numerical error. That is
reported as a tie, and everything behind the cut is then compared with the reference's kept set forced. The error itself
has a gate: any swap whatever lies within twice the error of the scores that made it, so without one a bundle that ranks
by noise would pass as one long tie.

Memory is one batch's: sums go on, tensors do not. Those of the fp32 reference, with which its run in half precision is
compared later (two references of a large model do not fit), wait in files.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from math import inf
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.arrays import Inputs
from himap_export.engines.pipeline import Pipeline
from himap_export.engines.scratch import scratch_folder
from himap_export.graphs.spec import Dtype
from himap_export.validate.parity.limits import ParityOptions, limit_of
from himap_export.validate.parity.runs import (
    UNDRAWN,
    EngineRun,
    Prompts,
    ReferenceRun,
    batched,
    load_run,
    run_engine,
    run_reference,
    save_run,
)
from himap_export.validate.parity.tensors import DiffSums, TensorDiff, Tensors, diff_sums, worst
from himap_export.validate.reference.reference import Reference

Load = Callable[[Dtype], Reference]
Sums = dict[str, DiffSums]  # by tensor
Outputs = dict[str, npt.NDArray[Any]]
VERDICTS = ("nothing removed", "identical", "tie", "different")  # the worse, the later


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

    def __add__(self, other: "CutParity") -> "CutParity":
        return CutParity(
            name=self.name, kept=self.kept + other.kept, swapped=self.swapped + other.swapped,
            outside=self.outside + other.outside, margin=min(self.margin, other.margin),
            error=max(self.error, other.error), verdict=max(self.verdict, other.verdict, key=VERDICTS.index),
        )  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """Greedy tokens: `equal` of `total`, the first step at which one parts from the reference's (None: none does), and
    the widest margin between the reference's best two logits where they part (0: none does)."""

    equal: int
    total: int
    first: int | None
    margin: float

    def __add__(self, other: "Answers") -> "Answers":
        first = min((n for n in (self.first, other.first) if n is not None), default=None)
        return Answers(self.equal + other.equal, self.total + other.total, first, max(self.margin, other.margin))


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
    outputs: Outputs
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)


@dataclass(frozen=True)
class Compared:
    """One batch of as many `prompts`; `outputs` are empty if nobody wants them."""

    prompts: int
    sums: Sums
    cuts: tuple[CutParity, ...]
    answers: Answers
    outputs: Outputs


def compare(
    pipeline: Pipeline,
    load: Load,
    inputs: Inputs,
    options: ParityOptions,
    progress: Callable[[str], None] = lambda line: None,
    load_rounding: Load | None = None,
) -> Parity:
    """Returns the parity over all prompts of `inputs`. `load` gives the reference in a dtype; one is held at a time.

    How far rounding carries values is measured with the reference in the bundle's dtype, or, of engines that round
    activations further, with what `load_rounding` gives. Prompt n draws its random cuts by seed n. HimapError (usage)
    for prompts that are none.
    """
    dtype, total = pipeline.manifest.dtype, len(inputs.input_ids)
    batches = batched(inputs, pipeline)
    rounding: Sums = {}
    load_rounding = load_rounding or (None if dtype == "fp32" else load)
    with scratch_folder("parity") as folder:
        found, files = list[Compared](), [folder / f"{n}.npz" for n in range(len(batches))]
        progress("PyTorch reference in fp32")
        reference = load("fp32")
        for prompts, file in zip(batches, files, strict=True):
            kept = file if load_rounding else None
            found.append(_compare_batch(reference, pipeline, prompts=prompts, options=options, file=kept))
            progress(f"compared {sum(c.prompts for c in found)} of {total} prompts")
        if load_rounding:
            del reference
            progress(f"PyTorch reference in {dtype}: how far rounding alone carries it")
            reference = load_rounding(dtype)
            pairs = zip(batches, files, strict=True)
            rounding = _added([_rounding(reference, pipeline, prompts, file) for prompts, file in pairs])
    return _conclude(pipeline, found, rounding, options)


def _compare_batch(
    reference: Reference, pipeline: Pipeline, prompts: Prompts, options: ParityOptions, file: Path | None
) -> Compared:
    """One batch through both; what the reference computes is kept in `file`, if there is one."""
    expected = run_reference(reference, pipeline, prompts, options.new_tokens)
    actual = run_engine(pipeline, prompts, expected, options.new_tokens)
    if file is not None:
        save_run(file, expected)
    return compare_runs(actual, expected, pipeline.manifest.model.pad_token, options.outputs)


def _rounding(reference: Reference, pipeline: Pipeline, prompts: Prompts, file: Path) -> Sums:
    """How far `reference`, in another dtype, lies from the run in `file`, with the same tokens kept and answered."""
    expected = load_run(file)
    actual = run_reference(reference, pipeline, prompts, expected.reference_tokens.shape[1], same=expected)
    return _sums(actual.tensors, expected.tensors)


def compare_runs(actual: EngineRun, expected: ReferenceRun, pad_token: int, outputs: bool = True) -> Compared:
    """Returns how one batch's run of a bundle lies beside the reference's; with the arrays, if `outputs`."""
    return Compared(
        prompts=len(actual.engine_tokens),
        sums=_sums(actual.tensors, expected.tensors),
        cuts=tuple(
            reduce(add, (part for row in range(len(cut.kept)) for part in _cut_parity(n, row, actual, expected)))
            for n, cut in enumerate(actual.cuts)
        ),
        answers=_answers(actual, expected, pad_token),
        outputs=_outputs(actual, expected) if outputs else {},
    )


def _sums(actual: Tensors, expected: Tensors) -> Sums:
    """Of every tensor, in the order of the reference's."""
    return {name: diff_sums(actual[name], rows) for name, rows in expected.items()}


def _added(parts: Sequence[Sums]) -> Sums:
    return {name: reduce(add, (part[name] for part in parts)) for name in parts[0]}


def _cut_parity(n: int, row: int, actual: EngineRun, expected: ReferenceRun) -> Iterator[CutParity]:
    """What the engines kept of prompt `row` at cut `n`, beside what the reference kept, in the light of both scores: of
    each set of tokens that were ranked by themselves."""
    cut, sets = actual.cuts[n], max(actual.cuts[n].ranked, 1)
    in_expected, name = np.isin(cut.candidates[row], expected.kept[n][row]), f"score {cut.name}"
    if not cut.ranked:
        yield CutParity(
            cut.name, int(in_expected.sum()), swapped=0, outside=0, margin=inf, error=0.0, verdict=VERDICTS[0]
        )
        return
    scores = expected.tensors[name][row]
    differing = np.isin(cut.candidates[row], cut.kept[row]) != in_expected
    error = worst(np.abs(actual.tensors[name][row] - scores))
    for score, stays, differs in zip(*(np.split(a, sets) for a in (scores, in_expected, differing)), strict=True):
        threshold = score[stays].min(initial=inf)
        swapped = -(-int(differs.sum()) // 2)
        # A swap needs the gap between two scores to be closed by an error in each of them.
        outside = int((np.abs(score[differs] - threshold) > 2 * error).sum())
        yield CutParity(
            cut.name, int(stays.sum()), swapped=swapped, outside=outside,
            margin=float(threshold - score[~stays].max()), error=error,
            verdict=VERDICTS[3 if outside else 2 if swapped else 1],
        )  # fmt: skip


def _answers(actual: EngineRun, expected: ReferenceRun, pad_token: int) -> Answers:
    found, wanted = _as_wide([actual.engine_tokens, expected.reference_tokens], pad_token)
    firsts, margins, tensors = list[int](), [0.0], expected.tensors
    for row in np.flatnonzero((found != wanted).any(axis=1)):
        first = int((found[row] != wanted[row]).argmax())
        logits = [tensors["logits"][row], *(tensors["decode"][row] if "decode" in tensors else ())]
        drawn = first < len(logits) and found[row, first] != UNDRAWN
        best = np.sort(logits[first])[-2:] if drawn else np.array([0.0, inf])
        firsts.append(first)
        margins.append(float(best[1] - best[0]))
    return Answers(int((found == wanted).sum()), found.size, min(firsts, default=None), worst(np.array(margins)))


def _conclude(pipeline: Pipeline, found: Sequence[Compared], rounding: Sums, options: ParityOptions) -> Parity:
    """All batches together, and the gates."""
    m = pipeline.manifest
    tensors = tuple(sums.diff(name) for name, sums in _added([c.sums for c in found]).items())
    cuts = tuple(reduce(add, parts) for parts in zip(*(c.cuts for c in found), strict=True))
    answers = reduce(add, (c.answers for c in found))
    gates = []
    for t in tensors:
        measured = rounding[t.name].max_abs if rounding else None
        limit = limit_of(t, dtype=m.dtype, layers=m.decoder.layers, rounding=measured, options=options)
        gates.append(Gate(t.name, t.max_abs, limit))
    gates += [Gate(f"kept {c.name}", c.outside, 0) for c in cuts]
    # Where two logits lie closer than twice their error, either may be the larger one. The error is the measured one,
    # which has its own gates: a flip it does not explain is a mistake in choosing tokens, not in computing logits.
    slack = max(min(g.value, g.limit) for g in gates if g.name in ("logits", "decode"))
    gates.append(Gate("tokens", answers.margin, 2 * slack))
    total, pad_token, outputs = sum(c.prompts for c in found), m.model.pad_token, Outputs()
    for name in found[0].outputs:
        rows = _as_wide([c.outputs[name] for c in found], pad_token if name.endswith("tokens") else -1)
        outputs[name] = np.concatenate(rows)
    return Parity(total, tensors, cuts=cuts, answers=answers, gates=tuple(gates), outputs=outputs)


def _outputs(actual: EngineRun, expected: ReferenceRun) -> Outputs:
    """himap-run's arrays and the reference's. Kept sets are the bundle's own; behind one that differs, logits and
    tokens are those with the reference's forced."""
    names = [f"kept_{cut.name}" for cut in actual.cuts]
    return {
        "image_features": np.stack(actual.tensors["vision"]),
        **{name: cut.kept for name, cut in zip(names, actual.cuts, strict=True)},
        "logits": np.stack(actual.tensors["logits"]),
        "tokens": actual.engine_tokens,
        "reference_image_features": np.stack(expected.tensors["vision"]),
        **{f"reference_{name}": kept for name, kept in zip(names, expected.kept, strict=True)},
        "reference_logits": np.stack(expected.tensors["logits"]),
        "reference_tokens": expected.reference_tokens,
    }


def _as_wide(arrays: Sequence[npt.NDArray[Any]], fill: int) -> list[npt.NDArray[Any]]:
    """Rows [b,n,..] of different widths filled up on the right, up to the widest."""
    width = max(a.shape[1] for a in arrays)
    added = [((0, 0), (0, width - a.shape[1]), *[(0, 0)] * (a.ndim - 2)) for a in arrays]
    return [np.pad(a, more, constant_values=fill) for a, more in zip(arrays, added, strict=True)]
