"""Hugging Face's decoder for one prompt, one layer at a time: the ground that every analysis stands on.

Nothing here computes attention. Hugging Face's eager attention returns its probabilities beside its output, a decoder
layer drops them, a hook on its `self_attn` keeps them. They are softmax in fp32, rounded to the model's dtype.

Shape letters: S tokens, D hidden, H query heads, W vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from himap_export.graphs.errors import HimapError
from himap_export.validate.analysis.sample import Sample, SampleSet, spans_of
from himap_export.validate.progress import Count
from himap_export.validate.reference.reference import Reference


class Prompt:
    """One sample in the decoder. Valid inside `prompts` only, where the decoder's attention is eager."""

    def __init__(self, reference: Reference, sample: Sample) -> None:
        self._state = reference.start(sample.input_ids, sample.pixel_values)
        self.sample, self.spans = sample, spans_of(self._state.is_image.cpu().numpy())
        self.layers, self._reference = reference.layers, reference
        self.embeds = self._state.hidden  # [1,S,D]
        self._positions, size = reference.rope_positions(self._state), self.embeds.shape[1]
        self.causal = torch.ones(size, size, dtype=torch.bool, device=self.embeds.device).tril()

    def run(self, layer: int, hidden: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Runs layer `layer` on `hidden` [1,S,D].

        `allowed` [S,S] bool: may row i see column j; causal if None. A row that may see nothing is NaN.
        """
        allowed = self.causal if allowed is None else allowed
        mask = torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill(~allowed, -torch.inf)
        only, state = range(layer, layer + 1), self._state
        return self._reference.run(only, hidden, self._positions, state=state, mask=mask[None, None])[0]

    def run_with_map(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what `run` does, causal; also the attention probabilities [1,H,S,S], in the output's graph if there
        is one."""
        found: list[Tensor] = []
        module = self._reference.decoder.layers[layer].self_attn
        hook = module.register_forward_hook(lambda module, arguments, outputs: found.append(outputs[1]))
        try:
            output = self.run(layer, hidden)
        finally:
            hook.remove()
        return output, found[0]

    @torch.no_grad()
    def states(self) -> list[Tensor]:
        """Returns the undisturbed hidden states, L + 1 times [1,S,D]: entry l enters layer l, the last one enters the
        norm."""
        states = [self.embeds]
        for layer in range(self.layers):
            states.append(self.run(layer, states[-1]))
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits [W], in the model's dtype, that follow the last token of what the last layer passed on,
        [1,S,D]."""
        logits: Tensor = self._reference.adapter.head(self._reference.decoder.norm(hidden[0, -1]))
        return logits


@contextmanager
def _eager(decoder: Any) -> Iterator[None]:
    """The decoder's attention is Hugging Face's eager one, whatever it was and will be again."""
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


@contextmanager
def prompts(reference: Reference, samples: SampleSet, progress: Count) -> Iterator[Iterator[Prompt]]:
    """Yields the prompts one after the other, as each has a length of its own: `with prompts(...) as each: for prompt
    in each: ...`."""
    if not len(samples):
        raise HimapError("there is nothing to analyse", "no samples")

    def each() -> Iterator[Prompt]:
        for done, sample in enumerate(samples, 1):
            yield Prompt(reference, sample)
            progress(done, len(samples))

    with _eager(reference.decoder):
        yield each()
