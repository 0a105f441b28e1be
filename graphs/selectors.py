"""Criteria of one's own: registered in Python, or offered by installed packages, which name them as entry points.

Nothing of a package is imported before a plan names its criterion.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from himap_export.graphs.errors import Exit, HimapError, suggestion
from himap_export.graphs.plan import PARTS, POLICIES, Criterion

if TYPE_CHECKING:
    from himap_export.graphs.scoring import Score

GROUP = "himap_export.criteria"  # of entry points: the criterion's name = where its Selector is, "package.module:NAME"


@dataclass(frozen=True)
class Selector:
    """A criterion by somebody else. Its name is also that of a policy: two cuts by it, where HiMAP's are.

    `score` builds it into a graph: of a ScoringContext, [B,S] fp32, of which only that of image tokens counts; those
    that score highest stay. `reference` says it again in PyTorch, for `validate`: of the reference's State, the number
    of tokens that stay and a seed, the scores [V] of the image tokens alive; the function, or "package.module:function"
    so that an export does not import torch. Without it a bundle can be exported and run, not judged.
    """

    score: "Score"
    reference: str | Callable[..., Any] | None = None


_REGISTERED: dict[str, Selector] = {}


def register_selector(name: str, selector: Selector) -> None:
    """Lets plans cut by the criterion `name`. HimapError (usage) if it is taken, or no name."""
    _check_name(name)
    taken = name in POLICIES or name in PARTS or _REGISTERED.setdefault(name, selector) != selector
    if taken:
        raise HimapError(f"there is a criterion {name}", "give yours another name", code=Exit.USAGE)


def find_selector(name: str) -> Selector | None:
    """Returns the criterion registered as `name`, or offered by a package as that; None if there is none.

    HimapError: missing if the package cannot be imported or offers something else, usage if two offer it.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    offers = _offers(name)
    if not offers:
        return None
    _check_name(name)
    packages = [offer.dist.name for offer in offers]
    if len(packages) > 1:
        summary = f"several packages offer the criterion {name}"
        raise HimapError(summary, ", ".join(packages), "uninstall all but one", Exit.USAGE)
    summary = f"the package {packages[0]} cannot give the criterion {name}"
    try:
        found = offers[0].load()
    except Exception as problem:  # whatever its import raises
        details = f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
        raise HimapError(summary, details, "update or uninstall it", Exit.MISSING) from problem
    if not isinstance(found, Selector):
        details = f"{offers[0].value} is a {type(found).__name__}, no himap_export.Selector"
        raise HimapError(summary, details, "update or uninstall it", Exit.MISSING)
    return found


def is_policy(name: str) -> bool:
    """Tells whether there is a policy `name`, without importing the package that may offer it."""
    return name in POLICIES or name in _REGISTERED or bool(_offers(name))


def criteria_of(policy: str) -> tuple[Criterion, ...]:
    """Returns what the cuts of a policy rank by, cut by cut: a row of POLICIES, or twice what goes by its name.

    HimapError (usage) if there is no such policy."""
    if not is_policy(policy):
        known = f"known: {', '.join(POLICIES)}{suggestion(policy, POLICIES)}"
        raise HimapError(f"unknown policy {policy[:80]}", known, code=Exit.USAGE)
    return POLICIES.get(policy, (policy, policy))


def _check_name(name: str) -> None:
    try:
        msgspec.convert(name, Criterion)
    except msgspec.ValidationError:
        details = "a name is up to 64 small letters, digits, _ and -, a letter first"
        raise HimapError(f"{name[:80]!r} cannot name a criterion", details, code=Exit.USAGE) from None


def _offers(name: str) -> list[Any]:
    """Returns the entry points of that name: one for each package that has one."""
    from importlib.metadata import entry_points  # a tenth of a second, which no `--help` needs

    return list(entry_points(group=GROUP, name=name))
