"""The run over a data set with systems whose accuracy is known, and what it sums up to."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from commands import QUESTIONS_64, SHAPES_64

from himap_export.engines.arrays import Inputs
from himap_export.engines.questions import Dataset, Example, read_dataset
from himap_export.validate.accuracy import prompter as prompter_module
from himap_export.validate.accuracy.answers import Answered, AnswerLog, read_log
from himap_export.validate.accuracy.costs import Costs
from himap_export.validate.accuracy.evaluate import (
    Findings,
    percent,
    points,
    right_answers,
    run,
    summarise,
    summary_lines,
)
from himap_export.validate.accuracy.front import Front
from himap_export.validate.accuracy.prompter import Prompter, prompter_of_checkpoint
from himap_export.validate.accuracy.statistics import Interval, accuracy_interval
from himap_export.validate.accuracy.systems import SeenBefore
from himap_export.validate.speed.benchmark import Times


@dataclass
class Knows:
    """Says the right answer to the examples whose number is in `known`, and the end of a sentence to the others."""

    name: str
    known: frozenset[int]
    labels: Sequence[int]
    stop: int
    seed: int = 0
    batch: int = 2
    fails_at: int | None = None
    asked: list[int] = field(default_factory=list)

    def answer(self, inputs: Sequence[Inputs], numbers: Sequence[int], seen: SeenBefore) -> list[list[int]]:
        assert len(inputs) == len(numbers) <= self.batch and all(i.input_ids.shape[0] == 1 for i in inputs)
        if self.fails_at is not None and len(self.asked) >= self.fails_at:
            raise KeyboardInterrupt
        self.asked += numbers
        return [[self.labels[n], self.stop] if n in self.known else [self.stop] for n in numbers]


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    return prompter_of_checkpoint(SHAPES_64)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return read_dataset(QUESTIONS_64)


def stop_of(prompter: Prompter) -> int:
    found = json.loads((SHAPES_64 / "generation_config.json").read_text())["eos_token_id"]
    return int(found if isinstance(found, int) else found[0])


def made_systems(prompter: Prompter, data: Dataset, fails_at: int | None = None) -> list[Knows]:
    labels, stop = [prompter.label(e) for e in data.examples], stop_of(prompter)
    everything = frozenset(range(len(labels)))
    return [
        Knows("none", everything, labels, stop),
        Knows("himap", frozenset([0, 1, 2]), labels, stop, batch=3),
        Knows("random", frozenset([0]), labels, stop, seed=0, fails_at=fails_at),
        Knows("random", frozenset([0, 3]), labels, stop, seed=1),
    ]


def asked(prompter: Prompter, data: Dataset, file: Path, systems: list[Knows]) -> list[Answered]:
    with AnswerLog(file, {"what": "test"}) as log:
        run(systems, data, prompter, log, [stop_of(prompter)], lambda done, total: None)
    return read_log(file)


def test_everyone_is_asked_everything_once(prompter: Prompter, data: Dataset, tmp_path: Path) -> None:
    systems = made_systems(prompter, data)
    answered = asked(prompter, data, tmp_path / "a.jsonl", systems)
    assert len(answered) == len(systems) * len(data.examples) == len({a.key for a in answered})
    for system in systems:
        assert system.asked == list(range(len(data.examples)))
        right = {a.line for a in answered if a.policy == system.name and a.seed == system.seed and a.right}
        assert right == {e.line for n, e in enumerate(data.examples) if n in system.known}


def test_an_interrupted_run_goes_on_where_it_stopped(prompter: Prompter, data: Dataset, tmp_path: Path) -> None:
    whole = asked(prompter, data, tmp_path / "whole.jsonl", made_systems(prompter, data))
    with pytest.raises(KeyboardInterrupt):
        asked(prompter, data, tmp_path / "cut.jsonl", made_systems(prompter, data, fails_at=2))
    before = read_log(tmp_path / "cut.jsonl")
    assert 0 < len(before) < len(whole)
    rest = made_systems(prompter, data)
    resumed = asked(prompter, data, tmp_path / "cut.jsonl", rest)
    assert sum(len(c.asked) for c in rest) == len(whole) - len(before)
    assert sorted(resumed, key=lambda a: a.key) == sorted(whole, key=lambda a: a.key)


def test_progress_counts_up_to_all(prompter: Prompter, data: Dataset, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with AnswerLog(tmp_path / "a.jsonl", {}) as log:
        run(made_systems(prompter, data), data, prompter, log, [stop_of(prompter)], lambda *counts: told.append(counts))
    total = 4 * len(data.examples)
    assert told[0] == (0, total) and told[-1] == (total, total) and told == sorted(told)


def test_the_summary_by_hand(prompter: Prompter, data: Dataset, tmp_path: Path) -> None:
    answered, n = asked(prompter, data, tmp_path / "a.jsonl", made_systems(prompter, data)), len(data.examples)
    summary = summarise(
        right_answers(answered, data), data, {"none": (), "himap": ("none", "random"), "random": ("none",)}
    )
    assert summary.types == ("all", *dict.fromkeys(e.type for e in data.examples))
    himap, random = summary.cells["himap"]["all"], summary.cells["random"]["all"]
    assert himap.accuracy.mean == pytest.approx(3 / n) and himap.seeds is None and himap.questions == n
    assert random.accuracy.mean == pytest.approx(1.5 / n)
    assert random.seeds is not None and (random.seeds.low, random.seeds.high) == pytest.approx((1 / n, 2 / n))
    assert himap.over["random"].mean == pytest.approx(1.5 / n) and himap.over["none"].mean == pytest.approx(3 / n - 1)
    one = data.examples[0].type
    of_type = [number for number, e in enumerate(data.examples) if e.type == one]
    right = np.isin(of_type, [0, 1, 2]).mean()
    assert summary.cells["himap"][one].accuracy.mean == pytest.approx(right)
    flops = {"none": 1.0, "himap": 0.4, "random": 0.4}
    found = Findings(summary, flops, Costs("not timed"), Front((), "nothing told apart"))
    text = "\n".join(summary_lines(found))
    assert "not timed" in text and "nothing told apart" in text and "prefill" not in text
    assert "±" not in text and "himap" in text and "paired differences" in text
    assert f"{300 / n:.1f} ({100 * himap.accuracy.low:.1f} to {100 * himap.accuracy.high:.1f})" in text
    told = json.loads(json.dumps(found.to_json()))
    assert told["accuracy"]["himap"]["all"]["questions"] == n and told["flops_kept"] == flops
    assert told["costs"] == {"note": "not timed", "systems": {}} and told["front"]["names"] == []


def test_time_and_memory_stand_beside_accuracy(prompter: Prompter, data: Dataset, tmp_path: Path) -> None:
    answered = asked(prompter, data, tmp_path / "a.jsonl", made_systems(prompter, data))
    summary = summarise(
        right_answers(answered, data), data, {"none": (), "himap": ("none", "random"), "random": ("none",)}
    )
    prefill = {"none": (0.2, 0.3, 0.2), "himap": (0.1, 0.1, 0.1), "random": (0.1, 0.29, 0.21)}
    times = {n: Times(n, {"prefill": p, "decode": (0.004,) * 3}, 7 * 2**20, 1.0) for n, p in prefill.items()}
    flops, costs = {"none": 1.0, "himap": 0.4, "random": 0.4}, Costs("on this machine", "none", times)
    found = Findings(summary, flops, costs, Front(("random", "none")))
    lines = summary_lines(found)
    rows = {line.split()[0]: " ".join(line.split()) for line in lines[2:5]}
    assert "100.0 ms 2.00x (2.00 to 3.00) 4.0 ms 7 MiB" in rows["himap"] and " 40% " in rows["himap"]
    assert "210.0 ms no difference measurable here (0.95 to 2.00)" in rows["random"]  # 2.00, 1.03, 0.95
    assert "200.0 ms" in rows["none"] and "x (" not in rows["none"] and "100%" in rows["none"]
    told = found.to_json()["costs"]["systems"]
    assert told["himap"]["over_unpruned"]["prefill"] == pytest.approx((2, 2, 3)) and told["none"]["decode"] == 0.004
    assert told["random"]["peak_bytes"] == 7 * 2**20 and found.to_json()["front"]["names"] == ("random", "none")


def test_missing_answers_are_no_wrong_answers(prompter: Prompter, data: Dataset, tmp_path: Path) -> None:
    answered = asked(prompter, data, tmp_path / "a.jsonl", made_systems(prompter, data))
    with pytest.raises(KeyError):
        summarise(right_answers(answered[1:], data), data, {"none": ()})


def test_everyone_sees_its_example_and_speaks_until_the_end(prompter: Prompter, data: Dataset, tmp_path: Path) -> None:
    class Talks(Knows):
        def answer(self, inputs: Sequence[Inputs], numbers: Sequence[int], seen: SeenBefore) -> list[list[int]]:
            for given, number in zip(inputs, numbers, strict=True):
                own = prompter.arrays(data.examples[number])
                np.testing.assert_array_equal(given.input_ids, own.input_ids)
                np.testing.assert_array_equal(given.pixel_values, own.pixel_values)
            return [[self.labels[n], self.stop, *self.labels] for n in numbers]

    labels = [prompter.label(e) for e in data.examples]
    systems = [Talks(f"{batch}", frozenset(), labels, stop_of(prompter), batch=batch) for batch in (3, 2)]
    for a in asked(prompter, data, tmp_path / "a.jsonl", [*systems]):
        assert a.said == a.expected == data.examples[a.line - 1].answer and a.right


def test_a_picture_is_read_once_whoever_asks(
    prompter: Prompter, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    load = prompter_module.load_image
    monkeypatch.setattr(prompter_module, "load_image", lambda file: (read.append(file), load(file))[1])
    asked(prompter, data, tmp_path / "a.jsonl", made_systems(prompter, data))
    assert read == [e.image for e in data.examples]


RIGHT = {  # by system and seed, on lines 1 to 6; the first four are of type "a", the others of type "b"
    ("none", 0): "111101",
    ("himap", 0): "101100",
    ("random", 0): "100010",
    ("random", 1): "110000",
    ("random", 2): "000000",
}


def test_differences_within_a_type_are_of_its_questions() -> None:
    kinds = "aaaabb"
    data = Dataset(tuple(Example(n + 1, "", Path(), "", "", kind) for n, kind in enumerate(kinds)), ())
    answered = [
        Answered(name, seed, n + 1, "", kinds[n], "", "", row[n] == "1")
        for (name, seed), row in RIGHT.items()
        for n in (3, 5, 0, 1, 4, 2)  # a resumed log is in any order
    ]
    shares = {"none": (5 / 6, 1, 1 / 2), "himap": (1 / 2, 3 / 4, 0), "random": (4 / 18, 3 / 12, 1 / 6)}
    summary = summarise(
        right_answers(answered, data), data, {"none": (), "himap": ("none", "random", "himap"), "random": ("none",)}
    )
    for name, cells in summary.cells.items():
        for kind, share, n in zip(("all", "a", "b"), shares[name], (6, 4, 2), strict=True):
            assert cells[kind].questions == n and cells[kind].accuracy.mean == pytest.approx(share)
            for other, difference in cells[kind].over.items():
                theirs = shares[other][("all", "a", "b").index(kind)]
                assert difference.mean == pytest.approx(share - theirs)
    own = summary.cells["himap"]["all"]
    assert (
        own.over["himap"].mean == 0 and own.over["himap"].low < -0.3 and own.over["himap"].high > 0.3
    )  # of 6 questions


def test_intervals_are_told_by_their_ends() -> None:
    assert percent(Interval(0.78, 0.769, 0.79)) == "78.0 (76.9 to 79.0)"
    assert percent(accuracy_interval(np.ones(5, bool))) == "100.0 (56.6 to 100.0)"
    assert points(Interval(-0.0001, -0.01, 0.02)) == "+0.0 (-1.0 to +2.0)"
