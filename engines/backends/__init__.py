"""One module per backend, each with the same functions.

`build(bundle, graph, gather)` compiles one ONNX graph of a bundle folder; `open_engines(bundle, opening)` opens what
was built. Both raise HimapError with exit code 4 when the backend's package or device is missing.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy.typing as npt

from himap_export.engines.bundle import Bundle
from himap_export.engines.command import BACKENDS, DEVICES, MOST_THREADS
from himap_export.engines.isolation import isolated
from himap_export.engines.manifest import EngineRecord
from himap_export.engines.scratch import scratch_folder
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.flops import stage_costs
from himap_export.graphs.ports import Kind, LinearForm, TensorSpec

Gather = Literal["auto", "plugin", "ops"]  # the form of the top-k gather in an engine
READ_GRAPHS = frozenset({"onnxruntime", "openvino"})  # backends whose engines are graphs, with weights beside them
# Which quantised weights a backend computes on as they are. The others it would multiply out again.
KINDS: Mapping[str, tuple[Kind, ...]] = {
    "onnxruntime": ("int8", "int4", "int8-dynamic"),
    "openvino": ("int8", "int4"),
    "tensorrt-rtx": ("int8", "int4", "fp8", "nvfp4"),
    "tensorrt": ("int8", "int4", "fp8", "nvfp4"),
}
# Those it computes on with one scale for each output only: TensorRT multiplies blocks of int8 out before the product.
_UNBLOCKED: Mapping[str, tuple[Kind, ...]] = {"tensorrt-rtx": ("int8",), "tensorrt": ("int8",)}
# FLOPs of a prefill from which on one more thread gains anything (docs/log.md, CPU backend).
WORTH_A_THREAD = 500_000_000


@dataclass(frozen=True)
class Opening:
    """How to open engines: CPU `threads` (None: as many as gain anything); `device`, one of the backend's DEVICES
    (None: its choice). `exact`: quantised weights times activations as they are, which engines else may
    round to 8 bits for speed.

    HimapError (usage) for a number of threads that no machine should start.
    """

    threads: int | None = None
    device: str | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise HimapError(f"cannot use {self.threads} threads", f"expected 1 to {MOST_THREADS}", code=Exit.USAGE)

    def cpu_threads(self, bundle: Bundle) -> int:
        """Returns the number asked for, else one for each WORTH_A_THREAD of the longest decoder prefill in `bundle`, at
        least one and at most all that this process may use."""
        if self.threads is not None:
            return self.threads
        m = bundle.manifest
        costs = (stage_costs(m.decoder, v.plan, v.budget, m.dtype) for v in m.variants)
        longest = max(sum(cost.flops for cost in stages) for stages in costs)
        return max(1, min(longest // WORTH_A_THREAD, len(os.sched_getaffinity(0))))


ANYWAY = Opening()


class Tensor(Protocol):
    """A static tensor in the backend's memory, allocated once and bound to the graphs that read or write it.

    `write` takes and `read` copies numbers: those of a bf16 tensor are read as fp32. `row` is one of the first axis,
    [1,..], as a tensor over the same memory, or one of as many equal `parts` of its rows, counted through; `take`
    copies a tensor of the same shape, within the backend's memory.
    """

    @property
    def spec(self) -> TensorSpec: ...
    def write(self, values: npt.NDArray[Any]) -> None: ...
    def read(self) -> npt.NDArray[Any]: ...
    def row(self, index: int, parts: int = 1) -> "Tensor": ...
    def take(self, source: "Tensor") -> None: ...


def row_spec(spec: TensorSpec, parts: int = 1) -> TensorSpec:
    """Returns what one row of a tensor's first axis is, or one of as many `parts` of it, equal ones of the second."""
    rest = spec.shape[1:]
    return TensorSpec(spec.dtype, (1, rest[0] // parts, *rest[1:]) if parts > 1 else (1, *rest))


class Engines(Protocol):
    """A bundle's graphs, ready to run over one copy of its weights.

    `binds_often`: whether binding a graph again, to other tensors, costs next to nothing; else each time takes the
    memory that the graph works in.
    """

    device: str
    binds_often: bool

    def tensor(self, spec: TensorSpec) -> Tensor: ...

    def bind(self, graph: str, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
        """Returns a function that runs `graph`, as the manifest names it, on these tensors.

        One that is bound as input and as output is updated in place.
        """
        ...

    def chain(self, runs: Sequence[Callable[[], None]]) -> Callable[[], None]:
        """Returns one function that does what `runs` of this object do, one after the other, at the least cost."""
        ...


class Backend(Protocol):
    """What a backend's module offers."""

    def check(self, dtype: str, gather: Gather) -> None:
        """Raises HimapError if this backend cannot build graphs of this dtype and gather, or is not installed."""
        ...

    def environment(self, gather: Gather, scratch: Path) -> Mapping[str, str] | None:
        """Returns the variables of the process of its own that a build needs, or None if any process will do.

        What they point to is in the folder `scratch`, which lasts as long as the build.
        """
        ...

    def build(self, bundle: Bundle, graph: str, gather: Gather = "auto") -> EngineRecord: ...
    def open_engines(self, bundle: Bundle, opening: Opening = ANYWAY) -> Engines: ...
    def version(self) -> dict[str, str]: ...


def load_backend(name: str) -> Backend:
    """Returns the module of a backend, by the name users give it; HimapError (usage) if there is none."""
    if name not in BACKENDS:
        raise HimapError(f"unknown backend {name}", hint=f"known: {', '.join(BACKENDS)}", code=Exit.USAGE)
    return cast(Backend, import_module(f"{__name__}.{name.replace('-', '_')}"))


def lacks(name: str, form: LinearForm) -> str:
    """Returns which weights the backend `name` does not compute on, if they are those of `form`: "fp8 weights"; else
    ""."""
    if form.kind not in KINDS[name]:
        return f"{form.kind} weights"
    return f"{form.kind} weights in blocks" if form.block and form.kind in _UNBLOCKED.get(name, ()) else ""


def check_forms(name: str, forms: Iterable[LinearForm]) -> None:
    """Raises HimapError (usage) if the backend `name` does not compute on quantised weights of one of `forms`."""
    for form in forms:
        if lacking := lacks(name, form):
            having = " and ".join(backend for backend in KINDS if not lacks(backend, form))
            own = ", ".join(KINDS[name]) if form.kind not in KINDS[name] else "one scale for each output"
            details = f"it has {own}; for these there is {having}"
            hint = "change `quantize`, `block` or `backend`"
            raise HimapError(f"{name} has no {lacking}", details, hint, Exit.USAGE)


def open_backend(name: str, bundle: Bundle, opening: Opening = ANYWAY) -> Engines:
    """Returns a bundle's engines of a backend, opened. HimapError (usage) for a device that is none of the backend's,
    (missing) for one that is not here, (failure) for quantised weights that the backend never had engines of."""
    backend, devices = load_backend(name), DEVICES[name]
    if opening.device not in (None, *devices):
        details = f"it runs on {' or '.join(devices)}"
        raise HimapError(f"{name} does not run on `device` {opening.device}", details, code=Exit.USAGE)
    for form in bundle.manifest.quantised().values():
        if lacking := lacks(name, form):
            raise HimapError(f"{name} has no {lacking}, which {bundle.folder} says", hint="export the bundle again")
    return backend.open_engines(bundle, opening)


def build_all(name: str, bundle: Bundle, graphs: Sequence[str], gather: Gather) -> dict[str, EngineRecord]:
    """Compiles `graphs` on one backend, in a process of its own if the backend wants one."""
    with scratch_folder("build") as scratch:
        variables = load_backend(name).environment(gather, scratch)
        if variables is None:
            return _build_here(name, bundle, graphs, gather)
        return isolated(f"building {name} engines", variables, _build_here, name, bundle, graphs, gather)


def _build_here(name: str, bundle: Bundle, graphs: Sequence[str], gather: Gather) -> dict[str, EngineRecord]:
    backend = load_backend(name)
    return {graph: backend.build(bundle, graph, gather) for graph in graphs}
