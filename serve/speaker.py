"""From one request's logits to the text of its answer, piece by piece: sampled, decoded, ended."""

from collections.abc import Collection
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from himap_export.engines.prompt import Detokenizer
from himap_export.engines.sampling import Sampler, Sampling


class Speaker:
    """One answer. What it draws depends on its own seed, not on who else is answered.

    `token` is the last one drawn, `count` how many there are, `reason` why it has ended, None as long as it has not:
    "stop" at an end-of-sequence token or one of the texts in `stop`, "length" at `most` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_tokens: Collection[int],
        *,
        most: int,
        sampling: Sampling,
        stop: tuple[str, ...] = (),
    ) -> None:
        self._detokenizer, self._sampler = Detokenizer(tokenizer), Sampler(sampling, [0])
        self._eos, self._most, self._stop = eos_tokens, most, stop
        self._held, self._spoken = "", False
        self.token, self.count = -1, 0
        self.reason: Literal["stop", "length"] | None = None

    def say(self, logits: npt.NDArray[np.float32]) -> str:
        """Draws a token from `logits` [1,W] and returns the text that can be said now; "" if none. HimapError if they
        are not finite."""
        self.token, self.count = int(self._sampler(logits)[0]), self.count + 1
        if self.token in self._eos:
            self.reason = "stop"
        else:
            self._hear(self._detokenizer.push(self.token))
            if self.count == self._most and self.reason is None:
                self.reason = "length"
        if self.reason is None:
            return self._said(self._unsure())
        self._hear(self._detokenizer.finish())
        return self._said(0)

    def _hear(self, text: str) -> None:
        """Takes text in; what comes behind a text that ends the answer is dropped."""
        if not self._spoken:
            text = text if self._held else text.lstrip()  # the space that tokenizers put before a word
        if self.reason == "stop" and self.token not in self._eos:
            return
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self._held, self.reason = self._held[: min(found)], "stop"

    def _unsure(self) -> int:
        """Returns how many characters at the end may be the beginning of a text that ends the answer."""
        most = max((min(len(stop) - 1, len(self._held)) for stop in self._stop), default=0)
        ends = (n for n in range(most, 0, -1) if any(stop.startswith(self._held[-n:]) for stop in self._stop))
        return next(ends, 0)

    def _said(self, kept: int) -> str:
        """Returns what was held but the last `kept` characters."""
        at = len(self._held) - kept
        text, self._held = self._held[:at], self._held[at:]
        self._spoken |= bool(text)
        return text
