"""Running engines on one GPU: one copy of the weights, tensors bound once by address, one stream.

Not run on hardware yet: written from the API's documentation, tested over stand-ins of its runtime and CUDA's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from himap_export.engines.backends import Tensor
from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import TensorSpec
from himap_export.engines.nvinfer.cuda_memory import DeviceTensor, DeviceWeights, Gpu, NoGpu, cuda_runtime, first_gpu
from himap_export.engines.nvinfer.flavour import Flavour, log_of, one_line
from himap_export.graphs.errors import Exit, HimapError


def open_engines(flavour: Flavour, bundle: Bundle) -> "NvInferEngines":
    """Needs a GPU that the product runs on."""
    flavour.api()
    try:
        cuda = cuda_runtime()
        name, capability = first_gpu(cuda)
    except NoGpu as reason:
        details = f"{reason}; building the engines needed none"
        raise HimapError(
            f"running {flavour.name} engines needs a GPU", details, _elsewhere(bundle), Exit.MISSING
        ) from None
    if flavour.capabilities and capability not in flavour.capabilities:
        details = f"cuda:0 is {name}, SM{capability}; it runs on SM{', '.join(map(str, flavour.capabilities))}"
        raise HimapError(f"{flavour.title} does not support this GPU", details, _elsewhere(bundle), Exit.MISSING)
    return NvInferEngines(flavour, bundle, Gpu(cuda), f"cuda:0 {name}")


def _elsewhere(bundle: Bundle) -> str:
    held = "onnxruntime" in bundle.manifest.engines
    return "--backend onnxruntime runs here" if held else "a bundle exported with --backend onnxruntime runs here"


class NvInferEngines:
    """The engines of a bundle on one GPU, over one copy of the weights, all on one stream."""

    def __init__(self, flavour: Flavour, bundle: Bundle, gpu: Gpu, device: str) -> None:
        self.flavour, self.device, self._bundle, self._gpu = flavour, device, bundle, gpu
        inside = bundle.manifest.weight_form == "embedded"
        self._weights = DeviceWeights(gpu, () if inside else bundle.weights().values())
        self._runtime = flavour.api().Runtime(log_of(flavour))
        self.stream = gpu.stream

    def tensor(self, spec: TensorSpec) -> DeviceTensor:
        return DeviceTensor(self._gpu, spec)

    def bind(self, graph: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        """A function that enqueues `graph`; reading a tensor waits for it."""
        engine = self._engine(graph)
        context = engine.create_execution_context()
        if context is None:
            raise self.failed(f"cannot prepare {graph}")
        addresses = dict(self._weights.addresses)
        for name, tensor in tensors.items():
            assert isinstance(tensor, DeviceTensor)  # tensors come from this object's own `tensor`
            addresses[name] = tensor.address
        _check_aliases(self.flavour.api(), engine, graph, addresses)
        for name in _doors(engine):
            if not context.set_tensor_address(name, addresses[name]):
                raise self.failed(f"cannot bind {name} of {graph}")
        return _Run(self, graph, context, engine, tensors)

    def chain(self, runs: Sequence[Callable[[], None]]) -> Callable[[], None]:
        def run() -> None:
            for each in runs:
                each()

        return run

    def _engine(self, graph: str) -> Any:
        path = self._bundle.path(self._bundle.manifest.engines[self.flavour.name][graph].file)
        log_of(self.flavour).clear()
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise self.failed(f"cannot open {path}")
        return engine

    def failed(self, what: str) -> HimapError:
        details = one_line(next(iter(log_of(self.flavour).errors), "it says no more"))
        hint = f"check {self.flavour.name} {self.flavour.version()} against the manifest's toolchain"
        return HimapError(f"{self.flavour.title} {what}", details, hint)


@dataclass(frozen=True)
class _Run:
    """Enqueues one graph; holds what the context reads and writes but does not keep alive."""

    engines: NvInferEngines
    graph: str
    context: Any
    engine: Any
    tensors: Mapping[str, Tensor]

    def __call__(self) -> None:
        if not self.context.execute_async_v3(self.engines.stream):
            raise self.engines.failed(f"cannot run {self.graph}")


def _doors(engine: Any) -> list[str]:
    return [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]


def _check_aliases(trt: ModuleType, engine: Any, graph: str, addresses: Mapping[str, int]) -> None:
    """A cache that TensorRT updates in place must be bound as input and as output at one address."""
    for name in _doors(engine):
        if engine.get_tensor_mode(name) != trt.TensorIOMode.OUTPUT:
            continue
        source = engine.get_aliased_input_tensor(name)
        if source and addresses[source] != addresses[name]:
            raise ValueError(f"{graph} updates {source} in place: bind {name} to the same tensor")
