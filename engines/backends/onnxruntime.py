"""onnxruntime on the CPU or, as onnxruntime-gpu, on a GPU: the bundle's ONNX graphs are its engines.

All sessions share each plain weight as one OrtValue: over the mapped file's pages, or once on the device. In the graphs
they are inputs with defaults, not constants, so no session makes copies of its own: prepacked, folded or cast.
Quantised ones are constants, else there is no kernel that reads them compressed: each session packs those it reads, and
its engine is a graph of its own, over weights in the order that packing begins with.

The CUDA provider has not been on hardware yet: it is written from onnxruntime's documentation. What it has no kernel
for runs on the CPU, and so do computations of shapes, which onnxruntime puts there itself: a session that refused all
of them might refuse sound graphs. So each is named on standard error.
"""

import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from himap_export.engines.backends import ANYWAY, Gather, Opening, Tensor, row_spec
from himap_export.engines.bundle import Bundle
from himap_export.engines.extras import how_to_install, required
from himap_export.engines.manifest import EngineRecord
from himap_export.engines.onnxruntime.quantised import TURNED, exact, fused, write_engine, write_turned
from himap_export.engines.weight_file import NUMPY, StoredTensor, as_stored, find_tensors, map_tensors
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import TensorSpec

_RECORD = "session.record_ep_graph_assignment_info"  # else a session does not know afterwards where its nodes run
_FOLDER = "session.model_external_initializers_file_folder_path"  # of a graph that is given as bytes
_NAMED = 500  # characters of a list of nodes
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def _onnxruntime() -> ModuleType:
    return required("onnxruntime")


def check(dtype: str, gather: Gather) -> None:
    if dtype == "bf16":
        hint = "use `dtype` fp16 or fp32"
        raise HimapError("onnxruntime's CPU kernels do not compute in bf16", hint=hint, code=Exit.USAGE)
    if gather == "plugin":
        hint = "leave `gather` out: onnxruntime runs the gather's standard operators"
        raise HimapError("onnxruntime has no plugins", hint=hint, code=Exit.USAGE)
    _onnxruntime()


def environment(gather: Gather, scratch: Path) -> None:
    return None


def version() -> dict[str, str]:
    return {"onnxruntime": _onnxruntime().__version__}


def build(bundle: Bundle, graph: str, gather: Gather = "auto") -> EngineRecord:
    """Opens the graph once: proof that every node has a kernel. The ONNX file itself is the engine, unless it reads
    quantised weights."""
    start = time.perf_counter()
    record, own = bundle.manifest.graphs[graph], None
    file = record.file
    if any(spec.constant for spec in record.weights.values()) and fused(bundle):
        file, own = f"{graph}.onnxruntime.onnx", TURNED  # beside the weights that it points to
        if not bundle.path(TURNED).exists():
            write_turned(bundle, bundle.path(TURNED))
        write_engine(bundle, bundle.path(record.file), bundle.path(file), _level(bundle, graph))
    inputs = {name: spec for name, spec in record.weights.items() if not spec.constant}
    held = {} if bundle.manifest.weight_form == "absent" else find_tensors(bundle.tensors, inputs)
    _session(bundle, graph, file, weights=_values(held, "cpu"), opening=ANYWAY, device="cpu")
    form: Literal["ops", "none"] = "ops" if any(port.role == "score" for port in record.inputs.values()) else "none"
    return EngineRecord(file, round(time.perf_counter() - start, 3), form, weights=own)


def open_engines(bundle: Bundle, opening: Opening = ANYWAY) -> "OnnxRuntime":
    return OnnxRuntime(bundle, opening)


def _device(asked: str | None) -> str:
    """Returns `asked`, else "cuda" where its provider is installed; HimapError (missing) if asked for and not."""
    held = _PROVIDERS["cuda"] in _onnxruntime().get_available_providers()
    if asked == "cuda" and not held:
        hint = f"in the place of onnxruntime: {how_to_install('cuda')}"
        raise HimapError("this onnxruntime has no CUDA provider", hint=hint, code=Exit.MISSING)
    return asked or ("cuda" if held else "cpu")


def _values(tensors: Mapping[str, StoredTensor], device: str) -> dict[str, Any]:
    """Returns weights as OrtValues: on the CPU over the mapped files' pages, on a GPU copied there one by one."""
    arrays = map_tensors(tensors.values())
    if device == "cpu":
        return {name: _on_host(array) for name, array in arrays.items()}
    return {name: _borrowed(_on_device(array)) for name, array in arrays.items()}


def _on_host(array: npt.NDArray[Any]) -> Any:
    return _onnxruntime().OrtValue.ortvalue_from_numpy(array)


def _on_device(array: npt.NDArray[Any]) -> Any:
    return _onnxruntime().OrtValue.ortvalue_from_numpy(array, "cuda", 0)


def _borrowed(value: Any) -> Any:
    """Returns the same memory as a value that does not own it: sessions refuse to share one that does."""
    return _onnxruntime().OrtValue.from_dlpack(value)


def _session(bundle: Bundle, graph: str, file: str, weights: Mapping[str, Any], opening: Opening, device: str) -> Any:
    """Opens a graph's engine over `weights`, as far as it reads them from outside its own file."""
    ort, options, record = _onnxruntime(), _options(bundle, opening), bundle.manifest.graphs[graph]
    if bundle.manifest.weight_form == "shared":
        for name, spec in record.weights.items():
            if not spec.constant:
                options.add_initializer(name, weights[name])
    providers: list[Any] = [_PROVIDERS["cpu"]]
    if device == "cuda":
        providers.insert(0, (_PROVIDERS["cuda"], {"device_id": 0}))
        options.add_session_config_entry(_RECORD, "1")
    else:
        _share_memory(options)
    engine: str | bytes = str(bundle.path(file))
    if opening.exact and file != record.file:
        engine = exact(bundle.path(file))
        options.add_session_config_entry(_FOLDER, str(bundle.folder))
    try:
        session = ort.InferenceSession(engine, options, providers=providers)
    except Exception as problem:  # onnxruntime's own exceptions share no base class
        details = next(iter(str(problem).splitlines()), type(problem).__name__)
        hint = "check onnxruntime's version against the manifest's"
        raise HimapError(f"onnxruntime refuses {bundle.path(file)}", details, hint) from None
    if _PROVIDERS[device] not in session.get_providers():  # onnxruntime itself falls back with a warning
        hint = "check the GPU's driver, or give `device` cpu"
        raise HimapError("onnxruntime cannot use the CUDA provider", hint=hint, code=Exit.MISSING)
    if device == "cuda" and (elsewhere := _elsewhere(session, _PROVIDERS["cuda"])):
        print(f"onnxruntime: {graph} runs partly on the CPU: {elsewhere}", file=sys.stderr)
    return session


def _options(bundle: Bundle, opening: Opening) -> Any:
    options = _onnxruntime().SessionOptions()
    options.intra_op_num_threads = opening.cpu_threads(bundle)
    # Each session has threads of its own. They spin between its operators, a fifth of a decode step in int4, and stop
    # when it has run: else they would keep the next graph's from the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    return options


def _share_memory(options: Any) -> None:
    """Lets a session on the CPU take what its operators write from the memory that all sessions share, one of which
    runs at a time. What it packs when it is opened is its own, and leaves with it."""
    _register_memory()
    options.enable_mem_pattern = False  # a block for all that a run writes: of prefill it is larger than what it needs
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")


@functools.cache
def _register_memory() -> None:
    ort = _onnxruntime()
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    as_asked = {"arena_extend_strategy": 1}  # not twice as much each time
    ort.create_and_register_allocator(info, ort.OrtArenaCfg(as_asked))


def _level(bundle: Bundle, graph: str) -> int:
    """Returns how MatMulNBits computes: 0, with activations as they are, or 4, with activations rounded to 8 bits, of
    32 inputs together. Prefill over int4 alone loses nothing by the former: what is kept does not hang on rounding."""
    kinds = {weight.kind for weight in bundle.manifest.quantised().values()}
    return 0 if kinds == {"int4"} and graph not in bundle.manifest.decode_graphs() else 4


def _elsewhere(session: Any, provider: str) -> str:
    """Says how many nodes of a session run on another provider than this one, and which; "" if none does."""
    parts = session.get_provider_graph_assignment_info()
    nodes = [(part.ep_name == provider, node) for part in parts for node in part.get_nodes()]
    others = ", ".join(f"{node.op_type} {node.name}".strip() for here, node in nodes if not here)
    named = others if len(others) <= _NAMED else f"{others[:_NAMED]} .."
    return f"{sum(not here for here, _ in nodes)} of {len(nodes)} nodes, {named}" if others else ""


class OrtTensor:
    """Memory of the host or the device that onnxruntime's sessions share; only `write`, `read` and `take` move it."""

    def __init__(self, spec: TensorSpec, value: Any) -> None:
        self.spec, self.value = spec, value

    def write(self, values: npt.NDArray[Any]) -> None:
        stored = as_stored(values, self.spec.dtype)
        self.value.update_inplace(np.ascontiguousarray(np.broadcast_to(stored, self.spec.shape)))

    def read(self) -> npt.NDArray[Any]:
        return np.array(self.value.numpy())  # of the host's memory that is a view

    def take(self, source: Tensor) -> None:
        self.write(source.read())

    def row(self, index: int, parts: int = 1) -> "OrtRow":
        return OrtRow(self, index, parts)

    def bind(self, binding: Any, name: str, output: bool) -> None:
        (binding.bind_ortvalue_output if output else binding.bind_ortvalue_input)(name, self.value)


class OrtRow:
    """A row of a tensor's first axis, or one of its equal `parts`: to graphs an address in its memory."""

    def __init__(self, whole: OrtTensor, index: int, parts: int) -> None:
        self.spec, self._whole, self._index = row_spec(whole.spec, parts), whole, index
        size = whole.value.tensor_size_in_bytes() // (whole.spec.shape[0] * parts)
        self._address = whole.value.data_ptr() + index * size

    def write(self, values: npt.NDArray[Any]) -> None:
        on_host = self._whole.value.device_name() == "cpu"
        found = self._whole.value.numpy() if on_host else self._whole.read()  # of the host's memory a view
        found.reshape(-1, *self.spec.shape[1:])[self._index] = as_stored(values, self.spec.dtype)
        if not on_host:
            self._whole.write(found)

    def read(self) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = self._whole.read().reshape(-1, *self.spec.shape[1:])[self._index][None]
        return found

    def take(self, source: Tensor) -> None:
        self.write(source.read())

    def row(self, index: int, parts: int = 1) -> "OrtRow":
        assert index == 0 and parts == 1
        return self

    def bind(self, binding: Any, name: str, output: bool) -> None:
        bind, device = binding.bind_output if output else binding.bind_input, self._whole.value.device_name()
        bind(name, device, 0, NUMPY[self.spec.dtype], list(self.spec.shape), buffer_ptr=self._address)


class OnnxRuntime:
    """The sessions of a bundle on one device, one for each graph, over one copy of its weights."""

    binds_often = True

    def __init__(self, bundle: Bundle, opening: Opening) -> None:
        self._bundle, self._opening, self.device = bundle, opening, _device(opening.device)
        inside = bundle.manifest.weight_form == "embedded"
        inputs = {} if inside else bundle.weights(constants=False)
        self._weights = _values(inputs, self.device)
        self._sessions: dict[str, Any] = {}

    def tensor(self, spec: TensorSpec) -> Tensor:
        zeros = np.zeros(spec.shape, NUMPY[spec.dtype])
        return OrtTensor(spec, _on_host(zeros) if self.device == "cpu" else _on_device(zeros))

    def bind(self, graph: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        session = self._session(graph)
        record, binding = self._bundle.manifest.graphs[graph], session.io_binding()
        for output, names in enumerate((record.inputs, record.outputs)):
            for name in names:
                tensor = tensors[name]
                assert isinstance(tensor, OrtTensor | OrtRow)  # tensors come from this object's own `tensor`
                tensor.bind(binding, name, output=bool(output))
        if self._bundle.manifest.weight_form == "absent":  # such a graph takes its weights as inputs
            for name in record.weights:
                binding.bind_ortvalue_input(name, self._weights[name])

        def run() -> None:
            try:
                session.run_with_iobinding(binding)
            except Exception as problem:  # onnxruntime's own exceptions share no base class
                hint = "the graph and the manifest do not fit: export the bundle again"
                raise HimapError(f"onnxruntime cannot run {graph}", str(problem), hint) from None

        return run

    def _session(self, graph: str) -> Any:
        if graph not in self._sessions:
            file = self._bundle.manifest.engines["onnxruntime"][graph].file
            self._sessions[graph] = _session(
                self._bundle, graph, file, self._weights, opening=self._opening, device=self.device
            )
        return self._sessions[graph]

    def chain(self, runs: Sequence[Callable[[], None]]) -> Callable[[], None]:
        def run() -> None:
            for each in runs:
                each()

        return run
