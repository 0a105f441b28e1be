"""Running engines on one GPU: one copy of the weights, tensors bound once by address, one stream.

Not run on hardware yet: written from the API's documentation, tested over stand-ins of its runtime and CUDA's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from himap_export.engines.backends import Tensor
from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import TensorSpec
from himap_export.engines.nvinfer.cuda_memory import DeviceTensor, DeviceWeights, Gpu, NoGpu, cuda_runtime, first_gpu
from himap_export.engines.nvinfer.flavour import RTX, Flavour, log_of, one_line
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
        self.stream, self._scratch = gpu.stream, 0

    def tensor(self, spec: TensorSpec) -> DeviceTensor:
        return DeviceTensor(self._gpu, spec)

    def bind(self, graph: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        """A function that enqueues `graph`; reading a tensor waits for it."""
        engine = self._engine(graph)
        context = engine.create_execution_context()
        if context is None:
            raise self.failed(f"cannot prepare {graph}")
        self._scratch += int(engine.device_memory_size_v2)
        addresses = dict(self._weights.addresses)
        for name, tensor in tensors.items():
            assert isinstance(tensor, DeviceTensor)  # tensors come from this object's own `tensor`
            addresses[name] = tensor.address
        _check_aliases(self.flavour.api(), engine, graph, addresses)
        for name in _doors(engine):
            if not context.set_tensor_address(name, addresses[name]):
                raise self.failed(f"cannot bind {name} of {graph}")
        return _Run(self, graph, context, engine, tensors)

    def chain(self, runs: Sequence[Callable[[], None]]) -> "Chain":
        assert all(isinstance(run, _Run) for run in runs)  # they come from this object's own `bind`
        return Chain(self._gpu, [run for run in runs if isinstance(run, _Run)])

    def memory_bytes(self) -> int:
        """Device memory of weights, tensors and engines' scratch, as far as it was asked for here."""
        return self._gpu.allocated + self._scratch

    def _engine(self, graph: str) -> Any:
        record = self._bundle.manifest.engines[self.flavour.name][graph]
        path = self._bundle.path(record.file)
        content = path.read_bytes()
        check_validity(self.flavour, self._runtime, content, self._bundle, path)
        if record.gather == "plugin" and self.flavour is RTX:  # TensorRT's own engines carry their plugins' kernels
            from himap_export.engines.plugin import tensorrt_rtx as plugin

            plugin.register()
        log_of(self.flavour).clear()
        engine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise self.failed(f"cannot open {path}")
        return engine

    def failed(self, what: str) -> HimapError:
        details = one_line(next(iter(log_of(self.flavour).errors), "it says no more"))
        hint = f"check {self.flavour.name} {self.flavour.version()} against the manifest's toolchain"
        return HimapError(f"{self.flavour.title} {what}", details, hint)


def check_validity(flavour: Flavour, runtime: Any, engine: bytes, bundle: Bundle, path: Path) -> None:
    """HimapError that says why this engine cannot run here, before it is loaded.

    TensorRT-RTX tells; TensorRT does not, and loads engines of its own version only, which the manifest names.
    """
    built, here = bundle.manifest.toolchain.get(flavour.name, "an unknown version"), flavour.version()
    hint = f"export again, here or with {flavour.name} {here}"
    if flavour.capabilities:
        validity, diagnostics = runtime.get_engine_validity(engine)
        kinds = flavour.api().EngineInvalidityDiagnostics
        if validity == flavour.api().EngineValidity.INVALID:
            told = [text for name, text in _INVALID.items() if int(getattr(kinds, name)) & int(diagnostics)]
            details = "; ".join(told or ["it does not say why"]).format(built=built, here=here)
            raise HimapError(f"{flavour.title} cannot run {path} here", details, hint)
    elif built != here:
        details = f"it was built by {flavour.name} {built}, this is {here}"
        raise HimapError(f"{flavour.title} cannot run {path} here", details, hint)


_INVALID = {
    "VERSION_MISMATCH": "it was built by version {built}, this is {here}",
    "UNSUPPORTED_CC": "it was not built for this GPU's compute capability",
    "OLD_CUDA_DRIVER": "the CUDA driver is too old for it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory",
    "MALFORMED_ENGINE": "it is no engine, or a damaged one",
    "CUDA_ERROR": "CUDA reports an error",
}


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

    def capturable(self) -> bool:
        """TensorRT-RTX knows; TensorRT finds out, and capturing fails."""
        ask = getattr(self.context, "is_stream_capturable", None)
        return ask is None or bool(ask(self.engines.stream))


class Chain:
    """Several graphs, one after the other: at first enqueued one by one, from the second time on one CUDA graph.

    The first time TensorRT may allocate and compile, which cannot be captured. `captured` says whether the rest was;
    a chain that cannot be goes on one by one, with the same results. Nothing waits for the host in between.
    """

    def __init__(self, gpu: Gpu, runs: Sequence[_Run]) -> None:
        self._gpu, self._runs, self._calls = gpu, runs, 0
        self._graph: int | None = None

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def __call__(self) -> None:
        self._calls += 1
        if self._calls == 2 and all(run.capturable() for run in self._runs):
            self._graph = self._gpu.capture(self._enqueue, self)
        if self._graph is None:
            self._enqueue()
        else:
            self._gpu.launch(self._graph)

    def _enqueue(self) -> None:
        for run in self._runs:
            run()


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
