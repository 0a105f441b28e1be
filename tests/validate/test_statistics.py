"""Intervals against the normal approximation, SciPy's bootstrap, and the truth behind simulated answers."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from himap_export.validate.statistics import accuracy_interval, over_seeds, paired_difference

Bools = npt.NDArray[np.bool_]


def drawn(shape: int | tuple[int, ...], share: float, seed: int) -> Bools:
    return np.random.default_rng(seed).random(shape) < share


def correlated(n: int, seed: int) -> tuple[Bools, Bools]:
    """Two policies that differ on one question in ten."""
    a, differ = drawn(n, 0.7, seed), drawn(n, 0.1, seed + 1)
    return a, a ^ differ


@pytest.mark.parametrize(("n", "share"), [(400, 0.5), (10_000, 0.9)])
def test_an_interval_is_the_normal_one_on_many_questions(n: int, share: float) -> None:
    right = np.arange(n) < share * n
    found, half = accuracy_interval(right, 0), 1.96 * np.sqrt(share * (1 - share) / n)
    assert found.mean == share
    assert (found.low, found.high) == pytest.approx((share - half, share + half), abs=half / 10)


def test_intervals_cover_the_truth_nineteen_times_in_twenty() -> None:
    """600 data sets of 200 questions; the share that covers is itself 0.95 +- 0.009, a bit less by theory."""
    covering = 0
    for seed in range(600):
        found = accuracy_interval(drawn(200, 0.8, seed), seed)
        covering += found.low <= 0.8 <= found.high
    assert 0.915 < covering / 600 < 0.975


def test_paired_intervals_cover_the_true_difference() -> None:
    truth = 0.1 * (1 - 2 * 0.7)  # one in ten flips: P(b) - P(a) = 0.1 P(a wrong) - 0.1 P(a right)
    covering = 0
    for seed in range(0, 1200, 2):
        a, b = correlated(200, seed)
        found = paired_difference(b, a, seed)
        covering += found.low <= truth <= found.high
    assert 0.915 < covering / 600 < 0.98


def test_scipy_agrees_on_pairs() -> None:
    a, b = correlated(300, 5)
    theirs = stats.bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True, method="percentile",
        n_resamples=10_000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    ours = paired_difference(a, b, 0)
    width = ours.high - ours.low
    assert ours.mean == pytest.approx(a.mean() - b.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=width / 15)


def test_pairs_of_alike_answers_tell_more() -> None:
    a, b = correlated(500, 3)
    paired = paired_difference(a, b, 0)
    shuffled = paired_difference(a, np.random.default_rng(0).permutation(b), 0)
    assert shuffled.mean == pytest.approx(paired.mean)
    assert paired.high - paired.low < 0.7 * (shuffled.high - shuffled.low)


def test_seeds_are_averaged_per_question_and_are_no_further_questions() -> None:
    right = drawn(100, 0.6, 2)
    once, often = accuracy_interval(right, 0), accuracy_interval(np.tile(right, (50, 1)), 0)
    assert (often.mean, often.low, often.high) == pytest.approx((once.mean, once.low, once.high))
    many = drawn((20, 400), 0.6, 1)
    found = accuracy_interval(many, 0)
    theirs = stats.bootstrap((many.mean(axis=0),), np.mean, method="percentile", rng=np.random.default_rng(1))
    low, high = theirs.confidence_interval
    assert (found.low, found.high) == pytest.approx((low, high), abs=(high - low) / 15)
    assert paired_difference(many, right[:1].repeat(400), 0).mean == pytest.approx(many.mean() - right[0])


def test_values_that_are_all_distinct_are_drawn_in_parts() -> None:
    values = np.random.default_rng(0).random(1500)
    found, half = accuracy_interval(values, 0), 1.96 * values.std() / np.sqrt(1500)
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 10)


def test_the_spread_over_seeds() -> None:
    found = over_seeds(np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]], bool))
    assert (found.mean, found.low, found.high, found.seeds) == (0.5, 0.25, 0.75, 3)


@pytest.mark.parametrize(("right", "mean"), [([True], 1), ([False], 0), ([True] * 50, 1)])
def test_nothing_to_vary(right: list[bool], mean: float) -> None:
    found = accuracy_interval(np.array(right), 0)
    assert (found.mean, found.low, found.high) == (mean, mean, mean)
    other = paired_difference(np.array(right), np.array(right), 0)
    assert (other.mean, other.low, other.high) == (0, 0, 0)


def test_a_seed_decides_everything() -> None:
    right = drawn(200, 0.7, 0)
    assert accuracy_interval(right, 4) == accuracy_interval(right, 4)
    assert accuracy_interval(right, 4) != accuracy_interval(right, 5)


def test_no_question_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="no question"):
        accuracy_interval(np.zeros(0, bool), 0)
