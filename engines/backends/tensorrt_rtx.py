"""TensorRT-RTX: engines built ahead of time on any machine, run on RTX GPUs."""

from collections.abc import Mapping
from pathlib import Path

from himap_export.engines.backends import ANYWAY, Gather, Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import EngineRecord
from himap_export.engines.nvinfer import build as builder
from himap_export.engines.nvinfer import run
from himap_export.engines.nvinfer.flavour import RTX as FLAVOUR


def check(dtype: str, gather: Gather) -> None:
    builder.check(FLAVOUR, dtype)


def environment(gather: Gather, scratch: Path) -> Mapping[str, str]:
    return {}


def version() -> dict[str, str]:
    return {FLAVOUR.name: FLAVOUR.version()}


def build(bundle: Bundle, graph: str, gather: Gather = "auto") -> EngineRecord:
    return builder.build(FLAVOUR, bundle, graph, "ops" if gather == "auto" else gather)


def open_engines(bundle: Bundle, opening: Opening = ANYWAY) -> run.NvInferEngines:
    return run.open_engines(FLAVOUR, bundle)
