"""Running engines on one GPU: one copy of the weights, tensors bound once by address, one stream."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from himap_export.engines.backends import Tensor
from himap_export.engines.bundle import Bundle
from himap_export.engines.nvinfer.cuda_graph import Chain
from himap_export.engines.nvinfer.cuda_memory import DeviceTensor, DeviceWeights, Gpu, NoGpu, cuda_core, first_gpu
from himap_export.engines.nvinfer.edition import Edition, first_capability, log_of, one_line
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import TensorSpec


def open_engines(edition: Edition, bundle: Bundle) -> "NvInferEngines":
    """Opens the bundle's engines; HimapError (missing) without a GPU that the product runs on."""
    edition.api()
    try:
        core = cuda_core()
        device = first_gpu(core)
    except NoGpu as reason:
        summary, details = f"running {edition.name} engines needs a GPU", f"{reason}; building the engines needed none"
        raise HimapError(summary, details, _elsewhere(bundle), Exit.MISSING) from None
    name, capability = str(device.name), 10 * device.compute_capability.major + device.compute_capability.minor
    _check_gpu(edition, bundle, name, capability)
    runtime = edition.api().Runtime(log_of(edition))
    check_engines(edition, bundle, runtime, capability)
    gpu = Gpu(core, device)
    return NvInferEngines(edition=edition, bundle=bundle, runtime=runtime, gpu=gpu, device=f"cuda:0 {name}")


def _check_gpu(edition: Edition, bundle: Bundle, name: str, capability: int) -> None:
    kinds = sorted({weight.kind for weight in bundle.manifest.quantised().values()})
    if edition.capabilities and capability not in edition.capabilities:
        summary, found = f"{edition.title} does not support this GPU", ", ".join(map(str, edition.capabilities))
    elif capability < (first := first_capability(kinds)):
        summary, found = f"this GPU has no products of {' and '.join(kinds)} weights", f"{first} and later"
    else:
        return
    details = f"cuda:0 is {name}, SM{capability}; it runs on SM{found}"
    raise HimapError(summary, details, _elsewhere(bundle), Exit.MISSING)


def _elsewhere(bundle: Bundle) -> str:
    held = "onnxruntime" in bundle.manifest.engines
    return "`backend` onnxruntime runs here" if held else "a bundle exported with `backend` onnxruntime runs here"


class NvInferEngines:
    """The engines of a bundle on one GPU, over one copy of the weights, all on one stream."""

    binds_often = False  # a context works in memory of its own, and a CUDA graph knows its addresses

    def __init__(self, edition: Edition, bundle: Bundle, runtime: Any, gpu: Gpu, device: str) -> None:
        self.edition, self.device, self._bundle, self._runtime, self._gpu = edition, device, bundle, runtime, gpu
        inside = bundle.manifest.weight_form == "embedded"
        self._weights = DeviceWeights(gpu, () if inside else bundle.weights().values())
        self._engines: dict[str, Any] = {}
        self.stream = int(gpu.stream.handle)

    def tensor(self, spec: TensorSpec) -> DeviceTensor:
        return DeviceTensor(self._gpu, spec)

    def bind(self, graph: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        """Returns a function that enqueues `graph`; reading a tensor waits for it."""
        engine = self._engine(graph)
        context = engine.create_execution_context()
        if context is None:
            raise self.failed(f"cannot prepare {graph}")
        addresses = dict(self._weights.addresses)
        for name, tensor in tensors.items():
            assert isinstance(tensor, DeviceTensor)  # tensors come from this object's own `tensor`
            addresses[name] = tensor.address
        _check_aliases(self.edition.api(), engine, graph, addresses)
        for name in _port_names(engine):
            if not context.set_tensor_address(name, addresses[name]):
                raise self.failed(f"cannot bind {name} of {graph}")
        run = _Run(engines=self, graph=graph, context=context, engine=engine, tensors=tensors)
        self._gpu.count(int(engine.device_memory_size_v2), run)
        return run

    def chain(self, runs: Sequence[Callable[[], None]]) -> Chain:
        own = [run for run in runs if isinstance(run, _Run)]
        assert len(own) == len(runs)  # they come from this object's own `bind`

        def obstacle() -> str:
            refused = [run.graph for run in own if not run.capturable()]
            return f"{self.edition.title} cannot be captured in {', '.join(refused)}" if refused else ""

        return Chain(self._gpu, own, obstacle)

    def memory_bytes(self) -> int:
        """Returns device memory of weights, tensors and engines' scratch; CUDA's own and the kernels' is not in it."""
        return self._gpu.held

    def _engine(self, graph: str) -> Any:
        """Returns a graph's engine, loaded once, however often it is bound."""
        if graph not in self._engines:
            record = self._bundle.manifest.engines[self.edition.name][graph]
            if record.gather == "plugin" and self.edition.plugin:
                import_module(self.edition.plugin).register()
            self._engines[graph] = engine = self._load(self._bundle.path(record.file))
            # What of the weights is inside: all of them in an embedded bundle.
            self._gpu.count(int(engine.get_engine_stat(self.edition.api().EngineStat.TOTAL_WEIGHTS_SIZE)), self)
        return self._engines[graph]

    def _load(self, path: Path) -> Any:
        log_of(self.edition).clear()
        engine = self._runtime.deserialize_cuda_engine(np.memmap(path, np.uint8, "r"))
        if engine is None:
            raise self.failed(f"cannot open {path}")
        return engine

    def failed(self, what: str) -> HimapError:
        details = one_line(next(iter(log_of(self.edition).errors), "it says no more"))
        hint = f"check {self.edition.name} {self.edition.version()} against the manifest's toolchain"
        return HimapError(f"{self.edition.title} {what}", details, hint)


def check_engines(edition: Edition, bundle: Bundle, runtime: Any, capability: int) -> None:
    """Raises HimapError that says why an engine of this bundle cannot run here, before anything is loaded.

    TensorRT-RTX tells, from a few bytes. TensorRT does not: its engines run only in the version, and on the kind of
    GPU, that built them, which the manifest names.
    """
    tells = hasattr(runtime, "get_engine_validity")
    for record in bundle.manifest.engines[edition.name].values():
        path = bundle.path(record.file)
        header = _header(path, int(runtime.engine_header_size) if tells else 1)
        problem = _mismatch(edition, bundle.manifest.toolchain, capability, version=not tells)
        if tells and not problem:
            problem = _told(edition, bundle.manifest.toolchain, runtime=runtime, capability=capability, header=header)
        if problem:
            details, hint = problem
            raise HimapError(f"{edition.title} cannot run {path} here", one_line(details), hint, Exit.MISSING)


def _header(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            header = file.read(size)
    except OSError as problem:
        raise HimapError(f"cannot read {path}", problem.strerror or str(problem), "export the bundle again") from None
    if not header:
        raise HimapError(f"{path} is empty", hint="export the bundle again")
    return header


def _mismatch(edition: Edition, made: Mapping[str, str], capability: int, version: bool) -> tuple[str, str] | None:
    """Says what the toolchain of a bundle and this machine disagree about, and a hint; what is not recorded may fit."""
    system, here = made.get("platform", "").partition("-")[0], platform.platform().partition("-")[0]
    if system and system != here:
        return f"it was built on {system}, this is {here}", f"export again on {here}"
    built = made.get(edition.name)
    if version and built and built != edition.version():
        return _INVALID["VERSION_MISMATCH"][0].format(built=built, here=edition.version()), _versions(edition, made)
    gpu = made.get(f"{edition.name} gpu", "").upper().removeprefix("SM").replace(".", "")
    if version and gpu and gpu != str(capability):
        return f"it was built for SM{gpu}, this GPU is SM{capability}", "export again on this machine"
    return None


def _told(
    edition: Edition, made: Mapping[str, str], runtime: Any, capability: int, header: bytes
) -> tuple[str, str] | None:
    """Says what TensorRT-RTX finds wrong with an engine, and a hint. Its diagnostics are a sum of the enum's values."""
    trt, log = edition.api(), log_of(edition)
    log.clear()
    validity, diagnostics = runtime.get_engine_validity(header)
    if validity != trt.EngineValidity.INVALID:  # one that is only SUBOPTIMAL runs
        return None
    kinds = trt.EngineInvalidityDiagnostics
    told = [both for name, both in _INVALID.items() if int(getattr(kinds, name)) & int(diagnostics)]
    if not told:  # a CUDA that does not work has left no more than this
        return next(iter(log.errors), "it does not say why"), "export again on this machine"
    built = made.get(edition.name, "an unknown version")
    details = "; ".join(what for what, _ in told).format(built=built, here=edition.version(), gpu=f"SM{capability}")
    return details, told[0][1] or _versions(edition, made)


def _versions(edition: Edition, made: Mapping[str, str]) -> str:
    built = f", or install {edition.name} {made[edition.name]}" if edition.name in made else ""
    return f"export again with {edition.name} {edition.version()}{built}"


_INVALID = {  # TensorRT-RTX's diagnostics by name: what each means, and what helps
    "VERSION_MISMATCH": ("it was built by version {built}, this is {here}", ""),
    "UNSUPPORTED_CC": ("it was not built for this GPU, {gpu}", "export again with this version of himap-export"),
    "OLD_CUDA_DRIVER": ("the CUDA driver is too old for it", "update NVIDIA's driver"),
    "OLD_CUDA_RUNTIME": ("the CUDA runtime is too old for it", "update NVIDIA's driver and the package's libraries"),
    "INSUFFICIENT_GPU_MEMORY": ("the GPU has too little memory", "export with a smaller `batch` or `text_budget`"),
    "MALFORMED_ENGINE": ("it is no engine, or damaged, or of another platform", "export again"),
    "CUDA_ERROR": ("CUDA's driver or runtime does not work", "check NVIDIA's driver with nvidia-smi"),
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
        log_of(self.engines.edition).clear()  # of what a capture was refused for
        if not self.context.execute_async_v3(self.engines.stream):
            raise self.engines.failed(f"cannot run {self.graph}")

    def capturable(self) -> bool:
        """Asks TensorRT-RTX; TensorRT has no such call: there, capturing is tried."""
        ask = getattr(self.context, "is_stream_capturable", None)
        return ask is None or bool(ask(self.engines.stream))


def _port_names(engine: Any) -> list[str]:
    return [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]


def _check_aliases(trt: ModuleType, engine: Any, graph: str, addresses: Mapping[str, int]) -> None:
    """Refuses a cache, which TensorRT updates in place, that is not bound as input and as output at one address."""
    for name in _port_names(engine):
        if engine.get_tensor_mode(name) != trt.TensorIOMode.OUTPUT:
            continue
        source = engine.get_aliased_input_tensor(name)
        if source and addresses[source] != addresses[name]:
            raise ValueError(f"{graph} updates {source} in place: bind {name} to the same tensor")
