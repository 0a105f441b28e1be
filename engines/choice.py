"""Which backend is best on this machine: a table, read from the top."""

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from himap_export.engines.backends import load_backend
from himap_export.engines.command import BACKENDS
from himap_export.engines.extras import how_to_install
from himap_export.engines.nvinfer.edition import RTX
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.spec import Dtype

X86 = ("x86_64", "AMD64")


@dataclass(frozen=True)
class Choice:
    """A `backend` whose Python `module` is installed is best where `usable` says so; `why`: a phrase for people.
    `cpu`: whether it runs on any machine's CPU."""

    backend: str
    module: str
    usable: Callable[[], bool]
    why: str
    cpu: bool = False


def best_backend(dtype: str | None = None, *, cpu: bool = False) -> Choice:
    """Returns the first of the table that is installed and usable here, on the `cpu` if that is asked for; the first of
    those that builds graphs of `dtype`, if one does. HimapError (missing) if there is none."""
    rows = [choice for choice in _TABLE if choice.cpu or not cpu]
    found = [choice for choice in rows if _installed(choice.module) and choice.usable()]
    if found:
        return next((choice for choice in found if dtype is None or _builds(choice.backend, dtype)), found[0])
    others = ", ".join(name for name in BACKENDS if name != "onnxruntime")
    details = "with `backend` an engine is built for another machine"
    hint = f"{how_to_install('onnxruntime')}; other extras: {others}"
    raise HimapError("no backend that runs on this machine is installed", details, hint, Exit.MISSING)


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # an import hook's
        return False


def _builds(backend: str, dtype: str) -> bool:
    try:
        load_backend(backend).check(dtype, "auto")
    except HimapError:
        return False
    return True


def fast_dtype(backend: str) -> Dtype:
    """Returns the dtype in which `backend`, onnxruntime or openvino, computes fastest on this CPU."""
    return "bf16" if backend == "openvino" and _cpu_flags() & {"amx_bf16", "avx512_bf16"} else "fp32"


def slow_dtype(backends: Sequence[str], dtype: str) -> str:
    """Returns what is to be said before a bundle of `dtype` is built for `backends`, "" if nothing is."""
    if dtype != "fp16":
        return ""
    if "onnxruntime" in backends and not _has_cuda_provider():
        fast = "`dtype` fp32 or `backend` openvino with another `dtype`"
        return f"onnxruntime computes fp16 on a CPU for parity only, 2.5 times slower than fp32: {fast} is fast there"
    if "openvino" in backends and "amx_fp16" not in _cpu_flags():
        fast = f"`dtype` {fast_dtype('openvino')} is fast there"
        return f"OpenVINO computes fp16 slower than fp32 on a CPU without amx_fp16: {fast}"
    return ""


def _cpu_flags() -> frozenset[str]:
    """The features of an x86 CPU by Linux's names."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def _has_cuda_provider() -> bool:
    """Whether the module onnxruntime is that of onnxruntime-gpu; asked without its import."""
    try:
        return bool(version("onnxruntime-gpu"))
    except PackageNotFoundError:
        return False


def _capability() -> int | None:
    """The first GPU's compute capability, 80 for SM 8.0; None without a GPU, or without cuda-core, which sees it."""
    from himap_export.engines.nvinfer.cuda_memory import NoGpu, cuda_core, first_gpu

    try:
        found = first_gpu(cuda_core()).compute_capability
    except (NoGpu, HimapError):
        return None
    return int(10 * found.major + found.minor)


_TABLE = (
    Choice("tensorrt", "tensorrt", lambda: _capability() is not None, "TensorRT and a GPU are here"),
    Choice(
        "tensorrt-rtx", "tensorrt_rtx", lambda: _capability() in RTX.capabilities,
        "TensorRT-RTX and a GPU that it knows are here",
    ),
    Choice(
        "onnxruntime", "onnxruntime", lambda: _has_cuda_provider() and _capability() is not None,
        "onnxruntime-gpu and a GPU are here",
    ),
    Choice(
        "openvino", "openvino", lambda: platform.machine() in X86, "the fastest that is installed, on an x86 CPU",
        cpu=True,
    ),
    Choice("onnxruntime", "onnxruntime", lambda: True, "installed, and runs on any CPU", cpu=True),
)  # fmt: skip
