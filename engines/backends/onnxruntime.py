"""onnxruntime on the CPU: the bundle's ONNX graphs are its engines.

All sessions read the same mapped weight files: each weight is one OrtValue over the file's pages, shared with every
session, and prepacking is off because it would keep a second, private copy per session.
"""

import os
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.backends import Tensor, as_stored
from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import EngineRecord, TensorSpec
from himap_export.engines.weight_file import NUMPY, map_tensors
from himap_export.graphs.errors import Exit, HimapError

_ELEMENT = {"fp32": "float", "fp16": "float16", "bf16": "bfloat16", "int64": "int64"}


def _onnxruntime() -> ModuleType:
    try:
        onnxruntime = import_module("onnxruntime")
    except ImportError:
        hint = "pip install onnxruntime (CPU) or onnxruntime-gpu (CUDA), not both"
        raise HimapError("onnxruntime is not installed", hint=hint, code=Exit.MISSING) from None
    return onnxruntime


def check(bundle_dtype: str) -> None:
    _onnxruntime()
    if bundle_dtype == "bf16":
        hint = "use --dtype fp16 or fp32"
        raise HimapError("onnxruntime's CPU kernels do not compute in bf16", hint=hint, code=Exit.USAGE)


def version() -> dict[str, str]:
    return {"onnxruntime": _onnxruntime().__version__}


def build(bundle: Bundle, graph: str) -> EngineRecord:
    """Opens the graph once: proof that every node has a kernel. The ONNX file itself is the engine."""
    start = time.perf_counter()
    _Sessions(bundle, None).session(graph)
    gather = "ops" if any(name.startswith("score_") for name in bundle.graph(graph).inputs) else "none"
    return EngineRecord(bundle.graph(graph).file, round(time.perf_counter() - start, 3), gather)


def open_engines(bundle: Bundle, threads: int | None = None) -> "OnnxRuntime":
    return OnnxRuntime(bundle, threads)


class HostTensor:
    """NumPy memory that onnxruntime reads and writes in place."""

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self.array: npt.NDArray[Any] = np.zeros(spec.shape, NUMPY[spec.dtype])
        self.value = _onnxruntime().OrtValue.ortvalue_from_numpy(self.array)

    def write(self, values: npt.NDArray[Any]) -> None:
        self.array[...] = as_stored(values, self.spec.dtype)

    def read(self) -> npt.NDArray[Any]:
        return self.array.copy()


class _Sessions:
    """Opens graphs over one set of weights."""

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self.bundle, self.ort = bundle, _onnxruntime()
        self.threads = threads or len(os.sched_getaffinity(0))
        wanted = {name for g in bundle.manifest.graphs.values() for name in g.weights}
        arrays = map_tensors(t for name, t in bundle.tensors.items() if name in wanted)
        self.weights = {name: self.ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}

    def session(self, graph: str) -> Any:
        options = self.ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 3
        options.add_session_config_entry("session.disable_prepacking", "1")
        record = self.bundle.graph(graph)
        for name in record.weights:
            options.add_initializer(name, self.weights[name])
        path = str(self.bundle.path(record.file))
        try:
            # Constant folding would keep a transposed private copy of every weight of the vision tower.
            return self.ort.InferenceSession(
                path, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
            )
        except Exception as problem:  # onnxruntime's own exceptions share no base class
            details = str(problem).splitlines()[0]
            raise HimapError(
                f"onnxruntime refuses {path}", details, "check onnxruntime's version against the manifest's"
            ) from None


class OnnxRuntime:
    """The sessions of a bundle on the CPU."""

    device = "cpu"

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self._sessions = _Sessions(bundle, threads)

    def tensor(self, spec: TensorSpec) -> HostTensor:
        return HostTensor(spec)

    def bind(self, graph: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        session, record = self._sessions.session(graph), self._sessions.bundle.graph(graph)
        binding = session.io_binding()
        for names, bind in (
            (record.inputs, binding.bind_ortvalue_input),
            (record.outputs, binding.bind_ortvalue_output),
        ):
            for name in names:
                tensor = tensors[name]
                assert isinstance(tensor, HostTensor)  # tensors come from this object's own `tensor`
                bind(name, tensor.value)
        return lambda: session.run_with_iobinding(binding)
