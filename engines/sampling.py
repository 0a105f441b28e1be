"""Choosing the next token from logits."""

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
        if self.temperature < 0:
            raise HimapError(f"--temperature {self.temperature} is negative", hint="0 is greedy", code=Exit.USAGE)
        if not 0 < self.top_p <= 1:
            raise HimapError(f"--top-p {self.top_p} is outside (0, 1]", hint="1 keeps all tokens", code=Exit.USAGE)
        if not 0 <= self.seed < 2**32:
            raise HimapError(f"--seed {self.seed} is outside [0, 2^32)", hint="give a number in it", code=Exit.USAGE)


class Sampler:
    """Draws tokens [B] int64 from logits [B,W], reproducibly for a seed."""

    def __init__(self, how: Sampling) -> None:
        self.how, self._random = how, np.random.default_rng(how.seed)

    def __call__(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        if self.how.temperature == 0:
            best: npt.NDArray[np.int64] = logits.argmax(axis=1)
            return best
        scaled = logits.astype(np.float64) / self.how.temperature
        return np.array([self._draw(row) for row in scaled], np.int64)

    def _draw(self, logits: npt.NDArray[np.float64]) -> int:
        p = np.exp(logits - logits.max())
        p /= p.sum()
        order = np.argsort(-p, kind="stable")
        # A token stays if those before it have not yet reached top_p: the first one always does.
        order = order[np.cumsum(p[order]) - p[order] < self.how.top_p]
        return int(self._random.choice(order, p=p[order] / p[order].sum()))
