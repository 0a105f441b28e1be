"""What himap-validate, himap-analyze and himap-tune read: data sets, and logs of answers, that lie."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from fuzz import json_faults
from fuzz.contract import Arguments, Case, Door, Room, stop

from himap_export.engines.command import run_command

Originals = Mapping[str, Path]
LINE = {
    "image": "image.png",
    "question": "Which?",
    "options": ["a dog", "a cat", "a cow"],
    "answer": "B",
    "id": 7,
    "type": "x",
}
HEADER = {"himap-validate": "answers", "dataset": "abc", "plans": ["qa"]}
ANSWER = {"policy": "qa", "seed": 0, "line": 1, "id": "7", "type": "", "said": "B", "expected": "B", "right": True}


def doors(originals: Originals) -> list[Door]:
    """Data sets of himap-analyze and himap-tune, and the log of both others."""
    analyze = ("himap_export.validate.checkpoint:load_reference", "himap-analyze", ())
    tune = ("himap_export.validate.tuning.tune:tune", "himap-tune", ("--no-time", "--r1", "0.5", "--r2", "0.5"))
    return [*(_data_sets(originals, *how) for how in (analyze, tune)), _logs()]


def _data_sets(originals: Originals, place: str, command: str, flags: tuple[str, ...]) -> Door:
    name = f"data set of {command}"

    def case(fault: str, content: bytes, same: bool = False, why: str = "") -> Case:
        def prepare(room: Room) -> Arguments:
            room.copy("image.png")
            data = room.write(room.folder / "data.jsonl", content)
            return (room.copy("model"), "--dataset", data, "--out", room.folder / "out", *flags)

        return Case(name, fault, command, prepare, why, same, ("out",), {place: stop})

    return Door(name, case("good", _lines(), True), lambda: [case(*fault) for fault in _line_faults()])


def _lines(line: str | None = None) -> bytes:
    """The line between two good ones."""
    good = json.dumps(LINE)
    return "\n".join([good, line or good, good, ""]).encode("utf-8", "surrogatepass")


def _line_faults() -> Iterator[tuple[str, bytes, bool, str]]:
    text = json.dumps(LINE).encode()
    texts = ("empty", "word", "long", "climbing", "absolute")
    for fault in json_faults.faults(text, most_alike=3):
        absent = fault.value in ("deleted", "null") and fault.place in ("id", "type", "options")
        free = fault.value in texts and fault.place in (
            "id",
            "type",
            "question",
        )
        number = fault.place == "id" and fault.kind == "int" and fault.value in ("-1", "0", "1e9", "1e30")
        other = fault.place.startswith("options[") and fault.value in (
            "deleted",
            "word",
            "long",
            "climbing",
            "absolute",
        )
        index = fault.place == "answer" and fault.value in ("0", "null")
        words = free or number or other or index or absent
        yield fault.name, _lines(fault.spoil(text).decode()), False, "words of a question" if words else ""
    for name, content in {
        "empty": b"", "blank": b"\n\n", "not UTF-8": b'{"image": "\xff"}\n', "a list": b"[]\n", "a table": b"id\tx\n",
        "one line of 100 MB": b" " * 100_000_000, "zeros": b"\0" * 1000, "UTF-16": _lines().decode().encode("utf-16"),
        "deep": b"[" * 100_000 + b"\n", "cut off": _lines()[:-30], "twice": b'{"image": "a", "image": "b"}\n',
    }.items():  # fmt: skip
        yield name, content, False, "the last lines are blank" if name == "one line of 100 MB" else ""
    for image in (
        "..",
        ".",
        "",
        "/etc/passwd",
        "/dev/zero",
        "none.png",
        "x" * 300,
        "a\0b",
        "\udcff",
        "data.jsonl",
        "\n",
    ):
        yield f"image {image[:20]!r}", _lines(json.dumps(LINE | {"image": image})), False, ""


# --- logs ---


def _logs() -> Door:
    header, answer = json.dumps(HEADER).encode(), json.dumps(ANSWER).encode()

    def read(content: bytes, room: Room) -> Arguments:
        return (room.write(room.folder / "answers.jsonl", content),)

    def case(name: str, lines: list[bytes], end: bytes = b"\n", same: bool = False, why: str = "") -> Case:
        content = b"\n".join(lines) + end
        return Case("log", name, "log", lambda room: read(content, room), why, same, ("answers.jsonl",), main=_resume)

    def bad() -> list[Case]:
        free = {"type", "said", "expected", "policy", "id"}
        found = [case(f"header: {f.name}", [f.spoil(header), answer]) for f in json_faults.faults(header)]
        for f in json_faults.faults(answer):
            words = f.place in free and f.value in ("empty", "word", "long", "climbing", "absolute")
            number = f.place in ("seed", "line") and f.value in ("0", "1e9")
            why = "an answer" if words or number or (f.place, f.value) == ("right", "true") else ""
            found.append(case(f.name, [header, f.spoil(answer), answer], why=why))
        found += [case("cut off", [header, answer, answer[:20]], b"", why="what a kill cut off is asked again")]
        return [*found, case("not UTF-8", [header, b"\xff"]), case("no header", [answer]), case("zeros", [bytes(99)])]

    return Door("log", case("good", [header, answer], same=True), bad)


def _resume() -> None:
    """Reads a log and goes on with it, as himap-validate and himap-tune do."""
    import sys

    from himap_export.validate.accuracy.answers import AnswerLog, read_log

    def body() -> None:
        log = Path(sys.argv[1])
        read_log(log)
        with AnswerLog(log, HEADER) as found:
            print(len(found.done))

    run_command("log", body)
