"""The schemas at the doors themselves: what msgspec does with them must be safe."""

import importlib
import pkgutil
from collections.abc import Iterator

import msgspec
import pytest
from msgspec import inspect

ROOMS = tuple(f"himap_export.{room}" for room in ("graphs", "engines", "serve", "exporter", "validate"))
# Modules that need what not every machine has.
FOREIGN = (".nvinfer", ".plugin", ".backends", "optimum", "serve.ray")


def schemas() -> list[type[msgspec.Struct]]:
    """Every struct of the project."""
    for room in ROOMS:
        package = importlib.import_module(room)
        for found in pkgutil.walk_packages(package.__path__, f"{room}."):
            if not any(part in found.name for part in FOREIGN):
                importlib.import_module(found.name)
    return [kind for kind in _below(msgspec.Struct) if kind.__module__.startswith("himap_export.")]


def _below(kind: type) -> Iterator[type]:
    for one in kind.__subclasses__():
        yield one
        yield from _below(one)


def _types(found: object, seen: set[int]) -> Iterator[inspect.Type]:
    """A type and those inside it."""
    if isinstance(found, inspect.Type) and id(found) not in seen:
        seen.add(id(found))
        yield found
    inner = [getattr(found, name) for name in getattr(found, "__struct_fields__", ()) if name != "default"]
    for value in inner:
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, inspect.Type | inspect.Field) and id(one) not in seen:
                yield from _types(one, seen)


def _bounded(found: inspect.Type) -> bool:
    bounds = ("ge", "gt", "le", "lt", "multiple_of", "min_length", "max_length", "pattern")
    scalar = isinstance(found, inspect.IntType | inspect.FloatType | inspect.StrType | inspect.BytesType)
    return scalar and any(getattr(found, name, None) is not None for name in bounds)


def test_no_fixed_tuple_stands_beside_a_bounded_value() -> None:
    """msgspec 0.22 reads memory that is not its own for `Annotated[int, Meta(ge=1)] | tuple[int, int]`: good input is
    refused with an absurd length, and the process dies later. A tuple of any length with a bound on it is safe."""
    for schema in schemas():
        for found in _types(inspect.type_info(schema), set()):
            if isinstance(found, inspect.UnionType) and any(isinstance(t, inspect.TupleType) for t in found.types):
                assert not any(_bounded(t) for t in found.types), f"{schema.__module__}.{schema.__name__}: {found}"


def test_what_was_checked_stays_as_it_was() -> None:
    """All structs are frozen: what was checked at the door stays as it was checked."""
    loose = [kind.__name__ for kind in schemas() if not kind.__struct_config__.frozen]
    assert not loose


@pytest.mark.parametrize("safe", [tuple[int, ...], list[int]])
def test_what_is_safe_beside_a_bounded_value(safe: type) -> None:
    from typing import Annotated

    kind = Annotated[int, msgspec.Meta(ge=1)] | Annotated[safe, msgspec.Meta(min_length=2, max_length=2)]
    assert list(msgspec.convert([1, 2], kind)) == [1, 2]
