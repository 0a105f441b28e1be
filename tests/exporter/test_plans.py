"""Plan files: what they hold becomes plans, or is refused in one line, in no time."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import HIMAP_TINY, call
from hypothesis import given
from hypothesis import strategies as st

from himap_export.exporter.cli import main as export_main
from himap_export.exporter.plans import named_plans
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import TASKS, Cut, PruningPlan, himap

HIMAP = "k1 = 2\nk2 = 8\nr1 = 0.5\nr2 = 0.75\n"


def plans(folder: Path, content: str | bytes) -> dict[str, PruningPlan]:
    file = folder / "plans.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return named_plans([str(file)])


def test_tables_become_plans(tmp_path: Path) -> None:
    content = f"""
[as-the-authors]
{HIMAP}
[whole]
policy = "none"
[fast]
policy = "fastv"
k1 = 3
keep = 100
[random]
policy = "random"
{HIMAP}
[mine]
cuts = [{{layer = 2, criterion = "last", remove = 0}}, {{layer = 5, criterion = "image", keep = 7}}]
"""
    found = plans(tmp_path, content)
    assert found["as-the-authors"] == himap(2, 8, 0.5, 0.75) == TASKS["qa"] and found["whole"] == PruningPlan()
    assert found["fast"] == PruningPlan((Cut(3, "last", None, 100),))
    assert [cut.criterion for cut in found["random"].cuts] == ["random", "random"]
    assert found["mine"] == PruningPlan((Cut(2, "last", 0.0), Cut(5, "image", None, 7)))


NESTED = "x = " + "[" * 5000 + "]" * 5000
CUT = "{layer = 1, criterion = 'last', keep = 1},"
DOTTED = ".".join("a" * 5000) + " = 1"
BAD: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "holds no plan"),
    "no table": ("k1 = 1", "k1 is not a plan"),
    "no TOML": ("[a", "is not TOML"),
    "no text": (b"\xff\xfe", "is not UTF-8"),
    "a null byte": ("[a]\x00", "is not TOML"),
    "lists in lists": (NESTED, "nested too deeply"),
    "tables in tables": (f"[a]\n{DOTTED}", "a"),
    "5000 digits": (f"[a]\nk1 = {'9' * 5000}", "a"),
    "many plans": ("".join(f"[p{n}]\n{HIMAP}" for n in range(65)), "holds 65 plans: at most 64"),
    "many cuts": (f"[a]\ncuts = [{CUT * 65}]", "length <= 64 - at $.cuts"),
    "a path for a name": (f"['a/b']\n{HIMAP}", "a/b is not a plan"),
    "a long name": (f"[{'a' * 65}]\n{HIMAP}", "is not a plan"),
    "a field too few": ("[a]\nk1 = 1\nr1 = 0.5\nr2 = 0.5", "plan a is not usable: Object missing required field k2"),
    "a field too many": (f"[a]\n{HIMAP}r3 = 1", "unknown field r3"),
    "half a layer": ("[a]\nk1 = 1.5\nk2 = 2\nr1 = 0.5\nr2 = 0.5", "Expected int, got float - at $.k1"),
    "a layer of no model": ("[a]\nk1 = 1\nk2 = 99999\nr1 = 0.5\nr2 = 0.5", "Expected int <= 1024 - at $.k2"),
    "a true layer": ("[a]\nk1 = true\nk2 = 2\nr1 = 0.5\nr2 = 0.5", "got bool - at $.k1"),
    "a date": ("[a]\nk1 = 1979-05-27\nk2 = 2\nr1 = 0.5\nr2 = 0.5", "Expected int"),
    "not a number": ("[a]\nk1 = 1\nk2 = 2\nr1 = nan\nr2 = 0.5", "Expected float >= 0.0 - at $.r1"),
    "infinity": ("[a]\nk1 = 1\nk2 = 2\nr1 = 0.5\nr2 = inf", "Expected float < 1.0 - at $.r2"),
    "all": ("[a]\nk1 = 1\nk2 = 2\nr1 = 1\nr2 = 0.5", "Expected float < 1.0 - at $.r1"),
    "less than nothing": ("[a]\npolicy = 'fastv'\nk1 = 1\nkeep = -1", "Expected int >= 0 - at $.keep"),
    "an unknown policy": ("[a]\npolicy = 'best'", "unknown policy best"),
    "a policy that is no text": ("[a]\npolicy = ['himap']", "unknown policy ['himap']"),
    "another policy's flag": ("[a]\npolicy = 'fastv'\nk1 = 1\nkeep = 9\nk2 = 3", "unknown field k2"),
    "neither fraction nor number": ("[a]\npolicy = 'fastv'\nk1 = 1", "lacks r1"),
    "cuts and more": ("[a]\ncuts = []\npolicy = 'none'", "unknown field policy"),
    "cuts that are none": ("[a]\ncuts = 3", "Expected array, got int - at $.cuts"),
    "a cut that is none": ("[a]\ncuts = [3]", "Expected object, got int - at $.cuts[0]"),
    "a criterion of no such name": (
        "[a]\ncuts = [{layer = 1, criterion = 'The best', keep = 1}]",
        "matching regex",
    ),
    "the name of a task": (f"[qa]\n{HIMAP}r3 = 1", "unknown field"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_content_is_refused_in_a_line(case: str, tmp_path: Path) -> None:
    content, words = BAD[case]
    with pytest.raises(HimapError) as caught:
        plans(tmp_path, content)
    said = str(caught.value)
    assert words in said and "\n" not in said and len(said) < 600
    assert caught.value.code == Exit.USAGE


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: None, "No such file"),
    "a folder": (Path.mkdir, "Is a directory"),
    "a pipe": (os.mkfifo, "not a plain file"),  # whoever opens it waits for its writer
    "a link to itself": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "not a plain file"),
    "a gigabyte": (lambda path: (path.touch(), os.truncate(path, 10**9)), "1000000000 bytes, at most 1000000"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_files_are_refused_in_a_line(kind: str, tmp_path: Path) -> None:
    make, words = KINDS[kind]
    make(tmp_path / "plans.toml")
    with pytest.raises(HimapError) as caught:
        named_plans([str(tmp_path / "plans.toml")])
    said = str(caught.value)
    assert words in said and "a plan is one of qa, caption, or a TOML file" in said
    assert caught.value.code == Exit.USAGE


@pytest.mark.parametrize("name", ["p" * 300, "p\x00", "\udcff"])
def test_names_that_no_file_has(name: str) -> None:
    with pytest.raises(HimapError, match="a plan is one of"):
        named_plans([name])


def test_the_command_says_it_in_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "plans.toml")
    assert call(export_main, HIMAP_TINY, "--plan", tmp_path / "plans.toml", "--dry-run") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("himap-export: error: cannot read the plan")


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ANYTHING = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


@given(table=st.dictionaries(st.sampled_from(["k1", "k2", "r1", "r2", "keep", "policy", "cuts", "x"]), ANYTHING))
def test_any_table_is_a_plan_or_refused(table: dict[str, object]) -> None:
    from himap_export.exporter.plans import _plan

    try:
        assert isinstance(_plan("plan a", table), PruningPlan)
    except HimapError as problem:
        assert problem.code == Exit.USAGE
