"""The chain: vision, the stages of prefill, then decode, over KV caches that stay where they are."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.backends import ANYWAY, Opening
from himap_export.engines.bundle import RunSpec
from himap_export.engines.layout import Integers, PromptLayout
from himap_export.engines.prefill import Prefill, Prefilled, Seen, check_memory
from himap_export.engines.sampling import Sampler, Sampling
from himap_export.graphs.errors import Exit, HimapError


class Pipeline(Prefill):
    """A variant of a bundle, opened on a backend, for batches of up to B prompts at a time."""

    def __init__(self, spec: RunSpec, backend: str, opening: Opening = ANYWAY, beside: Prefill | None = None) -> None:
        super().__init__(spec, backend, opening, beside)
        graphs = *self.stages, "decode"
        check_memory(self.engines.device, [(spec, graph) for graph in ("vision", *graphs)])
        self._run |= {name: self._bind(name, self.tensors) for name in graphs}
        self.vision = self._open_vision()
        self._prefill, self._decode = self.chained(*self.stages), self.chained("decode")

    def prefill(
        self,
        input_ids: Integers,
        pixel_values: npt.NDArray[Any] | Seen,
        attention_mask: Integers | None = None,
        seeds: Integers | None = None,
        seconds: Sequence[float] = (),
    ) -> tuple[Prefilled, PromptLayout]:
        """Loads prompts, as `load`, then runs all stages of prefill."""
        layout = self.load(input_ids, pixel_values, attention_mask, seeds=seeds, seconds=seconds)
        self._prefill()
        return self.prefilled(len(input_ids)), layout

    def step(self, tokens: Integers, positions: Integers) -> npt.NDArray[np.float32]:
        """Appends one token [B] per sample at its original position [B]; returns logits [B,W]."""
        self.feed(tokens, positions)
        self._decode()
        return self.read("logits")

    def feed(self, tokens: Integers, positions: Integers) -> None:
        """Writes what decode reads."""
        self._feed(tokens, positions, self._rope_shift, self.tensors)

    def check_new_tokens(self, count: int) -> None:
        """Raises HimapError (usage) for an answer of so many tokens, if the bundle has no room for it."""
        limit = self.spec.budget.new
        if not 1 <= count <= limit:
            hint = f"1 to {limit}, or export with `max_new_tokens` {count}"
            raise HimapError(f"`max_new_tokens` {count} is outside the bundle's budget", hint=hint, code=Exit.USAGE)

    def generate(
        self,
        prefilled: Prefilled,
        layout: PromptLayout,
        new_tokens: int,
        sampling: Sampling | None = None,
        requests: Sequence[int] | None = None,
    ) -> Iterator[Integers]:
        """Yields tokens [b], one array per step, until every sample has ended; an ended one goes on with padding.

        `requests` [b], 0, 1, .. if not given, are the samples' numbers: by theirs and the seed they draw. HimapError if
        logits are not finite.
        """
        self.check_new_tokens(new_tokens)
        samples, batch, model = len(prefilled.logits), len(layout.lengths), self.manifest.model
        sampler = Sampler(sampling or Sampling(), range(samples) if requests is None else requests)
        ended, logits = np.zeros(samples, bool), prefilled.logits
        for step in range(new_tokens):
            tokens = np.where(ended, model.pad_token, sampler(np.where(ended[:, None], 0, logits)))
            yield tokens
            ended |= np.isin(tokens, model.eos_tokens)
            if ended.all() or step == new_tokens - 1:
                return
            logits = self.step(np.resize(tokens, batch), layout.lengths + step)[:samples]
