"""Numbers that are none, for every option of every command that takes one."""

import argparse
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

from fuzz.contract import COMMANDS, Arguments, Case, Door, Room, stop

Originals = Mapping[str, Path]
NUMBERS = (
    "nan", "inf", "-inf", "-1", "0", "0.5", "1e9", str(10**9), str(10**30), "1e999", "", " ", "many", "٣", "½", "1_000",
    "0x10", "--", "1,2", "1," * 5000 + "1", "9" * 5000, "-0", "\udcff", "1\n2",
)  # fmt: skip
# Nobody means these, whatever the option.
NEVER = {"nan", "inf", "-inf", "1e999", "", " ", "many", "½", "0x10", "--", "9" * 5000, "\udcff", str(10**30), "1\n2"}
GOOD = {
    "himap-export": ("model", "--k1", "1", "--k2", "3", "--dry-run"),
    "himap-run": ("bundle", "--load-inputs", "in.npz", "--threads", "1"),
    "himap-validate": ("bundle", "--model", "model", "--load-inputs", "in.npz", "--no-speed"),
    "himap-analyze": ("model", "--dataset", "data.jsonl", "--out", "out"),
    "himap-tune": ("model", "--dataset", "data.jsonl", "--out", "out", "--no-time"),
}
PATCHES = {
    "himap-run": {"himap_export.engines.session:Pipeline": stop},
    "himap-validate": {"himap_export.engines.session:Pipeline": stop},
    "himap-analyze": {"himap_export.validate.checkpoint:load_reference": stop},
    "himap-tune": {"himap_export.validate.tuning.tune:tune": stop},
}


def doors(originals: Originals) -> list[Door]:
    """One door for each command."""
    return [_options(command) for command in COMMANDS]


def numeric(command: str) -> list[str]:
    """The command's options that take a number, several, or a size."""
    parser: argparse.ArgumentParser = import_module(COMMANDS[command])._parser()
    return [a.option_strings[0] for a in parser._actions if a.option_strings and _takes_number(a)]


def _takes_number(action: argparse.Action) -> bool:
    if action.type is None or action.type is Path or action.choices is not None:
        return False
    assert callable(action.type)
    for text in ("1", "1.0", "56x56"):
        try:
            if isinstance(action.type(text), int | float | tuple):
                return True
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            continue
    return False


def _options(command: str) -> Door:
    name = f"options of {command}"

    def case(fault: str, words: tuple[str, ...], why: str = "") -> Case:
        def prepare(room: Room) -> Arguments:
            for original in ("bundle", "model", "in.npz", "image.png", "data.jsonl"):
                room.copy(original)
            return [room.folder / w if w in room.originals or w == "out" else w for w in GOOD[command]] + list(words)

        return Case(name, fault, command, prepare, why, may_make=("out",), patches=PATCHES.get(command, {}))

    def bad() -> Iterator[Case]:
        for option in numeric(command):
            for text in NUMBERS:
                why = "" if text in NEVER or (text == "-1") else "within what the option says it takes"
                yield case(f"{option} {text[:20]!r}", (f"{option}={text}",), why)
                yield case(f"{option} {text[:20]!r} apart", (option, text), why)

    return Door(name, case("good", ()), lambda: list(bad()))
