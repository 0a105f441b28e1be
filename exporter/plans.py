"""Which plans the user means: a policy and its flags, the authors' tasks, or TOML files."""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct
from msgspec.structs import replace

from himap_export.engines.documents import MEGABYTE, read_file, typed
from himap_export.graphs.errors import Exit, HimapError, suggestion
from himap_export.graphs.plan import POLICIES, TASKS, Cut, PruningPlan, Tokens
from himap_export.graphs.selectors import criteria_of, is_policy

Values = Mapping[str, Any]  # k1, k2, r1, r2, keep, as far as they were given
Source = str | Path | PruningPlan | Mapping[str, PruningPlan]  # of TASKS; a TOML file; a plan; plans by name
NAME = re.compile(r"[\w-]{1,64}")
KEYS = ("k1", "k2", "r1", "r2", "keep")
# Their authors' own K and R. HAWK's cut lies in front of layer 0; no cut of ours can come before layer 1.
ONE_CUT = {"fastv": Cut(2, "last", 0.5), "hawk": Cut(1, "hawk", 0.8), "dart": Cut(2, "dart", 0.778)}
MOST_PLANS = 64  # in one file: each is a variant of the bundle, with graphs of its own
_Layer = Annotated[int, Meta(ge=1, le=1024)]  # no decoder has more
_Fraction = Annotated[float, Meta(ge=0, lt=1)]


class _NoCut(Struct, frozen=True, forbid_unknown_fields=True):
    """The table of a plan by its policy; the policies differ by how many cuts they make."""

    policy: str = "himap"


class _OneCut(_NoCut, frozen=True, forbid_unknown_fields=True, kw_only=True):
    k1: _Layer
    r1: _Fraction | None = None
    keep: Tokens | None = None


class _TwoCuts(_NoCut, frozen=True, forbid_unknown_fields=True, kw_only=True):
    k1: _Layer
    k2: _Layer
    r1: _Fraction
    r2: _Fraction


_TABLES: tuple[type[_NoCut], ...] = (_NoCut, _OneCut, _TwoCuts)


def flag_plans(policies: Sequence[str], task: str, values: Values) -> dict[str, PruningPlan]:
    """Returns the plan of each policy by its name: the task's cuts, or the policy's own, changed by what was given.

    Of several policies each takes what it has cuts for; HimapError (usage) if none does.
    """
    found, taken = {}, {policy: _allowed(policy) for policy in policies}
    for key in values:
        if not any(key in allowed for allowed in taken.values()):
            raise _not_for(policies[0], key)
    for policy, allowed in taken.items():
        own = {key: value for key, value in values.items() if key in allowed}
        plan = _changed(policy, _default(policy, task), own)
        name = policy if policy != "himap" else task if plan == TASKS[task] else "custom"
        found[name] = plan
    return found


def named_plans(sources: Sequence[Source]) -> dict[str, PruningPlan]:
    """Returns every plan by its name, in the order asked for. HimapError (usage) for a name that is taken, or cannot be
    part of a file's."""
    found: dict[str, PruningPlan] = {}
    for source in sources:
        for name, plan in _plans_of(source):
            if found.setdefault(name, plan) != plan:
                raise HimapError(f"two plans are named {name}", hint="rename one", code=Exit.USAGE)
    return found


def _plans_of(source: Source) -> Iterator[tuple[str, PruningPlan]]:
    if isinstance(source, PruningPlan):
        yield "custom", source
    elif isinstance(source, Mapping):
        for name, plan in source.items():
            if not NAME.fullmatch(name):
                hint = "up to 64 letters, digits, - and _"
                raise HimapError(f"{name[:80]!r} is no name for a plan", hint=hint, code=Exit.USAGE)
            yield name, plan
    elif str(source) in TASKS:
        yield str(source), TASKS[str(source)]
    else:
        yield from _read(Path(source))


def _default(policy: str, task: str) -> PruningPlan | None:
    """Returns a policy's plan before anything is changed; None if it has none: truncation's authors try every layer."""
    criteria = criteria_of(policy)
    if len(criteria) == 1:
        return PruningPlan((ONE_CUT[policy],)) if policy in ONE_CUT else None
    cuts = TASKS[task].cuts[: len(criteria)]
    return PruningPlan(tuple(replace(cut, criterion=c) for cut, c in zip(cuts, criteria, strict=True)))


def _changed(policy: str, plan: PruningPlan | None, values: Values) -> PruningPlan:
    if "r1" in values and "keep" in values:
        raise HimapError("`r1` and `keep` exclude each other", "a fraction or a number", code=Exit.USAGE)
    if plan is None and not ("k1" in values and {"r1", "keep"} & set(values)):
        hint = "give `k1` LAYER and `keep` N (or `r1` FRACTION)"
        raise HimapError(f"the policy {policy} has no default cut", hint=hint, code=Exit.USAGE)
    cuts = plan.cuts if plan else (Cut(values["k1"], criteria_of(policy)[0], 0.0),)
    changed = [
        replace(cut, layer=values.get(f"k{n}", cut.layer), remove=values.get(f"r{n}", cut.remove))
        for n, cut in enumerate(cuts, 1)
    ]
    if "keep" in values:
        changed[0] = replace(changed[0], remove=None, keep=values["keep"])
    return PruningPlan(tuple(changed))


def _allowed(policy: str) -> tuple[str, ...]:
    return _TABLES[len(criteria_of(policy))].__struct_fields__[1:]  # without "policy"


def _not_for(policy: str, key: str) -> HimapError:
    count = len(criteria_of(policy))
    hint = f"it has {count} cut{'s' * (count != 1)}: {', '.join(f'`{own}`' for own in _allowed(policy)) or 'no flags'}"
    return HimapError(f"`{key}` is not for the policy {policy}", hint=hint, code=Exit.USAGE)


def _read(file: Path) -> Iterator[tuple[str, PruningPlan]]:
    """Yields the plans of a TOML file, one table each.

    `[tight]` with `k1 = 2`, `k2 = 8`, `r1 = 0.5`, `r2 = 0.9`, and `policy` if not himap; or with any list of cuts:
    `cuts = [{layer = 2, criterion = "last", keep = 100}]`.
    """
    tables = _tables(file)
    if not tables:
        raise HimapError(f"{file} holds no plan", hint="one table each, with k1, k2, r1 and r2", code=Exit.USAGE)
    if len(tables) > MOST_PLANS:
        raise HimapError(f"{file} holds {len(tables)} plans", f"at most {MOST_PLANS} are read", code=Exit.USAGE)
    for name, table in tables.items():
        if not NAME.fullmatch(name) or not isinstance(table, dict):
            hint = "one table each, named with up to 64 letters, digits, - and _"
            raise HimapError(f"{file}: {name[:80]} is not a plan", hint=hint, code=Exit.USAGE)
        yield name, _plan(f"{file}: plan {name}", table)


def _tables(file: Path) -> dict[str, Any]:
    try:
        content = read_file(file, "the plan", MEGABYTE)
    except HimapError as problem:
        known = f"a plan is one of {', '.join(TASKS)}, or a TOML file{suggestion(str(file), TASKS)}"
        raise HimapError(problem.summary, problem.details, known, problem.code) from None
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError:
        raise HimapError(f"{file} is not TOML", "it is not UTF-8 text", code=Exit.USAGE) from None
    except RecursionError:
        raise HimapError(f"{file} is not usable TOML", "it is nested too deeply", code=Exit.USAGE) from None
    except ValueError as problem:  # TOMLDecodeError, and numbers of thousands of digits
        raise HimapError(f"{file} is not TOML", str(problem), code=Exit.USAGE) from None


def _plan(what: str, table: Mapping[str, Any]) -> PruningPlan:
    if "cuts" in table:
        return typed(table, PruningPlan, what)
    policy = table.get("policy", "himap")
    if not isinstance(policy, str) or not is_policy(policy):
        known = f"known: {', '.join(POLICIES)}{suggestion(str(policy), POLICIES)}"
        raise HimapError(f"{what}: unknown policy {str(policy)[:80]}", known, code=Exit.USAGE)
    found = typed(table, _TABLES[len(criteria_of(policy))], what)
    values = {key: value for key in KEYS if (value := getattr(found, key, None)) is not None}
    if isinstance(found, _OneCut) and found.r1 is None and found.keep is None:
        raise HimapError(f"{what} lacks r1", "expected k1, and r1 or keep", code=Exit.USAGE)
    return _changed(policy, _default(policy, "qa"), values)
