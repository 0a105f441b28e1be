"""What each criterion ranks by, in NumPy and fp64, from what one layer computed: one function each.

Shape letters as in the graphs; S tokens, none of them padding; V of them are candidates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Layer:
    """What a layer computed for one prompt, and who may be ranked by it.

    `attention` [S,S], mean over heads; query and raw_query [H,S,E], key, raw_key and value [G,S,E], the raw ones before
    rotation; hidden, previous and normed [S,D]: what it passes on, what it was given, and the
    first behind the model's final norm. Indices into S: `candidates` [V] are
    the image tokens alive, `instruction` the text behind the image, `last` the last token of the prompt. `position`
    [S]: their original ones. The cut is at layer `cut`, keeps `keep`, and has `coefficients`.
    """

    attention: Floats
    query: Floats
    key: Floats
    value: Floats
    raw_query: Floats
    raw_key: Floats
    hidden: Floats
    previous: Floats
    normed: Floats
    candidates: Ints
    instruction: Ints
    last: int
    position: Ints
    cut: int
    keep: int
    seed: int
    coefficients: tuple[float, ...] = ()


def received(s: Layer, rows: Ints) -> Floats:
    scores: Floats = s.attention[rows][:, s.candidates].sum(0)
    return scores


def drawn(s: Layer) -> Floats:
    def rounds(z: Ints, keys: tuple[Ints, Ints]) -> tuple[Ints, Ints]:
        x, y = (np.mod(z + key, prime) for key, prime in zip(keys, (2039, 2027), strict=True))
        for _ in range(3):
            x = np.mod(x**3 + y + keys[0], 2039)
            y = np.mod(y**3 + x + keys[1], 2027)
        return x, y

    cut = np.array(s.cut)
    x, y = rounds(s.position[s.candidates], rounds(np.array(s.seed), (cut, cut)))
    return 2048.0 * x + y


def even(s: Layer) -> Floats:
    places = np.arange(len(s.candidates) + 1) * s.keep // len(s.candidates)
    return np.diff(places).astype(np.float64)


def short_keys(s: Layer) -> Floats:
    mean = sum(s.key) / len(s.key)
    return -np.sqrt((mean[s.candidates] ** 2).sum(1))


def moved(s: Layer) -> Floats:
    added = (s.hidden - s.previous)[s.candidates]
    found: Floats = np.sqrt(np.einsum("vd,vd->v", added, added))
    return found


def untrended(s: Layer) -> Floats:
    growth = np.exp(s.coefficients[0] * (s.position[s.candidates] - s.position[s.candidates[0]]))
    scores: Floats = received(s, s.instruction) / growth
    return scores


def by_heads(s: Layer) -> Floats:
    heads, scores = len(s.raw_query), np.zeros(len(s.candidates))
    for head, weight in enumerate(s.coefficients or np.full(heads, 1 / heads)):
        keys = s.raw_key[head * len(s.raw_key) // heads][s.candidates]
        met = s.raw_query[head][s.instruction] @ keys.T / np.sqrt(keys.shape[1])
        mean = met.sum(0) / max(len(met), 1)
        scores += weight * mean / max(np.linalg.norm(mean), 1e-12)
    return scores


def greedily(s: Layer) -> Floats:
    """Four pivots of the image and four of the text, by the L1 length of their keys; each takes the share of free
    tokens that point farthest away from it. By how much they do, beside the last one taken."""
    length = np.abs(s.key).sum((0, 2))
    unit = s.normed / np.linalg.norm(s.normed, axis=1, keepdims=True)
    own, text = (
        np.sort(of[np.argsort(-length[of], kind="stable")[:n]])
        for of, n in ((s.candidates, min(4, max(s.keep, 1))), (s.instruction, 4))
    )
    score = np.where(np.isin(s.candidates, own), 2.0, -4.0)
    free, left = ~np.isin(s.candidates, own), max(s.keep - 4, 0)
    for n in range(8 if left else 0):
        pivots = np.append(own, text)
        far = -s.position[s.candidates] / 2**20 if n >= len(pivots) else -unit[s.candidates] @ unit[pivots[n]]
        share = left // 8 + (n < left % 8)
        if share:
            bar = np.sort(far[free])[-share]
            score[free] = np.maximum(score, far - bar)[free]
            free &= far < bar
    return score


RANKINGS: Mapping[str, Callable[[Layer], Floats]] = {
    "instruction": lambda s: received(s, s.instruction),
    "image": lambda s: received(s, s.candidates),
    "last": lambda s: received(s, np.array([s.last])),
    "boundary": lambda s: received(s, s.instruction[:1]),
    "random": drawn,
    "uniform": even,
    "key-norm": short_keys,
    "v2drop": moved,
    "instruction-debiased": untrended,
    "hawk": by_heads,
    "dart": greedily,
}


def coefficients(criterion: str, heads: int) -> tuple[float, ...]:
    """Some for a criterion that takes them: a slope, weights of heads."""
    return {"instruction-debiased": (0.01,), "hawk": tuple(0.1 + n / 10 for n in range(heads))}.get(criterion, ())


def kept(scores: Floats, keep: int) -> Ints:
    """Indices of the `keep` highest scores, ascending; of equals the first."""
    found: Ints = np.sort(np.argsort(-scores, kind="stable")[:keep])
    return found
