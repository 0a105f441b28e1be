"""The plans of a sweep."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import Cut, PruningPlan, himap

MOST_PLANS = 1000  # each is a prefill of every question: of 1000 questions, at a tenth of a second, more than a day


@dataclass(frozen=True, order=True)
class Candidate:
    """HiMAP's plan at these cuts, fractions removed; `name` is also its table in a TOML file of plans."""

    k1: int
    r1: float
    k2: int
    r2: float

    @property
    def name(self) -> str:
        return f"k{self.k1}-r{self.r1}-k{self.k2}-r{self.r2}".replace(".", "_")  # all digits: no two share a name

    @property
    def plan(self) -> PruningPlan:
        return himap(self.k1, self.k2, self.r1, self.r2)

    def toml(self, name: str) -> str:
        """Returns the table that `himap-export --plan` reads."""
        return f"[{name}]\nk1 = {self.k1}\nk2 = {self.k2}\nr1 = {self.r1}\nr2 = {self.r2}\n"


def defaults(layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns K1 and K2 to try in a decoder of `layers` layers: the authors' 2 and 8 of 32, their halves and their
    doubles."""
    k1 = sorted({max(1, round(layers * share)) for share in (1 / 32, 2 / 32, 4 / 32)})
    k2 = sorted({max(k1[-1] + 1, round(layers * share)) for share in (4 / 32, 8 / 32, 16 / 32)})
    return tuple(k1), tuple(k2)


def grid(
    k1s: Sequence[int], r1s: Sequence[float], k2s: Sequence[int], r2s: Sequence[float], layers: int
) -> tuple[Candidate, ...]:
    """Returns every plan of these values in which K2 comes after K1, sorted so that those that share a prefix stand
    together.

    HimapError (usage) if a value is outside what a decoder of `layers` layers can follow, no plan is left, or more
    than MOST_PLANS are.
    """
    for k1, r1 in product(k1s, r1s):
        PruningPlan((Cut(k1, "instruction", r1),)).check(layers)
    for k2, r2 in product(k2s, r2s):
        if k2 != 1:  # a layer like any other, but no K1 comes before it: there will be no plan with it
            himap(1, k2, 0.0, r2).check(layers)
    pairs, fractions = [(k1, k2) for k1, k2 in product(set(k1s), set(k2s)) if k1 < k2], (set(r1s), set(r2s))
    if not pairs:
        listed = f"--k1 {','.join(map(str, k1s))}, --k2 {','.join(map(str, k2s))}"
        raise HimapError("no plan is left to try", f"no k2 is above a k1 ({listed})", code=Exit.USAGE)
    if (plans := len(pairs) * len(fractions[0]) * len(fractions[1])) > MOST_PLANS:
        details, hint = f"at most {MOST_PLANS}, for each is a prefill of every question", "name fewer values"
        raise HimapError(f"{plans} plans are too many to try", details, hint, Exit.USAGE)
    return tuple(sorted(Candidate(k1, r1, k2, r2) for (k1, k2), r1, r2 in product(pairs, *fractions)))
