"""GPU memory through cuda.core: one device, one stream, tensors allocated once."""

import ctypes
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import cycle
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from himap_export.engines.backends import Tensor, row_spec
from himap_export.engines.weight_file import NUMPY, StoredTensor, as_numbers, as_stored, map_tensors
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import TensorSpec

PIECE = 32 << 20  # bytes of a weight on their way at once


class NoGpu(Exception):  # noqa: N818  the message says which part of a GPU is missing, an answer more than an error
    """This machine cannot run CUDA."""


def cuda_core() -> Any:
    """Returns cuda.core; HimapError (missing) if it is not installed."""
    try:
        return import_module("cuda.core")
    except ImportError:
        hint = "pip install 'cuda-core>=1.2' 'cuda-bindings>=13'"
        raise HimapError("cuda-core is not installed", hint=hint, code=Exit.MISSING) from None


def first_gpu(core: Any) -> Any:
    """Returns cuda.core's device 0, or raises NoGpu; CUDA_VISIBLE_DEVICES picks the device."""
    try:
        devices = core.Device.get_all_devices()
    except Exception as problem:  # no driver, or one too old: errors of several kinds
        reason = "this machine has no CUDA driver" if isinstance(problem, RuntimeError) else str(problem)
        raise NoGpu(reason) from None
    if not devices:
        raise NoGpu("this machine has no CUDA device")
    return devices[0]


class Gpu:
    """One device: allocates, copies, and orders everything on one stream."""

    def __init__(self, core: Any, device: Any) -> None:
        self.core, self.device = core, device
        with reported():
            device.set_current()
            # Not the default stream: TensorRT would synchronise the whole device around every run on it.
            self.stream = device.create_stream(options=core.StreamOptions(nonblocking=True))
        self.held = 0  # bytes
        self._uploading: list[Any] = []

    def allocate(self, nbytes: int, owner: object) -> Any:
        """Returns a cuda.core Buffer of `nbytes` zeros, counted as long as `owner` lives, freed with its last user."""
        with reported():
            buffer = self.device.allocate(max(nbytes, 1), stream=self.stream)
            buffer.fill(0, stream=self.stream)
        self.count(nbytes, owner)
        return buffer

    def count(self, nbytes: int, owner: object) -> None:
        """Adds to `held` what `owner` takes, as long as it lives."""
        self.held += nbytes
        weakref.finalize(owner, self._uncount, nbytes)

    def _uncount(self, nbytes: int) -> None:
        self.held -= nbytes

    def view(self, address: int, nbytes: int, owner: object) -> Any:
        """Returns `nbytes` at an address of the host or the device as a Buffer that keeps `owner` alive."""
        return self.core.Buffer.from_handle(address, nbytes, owner=owner)

    def upload(self, target: Any, array: npt.NDArray[Any]) -> None:
        """Enqueues the copy into a Buffer of its size and goes on: nobody may change `array` any more."""
        source = self.view(array.ctypes.data, array.nbytes, array)
        self._uploading.append(source)
        with reported():
            target.copy_from(source, stream=self.stream)

    def download(self, source: Any, array: npt.NDArray[Any]) -> None:
        """Copies a Buffer into an `array` of its size, and waits for it."""
        with reported():
            source.copy_to(self.view(array.ctypes.data, array.nbytes, array), stream=self.stream)
        self.synchronize()

    def synchronize(self) -> None:
        with reported():
            self.stream.sync()
        self._uploading.clear()


@contextmanager
def reported() -> Iterator[None]:
    """Turns what cuda.core raises into a HimapError of one line."""
    try:
        yield
    except HimapError:
        raise
    except Exception as problem:  # its CUDAError stands in a private module
        memory = "OUT_OF_MEMORY" in str(problem)
        hint = "the bundle's weights and caches do not fit the GPU's free memory" if memory else ""
        raise HimapError("the GPU reports an error", " ".join(str(problem).split())[:300], hint) from None


class DeviceTensor:
    """A static tensor in GPU memory; only `read` waits, for everything enqueued before it."""

    def __init__(self, gpu: Gpu, spec: TensorSpec, buffer: Any = None) -> None:
        """`buffer`: memory that is there already; its own if None."""
        self.spec, self._gpu = spec, gpu
        self._dtype: type[np.generic] = NUMPY[spec.dtype]
        self._buffer = gpu.allocate(np.empty(spec.shape, self._dtype).nbytes, self) if buffer is None else buffer
        self.address = int(self._buffer.handle)

    def row(self, index: int, parts: int = 1) -> "DeviceTensor":
        spec = row_spec(self.spec, parts)
        size = np.empty(spec.shape, self._dtype).nbytes
        return DeviceTensor(self._gpu, spec, self._gpu.view(self.address + index * size, size, self._buffer))

    def take(self, source: Tensor) -> None:
        """Enqueues the copy, on the device."""
        assert isinstance(source, DeviceTensor)
        with reported():
            self._buffer.copy_from(source._buffer, stream=self._gpu.stream)

    def write(self, values: npt.NDArray[Any]) -> None:
        stored = as_stored(values, self.spec.dtype)
        self._gpu.upload(self._buffer, np.broadcast_to(stored, self.spec.shape).copy())  # the caller's may change

    def read(self) -> npt.NDArray[Any]:
        array = np.empty(self.spec.shape, self._dtype)
        self._gpu.download(self._buffer, array)
        return as_numbers(array, self.spec.dtype)


class DeviceWeights:
    """One copy of every weight on the device, for all engines; `addresses` by checkpoint name."""

    def __init__(self, gpu: Gpu, tensors: Iterable[StoredTensor]) -> None:
        self._buffers: dict[str, Any] = {}
        arrays = map_tensors(tensors)
        if arrays:
            with _Staging(gpu) as staging:
                for name, array in arrays.items():
                    self._buffers[name] = gpu.allocate(array.nbytes, self)
                    staging.upload(self._buffers[name], array)
        self.addresses = {name: int(buffer.handle) for name, buffer in self._buffers.items()}


class _Staging:
    """Two pinned buffers: while one is on its way to the device, the other is filled from the file."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, pinned = gpu, gpu.core.LegacyPinnedMemoryResource()
        with reported():
            self._pinned = [pinned.allocate(PIECE, stream=gpu.stream) for _ in range(2)]
        self._halves = cycle(self._pinned)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._gpu.synchronize()
        for half in self._pinned:
            half.close()

    def upload(self, target: Any, array: npt.NDArray[Any]) -> None:
        """Copies the array into the Buffer `target`, piece by piece."""
        for offset in range(0, array.nbytes, PIECE):
            half, size = next(self._halves), min(PIECE, array.nbytes - offset)
            ctypes.memmove(int(half.handle), array.ctypes.data + offset, size)
            self._gpu.synchronize()  # the other half has arrived: it is filled next
            piece = self._gpu.view(int(target.handle) + offset, size, target)
            with reported():
                piece.copy_from(self._gpu.view(int(half.handle), size, half), stream=self._gpu.stream)
