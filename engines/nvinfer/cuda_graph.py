"""Runs on one stream, played back as one CUDA graph.

Not run on hardware yet: written from the documentation of cuda-bindings 13, tested over a stand-in of its runtime.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from himap_export.engines.nvinfer.cuda_memory import Gpu
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
        self._calls, self._graph = 0, None
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
            self._gpu.call(self._gpu.cuda.cudaGraphLaunch(self._graph, self._gpu.stream))
        self._calls += 1

    def _enqueue(self) -> None:
        for run in self._runs:
            run()

    def _capture(self) -> None:
        self.why_not = self._obstacle()
        if self.why_not:
            return
        try:
            self._graph = _instantiated(self._gpu, _recorded(self._gpu, self._enqueue))
        except HimapError as problem:
            self.why_not = str(problem)
            self._gpu.cuda.cudaGetLastError()  # or the next one to ask takes the capture's error for its own
        else:
            weakref.finalize(self, _destroy, self._gpu, self._graph)


def _recorded(gpu: Gpu, work: Callable[[], None]) -> Any:
    """What `work` enqueues, as a graph; HimapError if it cannot be captured. The stream leaves the mode in any case."""
    cuda = gpu.cuda
    # Only this thread is kept from what would spoil the capture: TensorRT's own may go on allocating.
    gpu.call(cuda.cudaStreamBeginCapture(gpu.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
    try:
        work()
    except BaseException:
        error, graph = cuda.cudaStreamEndCapture(gpu.stream)
        if error == cuda.cudaError_t.cudaSuccess:  # not CUDA, but TensorRT refused
            cuda.cudaGraphDestroy(graph)
        raise
    return gpu.call(cuda.cudaStreamEndCapture(gpu.stream))


def _instantiated(gpu: Gpu, graph: Any) -> Any:
    try:
        return gpu.call(gpu.cuda.cudaGraphInstantiate(graph, 0))
    finally:
        gpu.cuda.cudaGraphDestroy(graph)


def _destroy(gpu: Gpu, graph: Any) -> None:
    gpu.cuda.cudaStreamSynchronize(gpu.stream)  # it may still be running
    gpu.cuda.cudaGraphExecDestroy(graph)
