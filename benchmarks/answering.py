"""What a child of `real_size_answers.py` does: it opens one plan of a bundle and answers with it.

A module of its own, as a child cannot import its parent's main module.
"""

import time

from himap_export.engines.backends import Opening, load_backend
from himap_export.engines.bundle import RunSpec
from himap_export.engines.pipeline import Pipeline
from himap_export.graphs.errors import HimapError
from himap_export.validate.parity.prompts import drawn_inputs

STEPS = 16


class Answering:
    """A plan that is open. Asked for "opened", "first" or "decode" it answers seconds; HimapError for a first token
    that comes of no finite logits."""

    def __init__(self, run: RunSpec, backend: str, threads: int) -> None:
        load_backend(backend).version()  # imports its library
        start = time.perf_counter()
        self._pipeline = Pipeline(run, backend, Opening(threads, "cpu"))
        self._opened = time.perf_counter() - start
        self._inputs = drawn_inputs(run, run.budget.batch, 0, fill=True)

    def __call__(self, asked: str) -> float:
        return {"opened": lambda: self._opened, "first": self._first, "decode": self._decode}[asked]()

    def _first(self) -> float:
        """Returns the seconds from pixels and ids to a token: vision, all stages, logits."""
        self._pipeline.features.forget()
        start, given = time.perf_counter(), self._inputs
        prefilled, self._layout = self._pipeline.prefill(given.input_ids, given.pixel_values, given.attention_mask)
        self._token = prefilled.logits.argmax(axis=1)
        seconds = time.perf_counter() - start
        if not abs(prefilled.logits).max() < float("inf"):
            raise HimapError("the logits of the prompt are not finite")
        return seconds

    def _decode(self) -> float:
        start = time.perf_counter()
        for step in range(STEPS):
            self._pipeline.step(self._token, self._layout.lengths + step)
        return (time.perf_counter() - start) / STEPS
