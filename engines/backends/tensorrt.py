"""TensorRT: engines built and run on the datacenter GPU at hand.

The libraries come from NVIDIA's own package index only, so neither building nor running has been seen by us; all but
this file is the code of TensorRT-RTX, which the tests exercise.
"""

from collections.abc import Mapping
from pathlib import Path

from himap_export.engines.backends import ANYWAY, Gather, Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import EngineRecord
from himap_export.engines.nvinfer import build as builder
from himap_export.engines.nvinfer import run
from himap_export.engines.nvinfer.edition import DATACENTER as EDITION
from himap_export.engines.plugin import tensorrt as plugin
from himap_export.engines.plugin.ptx import check_compiler


def check(dtype: str, gather: Gather) -> None:
    builder.check(EDITION, dtype)
    if gather != "ops":
        check_compiler()


def environment(gather: Gather, scratch: Path) -> Mapping[str, str]:
    """Asks for a process of its own: a build may abort, and the plugin registered for it ends with it."""
    return {}


def version() -> dict[str, str]:
    return {EDITION.name: EDITION.version()}


def build(bundle: Bundle, graph: str, gather: Gather = "auto") -> EngineRecord:
    """Compiles one graph, with the plugin unless asked otherwise: the engine holds its kernel, and loads without it."""
    if gather == "ops":
        return builder.build(EDITION, bundle, graph, "ops")
    plugin.register()
    return builder.build(EDITION, bundle, graph, "plugin")


def open_engines(bundle: Bundle, opening: Opening = ANYWAY) -> run.NvInferEngines:
    return run.open_engines(EDITION, bundle)
