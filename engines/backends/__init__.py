"""One module per backend, each with the same two functions.

`build(bundle, graph)` compiles one ONNX graph of a bundle folder, and `open_engines(bundle, threads)` opens what was
built. Both raise HimapError with exit code 4 when the backend's package or device is missing.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from himap_export.engines.bundle import Bundle
from himap_export.engines.command import BACKENDS
from himap_export.engines.manifest import EngineRecord, TensorSpec
from himap_export.graphs.errors import Exit, HimapError


class Tensor(Protocol):
    """A static tensor in the backend's memory, allocated once and bound to the graphs that read or write it."""

    @property
    def spec(self) -> TensorSpec: ...
    def write(self, values: npt.NDArray[Any]) -> None: ...
    def read(self) -> npt.NDArray[Any]: ...


class Engines(Protocol):
    """A bundle's graphs, ready to run over one copy of its weights."""

    device: str

    def tensor(self, spec: TensorSpec) -> Tensor: ...

    def bind(self, graph: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        """A function that runs `graph` on these tensors; one bound as input and output is updated in place."""
        ...


class Backend(Protocol):
    """What a backend's module offers."""

    def check(self, bundle_dtype: str) -> None:
        """HimapError if this backend cannot build graphs of this dtype, or is not installed."""
        ...

    def build(self, bundle: Bundle, graph: str) -> EngineRecord: ...
    def open_engines(self, bundle: Bundle, threads: int | None = None) -> Engines: ...
    def version(self) -> dict[str, str]: ...


def load_backend(name: str) -> Backend:
    """The module of a backend, by the name users give it; HimapError (usage) if there is none."""
    if name not in BACKENDS:
        raise HimapError(f"unknown backend {name}", hint=f"known: {', '.join(BACKENDS)}", code=Exit.USAGE)
    return cast(Backend, import_module(f"{__name__}.{name.replace('-', '_')}"))


def as_stored(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """`values` in the NumPy form of `dtype`; bf16 is rounded to nearest even and held as 16-bit words."""
    if dtype != "bf16":
        from himap_export.engines.weight_file import NUMPY

        return np.ascontiguousarray(values, NUMPY[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def as_numbers(stored: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """The inverse: bf16 words become fp32, everything else is itself."""
    if dtype != "bf16":
        return stored
    return (stored.astype(np.uint32) << 16).view(np.float32)
