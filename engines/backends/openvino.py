"""OpenVINO on x86 CPUs, Intel's GPUs and NPUs: an engine is the bundle's ONNX graph, compiled when it is opened.

Compiling takes a second for 200 M parameters and depends on the CPU, so what is kept is the graph, its functions
inlined: OpenVINO's frontend does not know model-local ones. GPUs and NPUs have not been seen.
"""

import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from himap_export.engines.backends import ANYWAY, Gather, Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.extras import how_to_install, required
from himap_export.engines.manifest import EngineRecord
from himap_export.engines.openvino.quantised import PACKED, TURNED, count_packed, write_turned
from himap_export.engines.openvino.run import Compiler, OpenVino, computed
from himap_export.graphs.errors import Exit, HimapError

OLDEST = (2026, 4)  # older ones were not tried
_NO_KERNELS = ("Const", "Input", "Output", "Parameter", "Result", "Reshape")


def _openvino() -> ModuleType:
    ov = required("openvino")
    found = tuple(int(part) for part in ov.__version__.split("-")[0].split(".")[:2])
    if found < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise HimapError(
            f"openvino {ov.__version__.split('-')[0]} is too old", f"expected {wanted} or newer",
            how_to_install("openvino"), Exit.MISSING,
        )  # fmt: skip
    return ov


def check(dtype: str, gather: Gather) -> None:
    if gather == "plugin":
        hint = "leave `gather` out: OpenVINO runs the gather's standard operators"
        raise HimapError("OpenVINO has no plugins", hint=hint, code=Exit.USAGE)
    _openvino()
    if dtype not in (own := computed()):
        hint = f"use `dtype` {' or '.join(own)}, or export where it does"
        raise HimapError(f"this CPU does not compute in {dtype}", hint=hint, code=Exit.USAGE)


def environment(gather: Gather, scratch: Path) -> None:
    return None


def version() -> dict[str, str]:
    return {"openvino": _openvino().__version__}


def build(bundle: Bundle, graph: str, gather: Gather = "auto") -> EngineRecord:
    """Inlines the graph's functions and compiles it once: proof that every node has a kernel, which are recorded."""
    import onnx
    import onnx.inliner

    start = time.perf_counter()
    record, file = bundle.manifest.graphs[graph], f"{graph}.openvino.onnx"  # beside the weights that it points to
    model = onnx.load(bundle.path(record.file), load_external_data=False)
    onnx.save(onnx.inliner.inline_local_functions(model), bundle.path(file))
    own = TURNED if bundle.manifest.quantised() else None
    if own and not bundle.path(own).exists():
        write_turned(bundle, bundle.path(own))
    compiler = Compiler.of(bundle, "cpu", ANYWAY, own)
    read = compiler.read(bundle.path(file))
    engine = compiler.compile(read)
    _check_packed(graph, count_packed(read.model), engine)
    form: Literal["ops", "none"] = "ops" if any(port.role == "score" for port in record.inputs.values()) else "none"
    seconds = round(time.perf_counter() - start, 3)
    return EngineRecord(file, seconds, form, kernels=_kernels(engine), weights=own)


def _kernels(engine: Any) -> tuple[str, ...]:
    """Returns what the compiled model runs, equal ones counted: "57x FullyConnected (brgemm_avx512_amx_bf16)", with the
    type of its weights where they stay integers: "112x FullyConnected (brgemm_avx512_f32, i4)"."""
    found = Counter[str]()
    for kind, kernel, precision in _nodes(engine):
        stored = f", {precision}" if kind == "FullyConnected" and precision in PACKED else ""
        found[f"{kind} ({kernel}{stored})"] += kind not in _NO_KERNELS
    return tuple(f"{count}x {kernel}" for kernel, count in (+found).most_common())


def _nodes(engine: Any) -> list[tuple[str, str, str]]:
    """Returns type, kernel and precision of each node that a compiled model runs."""
    nodes = [node.get_rt_info() for node in engine.get_runtime_model().get_ops()]
    return [(n["layerType"].value, n["primitiveType"].value, n["runtimePrecision"].value) for n in nodes]


def _check_packed(graph: str, weights: int, engine: Any) -> None:
    """Raises HimapError unless the compiled model keeps as many quantised `weights` as they are."""
    kept = sum(kind == "FullyConnected" and precision in PACKED for kind, _, precision in _nodes(engine))
    if kept != weights:
        details, hint = f"{kept} of {weights} stay as they are", "check openvino's version against the manifest's"
        raise HimapError(f"OpenVINO multiplies quantised weights of {graph} out", details, hint)


def open_engines(bundle: Bundle, opening: Opening = ANYWAY) -> OpenVino:
    _openvino()
    return OpenVino(bundle, opening)
