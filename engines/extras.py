"""What is installed by which extra: the one place that turns a missing module into a line that says how to get it."""

from himap_export.graphs.errors import Exit, HimapError

# Module -> the extra of pyproject.toml that brings it.
EXTRAS = {
    "onnxruntime": "onnxruntime",
    "tensorrt_rtx": "tensorrt-rtx",
    "tensorrt": "tensorrt",
    "cuda": "tensorrt-rtx",
    "triton": "plugin",
    "polygraphy": "polygraphy",
    "optimum": "optimum",
    "shtab": "completion",
} | dict.fromkeys(("matplotlib", "altair", "jinja2", "vl_convert"), "report")
EXTRAS |= dict.fromkeys(
    ("huggingface_hub", "onnx", "onnx_ir", "onnxscript", "safetensors", "tiktoken", "torch", "tqdm", "transformers"),
    "export",
)


def how_to_install(extra: str) -> str:
    """Returns the command that installs `extra`, for the package and for a checkout of its repository."""
    return f"pip install 'himap-export[{extra}]'; in a checkout: pip install -e '.[{extra}]'"


def missing_extra(problem: ModuleNotFoundError) -> HimapError | None:
    """Returns the user's error behind a failed import; None if no extra holds the module, which is a bug."""
    module = (problem.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    extra = EXTRAS[module]
    return HimapError(f"{module} is not installed", f"the extra {extra} brings it", how_to_install(extra), Exit.MISSING)
