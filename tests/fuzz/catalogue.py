"""All doors, by the commands that read through them, and what a run found, told so that a finding can be repeated."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fuzz import (
    bundle_doors,
    checkpoint_doors,
    option_doors,
    place_doors,
    quantised_bundle_doors,
    quantised_doors,
    question_doors,
)
from fuzz.contract import Door, Outcome

Originals = Mapping[str, Path]
GROUPS: Mapping[str, Callable[[Originals], list[Door]]] = {
    "bundle": bundle_doors.doors,
    "checkpoint": checkpoint_doors.doors,
    "quantised": quantised_doors.doors,
    "quantised bundle": quantised_bundle_doors.doors,
    "questions": question_doors.doors,
    "places": place_doors.doors,
    "options": option_doors.doors,
}


def told(outcomes: Sequence[Outcome], examples: int = 3) -> str:
    """How many cases were refused, accepted, violations; then each cause with its cases and how to repeat them."""
    broken = [o for o in outcomes if o.broken]
    refused, accepted = sum(o.code != 0 and not o.broken for o in outcomes), sum(o.code == 0 for o in outcomes)
    slowest = max(outcomes, key=lambda o: o.seconds, default=None)
    lines = [f"{len(outcomes)} cases: {refused} refused, {accepted} accepted, {len(broken)} violations"]
    if slowest is not None:
        lines.append(f"slowest: {slowest.seconds:.1f} s, {slowest.case.name}")
    causes: dict[str, list[Outcome]] = {}
    for o in broken:
        causes.setdefault(o.cause, []).append(o)
    for cause, group in sorted(causes.items(), key=lambda item: -len(item[1])):
        lines += ["", f"{len(group)}x {cause}"]
        for o in group[:examples]:
            lines.append(f"   HIMAP_FUZZ_CASE={o.case.name!r} pytest tests/fuzz -m slow -k one_case")
            lines.append(f"      {'; '.join(o.broken)[:300]}")
            lines += [f"      {line[:300]}" for line in o.said.splitlines()[-2:]]
    return "\n".join(lines)
