"""Criteria of one's own: how tokens are ranked inside a graph, and how the reference says that they should be."""

from collections.abc import Iterable
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.selectors import Selector, find_selector, register_selector

if TYPE_CHECKING:
    from himap_export.graphs.scoring import Score
    from himap_export.validate.reference.criteria import Score as ReferenceScore


def register_criterion(name: str, score: "Score", reference: "str | ReferenceScore | None" = None) -> None:
    """Registers an importance score in this process: a cut may name it as its criterion, an export as its policy.

    `score` and `reference` are those of a Selector. HimapError (usage) if the name is taken.
    """
    register_selector(name, Selector(score, reference))


def require_references(what: str, criteria: Iterable[str]) -> None:
    """Lets the reference of this process cut by `criteria`, those of `what`, if it does not yet.

    HimapError: usage for one that no reference ranks by, missing if the package that offers it cannot give it.
    """
    from himap_export.validate.reference.criteria import CRITERIA  # torch: seconds to import

    for criterion in criteria:
        if criterion in CRITERIA:
            continue
        found = find_selector(criterion)
        if found is None or found.reference is None:
            summary = f"{what} is cut by {criterion}, which no reference ranks by"
            hint = "one of your own is registered with its reference before, or offered by a package"
            raise HimapError(summary, f"known: {', '.join(CRITERIA)}", hint, Exit.USAGE)
        CRITERIA[criterion] = _resolved(criterion, found.reference)


def _resolved(criterion: str, reference: "str | ReferenceScore") -> "ReferenceScore":
    """Returns the function that is meant. HimapError (missing) if it cannot be imported."""
    if not isinstance(reference, str):
        return reference
    try:
        found: ReferenceScore = resolve_name(reference)
    except Exception as problem:  # whatever its import raises
        details = f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
        summary = f"{reference} cannot give the reference of the criterion {criterion}"
        raise HimapError(summary, details, "update or uninstall its package", Exit.MISSING) from problem
    return found
