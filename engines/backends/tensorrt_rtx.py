"""TensorRT-RTX: engines built ahead of time on any machine, run on RTX GPUs.

Weight matrices are inputs of the engines, not constants inside: engines stay small, the build never reads them, and at
run time all of a bundle's engines share one copy on the device.

Building is tested on every change. Running (`open_engines`) has not been on hardware yet: it is written from the API's
documentation and tested over stand-ins of TensorRT's runtime and CUDA's.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any

from himap_export.engines.backends import Tensor
from himap_export.engines.backends.cuda_memory import DeviceTensor, DeviceWeights, Gpu, NoGpu, cuda_runtime, first_gpu
from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import EngineRecord, TensorSpec
from himap_export.graphs.errors import Exit, HimapError

NAME = "tensorrt-rtx"
# Every GPU that TensorRT-RTX knows but Turing (75), which has neither bf16 nor the scores' fp32 products; no Hopper.
CAPABILITIES = (80, 86, 89, 120, 121)


def _tensorrt() -> ModuleType:
    try:
        return import_module("tensorrt_rtx")
    except ImportError:
        hint = "pip install 'himap-export[tensorrt-rtx]'; building engines needs no GPU"
        raise HimapError("tensorrt-rtx is not installed", hint=hint, code=Exit.MISSING) from None


def check(bundle_dtype: str) -> None:
    _tensorrt()
    if bundle_dtype == "fp32":
        hint = "use --dtype fp16 or bf16"
        raise HimapError("TensorRT-RTX has no fused attention kernel in fp32", hint=hint, code=Exit.USAGE)


def version() -> dict[str, str]:
    return {NAME: _tensorrt().__version__}


@cache
def _log() -> Any:
    """The process's one logger. TensorRT keeps the first it is given, so a second would never hear a word."""
    trt = _tensorrt()

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Prints nothing; keeps the errors and the list of layers of what was built last."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.clear()

        def clear(self) -> None:
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif "Layers:" in message and len(message) > len(self.layers):
                self.layers = message

    return Log()


def build(bundle: Bundle, graph: str) -> EngineRecord:
    """Compiles one graph into `tensorrt-rtx/<graph>.engine`, for every GPU of CAPABILITIES; needs none itself."""
    trt, log, start = _tensorrt(), _log(), time.perf_counter()
    log.clear()
    source, file = bundle.path(bundle.graph(graph).file), f"{NAME}/{graph}.engine"
    model, operators = _with_weights_as_inputs(source, frozenset(bundle.graph(graph).weights))
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        raise _refused(source, _first_error(parser))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it the log names no layers
    config.num_compute_capabilities = len(CAPABILITIES)
    for i, capability in enumerate(CAPABILITIES):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), i)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _refused(source, next(iter(log.errors), "the builder says no more"))
    path = bundle.path(file)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(engine)
    gather = _gather_form(trt, network, operators)
    return EngineRecord(file, round(time.perf_counter() - start, 3), gather, kernels(log.layers, operators))


def _first_error(parser: Any) -> str:
    if not parser.num_errors:
        return "the parser says no more"
    error = parser.get_error(0)
    return f"{error.node_operator()} {error.node_name()}: {error.desc()}"


def _refused(source: Path, problem: str) -> HimapError:
    if "not supported by a dedicated kernel" in problem:
        details, hint = "it has no fused kernel for one of its Attention nodes", "heads as narrow as 8 have none"
    else:
        details, hint = _one_line(problem), "check tensorrt-rtx's version"
    return HimapError(f"TensorRT-RTX refuses {source}", details, hint)


def _one_line(text: str) -> str:
    return shorten(text, 300)


def _with_weights_as_inputs(source: Path, weights: frozenset[str]) -> tuple[bytes, dict[str, str]]:
    """The model's bytes, its `weights` turned from initializers into inputs, and each node's operator by name.

    Vectors stay inside: as an input, a bias costs a kernel that copies it (19 of 68 in three layers of CLIP).
    """
    import onnx_ir as ir

    try:
        model = ir.load(source)  # external initializers stay on disk
    except Exception as problem:  # protobuf's and onnx_ir's errors share no base class
        raise _refused(source, f"not a readable ONNX file, {problem}") from None
    graph = model.graph
    for name in sorted(weights & graph.initializers.keys()):
        value = graph.initializers[name]
        assert value.const_value is not None
        if len(value.const_value.shape) == 1:
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=name)
        else:
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
    return ir.to_proto(model).SerializeToString(), {node.name or "": node.op_type for node in graph}


def _gather_form(trt: ModuleType, network: Any, operators: Mapping[str, str]) -> str:
    """Whether the parser found a plugin for `himap::TopKGather` or inlined its standard operators."""
    if any(network.get_layer(i).type == trt.LayerType.PLUGIN_V3 for i in range(network.num_layers)):
        return "plugin"
    return "ops" if "TopKGather" in operators.values() else "none"


_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+),.*?Metadata: (?P<metadata>.*)$", re.MULTILINE)


def kernels(layers: str, operators: Mapping[str, str]) -> tuple[str, ...]:
    """The kernels in a build's `Layers:` log, equal ones counted: "32x _gemm_mha_v2 (Attention)", by first use.

    In parentheses the ONNX operators that became this kernel; `operators` gives each node's by name.
    """
    found: Counter[str] = Counter()
    for layer in _LAYER.finditer(layers):
        if layer["type"] in ("signal", "wait"):  # order between streams, no work
            continue
        # Library kernels bear the node's name, generated and fused ones that of what they do; both end in their number.
        generated = layer["type"] in ("kgen", "runtime_fusion")
        name = re.sub(r"^__myl_|_myl\d+_\d+$", "", layer["name"]) if generated else layer["type"]
        nodes = re.findall(r"ONNX Layer: ([^\]]+)\]", layer["metadata"])
        # What the parser inlined from a function is named "node | caller (function)".
        sources = sorted({operators.get(node, re.sub(r".* \| .* \((\w+)\)$", r"\1", node)) for node in nodes})
        found[f"{name} ({', '.join(sources)})"] += 1
    return tuple(f"{count}x {kernel}" for kernel, count in found.items())


def open_engines(bundle: Bundle, threads: int | None = None) -> "TensorRtRtx":
    """Needs an RTX GPU; `threads` means nothing to it."""
    _tensorrt()
    try:
        cuda = cuda_runtime()
        name, capability = first_gpu(cuda)
    except NoGpu as reason:
        details = f"{reason}; building the engines needed none"
        raise HimapError(
            f"running {NAME} engines needs an RTX GPU", details, _elsewhere(bundle), Exit.MISSING
        ) from None
    if capability not in CAPABILITIES:
        details = f"cuda:0 is {name}, SM{capability}; it runs on SM{', '.join(map(str, CAPABILITIES))}"
        raise HimapError("TensorRT-RTX does not support this GPU", details, _elsewhere(bundle), Exit.MISSING)
    return TensorRtRtx(bundle, Gpu(cuda), f"cuda:0 {name}")


def _elsewhere(bundle: Bundle) -> str:
    held = "onnxruntime" in bundle.manifest.engines
    return "--backend onnxruntime runs here" if held else "a bundle exported with --backend onnxruntime runs here"


class TensorRtRtx:
    """The engines of a bundle on one GPU, over one copy of the weights, all on one stream."""

    def __init__(self, bundle: Bundle, gpu: Gpu, device: str) -> None:
        self.device, self._bundle, self._gpu = device, bundle, gpu
        wanted = {name for graph in bundle.manifest.graphs.values() for name in graph.weights}
        self._weights = DeviceWeights(gpu, (t for name, t in bundle.tensors.items() if name in wanted))
        self._runtime = _tensorrt().Runtime(_log())
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
        _check_aliases(engine, graph, addresses)
        for name in _doors(engine):
            if not context.set_tensor_address(name, addresses[name]):
                raise self.failed(f"cannot bind {name} of {graph}")
        return _Run(self, graph, context, engine, tensors)

    def _engine(self, graph: str) -> Any:
        path = self._bundle.path(self._bundle.manifest.engines[NAME][graph].file)
        _log().clear()
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise self.failed(f"cannot open {path}")
        return engine

    def failed(self, what: str) -> HimapError:
        details = _one_line(next(iter(_log().errors), "it says no more"))
        hint = f"check tensorrt-rtx {version()[NAME]} against the manifest's toolchain"
        return HimapError(f"TensorRT-RTX {what}", details, hint)


@dataclass(frozen=True)
class _Run:
    """Enqueues one graph; holds what the context reads and writes but does not keep alive."""

    engines: TensorRtRtx
    graph: str
    context: Any
    engine: Any
    tensors: Mapping[str, Tensor]

    def __call__(self) -> None:
        if not self.context.execute_async_v3(self.engines.stream):
            raise self.engines.failed(f"cannot run {self.graph}")


def _doors(engine: Any) -> list[str]:
    return [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]


def _check_aliases(engine: Any, graph: str, addresses: Mapping[str, int]) -> None:
    """A cache that TensorRT updates in place must be bound as input and as output at one address."""
    trt = _tensorrt()
    for name in _doors(engine):
        if engine.get_tensor_mode(name) != trt.TensorIOMode.OUTPUT:
            continue
        source = engine.get_aliased_input_tensor(name)
        if source and addresses[source] != addresses[name]:
            raise ValueError(f"{graph} updates {source} in place: bind {name} to the same tensor")
