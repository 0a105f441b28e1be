"""Which systems are worth their cost, as far as the questions can tell."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from himap_export.validate.accuracy.statistics import LEVEL, Array, mcnemar

HOW = (
    "A plan is on the front if it is measurably righter than every cheaper one on it: by McNemar's exact test on the "
    "same questions, at 5 % for all plans together (Bonferroni)."
)


@dataclass(frozen=True)
class Front:
    """`names` of the systems on the front, cheapest first; none if nothing can be told apart, and `note` says so."""

    names: tuple[str, ...]
    note: str = ""


def front(cost: Mapping[str, float], right: Mapping[str, Array]) -> Front:
    """Returns the front of the systems in `cost`, by what is `right` of each, bool [n] or [seeds, n], all of the same
    questions: each member is measurably righter than all cheaper ones. One alone is no front: then there is none."""
    share = {name: float(right[name].mean()) for name in cost}
    level = (1 - LEVEL) / max(1, len(cost) - 1)  # each other plan is compared with the front once
    names: list[str] = []
    for name in sorted(cost, key=lambda name: (cost[name], -share[name])):
        if all(share[name] > share[other] and mcnemar(right[name], right[other]) <= level for other in names):
            names.append(name)
    if len(names) > 1:
        return Front(tuple(names))
    asked, least = right[names[0]].shape[-1], 1 + math.ceil(-math.log2(level))
    note = (
        f"Nothing can be told apart on {asked} question{'s' * (asked != 1)}: no other is measurably righter than the "
        f"cheapest, {names[0]}. To tell two of {len(cost)} apart takes {least} or more on which one alone is right."
    )
    return Front((), note)
