"""How far one tensor lies from another, summed up prompt by prompt: nothing needs two prompts in memory at once."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from math import inf, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.int64]
Tensors = Mapping[str, list[Floats]]  # by name, one array per prompt, real tokens only


@dataclass(frozen=True)
class TensorDiff:
    """Two tensors: largest difference (inf if one is not finite), largest reference value, cosine of the whole."""

    name: str
    max_abs: float
    scale: float
    cosine: float


@dataclass(frozen=True)
class DiffSums:
    """What a TensorDiff is made of, so far; that of more prompts is the sum."""

    max_abs: float
    scale: float
    product: float
    actual_square: float
    expected_square: float

    def __add__(self, other: "DiffSums") -> "DiffSums":
        return DiffSums(
            max_abs=max(self.max_abs, other.max_abs),
            scale=float(np.maximum(self.scale, other.scale)),  # Python's may drop a NaN
            product=self.product + other.product,
            actual_square=self.actual_square + other.actual_square,
            expected_square=self.expected_square + other.expected_square,
        )

    def diff(self, name: str) -> TensorDiff:
        norms = sqrt(self.actual_square) * sqrt(self.expected_square)
        return TensorDiff(name, self.max_abs, self.scale, self.product / norms if norms else float(self.max_abs == 0))


def diff_sums(actual: Iterable[Floats], expected: Iterable[Floats]) -> DiffSums:
    """Returns the sums over the prompts of one tensor."""
    return reduce(DiffSums.__add__, (_of_prompt(a, e) for a, e in zip(actual, expected, strict=True)))


def tensor_diff(name: str, actual: Iterable[Floats], expected: Iterable[Floats]) -> TensorDiff:
    """Returns how far `actual` lies from `expected`, arrays by prompt, taken as one long vector each."""
    return diff_sums(actual, expected).diff(name)


def worst(values: Floats) -> float:
    """Returns the largest, or inf if one is no number: Python's `max` may drop a NaN."""
    return float(values.max()) if np.isfinite(values).all() else inf


def _of_prompt(actual: Floats, expected: Floats) -> DiffSums:
    a, e = (array.ravel().astype(np.float64) for array in (actual, expected))
    return DiffSums(
        worst(np.abs(a - e)), float(np.abs(e).max()), product=float(a @ e), actual_square=float(a @ a),
        expected_square=float(e @ e),
    )  # fmt: skip
