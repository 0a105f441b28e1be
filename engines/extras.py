"""What is installed by which extra: the one place that turns a missing module into a line that says how to get it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from himap_export.graphs.errors import Exit, HimapError

# Module -> the extra of pyproject.toml that brings it.
EXTRAS = {
    "av": "video",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt_rtx": "tensorrt-rtx",
    "tensorrt": "tensorrt",
    "cuda": "tensorrt-rtx",
    "triton": "plugin",
    "polygraphy": "polygraphy",
    "optimum": "optimum",
    "ray": "ray",
    "shtab": "completion",
} | dict.fromkeys(("altair", "jinja2", "vl_convert"), "report")
EXTRAS |= dict.fromkeys(("anyio", "h11", "prometheus_client", "starlette", "uvicorn"), "serve")
EXTRAS |= dict.fromkeys(
    ("huggingface_hub", "onnx", "onnx_ir", "onnxscript", "safetensors", "tiktoken", "torch", "tqdm", "transformers"),
    "export",
)


# Where it is installed, an import of openvino forks this process, sends an event to a server on the internet and writes
# into the user's home. openvino looks for it once, and does without.
_TELEMETRY = "openvino_telemetry"


def how_to_install(extra: str) -> str:
    """Returns the command that installs `extra`, for the package and for a checkout of its repository."""
    return f"pip install 'himap-export[{extra}]'; in a checkout: pip install -e '.[{extra}]'"


def required(module: str) -> ModuleType:
    """Returns `module`, imported; HimapError (missing) if the extra that brings it is not installed."""
    try:
        with _no_telemetry():
            return import_module(module)
    except ModuleNotFoundError as problem:
        raise missing_extra(problem) or problem from None
    except (ImportError, OSError) as problem:  # one of its own libraries
        raise HimapError(f"{module} is installed, but cannot be loaded", str(problem), code=Exit.MISSING) from None


@contextmanager
def _no_telemetry() -> Iterator[None]:
    """Makes the telemetry's package look as if it were not installed, unless somebody else has imported it."""
    if _TELEMETRY in sys.modules:
        yield
        return
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # what the import system documents for this
    try:
        yield
    finally:
        del sys.modules[_TELEMETRY]


def missing_extra(problem: ModuleNotFoundError) -> HimapError | None:
    """Returns the user's error behind a failed import; None if no extra holds the module, which is a bug."""
    cause: BaseException | None = problem
    while isinstance(cause, ModuleNotFoundError) and cause.name is None:  # transformers' lazy modules raise such
        cause = cause.__cause__
    module = (getattr(cause, "name", None) or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    return HimapError(f"{module} is not installed", hint=how_to_install(EXTRAS[module]), code=Exit.MISSING)
