"""GPU memory through the CUDA runtime: one device, one stream, tensors allocated once.

Not run on hardware yet: written from the documentation of cuda-bindings 13, tested over a stand-in of its runtime.
"""

import ctypes
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.backends import as_stored
from himap_export.engines.manifest import TensorSpec
from himap_export.engines.weight_file import NUMPY, StoredTensor, map_tensors
from himap_export.graphs.errors import Exit, HimapError


class NoGpu(Exception):  # noqa: N818  the message says which part of a GPU is missing, an answer more than an error
    """This machine cannot run CUDA."""


def cuda_runtime() -> ModuleType:
    """The CUDA runtime's bindings; NoGpu on a machine without NVIDIA's driver, HimapError if only they are missing."""
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        raise NoGpu("this machine has no CUDA driver") from None
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError:
        hint = "pip install 'cuda-bindings>=13'"
        raise HimapError("cuda-bindings is not installed", hint=hint, code=Exit.MISSING) from None


def first_gpu(cuda: ModuleType) -> tuple[str, int]:
    """Name and compute capability (89 for SM89) of device 0, or NoGpu; CUDA_VISIBLE_DEVICES picks the device."""
    error, _ = cuda.cudaGetDeviceCount()
    if error == cuda.cudaError_t.cudaSuccess:
        error, properties = cuda.cudaGetDeviceProperties(0)
    if error != cuda.cudaError_t.cudaSuccess:  # no device, or a driver too old for this runtime
        raise NoGpu(cuda.cudaGetErrorString(error)[1].decode())
    return properties.name.decode().rstrip("\0"), 10 * properties.major + properties.minor


class Gpu:
    """Device 0: allocates, copies, and orders everything on one stream."""

    def __init__(self, cuda: ModuleType) -> None:
        self._cuda = cuda
        self._call(cuda.cudaSetDevice(0))
        # Not the default stream: TensorRT would synchronise the whole device around every run on it.
        self._stream = self._call(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        self.stream = int(self._stream)
        self.allocated = 0  # bytes, ever: tensors and weights live as long as their engines

    def allocate(self, nbytes: int, owner: object) -> int:
        """Address of `nbytes` bytes of zeros that live as long as `owner`."""
        address = int(self._call(self._cuda.cudaMalloc(max(nbytes, 1))))
        self.allocated += nbytes
        weakref.finalize(owner, self._cuda.cudaFree, address)
        self._call(self._cuda.cudaMemsetAsync(address, 0, nbytes, self._stream))
        return address

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self._stream))
        self.synchronize()  # `array` may go away once we return

    def download(self, address: int, array: npt.NDArray[Any]) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self._stream))
        self.synchronize()

    def capture(self, work: Callable[[], None], owner: object) -> int | None:
        """What `work` enqueues, as a graph to `launch` as long as `owner` lives; None if CUDA cannot capture it."""
        cuda = self._cuda
        self._call(
            cuda.cudaStreamBeginCapture(self._stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        )
        try:
            work()
        except HimapError:  # TensorRT refuses what cannot be captured; the stream has to leave the mode all the same
            cuda.cudaStreamEndCapture(self._stream)
            return None
        error, graph = cuda.cudaStreamEndCapture(self._stream)
        if error != cuda.cudaError_t.cudaSuccess:
            return None
        executable = self._call(cuda.cudaGraphInstantiate(graph, 0))
        self._call(cuda.cudaGraphDestroy(graph))
        weakref.finalize(owner, cuda.cudaGraphExecDestroy, executable)
        return int(executable)

    def launch(self, graph: int) -> None:
        self._call(self._cuda.cudaGraphLaunch(graph, self._stream))

    def synchronize(self) -> None:
        self._call(self._cuda.cudaStreamSynchronize(self._stream))

    def _call(self, result: tuple[Any, ...]) -> Any:
        """The value a CUDA call returned behind its error code."""
        error, *values = result
        if error != self._cuda.cudaError_t.cudaSuccess:
            memory = error == self._cuda.cudaError_t.cudaErrorMemoryAllocation
            hint = "the bundle's weights and caches do not fit the GPU's free memory" if memory else ""
            _, text = self._cuda.cudaGetErrorString(error)
            raise HimapError("the GPU reports an error", text.decode(), hint)
        return values[0] if values else None


class DeviceTensor:
    """A static tensor in GPU memory; `read` waits for everything enqueued before it."""

    def __init__(self, gpu: Gpu, spec: TensorSpec) -> None:
        self.spec, self._gpu = spec, gpu
        self._dtype: type[np.generic] = NUMPY[spec.dtype]
        self.address = gpu.allocate(np.empty(spec.shape, self._dtype).nbytes, self)

    def write(self, values: npt.NDArray[Any]) -> None:
        stored = as_stored(values, self.spec.dtype)
        self._gpu.upload(self.address, np.ascontiguousarray(np.broadcast_to(stored, self.spec.shape)))

    def read(self) -> npt.NDArray[Any]:
        array = np.empty(self.spec.shape, self._dtype)
        self._gpu.download(self.address, array)
        return array


class DeviceWeights:
    """One copy of every weight on the device, for all engines; `addresses` by checkpoint name."""

    def __init__(self, gpu: Gpu, tensors: Iterable[StoredTensor]) -> None:
        self.addresses: Mapping[str, int] = {
            name: self._upload(gpu, array) for name, array in map_tensors(tensors).items()
        }

    def _upload(self, gpu: Gpu, array: npt.NDArray[Any]) -> int:
        address = gpu.allocate(array.nbytes, self)
        gpu.upload(address, array)
        return address
