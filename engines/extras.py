"""What is installed by which extra: the one place that turns a missing module into a line that says how to get it."""

from importlib import import_module
from types import ModuleType

from himap_export.graphs.errors import Exit, HimapError

# Module -> the extra of pyproject.toml that brings it.
EXTRAS = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt_rtx": "tensorrt-rtx",
    "tensorrt": "tensorrt",
    "cuda": "tensorrt-rtx",
    "triton": "plugin",
    "polygraphy": "polygraphy",
    "optimum": "optimum",
    "shtab": "completion",
} | dict.fromkeys(("altair", "jinja2", "vl_convert"), "report")
EXTRAS |= dict.fromkeys(
    ("huggingface_hub", "onnx", "onnx_ir", "onnxscript", "safetensors", "tiktoken", "torch", "tqdm", "transformers"),
    "export",
)


def how_to_install(extra: str) -> str:
    """Returns the command that installs `extra`, for the package and for a checkout of its repository."""
    return f"pip install 'himap-export[{extra}]'; in a checkout: pip install -e '.[{extra}]'"


def required(module: str) -> ModuleType:
    """Returns `module`, imported; HimapError (missing) if the extra that brings it is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as problem:
        raise missing_extra(problem) or problem from None
    except (ImportError, OSError) as problem:  # one of its own libraries
        raise HimapError(f"{module} is installed, but cannot be loaded", str(problem), code=Exit.MISSING) from None


def missing_extra(problem: ModuleNotFoundError) -> HimapError | None:
    """Returns the user's error behind a failed import; None if no extra holds the module, which is a bug."""
    cause: BaseException | None = problem
    while isinstance(cause, ModuleNotFoundError) and cause.name is None:  # transformers' lazy modules raise such
        cause = cause.__cause__
    module = (getattr(cause, "name", None) or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    return HimapError(f"{module} is not installed", hint=how_to_install(EXTRAS[module]), code=Exit.MISSING)
