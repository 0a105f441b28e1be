"""Which plans are worth having, and which one to take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from himap_export.validate.accuracy.evaluate import Right, percent
from himap_export.validate.accuracy.front import Front, front
from himap_export.validate.accuracy.statistics import Interval, accuracy_interval, least_questions, paired_difference
from himap_export.validate.accuracy.systems import UNPRUNED
from himap_export.validate.tuning.grid import Candidate


@dataclass(frozen=True)
class RankedPlan:
    """A plan's accuracy, its difference to the unpruned model on the same questions, and its share of the FLOPs."""

    candidate: Candidate
    flops: float
    accuracy: Interval
    loss: Interval  # unpruned minus pruned
    on_front: bool


@dataclass(frozen=True)
class Choice:
    """The plan to take, or None, and why."""

    candidate: Candidate | None
    reason: str


def rank(
    candidates: Sequence[Candidate], flops: Mapping[str, float], right: Mapping[str, Right]
) -> tuple[tuple[RankedPlan, ...], Front]:
    """Returns all plans, cheapest first, and the front by FLOPs, of which the unpruned model may be part."""
    best, unpruned, found = front({**flops, UNPRUNED: 1.0}, right), right[UNPRUNED], []
    for c in sorted(candidates, key=lambda c: (flops[c.name], -float(right[c.name].mean()))):
        accuracy, loss = accuracy_interval(right[c.name]), paired_difference(unpruned, right[c.name])
        found.append(RankedPlan(c, flops[c.name], accuracy=accuracy, loss=loss, on_front=c.name in best.names))
    return tuple(found), best


def choose(ranked: Sequence[RankedPlan], unpruned: float, keep: float) -> Choice:
    """Returns the cheapest plan that keeps the fraction `keep` of the `unpruned` accuracy as far as the questions can
    tell: the upper end of the 95 % interval of its paired loss is within the rest."""
    allowed = (1 - keep) * unpruned
    for j in ranked:
        if j.loss.high <= allowed:
            reason = (
                f"{j.candidate.name} is the cheapest plan whose loss, by its 95 % interval, leaves at least {keep:.0%} "
                f"of the unpruned accuracy: it is right in {j.accuracy.mean:.1%} against {unpruned:.1%}, loses "
                f"{percent(j.loss)} points, and takes {j.flops:.0%} of the FLOPs. {CAUTION}"
            )
            return Choice(j.candidate, reason)
    least = min(ranked, key=lambda j: j.loss.high)
    reason = (
        f"No plan's 95 % interval leaves at least {keep:.0%} of the unpruned accuracy of {unpruned:.1%}: "
        f"{least.candidate.name} comes nearest, and may lose {100 * least.loss.high:.1f} points. {_advice(allowed)}"
    )
    return Choice(None, reason)


# The best of many plans looks better than it is.
CAUTION = "It was chosen on these very questions: validate it on others before you rely on it."


def _advice(allowed: float) -> str:
    """No interval excludes a loss that so few questions would not have shown."""
    if allowed <= 0:
        return "Nothing may be lost, and no number of questions excludes every loss: lower --min-accuracy."
    return (
        f"Ask more questions (even without a loss it takes {least_questions(allowed)}), prune less, or lower "
        "--min-accuracy."
    )
