"""Pictures are looked at once: what is kept, what is forgotten, and what tells one picture from another."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from himap_export.engines.backends import TensorSpec
from himap_export.engines.vision import FeatureCache, Vision
from himap_export.graphs.ports import GraphPorts, Place, Port

FEATURES, DEEP = Place("seen_features"), Place("seen_deepstack", 0)
V, D = 2, 4
PIXELS = Port("fp32", (1, 3, 2, 2), "pixel_values")
WRITTEN = {"image_features": Port("fp16", (1, V, D), "seen_features"), "deepstack_0": Port("fp32", (1, V, D), *DEEP)}
EACH = V * D * 2 + V * D * 4  # bytes of one picture


@dataclass
class Memory:
    """A tensor, in NumPy's memory."""

    spec: TensorSpec
    values: Any = 0

    def write(self, values: Any) -> None:
        self.values = np.array(values)

    def read(self) -> Any:
        return np.array(self.values)

    def take(self, source: "Memory") -> None:
        self.values = source.read()


@dataclass
class Backend:
    """Makes such tensors, and counts how often the tower runs: it says the sum of the pixels it sees."""

    tensors: dict[Place, Memory] = field(default_factory=dict)
    runs: int = 0

    def tensor(self, spec: TensorSpec) -> Memory:
        return Memory(spec)

    def run(self) -> None:
        self.runs += 1
        for n, place in enumerate((FEATURES, DEEP), 1):
            self.tensors[place].write(n * self.tensors[Place("pixel_values")].values.sum())

    def tower(self, cache: FeatureCache, name: str = "vision") -> Vision:
        ports = GraphPorts({"pixel_values": PIXELS}, WRITTEN)
        self.tensors = {port.place: Memory(port) for port in (PIXELS, *WRITTEN.values())}
        return Vision(name, ports, self.tensors, run=self.run, engines=self, cache=cache)  # type: ignore[arg-type]


def pixels(value: float) -> Any:
    return np.full((1, 3, 2, 2), value, np.float32)


def looked(vision: Vision, value: float) -> None:
    """What it says of a picture is right, however it knows."""
    seen, total = vision.look(pixels(value)), float(pixels(value).sum())
    assert {place: float(tensor.read()) for place, tensor in seen.items()} == {FEATURES: total, DEEP: 2 * total}


def test_a_picture_that_is_known_is_not_looked_at_again() -> None:
    backend, cache = Backend(), FeatureCache()
    vision = backend.tower(cache)
    for value in (1, 2, 1, 1, 2, 3):
        looked(vision, value)
    assert (backend.runs, cache.misses, cache.hits) == (3, 3, 3)
    assert vision.pixels_shape == (1, 3, 2, 2) and float(vision.read()[FEATURES]) == 36


def test_one_bit_makes_another_picture_and_another_tower_sees_it_anew() -> None:
    backend, cache = Backend(), FeatureCache()
    first, second = backend.tower(cache), Backend().tower(cache, "vision-2")
    looked(first, 1)
    looked(first, float(np.nextafter(np.float32(1), np.float32(2))))
    looked(second, 1)
    assert (cache.misses, cache.hits) == (3, 0)
    looked(Backend().tower(cache), 1)  # another variant's tensors, the same graph
    assert (cache.misses, cache.hits) == (3, 1)


def test_pixels_that_do_not_lie_in_a_row_are_the_same_picture() -> None:
    cache = FeatureCache()
    vision, drawn = Backend().tower(cache), np.random.default_rng(0).random((1, 2, 2, 3), np.float32)
    vision.look(drawn.transpose(0, 3, 1, 2))
    vision.look(np.ascontiguousarray(drawn.transpose(0, 3, 1, 2)))
    assert (cache.misses, cache.hits) == (1, 1)


@pytest.mark.parametrize("most", [0, EACH - 1, EACH, 2 * EACH, 3 * EACH - 1, 3 * EACH])
def test_what_was_longest_unasked_is_forgotten_first(most: int) -> None:
    """Against a list of pictures, the last asked about last; no more bytes are ever held."""
    backend, cache, known, runs = Backend(), FeatureCache(most), list[int](), 0
    vision = backend.tower(cache)
    for value in (1, 2, 1, 3, 1, 2, 4, 3, 3, 1, 4, 4, 2, 1):
        runs += value not in known
        looked(vision, value)
        known = ([each for each in known if each != value] + [value])[-(most // EACH) :] if most >= EACH else []
        assert backend.runs == runs, (value, known)
    assert len(cache._found) == len(known) == min(most // EACH, 4) and cache._held == EACH * len(known) <= most


def test_what_is_kept_is_a_copy() -> None:
    """The next picture is written where this one was."""
    vision = Backend().tower(FeatureCache())
    looked(vision, 1)
    looked(vision, 5)
    kept = vision.look(pixels(1))
    looked(vision, 7)
    assert float(kept[FEATURES].read()) == 12


def test_what_is_forgotten_is_looked_at_again() -> None:
    backend, cache = Backend(), FeatureCache(2 * EACH)
    vision = backend.tower(cache)
    for _ in range(2):
        looked(vision, 1)
        looked(vision, 2)
        cache.forget()
    assert (backend.runs, cache.misses, cache.hits) == (4, 4, 0)


def test_a_picture_larger_than_the_room_pushes_out_nothing() -> None:
    backend, cache = Backend(), FeatureCache(EACH)
    looked(backend.tower(cache), 1)
    large = {FEATURES: Memory(TensorSpec("fp32", (1, V, 100 * D)))}
    cache.put(b"large", large, backend)  # type: ignore[arg-type]
    assert cache.get(b"large") is None
    looked(backend.tower(cache), 1)
    assert backend.runs == 1
