"""What an analysis looks at: a prompt with the answer it should get, and which of its tokens are of which kind."""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from himap_export.graphs.errors import HimapError


@dataclass(frozen=True)
class Sample:
    """One prompt, without padding."""

    input_ids: NDArray[np.int64]  # [S], one image placeholder per image token
    pixel_values: NDArray[np.float32]  # [1,3,H,W]
    label: int  # token id of the first token of the right answer


@dataclass(frozen=True)
class Spans:
    """Which of the S tokens are of which kind: three masks, each token is in exactly one."""

    system: NDArray[np.bool_]  # [S] text before the last image token, also between two runs of image tokens
    image: NDArray[np.bool_]  # [S]
    instruction: NDArray[np.bool_]  # [S] text after the last image token


def spans_of(image: NDArray[np.bool_]) -> Spans:
    """Returns the spans of a prompt whose image tokens are `image` [S]. HimapError if it has none."""
    if not image.any():
        raise HimapError("a prompt has no image to follow", "no token is an image's", "expand the placeholder")
    instruction = np.arange(len(image)) > np.flatnonzero(image)[-1]
    return Spans(~image & ~instruction, image, instruction)


class SampleSet(Protocol):
    """Samples that are gone through, several times: a list, or what makes each when it is looked at."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Sample]: ...


Layer = TypeVar("Layer")  # a dataclass of floats


def average(samples: Sequence[Sequence[Layer]]) -> tuple[Layer, ...]:
    """Means over samples, layer by layer. `samples[i][l]`: what was found for sample i in layer l."""
    layers = zip(*samples, strict=True)
    return tuple(type(layer[0])(*np.mean([astuple(found) for found in layer], axis=0).tolist()) for layer in layers)
