"""Every way to spoil one place of a JSON document, by its type: the documents are real ones, only one place lies."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

Path_ = tuple[str | int, ...]
_HERE = "\u2316 here \u2316"  # stands where a literal goes that Python's json cannot write
_DEEP = 100_000

# Names of what a place becomes, and how JSON spells it.
VALUES = {
    "null": "null",
    "true": "true",
    "-1": "-1",
    "0": "0",
    "1.5": "1.5",
    "1e9": str(10**9),
    "1e30": str(10**30),
    "NaN": "NaN",
    "inf": "1e999",
    "empty": '""',
    "word": '"many"',
    "long": json.dumps("x" * 100_000),
    "climbing": '"../x"',
    "absolute": '"/etc/passwd"',
    "deep": "[" * _DEEP + "]" * _DEEP,
    "list": "[]",
    "object": "{}",
    "half": '"\\ud800"',
}
ABSURD = frozenset(VALUES) - {"null", "0", "1e9", "-1", "true"}  # nonsense where a whole number is due
ACTIONS = ("deleted", "twice", "unknown key")


@dataclass(frozen=True)
class Fault:
    """`value` (one of VALUES or ACTIONS) at `path`; `kind`: the type that the good document has there."""

    path: Path_
    value: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.place} {'' if self.value in ACTIONS else '= '}{self.value}"

    @cached_property
    def place(self) -> str:
        """text_config.layers[0].name"""
        parts = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in self.path)
        return parts.lstrip(".") or "(whole)"

    def spoil(self, text: bytes) -> bytes:
        """The document with this fault."""
        whole = json.loads(text)
        if not self.path:
            return (VALUES[self.value] if self.value in VALUES else text.decode()).encode()
        owner = whole
        for part in self.path[:-1]:
            owner = owner[part]
        last, literal = self.path[-1], VALUES.get(self.value)
        if literal is not None:
            owner[last] = _HERE
        elif self.value == "deleted":
            del owner[last]
        elif self.value == "unknown key":
            owner[last]["no such key"] = 1
        else:  # twice: the second one wins in Python, the first one elsewhere
            good = json.dumps(owner[last])
            owner[last] = _HERE
            literal = f"{good}, {json.dumps(last)}: {good}"
        written = json.dumps(whole)
        return written.replace(json.dumps(_HERE), literal or "").encode()


def faults(text: bytes, most_alike: int = 2) -> list[Fault]:
    """All faults of a document, but what is there already. Of list entries and of keys whose values look alike only the
    first `most_alike`."""
    whole = json.loads(text)
    found = [Fault((), value, type(whole).__name__) for value in VALUES]
    for path, value in _places(whole, most_alike):
        kind = type(value).__name__
        there = json.dumps(value)
        own = [Fault(path, name, kind) for name in (*VALUES, "deleted") if VALUES.get(name) != there]
        if isinstance(path[-1], str):
            own.append(Fault(path, "twice", kind))
        if isinstance(value, dict):
            own.append(Fault(path, "unknown key", kind))
        found += own
    return found


def _places(value: object, most_alike: int, path: Path_ = ()) -> Iterator[tuple[Path_, object]]:
    if path:
        yield path, value
    if isinstance(value, dict):
        shapes: dict[str, int] = {}
        for key, inner in value.items():
            shape = _shape(inner) if len(value) > 12 or isinstance(inner, dict) else key
            shapes[shape] = shapes.get(shape, 0) + 1
            if shapes[shape] <= most_alike or not isinstance(inner, dict | list):
                if len(value) > 40 and shapes[shape] > most_alike:
                    continue  # a vocabulary, a table of weights
                yield from _places(inner, most_alike, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value[:most_alike]):
            yield from _places(inner, most_alike, (*path, index))


def _shape(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(sorted(map(str, value))[:8]) + "}"
    return type(value).__name__
