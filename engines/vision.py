"""What the tower makes of pictures and films: each is looked at once, however often it is asked about."""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.backends import Engines, Tensor
from himap_export.engines.documents import MEGABYTE
from himap_export.engines.weight_file import NUMPY
from himap_export.graphs.ports import GraphPorts, Place

MOST_FEATURES = 256 * MEGABYTE  # fifty pictures of LLaVA-7B, in fp16
Features = Mapping[Place, Tensor]  # what vision writes of one picture or film


class FeatureCache:
    """The features of the pictures that were asked about last, by their pixels, in the memory of a bundle's engines.

    Those that take more than `most` bytes in sum are forgotten, the longest unasked first. For one thread.
    """

    def __init__(self, most: int = MOST_FEATURES) -> None:
        self._most, self._held = most, 0
        self._found: OrderedDict[bytes, Features] = OrderedDict()
        self.hits, self.misses = 0, 0

    def get(self, key: bytes) -> Features | None:
        """Returns what was put under `key`, if it is still known."""
        found = self._found.get(key)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
            self._found.move_to_end(key)
        return found

    def put(self, key: bytes, made: Features, engines: Engines) -> None:
        """Keeps a copy of what was `made`, unless it alone is more than there is room for."""
        size = _bytes(made)
        if size > self._most:
            return
        while self._held + size > self._most:
            _, oldest = self._found.popitem(last=False)
            self._held -= _bytes(oldest)
        kept = {place: engines.tensor(tensor.spec) for place, tensor in made.items()}
        for place, tensor in kept.items():
            tensor.take(made[place])
        self._found[key], self._held = kept, self._held + size

    def forget(self) -> None:
        """Forgets all pictures: whoever measures how long an answer takes wants them looked at."""
        self._found.clear()
        self._held = 0


def _bytes(features: Features) -> int:
    return sum(math.prod(t.spec.shape) * np.dtype(NUMPY[t.spec.dtype]).itemsize for t in features.values())


class Vision:
    """A vision graph, called `name`, over `tensors`: `run` runs it. It looks at one picture or film at a time."""

    def __init__(
        self,
        name: str,
        ports: GraphPorts,
        tensors: Mapping[Place, Tensor],
        *,
        run: Callable[[], None],
        engines: Engines,
        cache: FeatureCache,
    ) -> None:
        self._name, self._run, self._engines, self._cache = name, run, engines, cache
        self._pixels = tensors[Place("pixel_values")]
        self._made = {port.place: tensors[port.place] for port in ports.outputs.values()}

    @property
    def pixels_shape(self) -> tuple[int, ...]:
        """[tiles,3,H,W]."""
        return self._pixels.spec.shape

    def look(self, pixels: npt.NDArray[np.float32]) -> Features:
        """Returns what the tower makes of `pixels` [tiles,3,H,W], from memory if it is known; valid until the next
        look."""
        key = hashlib.sha256(self._name.encode() + b"\0" + np.ascontiguousarray(pixels).data).digest()
        known = self._cache.get(key)
        if known is not None:
            return known
        self._pixels.write(pixels)
        self._run()
        self._cache.put(key, self._made, self._engines)
        return self._made

    def read(self) -> dict[Place, npt.NDArray[Any]]:
        """Returns copies of what the graph wrote last."""
        return {place: tensor.read() for place, tensor in self._made.items()}
