"""Launching the compiled kernel: CUDA's driver loads the PTX; neither Triton nor torch is needed.

Not run on hardware yet: written from the documentation of cuda-bindings 13, tested over a stand-in of its driver.
"""

import ctypes
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from himap_export.engines.plugin.ptx import POINTERS, GatherKernel


class Launcher:
    """One kernel on the device whose context is current at the first launch."""

    def __init__(self, kernel: GatherKernel) -> None:
        self.kernel, self._function = kernel, None

    def __call__(self, pointers: Sequence[int], stream: int) -> None:
        """Enqueues the kernel over device addresses in the order of POINTERS; RuntimeError if CUDA refuses."""
        assert len(pointers) == len(POINTERS)
        driver = import_module("cuda.bindings.driver")
        if self._function is None:
            module = _done(driver, driver.cuModuleLoadData(self.kernel.ptx.encode()))
            self._function = _done(driver, driver.cuModuleGetFunction(module, self.kernel.name.encode()))
        arguments = (tuple(pointers), (ctypes.c_void_p,) * len(pointers))
        sizes = (*self.kernel.grid, *self.kernel.block, self.kernel.shared_bytes)
        _done(driver, driver.cuLaunchKernel(self._function, *sizes, stream, arguments, 0))


def _done(driver: Any, result: tuple[Any, ...]) -> Any:
    """The value a CUDA call returned behind its error code."""
    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(error)
        raise RuntimeError(f"the top-k gather cannot run: {text.decode()}")
    return values[0] if values else None
