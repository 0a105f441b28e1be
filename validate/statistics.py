"""How sure an accuracy is: percentile bootstrap over questions, paired where two policies answered the same ones.

Several seeds of a random policy are [seeds, n] arrays. They are averaged per question before anything is resampled:
seeds on the same question are no further questions. Their own spread is told apart, by `over_seeds`.
(Efron and Tibshirani, An Introduction to the Bootstrap, chapters 8 and 13.)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
LEVEL = (2.5, 97.5)  # percentiles: 95 %
_CELLS = 2**20  # counts drawn at once: 8 MiB

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Interval:
    """A mean over questions and its 95 % interval."""

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


def accuracy_interval(right: Array, seed: int) -> Interval:
    """Of `right`, bool [n] or [seeds, n]: the share of right answers. ValueError for no question.

    Where all answers are right (or wrong) the interval is that point: a bootstrap cannot tell of what it never saw.
    """
    return _interval(_per_question(right), seed)


def paired_difference(a: Array, b: Array, seed: int) -> Interval:
    """Of mean(a - b), where question i of both, bool [n] or [seeds, n], is the same; resampled as pairs."""
    return _interval(_per_question(a) - _per_question(b), seed)


def over_seeds(right: Array) -> SeedSpread:
    """The accuracies of the seeds in `right`, bool [seeds, n], one number a seed."""
    means = np.asarray(right, np.float64).mean(axis=1)
    return SeedSpread(float(means.mean()), float(means.min()), float(means.max()), len(means))


def _per_question(right: Array) -> npt.NDArray[np.float64]:
    means: npt.NDArray[np.float64] = np.atleast_2d(np.asarray(right, np.float64)).mean(axis=0)
    return means


def _interval(values: npt.NDArray[np.float64], seed: int) -> Interval:
    means = np.concatenate(list(_resampled_means(values, np.random.default_rng(seed))))
    low, high = np.percentile(means, LEVEL)
    return Interval(float(values.mean()), float(low), float(high))


def _resampled_means(values: npt.NDArray[np.float64], rng: np.random.Generator) -> Iterator[npt.NDArray[np.float64]]:
    """RESAMPLES means of n draws with replacement: how often each distinct value is drawn is multinomial."""
    if values.size == 0:
        raise ValueError("no question to resample")
    distinct, counts = np.unique(values, return_counts=True)  # right and wrong are two, whatever n is
    rows = max(1, _CELLS // len(distinct))
    for done in range(0, RESAMPLES, rows):
        drawn = rng.multinomial(len(values), counts / len(values), min(rows, RESAMPLES - done))
        yield drawn @ distinct / len(values)
