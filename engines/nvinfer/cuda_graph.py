"""Runs on one stream, played back as one CUDA graph."""

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from himap_export.engines.nvinfer.cuda_memory import Gpu, reported
from himap_export.graphs.errors import HimapError


class Chain:
    """Several runs, one after the other: at first enqueued one by one, from the second time on as one CUDA graph.

    The first time TensorRT may allocate and compile, which cannot be captured. `captured` says whether the rest was,
    and `why_not` what was in the way: then the runs go on one by one, with the same results. Nothing waits for the
    host in between; addresses are fixed, so what is uploaded before a call is what the graph reads.
    """

    def __init__(self, gpu: Gpu, runs: Sequence[Callable[[], None]], obstacle: Callable[[], str]) -> None:
        """`obstacle`, asked before capturing, says what forbids it; nothing: try."""
        self._gpu, self._runs, self._obstacle = gpu, tuple(runs), obstacle
        self._calls = 0
        self._graph: Any = None
        self.why_not = "it has not run twice"

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def __call__(self) -> None:
        if self._calls == 1:
            self._capture()
        if self._graph is None:
            self._enqueue()
        else:
            with reported():
                self._graph.launch(self._gpu.stream)
        self._calls += 1

    def _enqueue(self) -> None:
        for run in self._runs:
            run()

    def _capture(self) -> None:
        self.why_not = self._obstacle()
        if self.why_not:
            return
        try:
            self._graph = _graph(self._gpu, self._enqueue)
        except HimapError as problem:
            self.why_not = str(problem)
        else:
            weakref.finalize(self, _destroy, self._gpu, self._graph)


def _graph(gpu: Gpu, work: Callable[[], None]) -> Any:
    """Returns what `work` enqueues as a cuda.core Graph; HimapError if it cannot be captured.

    The stream leaves the mode in any case."""
    with reported():
        builder = gpu.stream.create_graph_builder()
        try:
            # Only this thread is kept from what would spoil the capture: TensorRT's own may go on allocating.
            builder.begin_building(mode="thread_local")
            work()
            builder.end_building()
            return builder.complete()
        finally:
            with suppress(Exception):  # of a capture in vain it ends one that is open, and what was wrong is raised
                builder.close()


def _destroy(gpu: Gpu, graph: Any) -> None:
    gpu.stream.sync()  # it may still be running
    graph.close()
