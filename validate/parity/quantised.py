"""What quantised weights cost: the bundle as deployed beside the checkpoint before rounding. Reported, not gated.

Nothing is forced: each ranks by its own scores, keeps what it ranks highest and answers with that. Distributions of the
next token are compared at the last prompt token and behind every prefix of one answer, the original's. The second
comparison, with the same bundle opened to multiply activations as they are, tells what engines add that round those;
where the graphs themselves round activations there is no such bundle.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.arrays import Inputs
from himap_export.engines.pipeline import Pipeline
from himap_export.validate.parity.compare import Load
from himap_export.validate.parity.runs import Prompts, batched, greedy_answer, reference_cuts, replayed
from himap_export.validate.parity.tensors import Floats, Integers, worst
from himap_export.validate.reference.reference import Reference

ORIGINAL, EXACT = "the original checkpoint", "its own weights, activations not rounded"
READY_MADE = "its checkpoint is published quantised: there is no original to compare with"


@dataclass(frozen=True)
class FreeRun:
    """One batch, nothing forced: per cut the positions `kept` [b,S_i] (-1 pads), the `answer` [b,N], and `logits`
    [b,M,W] at the last prompt token and behind the first tokens of the answer `along` [b,M]."""

    kept: tuple[Integers, ...]
    answer: Integers
    logits: Floats
    along: Integers


@dataclass(frozen=True)
class KeptDrift:
    """At one cut, of all prompts: image tokens that are `kept`, and how many of them others have `replaced`."""

    name: str
    kept: int
    replaced: int

    def __add__(self, other: "KeptDrift") -> "KeptDrift":
        return KeptDrift(self.name, self.kept + other.kept, self.replaced + other.replaced)

    @property
    def share(self) -> float:
        """Returns the share of kept image tokens that others replaced."""
        return self.replaced / self.kept if self.kept else 0.0


@dataclass(frozen=True)
class Drift:
    """How far the deployed bundle lies from `over`: KL(other || deployed) in nats, its sum over `positions` and its
    largest; the largest difference of a logit; greedy tokens, `equal` of `total`; kept tokens by cut."""

    over: str
    positions: int
    kl_sum: float
    kl_max: float
    logits: float
    equal: int
    total: int
    cuts: tuple[KeptDrift, ...]

    def __add__(self, other: "Drift") -> "Drift":
        return Drift(
            over=self.over, positions=self.positions + other.positions, kl_sum=self.kl_sum + other.kl_sum,
            kl_max=float(np.maximum(self.kl_max, other.kl_max)), logits=max(self.logits, other.logits),
            equal=self.equal + other.equal, total=self.total + other.total,
            cuts=tuple(map(add, self.cuts, other.cuts)),
        )  # fmt: skip

    @property
    def kl_mean(self) -> float:
        """Returns the mean of KL(other || deployed) over all positions, in nats."""
        return self.kl_sum / self.positions


@dataclass(frozen=True)
class Quantised:
    """What quantising cost: drifts from the original, if there is one, and from exact engines; what is to be `noted`
    besides."""

    drifts: tuple[Drift, ...]
    note: str = ""


def other_runs(
    pipeline: Pipeline,
    original: Load | None,
    exact: bool,
    inputs: Inputs,
    new_tokens: int,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, list[FreeRun]]:
    """Returns what a deployed bundle is compared with, by name, a run for each batch of `inputs`, answers of at most
    `new_tokens`: the `original` checkpoint in fp32, if there is one, and, if `exact`, `pipeline` itself, which is the
    bundle opened to compute with activations as they are. The checkpoint's model is gone when it has run."""
    found, batches = dict[str, list[FreeRun]](), batched(inputs, pipeline)
    if original is not None:
        progress("PyTorch reference in fp32, of the weights before they were quantised")
        reference = original("fp32")
        found[ORIGINAL] = [run_original(reference, pipeline, prompts, new_tokens) for prompts in batches]
        del reference
    if exact:
        along = _along(found, len(batches))
        found[EXACT] = [run_free(pipeline, *each, new_tokens) for each in zip(batches, along, strict=True)]
    return found


def quantisation_cost(
    deployed: Pipeline, others: Mapping[str, Sequence[FreeRun]], inputs: Inputs, new_tokens: int
) -> Quantised:
    """Returns how far `deployed` lies from `others`, over all prompts of `inputs`, as `other_runs` found them."""
    batches = batched(inputs, deployed)
    along = _along(others, len(batches))
    own = [run_free(deployed, *each, new_tokens) for each in zip(batches, along, strict=True)]
    drifts = []
    for name, runs in others.items():
        parts = [drift(name, *each, deployed) for each in zip(own, runs, batches, strict=True)]
        drifts.append(reduce(add, parts))
    return Quantised(tuple(drifts), "" if ORIGINAL in others else READY_MADE)


def run_original(reference: Reference, pipeline: Pipeline, prompts: Prompts, new_tokens: int) -> FreeRun:
    """Returns what `reference` computes of one batch by the plan of `pipeline`."""
    inputs, run = prompts.inputs, pipeline.spec
    start = reference.prefill(
        inputs.input_ids, inputs.pixel_values, inputs.attention_mask,
        cuts=reference_cuts(run.plan, run.budget.visual), seeds=prompts.seeds.tolist(),
    )  # fmt: skip
    answer, logits = reference.answer(start, new_tokens)
    return FreeRun(start.kept, answer, logits, answer)


def run_free(pipeline: Pipeline, prompts: Prompts, along: Integers | None, new_tokens: int) -> FreeRun:
    """Returns what `pipeline` computes of one batch, its logits along the answer [b,M], its own if None."""
    inputs, rows = prompts.inputs, len(prompts)
    prefilled, layout = pipeline.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask, prompts.seeds)
    kept, logits = tuple(k.copy() for k in prefilled.kept.values()), prefilled.logits[:, None].copy()
    answer = greedy_answer(pipeline, layout, rows, new_tokens)
    along = answer if along is None else along
    if along.shape[1] > 1:
        logits = np.concatenate([logits, np.stack(replayed(pipeline, layout, along))], axis=1)
    return FreeRun(kept, answer, logits, along)


def _along(others: Mapping[str, Sequence[FreeRun]], batches: int) -> list[Integers | None]:
    """Returns the answer that each batch is run along: the first of `others`' one; None, its own, without any."""
    first = next(iter(others.values()), None)
    return [None] * batches if first is None else [run.along for run in first]


def drift(name: str, own: FreeRun, other: FreeRun, prompts: Prompts, pipeline: Pipeline) -> Drift:
    """Returns how far the run `own` of one batch lies from `other`, called `name`, both along one answer."""
    model = pipeline.manifest.model
    live, answered = (_live(answer, model.eos_tokens) for answer in (other.along, other.answer))
    kl = _divergence(other.logits[live], own.logits[live])
    width = min(own.answer.shape[1], other.answer.shape[1])
    equal = (own.answer[:, :width] == other.answer[:, :width]) & answered[:, :width]
    images = [_image_positions(pipeline, prompts, row) for row in range(len(prompts))]
    cuts = tuple(
        reduce(add, (_kept_drift(stage, *rows) for rows in zip(a, b, images, strict=True)))
        for stage, a, b in zip(pipeline.stages[1:], own.kept, other.kept, strict=True)
    )
    return Drift(
        over=name, positions=len(kl), kl_sum=float(kl.sum()), kl_max=worst(kl),
        logits=worst(np.abs(own.logits - other.logits)[live]), equal=int(equal.sum()), total=int(answered.sum()),
        cuts=cuts,
    )  # fmt: skip


def _live(answer: Integers, eos_tokens: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which tokens of `answer` [b,M] no token before them ended."""
    ended = np.isin(answer, eos_tokens)
    return np.asarray(np.cumsum(ended, axis=1) - ended == 0)


def _divergence(expected: Floats, actual: Floats) -> npt.NDArray[np.float64]:
    """KL(expected || actual) [n] in nats, of logits [n,W]."""
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (expected, actual))
    return np.asarray((np.exp(p) * (p - q)).sum(axis=-1), np.float64)


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _image_positions(pipeline: Pipeline, prompts: Prompts, row: int) -> Integers:
    """Positions [V] of the image tokens of prompt `row`, real tokens counted from 0."""
    ids, mask = prompts.inputs.input_ids[row], prompts.inputs.attention_mask
    real = ids if mask is None else ids[mask[row] != 0]
    return np.flatnonzero(pipeline.manifest.model.image.find(real))


def _kept_drift(name: str, own: Integers, other: Integers, images: Integers) -> KeptDrift:
    kept = images[np.isin(images, other)]
    return KeptDrift(name, len(kept), int((~np.isin(kept, own)).sum()))


def quantised_lines(found: Quantised) -> list[str]:
    """Returns what quantising cost, for people."""
    lines = []
    for d in found.drifts:
        lines += [
            f"      quantised, as deployed, beside {d.over} (no gate):",
            f"      {'KL':10}  mean {d.kl_mean:.1e} nats, largest {d.kl_max:.1e}, over {d.positions} tokens",
            f"      {'logits':10}  {d.logits:.1e} apart at most; {d.equal} of {d.total} greedy tokens equal",
        ]
        for k in d.cuts:
            name, share = f"kept {k.name}", f"{k.share:.1%} of {k.kept} kept image tokens replaced"
            lines.append(f"      {name:10}  {share}")
    return [*lines, f"      {found.note}"] if found.note else lines


def quantised_rows(found: Quantised) -> tuple[tuple[str, ...], ...]:
    """Returns, of each comparison, with what, mean and largest KL, largest difference of a logit, tokens that agree and
    kept tokens replaced."""
    return tuple(
        (
            d.over, f"{d.kl_mean:.1e}", f"{d.kl_max:.1e}", f"{d.logits:.1e}", f"{d.equal} of {d.total}",
            ", ".join(f"{k.name} {k.share:.1%}" for k in d.cuts) or "-",
        )
        for d in found.drifts
    )  # fmt: skip


def quantised_json(found: Quantised) -> dict[str, Any]:
    """Returns the drifts by what they are from, means and shares computed."""
    drifts = {}
    for d in found.drifts:
        facts = asdict(d) | {"kl_mean": d.kl_mean, "cuts": {k.name: asdict(k) | {"share": k.share} for k in d.cuts}}
        drifts["original" if d.over == ORIGINAL else "exact"] = {
            key: value for key, value in facts.items() if key not in ("over", "kl_sum")
        }
    return {**drifts, "note": found.note}
