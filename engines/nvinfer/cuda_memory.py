"""GPU memory through the CUDA runtime: one device, one stream, tensors allocated once.

Not run on hardware yet: written from the documentation of cuda-bindings 13, tested over a stand-in of its runtime.
"""

import ctypes
import os
import weakref
from collections.abc import Iterable
from importlib import import_module
from itertools import cycle
from types import ModuleType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from himap_export.engines.weight_file import NUMPY, StoredTensor, as_stored, map_tensors
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import TensorSpec

PIECE = 32 << 20  # bytes of a weight on their way at once


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
        self.cuda = cuda
        self.call(cuda.cudaSetDevice(0))
        # Not the default stream: TensorRT would synchronise the whole device around every run on it.
        self.stream = int(self.call(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking)))
        self.held = 0  # bytes
        self._uploading: list[npt.NDArray[Any]] = []

    def allocate(self, nbytes: int, owner: object) -> int:
        """Address of `nbytes` bytes of zeros that live as long as `owner`."""
        address = int(self.call(self.cuda.cudaMalloc(max(nbytes, 1))))
        weakref.finalize(owner, self.cuda.cudaFree, address)
        self.count(nbytes, owner)
        self.call(self.cuda.cudaMemsetAsync(address, 0, nbytes, self.stream))
        return address

    def count(self, nbytes: int, owner: object) -> None:
        """Adds to `held` what `owner` takes, as long as it lives."""
        self.held += nbytes
        weakref.finalize(owner, self._uncount, nbytes)

    def _uncount(self, nbytes: int) -> None:
        self.held -= nbytes

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        """Enqueues the copy and goes on: nobody may change `array` any more."""
        self._uploading.append(array)
        self.copy(address, array.ctypes.data, array.nbytes)

    def copy(self, address: int, source: int, nbytes: int) -> None:
        """Enqueues a copy from the host, whose memory must last until `synchronize`."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call(self.cuda.cudaMemcpyAsync(address, source, nbytes, kind, self.stream))

    def download(self, address: int, array: npt.NDArray[Any]) -> None:
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call(self.cuda.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self.stream))
        self.synchronize()

    def synchronize(self) -> None:
        self.call(self.cuda.cudaStreamSynchronize(self.stream))
        self._uploading.clear()

    def call(self, result: tuple[Any, ...]) -> Any:
        """The value a CUDA call returned behind its error code; HimapError if that is one."""
        error, *values = result
        if error != self.cuda.cudaError_t.cudaSuccess:
            memory = error == self.cuda.cudaError_t.cudaErrorMemoryAllocation
            hint = "the bundle's weights and caches do not fit the GPU's free memory" if memory else ""
            _, text = self.cuda.cudaGetErrorString(error)
            raise HimapError("the GPU reports an error", text.decode(), hint)
        return values[0] if values else None


class DeviceTensor:
    """A static tensor in GPU memory; only `read` waits, for everything enqueued before it."""

    def __init__(self, gpu: Gpu, spec: TensorSpec) -> None:
        self.spec, self._gpu = spec, gpu
        self._dtype: type[np.generic] = NUMPY[spec.dtype]
        self.address = gpu.allocate(np.empty(spec.shape, self._dtype).nbytes, self)

    def write(self, values: npt.NDArray[Any]) -> None:
        stored = as_stored(values, self.spec.dtype)
        self._gpu.upload(self.address, np.broadcast_to(stored, self.spec.shape).copy())  # the caller's may change

    def read(self) -> npt.NDArray[Any]:
        array = np.empty(self.spec.shape, self._dtype)
        self._gpu.download(self.address, array)
        return array


class DeviceWeights:
    """One copy of every weight on the device, for all engines; `addresses` by checkpoint name."""

    def __init__(self, gpu: Gpu, tensors: Iterable[StoredTensor]) -> None:
        self.addresses: dict[str, int] = {}
        arrays = map_tensors(tensors)
        if not arrays:
            return
        with _Staging(gpu) as staging:
            for name, array in arrays.items():
                self.addresses[name] = gpu.allocate(array.nbytes, self)
                staging.upload(self.addresses[name], array)


class _Staging:
    """Two pinned buffers: while one is on its way to the device, the other is filled from the file."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._start = int(gpu.call(gpu.cuda.cudaMallocHost(2 * PIECE)))
        self._halves = cycle((self._start, self._start + PIECE))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._gpu.cuda.cudaStreamSynchronize(self._gpu.stream)
        self._gpu.cuda.cudaFreeHost(self._start)

    def upload(self, address: int, array: npt.NDArray[Any]) -> None:
        for offset in range(0, array.nbytes, PIECE):
            half, size = next(self._halves), min(PIECE, array.nbytes - offset)
            ctypes.memmove(half, array.ctypes.data + offset, size)
            self._gpu.synchronize()  # the other half has arrived: it is filled next
            self._gpu.copy(address + offset, half, size)
