"""Launching the compiled kernel: cuda.core loads the PTX; neither Triton nor torch is needed."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from himap_export.engines.plugin.ptx import POINTERS, GatherKernel


class Launcher:
    """One kernel on the device whose context is current at the first launch."""

    def __init__(self, kernel: GatherKernel) -> None:
        self.kernel = kernel
        self._function: Any = None

    def __call__(self, pointers: Sequence[int], stream: int) -> None:
        """Enqueues the kernel over device addresses in the order of POINTERS; RuntimeError if CUDA refuses."""
        assert len(pointers) == len(POINTERS)
        core, kernel = import_module("cuda.core"), self.kernel
        try:
            if self._function is None:
                self._function = core.ObjectCode.from_ptx(kernel.ptx.encode()).get_kernel(kernel.name)
            config = core.LaunchConfig(grid=kernel.grid, block=kernel.block, shmem_size=kernel.shared_bytes)
            core.launch(core.Stream.from_handle(stream), config, self._function, *pointers)
        except Exception as problem:  # its CUDAError stands in a private module
            raise RuntimeError(f"the top-k gather cannot run: {problem}") from None
