"""A bundle's graphs as OpenVINO's compiled models, over tensors that they share and update in place."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import numpy.typing as npt

from himap_export.engines.backends import Opening, Tensor
from himap_export.engines.bundle import Bundle
from himap_export.engines.extras import required
from himap_export.engines.openvino.frontend import Append, Frontend
from himap_export.engines.weight_file import NUMPY, as_numbers, as_stored, map_tensors
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import PortType, TensorSpec
from himap_export.graphs.spec import Dtype

_TYPES: Mapping[PortType, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int64": "i64"}
_NONE: Mapping[str, npt.NDArray[Any]] = MappingProxyType({})


class OvTensor:
    """Memory of the host that several compiled models read and write where it lies."""

    def __init__(self, spec: TensorSpec) -> None:
        ov = required("openvino")
        self.spec, self.value = spec, ov.Tensor(getattr(ov.Type, _TYPES[spec.dtype]), list(spec.shape))
        self.view: npt.NDArray[Any] = self.value.data.view(NUMPY[spec.dtype])
        self.view[...] = 0

    def write(self, values: npt.NDArray[Any]) -> None:
        self.view[...] = as_stored(values, self.spec.dtype)

    def read(self) -> npt.NDArray[Any]:
        return as_numbers(self.view, self.spec.dtype).copy()


class OpenVino:
    """The compiled models of a bundle on one device. Each holds the weights that it reads, in its kernels' order."""

    def __init__(self, bundle: Bundle, opening: Opening) -> None:
        self._bundle, self._threads, self.device = bundle, opening.cpu_threads(bundle), opening.device or "cpu"
        self._compiler = Compiler(self.device, bundle.manifest.dtype)
        absent = bundle.manifest.weight_form == "absent"
        self._weights = map_tensors(bundle.weights().values()) if absent else {}

    def tensor(self, spec: TensorSpec) -> Tensor:
        return OvTensor(spec)

    def bind(self, graph: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        record, file = self._bundle.manifest.graphs[graph], self._bundle.manifest.engines["openvino"][graph].file
        engine = self._compiler.compile(self._bundle.path(file), self._threads, self._weights)
        request, appends = engine.model.create_infer_request(), list[Callable[[], None]]()
        read = {name for port in engine.model.inputs for name in port.get_names()}
        for name in (*record.inputs, *record.outputs):
            tensor = tensors[name]
            assert isinstance(tensor, OvTensor)  # tensors come from this object's own `tensor`
            if name in engine.appends:
                appends.append(_append(request, engine.appends[name], tensor))
            elif name in read or name in record.outputs:
                request.set_tensor(name, tensor.value)

        def run() -> None:
            try:
                request.start_async()  # `infer` would copy every output into an array of its own
                request.wait()
            except RuntimeError as problem:
                raise HimapError(f"OpenVINO cannot run {graph}", _line(problem)) from None
            for append in appends:
                append()

        return run

    def chain(self, runs: Sequence[Callable[[], None]]) -> Callable[[], None]:
        def run() -> None:
            for each in runs:
                each()

        return run


def _append(request: Any, append: Append, cache: OvTensor) -> Callable[[], None]:
    """Returns what writes one token's keys or values into the slots of its cache [B,G,C,E]."""
    new, at = request.get_tensor(append.new), request.get_tensor(append.at)
    rows, slots, samples = new.data.view(cache.view.dtype)[:, :, 0], at.data.reshape(-1), range(len(cache.view))

    def run() -> None:
        for sample in samples:
            cache.view[sample, :, slots[sample]] = rows[sample]

    return run


@dataclass(frozen=True)
class Compiled:
    """A compiled model; `appends`: what it leaves to do after it has run, by the outputs of its ONNX graph."""

    model: Any
    appends: Mapping[str, Append]


class Compiler:
    """OpenVINO on one device; HimapError (missing) if there is none such, or it does not compute in `dtype`."""

    def __init__(self, device: str, dtype: str) -> None:
        self._core, self._device = required("openvino").Core(), device.upper()
        held = {name.partition(".")[0] for name in self._core.available_devices}
        if self._device not in held:
            details = f"it sees {', '.join(sorted(held)).lower() or 'none'}"
            raise HimapError(f"OpenVINO sees no device {device} here", details, "give another `device`", Exit.MISSING)
        if dtype not in (own := _computed(self._core, self._device)):
            name, hint = self._core.get_property(self._device, "FULL_DEVICE_NAME"), "export with another `dtype`"
            raise HimapError(
                f"{name} does not compute in {dtype}", f"it computes in {', '.join(own)}", hint, Exit.MISSING
            )
        self._frontend = Frontend(self._core)

    def compile(self, path: Path, threads: int, weights: Mapping[str, npt.NDArray[Any]] = _NONE) -> Compiled:
        """Returns the graph in `path`, compiled to compute as it says: fp32 where it casts to fp32, else in its own
        dtype, with as many CPU `threads`. `weights` stand for the inputs of their names."""
        settings = {
            "EXECUTION_MODE_HINT": "ACCURACY",  # else fp32 scores, too, would be computed in bf16
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
        }
        try:
            graph = self._frontend.read(path, weights)
            return Compiled(self._core.compile_model(graph.model, self._device, settings), graph.appends)
        except RuntimeError as problem:
            hint = "check openvino's version against the manifest's"
            raise HimapError(f"OpenVINO refuses {path}", _line(problem), hint) from None


def computed(device: str = "cpu") -> tuple[Dtype, ...]:
    """Returns the dtypes that a device computes in."""
    return _computed(required("openvino").Core(), device.upper())


def _computed(core: Any, device: str) -> tuple[Dtype, ...]:
    can = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    return tuple(dtype for dtype in get_args(Dtype) if dtype.upper() in can)


def _line(problem: Exception) -> str:
    """Returns the last line that says something: the first ones say where in OpenVINO's source."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[-1] if lines else type(problem).__name__
