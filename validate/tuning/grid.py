"""The plans of a sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import Cut, PruningPlan
from himap_export.graphs.selectors import criteria_of

MOST_PLANS = 1000  # each is a prefill of every question: of 1000 questions, at a tenth of a second, more than a day
MOST_CUTS = 2  # as many as there are options
FRACTIONS = {1: ((0.25, 0.5, 0.75, 0.9),), 2: ((0.25, 0.5, 0.75), (0.5, 0.75, 0.9))}  # to try by the number of cuts
Values = Mapping[str, Sequence[float]]  # of k1, r1, k2 and r2, as far as they were given


@dataclass(frozen=True, order=True)
class Candidate:
    """A policy's plan with `cuts` at these layers, of fractions removed; `name` is also its table in a TOML file of
    plans."""

    cuts: tuple[tuple[int, float], ...]
    policy: str = "himap"

    @property
    def name(self) -> str:
        words = (f"k{layer}-r{removed}" for layer, removed in self.cuts)
        return "-".join(words).replace(".", "_")  # all digits: no two share a name

    @property
    def plan(self) -> PruningPlan:
        return _plan(self.policy, self.cuts)

    def toml(self, name: str) -> str:
        """Returns the table that `himap-export --plan` reads."""
        lines = [f"[{name}]", *([] if self.policy == "himap" else [f'policy = "{self.policy}"'])]
        lines += (f"k{n} = {layer}\nr{n} = {removed}" for n, (layer, removed) in enumerate(self.cuts, 1))
        return "\n".join([*lines, ""])


def cuts_of(policy: str) -> int:
    """Returns how many cuts a policy makes. HimapError (usage) if it is unknown, or there is nothing to tune."""
    if not 0 < (cuts := len(criteria_of(policy))) <= MOST_CUTS:
        raise HimapError(f"the policy {policy} makes {cuts} cuts", "1 or 2 can be tuned", code=Exit.USAGE)
    return cuts


def defaults(layers: int, cuts: int = 2) -> tuple[tuple[int, ...], ...]:
    """Returns K1, or K1 and K2, to try in a decoder of `layers` layers: the authors' 2 and 8 of 32, their halves and
    their doubles; of a policy that cuts once, all of them."""
    k1 = sorted({max(1, round(layers * share)) for share in (1 / 32, 2 / 32, 4 / 32)})
    k2 = sorted({max(k1[-1] + 1, round(layers * share)) for share in (4 / 32, 8 / 32, 16 / 32)})
    return (tuple(k1), tuple(k2)) if cuts == 2 else (tuple(k for k in (*k1, *k2) if k < layers),)


def grid(values: Values, layers: int, policy: str = "himap") -> tuple[Candidate, ...]:
    """Returns every plan of the `values` of a `policy` in which each cut comes after the one before it, sorted so that
    those that share a prefix stand together; defaults stand in for what `values` lack.

    HimapError (usage) if a value is not for the policy or outside what a decoder of `layers` layers can follow, no plan
    is left, or more than MOST_PLANS are.
    """
    cuts = cuts_of(policy)
    allowed = [f"{letter}{n}" for n in range(1, cuts + 1) for letter in "kr"]
    for key in values:
        if key not in allowed:
            hint = f"it cuts {'once' if cuts == 1 else 'twice'}: {', '.join(f'`{own}`' for own in allowed)}"
            raise HimapError(f"`{key}` is not for the policy {policy}", hint=hint, code=Exit.USAGE)
    own = zip(defaults(layers, cuts), FRACTIONS[cuts], strict=True)
    at = [(values.get(f"k{n}", k), values.get(f"r{n}", r)) for n, (k, r) in enumerate(own, 1)]
    for n, (ks, rs) in enumerate(at):
        for k, r in product(ks, rs):
            if not (n and k == 1):  # a layer like any other, but no cut comes before it: there will be no plan with it
                _plan(policy, [*((m, 0.0) for m in range(1, n + 1)), (int(k), r)]).check(layers)
    rising = [ks for ks in product(*(sorted(set(ks)) for ks, _ in at)) if all(a < b for a, b in pairwise(ks))]
    if not rising:
        listed = ", ".join(f"--k{n} {','.join(map(str, ks))}" for n, (ks, _) in enumerate(at, 1))
        raise HimapError("no plan is left to try", f"no k2 is above a k1 ({listed})", code=Exit.USAGE)
    removed = list(product(*(sorted(set(rs)) for _, rs in at)))
    if (plans := len(rising) * len(removed)) > MOST_PLANS:
        details, hint = f"at most {MOST_PLANS}, for each is a prefill of every question", "name fewer values"
        raise HimapError(f"{plans} plans are too many to try", details, hint, Exit.USAGE)
    found = ((tuple(map(int, ks)), rs) for ks, rs in product(rising, removed))
    return tuple(sorted(Candidate(tuple(zip(ks, rs, strict=True)), policy) for ks, rs in found))


def _plan(policy: str, cuts: Sequence[tuple[int, float]]) -> PruningPlan:
    criteria = criteria_of(policy)
    return PruningPlan(tuple(Cut(layer, c, removed) for (layer, removed), c in zip(cuts, criteria, strict=False)))
