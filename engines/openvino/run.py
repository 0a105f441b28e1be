"""A bundle's graphs as OpenVINO's compiled models, over tensors that they share and update in place."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, get_args

import numpy as np
import numpy.typing as npt

from himap_export.engines.backends import Opening, Tensor, row_spec
from himap_export.engines.bundle import Bundle
from himap_export.engines.extras import required
from himap_export.engines.manifest import GraphRecord
from himap_export.engines.openvino.frontend import UNKNOWN, Append, Frontend, ReadGraph
from himap_export.engines.openvino.quantised import Dequantized, is_large, read_turned
from himap_export.engines.weight_file import NUMPY, as_numbers, as_stored, map_tensors
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import ElementType, TensorSpec
from himap_export.graphs.spec import Dtype

_TYPES: Mapping[ElementType, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int64": "i64"}
_NONE: Mapping[str, npt.NDArray[Any]] = MappingProxyType({})


class OvTensor:
    """Memory of the host that several compiled models read and write where it lies."""

    def __init__(self, spec: TensorSpec, value: Any) -> None:
        self.spec, self.value = spec, value
        self.view: npt.NDArray[Any] = value.data.view(NUMPY[spec.dtype])

    @classmethod
    def zeros(cls, spec: TensorSpec) -> Self:
        """Returns a tensor in memory of its own."""
        ov = required("openvino")
        made = cls(spec, ov.Tensor(getattr(ov.Type, _TYPES[spec.dtype]), list(spec.shape)))
        made.view[...] = 0
        return made

    def row(self, index: int, parts: int = 1) -> "OvTensor":
        ov, spec = required("openvino"), row_spec(self.spec, parts)
        rows = self.value.data.reshape(-1, *spec.shape[1:])[index : index + 1]
        return OvTensor(spec, ov.Tensor(rows, list(spec.shape), getattr(ov.Type, _TYPES[spec.dtype])))

    def take(self, source: Tensor) -> None:
        assert isinstance(source, OvTensor)
        self.view[...] = source.view

    def write(self, values: npt.NDArray[Any]) -> None:
        self.view[...] = as_stored(values, self.spec.dtype)

    def read(self) -> npt.NDArray[Any]:
        return as_numbers(self.view, self.spec.dtype).copy()


class OpenVino:
    """The compiled models of a bundle on one device. Each holds the weights that it reads, in its kernels' order.

    Each is compiled once, side by side with others: `bind` begins, `chain` and the first run wait.
    """

    binds_often = True

    def __init__(self, bundle: Bundle, opening: Opening) -> None:
        self._bundle, self.device = bundle, opening.device or "cpu"
        self._compiler = Compiler.of(bundle, self.device, opening, _own_weights(bundle))
        absent = bundle.manifest.weight_form == "absent"
        self._weights = map_tensors(bundle.weights().values()) if absent else {}
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "compile")
        self._compiled: dict[str, tuple[Future[Any], Mapping[str, Append]]] = {}

    def tensor(self, spec: TensorSpec) -> Tensor:
        return OvTensor.zeros(spec)

    def bind(self, graph: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        if graph not in self._compiled:
            file = self._bundle.manifest.engines["openvino"][graph].file
            read = self._compiler.read(self._bundle.path(file), self._weights)
            self._compiled[graph] = self._pool.submit(self._compiler.compile, read), read.appends
        return Run(graph, self._bundle.manifest.graphs[graph], *self._compiled[graph], tensors)

    def chain(self, runs: Sequence[Callable[[], None]]) -> Callable[[], None]:
        for each in runs:
            assert isinstance(each, Run)  # they come from this object's own `bind`
            each.wait()

        def run() -> None:
            for each in runs:
                each()

        return run


def _own_weights(bundle: Bundle) -> str | None:
    """Returns the file of quantised weights that the records of a bundle's engines name; None if it has none."""
    named = {engine.weights for engine in bundle.manifest.engines["openvino"].values()}
    if len(named) != 1 or (None in named) == bool(bundle.manifest.quantised()):
        raise HimapError(f"the engines of {bundle.folder} do not name their weights", hint="export the bundle again")
    return named.pop()


class Run:
    """One compiled model over its tensors, ready when it has been compiled. Called, it runs."""

    def __init__(
        self,
        graph: str,
        record: GraphRecord,
        compiling: Future[Any],
        appends: Mapping[str, Append],
        tensors: Mapping[str, Tensor],
    ) -> None:
        self._graph, self._record, self._compiling = graph, record, compiling
        self._tensors, self._taken_out = tensors, appends
        self._appends: list[Callable[[], None]] = []
        self._request: Any = None

    def wait(self) -> None:
        """Waits until the model is compiled, and binds its tensors; HimapError if OpenVINO refuses it or they do not
        fit."""
        if self._request is not None:
            return
        model = self._compiling.result()
        request, read = model.create_infer_request(), [port.get_names() for port in model.inputs]
        try:
            for names in read:
                if not names & self._record.inputs.keys():
                    raise RuntimeError(f"it reads {min(names)}, which the manifest does not name")
            for name in (*self._record.inputs, *self._record.outputs):
                tensor = self._tensors[name]
                assert isinstance(tensor, OvTensor)  # as they come from the engines' own `tensor`
                if name in self._taken_out:
                    self._appends.append(_append(request, self._taken_out[name], tensor))
                elif name in self._record.outputs or any(name in names for names in read):
                    request.set_tensor(name, tensor.value)
        except RuntimeError as problem:
            hint = "the graph and the manifest do not fit: export the bundle again"
            raise HimapError(f"OpenVINO cannot bind {self._graph}", _line(problem), hint) from None
        self._request = request

    def __call__(self) -> None:
        self.wait()
        try:
            self._request.start_async()  # `infer` would copy every output into an array of its own
            self._request.wait()
            for append in self._appends:
                append()
        except (RuntimeError, IndexError) as problem:  # IndexError: of a slot outside its cache
            raise HimapError(f"OpenVINO cannot run {self._graph}", _line(problem)) from None


def _append(request: Any, append: Append, cache: OvTensor) -> Callable[[], None]:
    """Returns what writes one token's keys or values into the slots of its cache [B,G,C,E]."""
    new, at = request.get_tensor(append.new), request.get_tensor(append.at)
    rows, slots, samples = new.data.view(cache.view.dtype)[:, :, 0], at.data.reshape(-1), np.arange(len(cache.view))

    def run() -> None:
        cache.view[samples, :, slots] = rows

    return run


class Compiler:
    """OpenVINO on one device; HimapError (missing) if there is none such, or it does not compute in `dtype`."""

    def __init__(
        self,
        device: str,
        dtype: str,
        threads: int,
        quantised: Mapping[str, Dequantized] | None = None,
        packed: bool = False,
        exact: bool = False,
    ) -> None:
        """`quantised` and `packed` as for `Frontend`; `exact`: no activation is rounded beside them."""
        self._core, self._device, self._threads = required("openvino").Core(), device.upper(), threads
        self._rounds, self._rounds_prefill = not exact, not exact and packed and dtype != "fp32"
        held = {name.partition(".")[0] for name in self._core.available_devices}
        if self._device not in held:
            details = f"it sees {', '.join(sorted(held)).lower() or 'none'}"
            raise HimapError(f"OpenVINO sees no device {device} here", details, "give another `device`", Exit.MISSING)
        if dtype not in (own := _computed(self._core, self._device)):
            name, hint = self._core.get_property(self._device, "FULL_DEVICE_NAME"), "export with another `dtype`"
            raise HimapError(
                f"{name} does not compute in {dtype}", f"it computes in {', '.join(own)}", hint, Exit.MISSING
            )
        self._frontend = Frontend(quantised or {}, packed)

    @classmethod
    def of(cls, bundle: Bundle, device: str, opening: Opening, turned: str | None) -> Self:
        """Returns what compiles the graphs of `bundle`, whose quantised weights are in the file `turned`."""
        return cls(
            device, bundle.manifest.dtype, opening.cpu_threads(bundle),
            quantised=read_turned(bundle.path(turned), bundle.manifest) if turned else {}, packed=is_large(bundle),
            exact=opening.exact,
        )  # fmt: skip

    def read(self, path: Path, weights: Mapping[str, npt.NDArray[Any]] = _NONE) -> ReadGraph:
        """Returns the graph in `path`; `weights` stand for the inputs of their names."""
        try:
            return self._frontend.read(path, weights)
        except HimapError as problem:  # a rule's
            raise HimapError(f"OpenVINO refuses {path.name}", str(problem)) from None
        except Exception as problem:  # OpenVINO's own share no base class
            raise _refused(path.name, problem) from None

    def compile(self, graph: ReadGraph) -> Any:
        """Returns the model, compiled to compute as it says: fp32 where it casts to fp32, else in its own dtype. Beside
        quantised weights activations are rounded to 8 bits, 32 of them together: in decode, and in a 16-bit prefill
        over weights that are too many to multiply out. Prefill in fp32 never rounds, so that what it keeps does not
        hang on the machine."""
        rounded = self._rounds if graph.appends else self._rounds_prefill
        settings = {
            "EXECUTION_MODE_HINT": "ACCURACY",  # else fp32 scores, too, would be computed in bf16
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self._threads,
            # Fewer threads than cores would all be tied to the first ones, and so would a neighbour's.
            "ENABLE_CPU_PINNING": self._threads >= len(os.sched_getaffinity(0)),
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 32 if rounded else 0,
        }
        try:
            return self._core.compile_model(graph.model, self._device, settings)
        except RuntimeError as problem:
            raise _refused(graph.model.get_friendly_name(), problem) from None


def _refused(graph: str, problem: Exception) -> HimapError:
    return HimapError(f"OpenVINO refuses {graph}", _line(problem), "check openvino's version against the manifest's")


def computed(device: str = "cpu") -> tuple[Dtype, ...]:
    """Returns the dtypes that a device computes in."""
    return _computed(required("openvino").Core(), device.upper())


def _computed(core: Any, device: str) -> tuple[Dtype, ...]:
    can = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    return tuple(dtype for dtype in get_args(Dtype) if dtype.upper() in can)


def _line(problem: Exception) -> str:
    """Returns the line that names unknown operators, else the last: the first ones say where in OpenVINO's source."""
    lines = [line.strip(" -") for line in str(problem).splitlines() if line.strip(" -")]
    return next((line for line in lines if UNKNOWN in line), lines[-1] if lines else type(problem).__name__)
