"""A film as frames: which of them a bundle sees, and how they are read from a file."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

Sampling = Literal["arange", "linspace", "rounded"]
MAX_FRAMES = 1024  # sampled


class Film(Struct, frozen=True):
    """How a film becomes `frames` pictures, all of it static.

    `steps`: steps of time that have tokens of their own; `frames / steps` frames become one. `sampling` names the rule
    by which frames are chosen (`frame_indices`). `fps`: how many frames a second the model's own processor samples.
    `rope_per_second`: by how much M-RoPE's time grows in a second; 0 if each step is a picture of its own to it.
    """

    frames: Annotated[int, Meta(ge=1, le=MAX_FRAMES)]
    steps: Annotated[int, Meta(ge=1, le=MAX_FRAMES)]
    sampling: Sampling
    fps: Annotated[float, Meta(gt=0, le=1000)]
    rope_per_second: Annotated[float, Meta(ge=0, le=1000)] = 0.0
