"""Continuous batching over static graphs: prompts come and go one by one, each in a slot of its own.

Decode runs over tensors of B rows. Prefill, at batch 1, fills one row of its caches; from then on each step appends a
token to every row that somebody has, whoever else comes and leaves in between. What a row holds never depends on the
others: the same graph computes it, row by row, whether they are taken or free.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from himap_export.engines.arrays import Inputs
from himap_export.engines.backends import ANYWAY, Opening
from himap_export.engines.bundle import RunSpec
from himap_export.engines.prefill import Prefill, Prefilled, Tensors, check_memory
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import Place


def graphs_of(spec: RunSpec) -> list[tuple[RunSpec, str]]:
    """Returns the stages of a variant that its slots run."""
    return [(spec, stage) for stage in spec.variant.graphs if stage != "decode" or not spec.budget.slots]


class Slots(Prefill):
    """A variant of a bundle, opened on a backend, for `rows` prompts at a time; one row if it was exported without
    slots. For one thread.

    HimapError (usage) for a bundle whose prefill takes several prompts at once.
    """

    def __init__(self, spec: RunSpec, backend: str, opening: Opening = ANYWAY, beside: Prefill | None = None) -> None:
        super().__init__(spec, backend, opening, beside)
        if spec.budget.batch > 1:
            summary = f"{spec.bundle.folder} answers {spec.budget.batch} prompts together"
            raise HimapError(summary, "each comes alone here", "export it with `batch` 1 and `slots`", Exit.USAGE)
        decode, self.rows = ("slots", spec.budget.slots) if spec.budget.slots else ("decode", 1)
        check_memory(self.engines.device, graphs_of(spec))
        self._many: Tensors = {}
        step = self._bind(decode, self._many)
        self.vision = self._open_vision()
        lanes = self._bound_lanes() if self.engines.binds_often else self._copied_lanes()
        self._lanes, self._decode = lanes, self.engines.chain([step])
        # A free row goes on with tokens at a position that every stage has a slot for: behind the longest prompt.
        self._parked = spec.budget.total[0]
        self._positions, self._shifts = np.full(self.rows, self._parked), np.zeros(self.rows, np.int64)

    def _bound_lanes(self) -> list[Callable[[], None]]:
        """Returns prefill for each row: its graphs bound to that row of the caches, and else to the same tensors."""
        lanes, caches = list[Callable[[], None]](), self._caches()
        for row in range(self.rows):
            self.tensors |= {place: self._many[place].row(row) for place in caches}
            lanes.append(self.engines.chain([self._bind(stage, self.tensors) for stage in self.stages]))
        return lanes

    def _copied_lanes(self) -> list[Callable[[], None]]:
        """Returns prefill for each row: its graphs, bound once, then a copy of what they wrote into that row."""
        prefill = self.engines.chain([self._bind(stage, self.tensors) for stage in self.stages])

        def lane(row: int) -> Callable[[], None]:
            pairs = [(self._many[place].row(row), self.tensors[place]) for place in self._caches()]

            def run() -> None:
                prefill()
                for target, source in pairs:
                    target.take(source)

            return run

        return [lane(row) for row in range(self.rows)]

    def _caches(self) -> list[Place]:
        return [place for place in self._many if place.role in ("key", "value")]

    def prefill(self, row: int, inputs: Inputs, seed: int = 0) -> Prefilled:
        """Fills a row with one prompt, in whose name random cuts draw by `seed`; HimapError (usage) if it does not
        fit."""
        layout = self.load(
            inputs.input_ids, inputs.pixel_values, inputs.attention_mask, seeds=np.array([seed]),
            seconds=inputs.seconds,
        )  # fmt: skip
        self._lanes[row]()
        self._positions[row], self._shifts[row] = layout.lengths[0], layout.rope_shift[0]
        return self.prefilled(1)

    def step(self, tokens: Mapping[int, int]) -> npt.NDArray[np.float32]:
        """Appends a token to each of these rows, which are all that are taken; returns logits [rows,W], of which theirs
        are meant."""
        fed, taken = np.zeros(self.rows, np.int64), list(tokens)
        fed[taken] = list(tokens.values())
        self._feed(fed, self._positions, self._shifts, self._many)
        self._decode()
        self._positions[taken] += 1
        logits: npt.NDArray[np.float32] = self._many[Place("logits")].read()
        return logits

    def free(self, row: int) -> None:
        """Gives a row back."""
        self._positions[row], self._shifts[row] = self._parked, 0
