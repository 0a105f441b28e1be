"""Which systems are worth their cost: what few answers can tell, and what many can."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from himap_export.validate.accuracy.front import front
from himap_export.validate.accuracy.statistics import mcnemar

Bools = npt.NDArray[np.bool_]


def rights(n: int, **counts: int) -> dict[str, Bools]:
    """The first so many of `n` questions, each system's."""
    return {name: np.arange(n) < count for name, count in counts.items()}


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 0), (6, 0), (8, 1), (3, 9), (40, 22), (300, 211)])
def test_mcnemars_test_is_the_exact_binomial_one(first: int, second: int) -> None:
    a, b = np.repeat([True, False, True], (first, second, 50)), np.repeat([False, True, True], (first, second, 50))
    wanted = stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(wanted)


def test_averages_over_seeds_are_rounded_against_a_difference() -> None:
    """Of ten questions that one policy knows, the other knows half in each of two seeds: five, whichever they are."""
    a, half = np.ones(10, bool), np.arange(10) % 2 == 0
    assert mcnemar(a, np.stack([half, ~half])) == mcnemar(a, np.stack([half, half])) == 2 / 2**5
    one = np.arange(10) == 0
    assert mcnemar(a, np.stack([half, half & ~one])) == 2 / 2**5  # 5.5 more: counted as 5
    assert mcnemar(np.stack([a, ~one]), np.stack([a, a])) == 1


def test_seeds_of_one_policy_are_told_apart_as_seldom_as_the_level_says() -> None:
    """Two policies that are right alike, each drawn five times: at 5 % at most one of twenty is told apart."""
    drawn = np.random.default_rng(0).random((400, 2, 5, 60)) < 0.7
    assert np.mean([mcnemar(a, b) <= 0.05 for a, b in drawn]) <= 0.05


@pytest.mark.parametrize("known", [0, 3, 5])
def test_five_answers_tell_nothing_apart(known: int) -> None:
    """However they fall: all are equal, or all of one system's are right and none of the others'."""
    right = rights(5, cheap=known, middle=5 - known, dear=5)
    found = front({"cheap": 0.2, "middle": 0.5, "dear": 1.0}, right)
    assert found.names == () and "Nothing can be told apart on 5 questions" in found.note
    assert "than the cheapest, cheap" in found.note and "takes 7 or more" in found.note  # 2 / 2^7 <= 0.05 / 2


def test_as_many_as_the_note_asks_for_tell_two_apart() -> None:
    for least, tells in ((6, False), (7, True)):
        found = front({"cheap": 0.2, "middle": 0.5, "dear": 1.0}, rights(7, cheap=0, middle=0, dear=least))
        assert found.names == (("cheap", "dear") if tells else ())


def test_who_costs_more_has_to_be_measurably_righter() -> None:
    right = rights(1000, cheap=600, near=610, better=700, worse=650, same=700, best=900)
    rng = np.random.default_rng(1)
    right["near"] = rng.permutation(right["near"])  # righter by 10 of 1000, on other questions
    cost = {"best": 1.0, "cheap": 0.2, "near": 0.3, "better": 0.4, "worse": 0.5, "same": 0.6}
    assert front(cost, right).names == ("cheap", "better", "best")
    assert front(cost, right).note == ""
    assert front(cost | {"worse": 0.1}, right).names == ("worse", "better", "best")


def test_of_equal_cost_the_righter_one_counts() -> None:
    cost = dict.fromkeys(("a", "b", "c"), 0.5)
    assert front(cost, rights(100, a=40, b=90, c=60)).names == ()
    assert front(cost | {"d": 1.0}, rights(100, a=40, b=80, c=60, d=100)).names == ("b", "d")


def test_more_plans_take_more_evidence() -> None:
    """Eight of eight tell two apart, and not two of forty: the best of many looks better than it is."""
    right = rights(8, cheap=0, dear=8)
    assert front({"cheap": 0.1, "dear": 1.0}, right).names == ("cheap", "dear")
    many = {f"p{n}": 0.2 for n in range(38)}
    assert front({"cheap": 0.1, "dear": 1.0} | many, right | dict.fromkeys(many, right["cheap"])).names == ()
