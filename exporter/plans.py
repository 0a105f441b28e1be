"""Which plans the user means: a policy and its flags, the authors' tasks, or TOML files."""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import CRITERIA, POLICIES, TASKS, Cut, PruningPlan

Values = Mapping[str, Any]  # k1, k2, r1, r2, keep, as far as they were given
KEYS = {"k1": (int,), "k2": (int,), "r1": (int, float), "r2": (int, float), "keep": (int,)}
_CUT_KEYS = {"layer": (int,), "criterion": (str,), "remove": (int, float), "keep": (int,)}
FASTV = PruningPlan((Cut(2, "last", 0.5),))  # its authors' own K and R


def flag_plans(policies: Sequence[str], task: str, values: Values) -> dict[str, PruningPlan]:
    """The plan of each policy by its name: the task's cuts, or the policy's own, changed by what was given.

    Of several policies each takes what it has cuts for; HimapError (usage) if none does.
    """
    found, taken = {}, {policy: _allowed(len(POLICIES[policy])) for policy in policies}
    for key in values:
        if not any(key in allowed for allowed in taken.values()):
            raise _not_for(policies[0], key)
    for policy, allowed in taken.items():
        own = {key: value for key, value in values.items() if key in allowed}
        plan = _changed(policy, _default(policy, task), own)
        name = policy if policy != "himap" else task if plan == TASKS[task] else "custom"
        found[name] = plan
    return found


def named_plans(sources: Sequence[str]) -> dict[str, PruningPlan]:
    """Every plan by its name, in the order asked for; a source is one of TASKS or a TOML file."""
    found: dict[str, PruningPlan] = {}
    for source in sources:
        for name, plan in {source: TASKS[source]}.items() if source in TASKS else _read(Path(source)):
            if found.setdefault(name, plan) != plan:
                raise HimapError(f"two plans are named {name}", hint="rename one", code=Exit.USAGE)
    return found


def _default(policy: str, task: str) -> PruningPlan | None:
    """A policy's plan before anything is changed; None if it has none: truncation's authors try every layer."""
    criteria = POLICIES[policy]
    if len(criteria) == 1:
        return FASTV if policy == "fastv" else None
    cuts = TASKS[task].cuts[: len(criteria)]
    return PruningPlan(tuple(replace(cut, criterion=c) for cut, c in zip(cuts, criteria, strict=True)))


def _changed(policy: str, plan: PruningPlan | None, values: Values) -> PruningPlan:
    if "r1" in values and "keep" in values:
        raise HimapError("--r1 and --keep exclude each other", "a fraction or a number", code=Exit.USAGE)
    if plan is None and not ("k1" in values and {"r1", "keep"} & set(values)):
        hint = "give --k1 LAYER and --keep N (or --r1 FRACTION)"
        raise HimapError(f"the policy {policy} has no default cut", hint=hint, code=Exit.USAGE)
    cuts = plan.cuts if plan else (Cut(values["k1"], POLICIES[policy][0], 0.0),)
    changed = [
        replace(cut, layer=values.get(f"k{n}", cut.layer), remove=values.get(f"r{n}", cut.remove))
        for n, cut in enumerate(cuts, 1)
    ]
    if "keep" in values:
        changed[0] = replace(changed[0], remove=None, keep=values["keep"])
    return PruningPlan(tuple(changed))


def _not_for(policy: str, key: str) -> HimapError:
    count = len(POLICIES[policy])
    hint = f"it has {count} cut{'s' * (count != 1)}: {', '.join(f'--{own}' for own in _allowed(count)) or 'no flags'}"
    return HimapError(f"--{key} is not for the policy {policy}", hint=hint, code=Exit.USAGE)


def _allowed(cuts: int) -> tuple[str, ...]:
    return ((), ("k1", "r1", "keep"), ("k1", "k2", "r1", "r2"))[cuts]


def _read(file: Path) -> Iterator[tuple[str, PruningPlan]]:
    """The plans of a TOML file, one table each.

    `[tight]` with `k1 = 2`, `k2 = 8`, `r1 = 0.5`, `r2 = 0.9`, and `policy` if not himap; or with any list of cuts:
    `cuts = [{layer = 2, criterion = "last", keep = 100}]`.
    """
    try:
        tables = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as problem:
        known = f"a plan is one of {', '.join(TASKS)}, or a TOML file"
        reason = problem.strerror if isinstance(problem, OSError) else "it is not text"
        raise HimapError(f"cannot read the plan {file}", f"{reason}", known, Exit.USAGE) from None
    except tomllib.TOMLDecodeError as problem:
        raise HimapError(f"{file} is not TOML", str(problem), code=Exit.USAGE) from None
    if not tables:
        raise HimapError(f"{file} holds no plan", hint="one table each, with k1, k2, r1 and r2", code=Exit.USAGE)
    for name, table in tables.items():
        if not re.fullmatch(r"[\w-]+", name) or not isinstance(table, dict):
            hint = "one table each, named with letters, digits, - and _"
            raise HimapError(f"{file}: {name} is not a plan", hint=hint, code=Exit.USAGE)
        yield name, _plan(f"{file}: plan {name}", table)


def _plan(what: str, table: Values) -> PruningPlan:
    if "cuts" in table:
        return _cuts(what, table)
    policy = table.get("policy", "himap")
    if policy not in POLICIES:
        raise HimapError(f"{what}: unknown policy {policy}", f"known: {', '.join(POLICIES)}", code=Exit.USAGE)
    values = {key: value for key, value in table.items() if key != "policy"}
    allowed = _allowed(len(POLICIES[policy]))
    _check_keys(what, values, {key: KEYS[key] for key in allowed})
    spare = "r1" if "keep" in values else "keep"  # one cut: a fraction or a number
    for key in allowed:
        if key not in values and key != spare:
            raise HimapError(f"{what} lacks {key}", f"expected {', '.join(allowed)}", code=Exit.USAGE)
    return _changed(policy, _default(policy, "qa"), values)


def _cuts(what: str, table: Values) -> PruningPlan:
    cuts = table["cuts"]
    if len(table) > 1 or not isinstance(cuts, list) or not all(isinstance(cut, dict) for cut in cuts):
        hint = 'cuts = [{layer = 2, criterion = "instruction", remove = 0.5}, ..] and nothing else'
        raise HimapError(f"{what}: cuts are no list of tables", hint=hint, code=Exit.USAGE)
    for n, cut in enumerate(cuts, 1):
        _check_keys(f"{what}, cut {n}", cut, _CUT_KEYS)
        for key in ("layer", "criterion"):
            if key not in cut:
                raise HimapError(f"{what}, cut {n} lacks {key}", f"expected {', '.join(_CUT_KEYS)}", code=Exit.USAGE)
        if cut["criterion"] not in CRITERIA:
            summary = f"{what}, cut {n}: unknown criterion {cut['criterion']}"
            raise HimapError(summary, f"known: {', '.join(CRITERIA)}", code=Exit.USAGE)
    return PruningPlan(tuple(Cut(**cut) for cut in cuts))


def _check_keys(what: str, table: Values, types: Mapping[str, tuple[type, ...]]) -> None:
    for key, value in table.items():
        if key not in types:
            expected = f"expected {', '.join(types) or 'no keys'}"
            raise HimapError(f"{what} has an unknown key {key}", expected, code=Exit.USAGE)
        if not isinstance(value, types[key]) or isinstance(value, bool):
            expected = "expected text" if str in types[key] else "expected a number"
            raise HimapError(f"{what}: {key} is {value!r}", expected, code=Exit.USAGE)
