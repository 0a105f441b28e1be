"""The two products behind one API, as data, and the one logger that each allows a process."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from textwrap import shorten
from types import ModuleType
from typing import Any

from himap_export.engines.extras import how_to_install
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import Kind

# The first compute capability whose matrix products take such weights as they are.
_FIRST: Mapping[Kind, int] = {"int8": 80, "int4": 80, "fp8": 89, "nvfp4": 100}


@dataclass(frozen=True)
class Edition:
    """`name` as users write it, `title` as NVIDIA does, `module` as Python imports it.

    `capabilities`: compute capabilities that an engine is built for ahead of time; empty: for the GPU at hand only.
    `plugin`: the module whose `register` a process calls before it opens an engine with the gather's plugin; empty: it
    needs none.
    """

    name: str
    title: str
    module: str
    capabilities: tuple[int, ...]
    install: str
    plugin: str = ""

    def api(self) -> ModuleType:
        """Returns the Python bindings; HimapError (missing) if they, or the libraries behind them, are not there."""
        try:
            return import_module(self.module)
        except (ImportError, OSError) as problem:
            details = "" if isinstance(problem, ModuleNotFoundError) else one_line(str(problem))
            raise HimapError(f"{self.name} is not installed", details, self.install, Exit.MISSING) from None

    def targets(self, kinds: Collection[Kind]) -> tuple[int, ...]:
        """Returns those of `capabilities` that compute on quantised weights of all `kinds`."""
        return tuple(c for c in self.capabilities if c >= first_capability(kinds))

    def version(self) -> str:
        return str(self.api().__version__)


def first_capability(kinds: Collection[Kind]) -> int:
    """Returns from which compute capability on a GPU computes on quantised weights of all `kinds`; 0: on any."""
    return max((_FIRST[kind] for kind in kinds), default=0)


RTX = Edition(
    name="tensorrt-rtx",
    title="TensorRT-RTX",
    module="tensorrt_rtx",
    # All that it knows but Turing (75), which has neither bf16 nor the scores' fp32 products; it knows no Hopper.
    capabilities=(80, 86, 89, 120, 121),
    install=f"{how_to_install('tensorrt-rtx')}; building engines needs no GPU",
    plugin="himap_export.engines.plugin.tensorrt_rtx",
)
DATACENTER = Edition(
    name="tensorrt",
    title="TensorRT",
    module="tensorrt",
    capabilities=(),
    install=f"{how_to_install('tensorrt')}; from NVIDIA's package index, on a machine with the GPU",
)


@cache
def log_of(edition: Edition) -> Any:
    """Returns the process's one logger. TensorRT keeps the first it is given, so a second would never hear a word."""
    trt = edition.api()

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Prints nothing; keeps the errors and the list of layers of what was built last."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.clear()

        def clear(self) -> None:
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif "Layers:" in message and len(message) > len(self.layers):
                self.layers = message

    return Log()


def one_line(text: str) -> str:
    return shorten(text, 300)
