"""TensorRT-RTX: engines built ahead of time on any machine, run on RTX GPUs."""

import os
from collections.abc import Mapping
from pathlib import Path

from himap_export.engines.backends import ANYWAY, Gather, Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import EngineRecord
from himap_export.engines.nvinfer import build as builder
from himap_export.engines.nvinfer import run
from himap_export.engines.nvinfer.edition import RTX as EDITION
from himap_export.engines.plugin import tensorrt_rtx as plugin
from himap_export.engines.plugin.ptx import check_compiler


def check(dtype: str, gather: Gather) -> None:
    builder.check(EDITION, dtype)
    if gather == "plugin":
        check_compiler()


def environment(gather: Gather, scratch: Path) -> Mapping[str, str]:
    """Asks for a process of its own: a build may abort, and what it registers and allocates ends with it."""
    if gather != "plugin":
        return {}
    found = plugin.link_library(scratch)
    before = os.environ.get("LD_LIBRARY_PATH")
    return found if not before else {name: f"{path}{os.pathsep}{before}" for name, path in found.items()}


def version() -> dict[str, str]:
    return {EDITION.name: EDITION.version()}


def build(bundle: Bundle, graph: str, gather: Gather = "auto") -> EngineRecord:
    """Compiles one graph. Inlined, the gather costs a few kernels, and the engine loads without a plugin."""
    if gather == "plugin":
        plugin.check_library()
        plugin.register()
        return builder.build(EDITION, bundle, graph, "plugin")
    plugin.unregister()
    return builder.build(EDITION, bundle, graph, "ops")


def open_engines(bundle: Bundle, opening: Opening = ANYWAY) -> run.NvInferEngines:
    return run.open_engines(EDITION, bundle)
