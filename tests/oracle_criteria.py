"""What each criterion ranks by, in NumPy and fp64, from what one layer computed: one function each.

Shape letters as in the graphs; S tokens, none of them padding; V of them are candidates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]
PRIME = 2**31 - 1


@dataclass(frozen=True)
class Layer:
    """What a layer computed for one prompt, and who may be ranked by it.

    `attention` [S,S], mean over heads; query and raw_query [H,S,E], key, raw_key and value [G,S,E], the raw ones before
    rotation; hidden and previous [S,D]: what it passes on and what it was given. Indices into S: `candidates` [V] are
    the image tokens alive, `instruction` the text behind the image, `last` the last token of the prompt. `position`
    [S]: their original ones. The cut is at layer `cut`, and keeps `keep`.
    """

    attention: Floats
    query: Floats
    key: Floats
    value: Floats
    raw_query: Floats
    raw_key: Floats
    hidden: Floats
    previous: Floats
    candidates: Ints
    instruction: Ints
    last: int
    position: Ints
    cut: int
    keep: int
    seed: int


def received(s: Layer, rows: Ints) -> Floats:
    scores: Floats = s.attention[rows][:, s.candidates].sum(0)
    return scores


def drawn(s: Layer) -> Floats:
    x = [s.seed % PRIME * 48271 + int(p) * 16807 + s.cut * 69621 + 1 for p in s.position[s.candidates]]
    for constant in (1013904223, 374761393, 668265263):
        x = [int(v) ** 5 % PRIME + constant for v in x]
    return np.array(x, np.float64) % 2**24


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


RANKINGS: Mapping[str, Callable[[Layer], Floats]] = {
    "instruction": lambda s: received(s, s.instruction),
    "image": lambda s: received(s, s.candidates),
    "last": lambda s: received(s, np.array([s.last])),
    "boundary": lambda s: received(s, s.instruction[:1]),
    "random": drawn,
    "uniform": even,
    "key-norm": short_keys,
    "v2drop": moved,
}


def kept(scores: Floats, keep: int) -> Ints:
    """Indices of the `keep` highest scores, ascending; of equals the first."""
    found: Ints = np.sort(np.argsort(-scores, kind="stable")[:keep])
    return found
