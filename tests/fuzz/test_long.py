"""The whole attack: every case of every door once, in random order, for as long as HIMAP_FUZZ_SECONDS says.

    HIMAP_FUZZ_SECONDS=1200 pytest tests/fuzz -m slow -s

HIMAP_FUZZ_SEED repeats an order, HIMAP_FUZZ_CASE one case, HIMAP_FUZZ_DOORS limits the attack to some doors.
"""

import os
import random
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from fuzz.batches import attack
from fuzz.catalogue import GROUPS, told
from fuzz.contract import Door, check

pytestmark = pytest.mark.slow


def _doors(originals: Mapping[str, Path]) -> list[Door]:
    wanted = os.environ.get("HIMAP_FUZZ_DOORS", "").split(",")
    doors = [door for group in GROUPS.values() for door in group(originals)]
    return [door for door in doors if any(part in door.name for part in wanted)]


def test_all_bad_inputs(originals: Mapping[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seconds, seed = float(os.environ.get("HIMAP_FUZZ_SECONDS", "60")), int(os.environ.get("HIMAP_FUZZ_SEED", "0"))
    seed = seed or random.SystemRandom().randrange(1, 10**6)
    doors = _doors(originals)
    expected = {door.name: door.expected(originals, tmp_path) for door in doors}
    cases = [case for door in doors for case in door.bad()]
    random.Random(seed).shuffle(cases)
    with capfd.disabled():
        print(f"\n{len(cases)} cases at {len(doors)} doors, for {seconds:.0f} s, HIMAP_FUZZ_SEED={seed}", flush=True)
    found, end = [], time.monotonic() + seconds
    for outcome in attack(cases, originals, tmp_path, expected):
        found.append(outcome)
        if time.monotonic() > end:
            break
    with capfd.disabled():
        print(told(found), flush=True)
    assert not any(o.broken for o in found), told(found)


def test_one_case(originals: Mapping[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wanted = os.environ.get("HIMAP_FUZZ_CASE")
    if wanted is None:
        pytest.skip("HIMAP_FUZZ_CASE names no case")
    door = next(d for group in GROUPS.values() for d in group(originals) if d.name == wanted.partition(" | ")[0])
    case = next(case for case in door.bad() if case.name == wanted)
    outcome = check(case, originals, tmp_path, door.expected(originals, tmp_path))
    with capfd.disabled():
        print(
            f"\n{' '.join(outcome.words)[:1000]}\nexit {outcome.code}\n{outcome.said[-3000:]}\n{outcome.result[:500]}"
        )
    assert not outcome.broken, outcome.broken
