"""Bad inputs of every kind against every command: a slice of them here, all of them in test_long.py."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from fuzz.catalogue import GROUPS, told
from fuzz.contract import Outcome, check
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

# Enough to see every door; together they take a quiet core about ten seconds.
CASES = {
    "bundle": 60,
    "checkpoint": 80,
    "quantised": 40,
    "quantised bundle": 40,
    "questions": 40,
    "places": 70,
    "options": 80,
}


@pytest.mark.parametrize("group", GROUPS)
def test_a_slice_of_bad_inputs(group: str, originals: Mapping[str, Path], tmp_path: Path) -> None:
    """hypothesis chooses, the same cases every time; a failure names its case and how to repeat it."""
    doors = GROUPS[group](originals)
    expected = {door.name: door.expected(originals, tmp_path) for door in doors}
    bad = {door.name: door.bad() for door in doors}
    found: list[Outcome] = []

    @settings(max_examples=CASES[group], phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.data())
    def attack(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(bad)))
        case = bad[name][data.draw(st.integers(0, len(bad[name]) - 1))]
        found.append(check(case, originals, tmp_path, expected[name]))

    attack()
    assert not [o for o in found if o.broken], told(found)
