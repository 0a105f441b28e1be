"""How sure an accuracy is: score intervals over questions, paired where two policies answered the same ones.

An accuracy has Wilson's interval (1927; Newcombe 1998, Statistics in Medicine 17:857, method 3), a difference of two on
the same questions Tango's (1998, Statistics in Medicine 17:891): McNemar's test, turned round to ask which differences
it does not refuse. Neither collapses to a point where all answers are equal, and neither is symmetric about its mean.

Several seeds of a random policy are [seeds, n] arrays. They are averaged per question first: seeds on the same question
are no further questions. Their own spread is told apart, by `over_seeds`. The averages y lie in [0,1], where right and
wrong vary most: y² <= y, so var(y) <= mean(1 - mean); and d = y - y' lies in [-1,1], where d² <= |d|, so var(d) <=
E|d| - mean². Those bounds are the variances that both intervals assume: of averages they cover at least as often.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
_HALVINGS = 60  # of [-1,1]: down to the last bit

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Interval:
    """A mean over questions and its 95 % interval, which holds it and is wider on one side."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class SeedSpread:
    """The mean accuracy over `seeds` seeds, the worst seed's and the best one's."""

    mean: float
    low: float
    high: float
    seeds: int


def accuracy_interval(right: Array, level: float = LEVEL) -> Interval:
    """Returns the share of right answers in `right`, bool [n] or [seeds, n], with Wilson's interval. ValueError for no
    question."""
    values = _per_question(right)
    n, mean, z = len(values), float(values.mean()), _quantile(level)
    centre, half = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return Interval(mean, max(0.0, min(low, mean)), min(1.0, max(high, mean)))  # rounding may pass an end


def paired_difference(a: Array, b: Array, level: float = LEVEL) -> Interval:
    """Returns mean(a - b), where question i of both, bool [n] or [seeds, n], is the same, with Tango's interval.
    ValueError for no question."""
    difference = _per_question(a) - _per_question(b)
    more, less = float(np.maximum(difference, 0).sum()), float(np.maximum(-difference, 0).sum())
    n, z = len(difference), _quantile(level)
    return Interval((more - less) / n, -_most(less, more, n, z), _most(more, less, n, z))


def mcnemar(a: Array, b: Array) -> float:
    """Returns the p value, two-sided, of McNemar's exact test that `a` and `b`, each bool [n] or [seeds, n] and of the
    same questions, are right equally often. ValueError for no question.

    Tango's interval inverts the test's approximation, which four questions can fool; this one takes six. Averages over
    seeds are rounded against a difference.
    """
    difference = _per_question(a) - _per_question(b)
    sums = (round(float(np.maximum(sign * difference, 0).sum()), 9) for sign in (1, -1))
    least, most = sorted(sums)
    against, n = math.ceil(least), math.floor(most) + math.ceil(least)
    ways = tail = 1  # to choose 0 of the n questions that differ
    for k in range(against):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(1.0, float(2 * tail / 2**n))


def least_questions(loss: float) -> int:
    """Returns how many questions it takes, all answered alike, for `paired_difference` to exclude more than `loss`."""
    z = _quantile(LEVEL)
    return math.ceil(z * z * (1 - loss) / loss)


def over_seeds(right: Array) -> SeedSpread:
    """Returns the accuracies of the seeds in `right`, bool [seeds, n], one number a seed."""
    means = np.asarray(right, np.float64).mean(axis=1)
    return SeedSpread(float(means.mean()), float(means.min()), float(means.max()), len(means))


def _per_question(right: Array) -> npt.NDArray[np.float64]:
    means: npt.NDArray[np.float64] = np.atleast_2d(np.asarray(right, np.float64)).mean(axis=0)
    if not len(means):
        raise ValueError("no question to judge by")
    return means


def _quantile(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


def _most(more: float, less: float, n: int, z: float) -> float:
    """The largest difference that McNemar's test at `z` does not refuse: `more` of `n` answers speak for it, `less`
    against. The test's statistic falls from 0 at the difference found, so that halving finds where it passes -z."""
    low, high = (more - less) / n, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if (n * middle - more + less) ** 2 <= z * z * n * _variance(more, less, n, middle):
            low = middle
        else:
            high = middle
    return low


def _variance(more: float, less: float, n: int, difference: float) -> float:
    """Of one question's difference, where the mean is `difference` and the share against it the likeliest one."""
    linear = (2 * n - more + less) * difference - more - less
    constant = -less * difference * (1 - difference)
    against = (math.sqrt(max(0.0, linear * linear - 8 * n * constant)) - linear) / (4 * n)
    return 2 * against + difference * (1 - difference)
