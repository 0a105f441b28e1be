"""What passes between a server's doors and the thread that owns the engines: questions in, events out."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from himap_export.engines.answer import Request
from himap_export.engines.layout import Integers
from himap_export.engines.sampling import Sampling
from himap_export.graphs.errors import HimapError

Reason = Literal["stop", "length", "cancelled", "timeout", "error"]


@dataclass(frozen=True)
class Question:
    """One request, checked and prepared. Times are of `time.monotonic`, in seconds.

    `request` holds one prompt and the variant that it fits; `stop`: texts that end the answer, and are not part of it;
    `deadline`: when it is given up, waiting or not. `streamed`: it is read as it comes; else nobody sees a part of it.
    """

    id: str
    model: str
    request: Request
    max_new_tokens: int
    asked: float
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    deadline: float = math.inf
    streamed: bool = True

    @property
    def prompt_tokens(self) -> int:
        """Image tokens and all others."""
        return int(self.request.inputs.input_ids.shape[1])


@dataclass(frozen=True)
class Began:
    """Prefill is done. `kept`: by cut (kept_k1, ..) the original positions [S_i] that stay, -1 for padding. `queue_s`:
    how long it waited for a slot, `prefill_s`: until its first token from then on. Of its pictures the tower `looked`
    at so many; the features of the others were `known`."""

    kept: Mapping[str, Integers]
    at: float
    queue_s: float
    prefill_s: float
    known: int = 0
    looked: int = 0


@dataclass(frozen=True)
class Piece:
    """The answer goes on: `text` may be empty, where a token completes none. `tokens`: how many there are now."""

    text: str
    tokens: int
    at: float


@dataclass(frozen=True)
class Ended:
    """Nothing more comes. `tokens`: of the whole answer; `decode_s`: from the first token to the last; `problem` says
    why, where the reason is "error"."""

    reason: Reason
    tokens: int
    at: float
    decode_s: float = 0.0
    problem: HimapError | None = None


Event = Began | Piece | Ended
Deliver = Callable[[Event], None]  # is called on the engines' thread, and must not block it
