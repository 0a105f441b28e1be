"""Intervals against published examples, the tests that they invert, and the truth behind simulated answers."""

from itertools import product

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from himap_export.validate.accuracy.statistics import (
    accuracy_interval,
    least_questions,
    over_seeds,
    paired_difference,
)

Bools = npt.NDArray[np.bool_]


def pairs(both: int, first: int, second: int, neither: int) -> tuple[Bools, Bools]:
    """Answers of two policies that are right together, one without the other, and not at all so often."""
    counts = (both, first, second, neither)
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


def drawn(shape: int | tuple[int, ...], share: float, seed: int) -> Bools:
    return np.random.default_rng(seed).random(shape) < share


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_intervals_are_the_published_ones(right: int, n: int, low: float, high: float) -> None:
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3."""
    found = accuracy_interval(np.arange(n) < right)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("table", "level", "low", "high"),
    [
        ((43, 0, 1, 0), 0.90, -0.096, 0.037),  # Tango 1998, section 6.1: soft contact lenses
        ((4, 9, 3, 16), 0.95, -0.027, 0.390),  # Tango 1998
        ((53, 16, 8, 9), 0.95, -0.020, 0.207),  # Agresti and Min 2005, Statistics in Medicine 24:729
        ((1, 1, 7, 12), 0.95, -0.517, -0.026),  # Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33:2850
        ((8, 3, 1, 2), 0.95, -0.167, 0.433),  # Tang 2010
    ],
)
def test_tangos_intervals_are_the_published_ones(
    table: tuple[int, int, int, int], level: float, low: float, high: float
) -> None:
    """As petelaud/ratesci, tests/testthat/test3.R, quotes them."""
    found = paired_difference(*pairs(*table), level=level)
    assert (found.low, found.high) == pytest.approx((low, high), abs=6e-4)


@pytest.mark.parametrize("n", [1, 5, 50])
def test_answers_that_are_all_equal_do_not_exclude_a_loss(n: int) -> None:
    """Where nothing was seen to differ, at most as much is excluded as a share of 0 of n excludes."""
    for share in (0, 1):
        right = np.full(n, bool(share))
        found, z = paired_difference(right, right), stats.norm.ppf(0.975)
        assert found.mean == 0 and (-found.low, found.high) == pytest.approx((z**2 / (n + z**2),) * 2)
        alone = accuracy_interval(right)
        assert alone.high - alone.low == pytest.approx(z**2 / (n + z**2))
    assert paired_difference(np.ones(5, bool), np.ones(5, bool)).high > 0.4


def test_how_many_equal_answers_exclude_a_loss() -> None:
    assert least_questions(0.01) == 381
    for loss in (0.01, 0.05, 0.3):
        n = least_questions(loss)
        enough, few = np.ones(n, bool), np.ones(n - 1, bool)
        assert paired_difference(enough, enough).high <= loss < paired_difference(few, few).high


def test_every_small_table() -> None:
    """The interval holds the difference, lies in [-1, 1], mirrors when swapped, and excludes 0 exactly if McNemar's
    test does; one more answer for the first policy never lowers an end."""
    tables = [t for t in product(range(7), repeat=4) if sum(t) == 6]
    tables += [(20, 9, 3, 8), (0, 30, 0, 0), (500, 12, 0, 88), (3, 40, 4, 3)]
    for both, first, second, neither in tables:
        found = paired_difference(*pairs(both, first, second, neither))
        swapped = paired_difference(*pairs(both, second, first, neither))
        assert -1 <= found.low <= found.mean <= found.high <= 1 and found.low < found.high
        assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low), abs=1e-12)
        mcnemar = (first - second) / np.sqrt(first + second) if first + second else 0.0
        assert (found.low > 0 or found.high < 0) == (abs(mcnemar) > stats.norm.ppf(0.975))
        if second:
            more = paired_difference(*pairs(both + 1, first, second - 1, neither))
            assert more.low >= found.low and more.high >= found.high


def test_accuracies_hold_themselves_and_rise() -> None:
    found = [accuracy_interval(np.arange(30) < k) for k in range(31)]
    for k, i in enumerate(found):
        assert 0 <= i.low <= i.mean == k / 30 <= i.high <= 1
    assert sorted(found, key=lambda i: (i.low, i.high)) == found


@pytest.mark.parametrize(("n", "share"), [(400, 0.5), (10_000, 0.9)])
def test_an_interval_is_the_normal_one_on_many_questions(n: int, share: float) -> None:
    right = np.arange(n) < share * n
    found, half = accuracy_interval(right), 1.96 * np.sqrt(share * (1 - share) / n)
    assert found.mean == share
    assert (found.low, found.high) == pytest.approx((share - half, share + half), abs=half / 10)


def test_intervals_cover_the_truth_nineteen_times_in_twenty() -> None:
    """800 data sets of 200 questions, at a share near 1 and at one in the middle: 0.95 +- 0.008."""
    for share in (0.8, 0.98):
        found = [accuracy_interval(drawn(200, share, seed)) for seed in range(800)]
        assert 0.925 < np.mean([i.low <= share <= i.high for i in found]) < 0.99


@pytest.mark.parametrize("flips", [0.01, 0.1])
def test_paired_intervals_cover_the_true_difference(flips: float) -> None:
    """Two policies that differ on one question in a hundred, or in ten: the first is right on 7 in 10."""
    truth, covering = -flips * (1 - 2 * 0.7), 0
    for seed in range(800):
        a, differ = drawn(200, 0.7, seed), drawn(200, flips, seed + 10**6)
        found = paired_difference(a, a ^ differ)
        covering += found.low <= truth <= found.high
    assert 0.925 < covering / 800 < 0.99


def test_averages_over_seeds_are_covered_at_least_as_often() -> None:
    """Questions of their own difficulty, answered by 5 seeds of one policy and once by another."""
    alone = paired = 0
    for seed in range(600):
        rng = np.random.default_rng(seed)
        difficulty = rng.beta(2, 1, 150)  # of mean 2/3
        many, once = rng.random((5, 150)) < difficulty, rng.random(150) < difficulty / 2  # of mean 1/3
        own, over = accuracy_interval(many), paired_difference(many, once)
        alone += own.low <= 2 / 3 <= own.high
        paired += over.low <= 1 / 3 <= over.high
    assert alone / 600 > 0.94 and paired / 600 > 0.94


def test_pairs_of_alike_answers_tell_more() -> None:
    a, differ = drawn(500, 0.7, 3), drawn(500, 0.1, 4)
    paired = paired_difference(a, a ^ differ)
    shuffled = paired_difference(a, np.random.default_rng(0).permutation(a ^ differ))
    assert shuffled.mean == pytest.approx(paired.mean)
    assert paired.high - paired.low < 0.7 * (shuffled.high - shuffled.low)


def test_seeds_are_averaged_per_question_and_are_no_further_questions() -> None:
    right = drawn(100, 0.6, 2)
    assert accuracy_interval(np.tile(right, (50, 1))) == accuracy_interval(right)
    many = drawn((20, 400), 0.6, 1)
    assert accuracy_interval(many).mean == pytest.approx(many.mean())
    assert paired_difference(many, right[:1].repeat(400)).mean == pytest.approx(many.mean() - right[0])


def test_the_spread_over_seeds() -> None:
    found = over_seeds(np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]], bool))
    assert (found.mean, found.low, found.high, found.seeds) == (0.5, 0.25, 0.75, 3)


def test_no_question_is_a_bug_of_the_caller() -> None:
    for judge in (accuracy_interval, lambda none: paired_difference(none, none)):
        with pytest.raises(ValueError, match="no question"):
            judge(np.zeros(0, bool))
