"""The benchmark of answers at real size, at tiny size: a plan that is opened and answers, what is printed, the bars."""

import os
import time
from pathlib import Path

import pytest
import real_size
import real_size_answers
from commands import Workshop
from real_size_answers import Answered, Measured

from himap_export.engines.bundle import Bundle
from himap_export.graphs.errors import HimapError

GIB = 2**30


def test_a_plan_answers_in_a_process_of_its_own(work: Workshop) -> None:
    flags = ("--policy", "himap", "--policy", "none", "--k1", 1, "--k2", 3)
    run = Bundle.open(work.bundle("gqa2", *flags)).select("none")
    found = real_size_answers.answered(run, "onnxruntime", 1)
    # The child imports it, which it cannot from the program that is run.
    assert real_size_answers.Answering.__module__ == "answering"
    assert all(0 < seconds < 10 for seconds in (found.opened, found.first, found.next, found.decode))
    assert 10 << 20 < found.anonymous < found.resident < GIB
    missing = "holds no openvino engines"
    with pytest.raises(HimapError, match=missing):
        real_size_answers.answered(run, "openvino", 1)


def test_the_most_memory_is_what_was_held_at_any_time() -> None:
    with real_size.peak_memory(os.getpid()) as peak:
        before = real_size.memory(os.getpid())[0]
        block = bytearray(os.urandom(1 << 16) * (1 << 11))  # 128 MiB, written
        time.sleep(0.3)
        del block
        assert before + (100 << 20) <= peak()[0] < before + (400 << 20)


def measured(fast: float, slow: float, anonymous: int, exported: int) -> Measured:
    def answers(seconds: float) -> list[Answered]:
        return [Answered(9.0, 2 * seconds, seconds, 0.2, anonymous, anonymous + 2 * GIB)] * 2

    phases = [real_size.Phase("weights", 40.0, GIB, exported), real_size.Phase("compile", 1.0, 1, 1)]
    return Measured(phases, 4 * 10**9, {"himap": 4 * 10**9, "none": 5 * 10**9}, 2.9, {
        "himap": answers(fast), "none": answers(slow),
    })  # fmt: skip


def test_bars_are_first_tokens_in_one_round_and_bytes_at_the_peak() -> None:
    good = measured(4.0, 10.0, 7 * GIB, GIB)
    bad = measured(5.0, 10.0, 9 * GIB, 3 * GIB)
    told = {v.what: v for v in real_size_answers.verdicts({"openvino": good, "onnxruntime": bad})}
    assert [told[w].met for w in told if "openvino" in w] == [True] * 3
    assert [told[w].met for w in told if "onnxruntime" in w] == [False] * 3
    first = told["first token, openvino, pruned over unpruned"]
    assert first.found == "2.50x (2.50 to 2.50), the bar is 2.2"
    assert told["memory, onnxruntime, pruned"].found.startswith("9.00 GiB beside files' pages")


def test_what_was_found_stands_beside_what_flops_and_memory_allow() -> None:
    head, pruned, unpruned = real_size_answers.lines("openvino", measured(4.0, 10.0, 7 * GIB, GIB), 3e-11)
    assert head == "openvino, 4.00 GB of weights; FLOPs allow 2.90x over the unpruned decoder"
    assert "first token 4.00 s, just opened 8.00; decode 200 ms a token, 1.67x the reading of 4.00 GB" in pruned
    assert "opens in 9.0 s" in unpruned and unpruned.endswith("peak 7.00 GiB anonymous, 9.00 resident")


def test_files_of_peers_are_deleted_whatever_happens(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "model").write_text("weights")
    with pytest.raises(RuntimeError), real_size_answers.deleted(folder):
        raise RuntimeError
    (tmp_path / "file").touch()
    with real_size_answers.deleted(tmp_path / "file") as file:
        assert file.exists()
    assert not list(tmp_path.iterdir())
