"""Choosing the next token from logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from himap_export.graphs.errors import Exit, HimapError


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; else softmax(logits / temperature) cut to the smallest set of probability `top_p`."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise HimapError(f"temperature {self.temperature} is no number from 0 on", "0 is greedy", code=Exit.USAGE)
        if not 0 < self.top_p <= 1:
            raise HimapError(f"top_p {self.top_p} is outside (0, 1]", "1 keeps all tokens", code=Exit.USAGE)
        if not 0 <= self.seed < 2**32:
            raise HimapError(f"seed {self.seed} is outside [0, 2^32)", "give a number in it", code=Exit.USAGE)


class Sampler:
    """Draws tokens [b] int64 from logits [b,W]; row i answers request `requests[i]`.

    What a request draws depends on the seed and its own number, not on who else is in the batch. HimapError if logits
    are not finite: no token follows from them.
    """

    def __init__(self, how: Sampling, requests: Sequence[int]) -> None:
        self.how, self._requests = how, requests
        self._random = [np.random.default_rng((how.seed, request)) for request in requests]

    def __call__(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        for request, row in zip(self._requests, logits, strict=True):
            if not np.isfinite(row).all():
                count = np.count_nonzero(~np.isfinite(row))
                details = f"{count} of {row.size} logits of prompt {request} are NaN or infinite"
                hint = "himap-validate tells which stage went wrong; fp16 overflows where bf16 and fp32 do not"
                raise HimapError("the model gives no answer", details, hint)
        if self.how.temperature == 0:
            best: npt.NDArray[np.int64] = logits.argmax(axis=1)
            return best
        return np.array([self._draw(*pair) for pair in zip(self._random, logits, strict=True)], np.int64)

    def _draw(self, random: np.random.Generator, logits: npt.NDArray[np.float32]) -> int:
        p = np.exp((logits.astype(np.float64) - logits.max()) / self.how.temperature)
        p /= p.sum()
        order = np.argsort(-p, kind="stable")
        # A token stays if those before it have not yet reached top_p: the first one always does.
        # By their ids: two that are as likely as each other stay where they are, whatever the last bits of logits say.
        kept = np.sort(order[np.cumsum(p[order]) - p[order] < self.how.top_p])
        return int(random.choice(kept, p=p[kept] / p[kept].sum()))
