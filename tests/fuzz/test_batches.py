"""The attack survives what it finds: a case that takes its process with it is told, and the next one is tried."""

import os
import signal
from pathlib import Path

from fuzz.batches import attack
from fuzz.contract import Case

from himap_export.engines.command import run_command
from himap_export.graphs.errors import Exit, HimapError


def _refuses() -> None:
    def body() -> None:
        raise HimapError("no", "because", "do otherwise", Exit.USAGE)

    run_command("one", body)


def _dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_case_that_dies_is_a_finding(tmp_path: Path) -> None:
    mains = [_refuses, _dies, _refuses]
    cases = [Case("door", f"case {n}", "one", lambda room: (), main=main) for n, main in enumerate(mains)]
    found = list(attack(cases, {}, tmp_path, {"door": ""}))
    assert [o.case.fault for o in found] == ["case 0", "case 1", "case 2"]
    assert [o.code for o in found] == [2, None, 2]
    assert not found[0].broken and not found[2].broken
    assert found[1].broken == ["the process died of SIGKILL"]
