"""The gather as a plugin of TensorRT-RTX: an `IPluginV3` around the compiled kernel, and its creator.

TensorRT-RTX takes no kernel into its engines, only a plugin's name and fields. The PTX is one of these fields, so an
engine can run without Triton, but in a process that has this module's creator registered.
"""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.nvinfer.edition import RTX
from himap_export.engines.plugin.launch import Launcher
from himap_export.engines.plugin.ptx import DTYPES, GatherKernel, GatherShape, compile_gather
from himap_export.graphs.errors import Exit, HimapError

NAME, NAMESPACE, VERSION = "TopKGather", "himap", "1"  # the node's operator, and its attributes
_LIBRARY = "libtensorrt_rtx.so"  # what the parser opens when it meets a plugin; the wheel holds only ...so.1


def register() -> None:
    """Lets TensorRT-RTX know the plugin, for parsing and for loading engines."""
    registry = RTX.api().get_plugin_registry()
    if registry.get_creator(NAME, VERSION, NAMESPACE) is None and not registry.register_creator(_creator(), NAMESPACE):
        raise HimapError("TensorRT-RTX refuses the top-k gather plugin", hint="check tensorrt-rtx's version")


def unregister() -> None:
    """Lets the parser inline the gather's standard operators again."""
    registry = RTX.api().get_plugin_registry()
    if registry.get_creator(NAME, VERSION, NAMESPACE) is not None:
        registry.deregister_creator(_creator())


def check_library() -> None:
    """Raises HimapError (missing) where the parser would not find the library it opens: it aborts the whole process."""
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        if not (_libraries() / _LIBRARY).exists():
            details = f"its parser opens {_LIBRARY} to import a plugin, and its package holds only {_LIBRARY}.1"
            hint = f"put a folder with a link of that name on LD_LIBRARY_PATH before the process starts: {_libraries()}"
            raise HimapError("TensorRT-RTX cannot import plugins here", details, hint, Exit.MISSING) from None


def link_library(folder: Path) -> dict[str, str]:
    """Returns the variables by which a new process finds the library: a link in `folder`, not in the package."""
    if not (_libraries() / _LIBRARY).exists():
        (folder / _LIBRARY).symlink_to(_libraries() / f"{_LIBRARY}.1")
    return {"LD_LIBRARY_PATH": str(folder)}


def _libraries() -> Path:
    found = find_spec("tensorrt_rtx_libs")
    if found is None or found.origin is None:
        raise HimapError("tensorrt-rtx is not installed", "its libraries are missing", RTX.install, Exit.MISSING)
    return Path(found.origin).parent


@cache
def _creator() -> Any:
    """Returns the one creator of this process; TensorRT-RTX keeps only a pointer to it."""
    trt = RTX.api()
    plugin_class = _plugin_class(trt)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc, name-defined]
        """From the node's attribute `keep` while an engine is built, from all stored fields when one is loaded."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = NAME, NAMESPACE, VERSION
            self.stored = {"keep": np.zeros(1, np.int32)}
            self.field_names = _fields(trt, self.stored)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            stored = {field.name: np.array(field.data).reshape(-1) for field in fields}
            return plugin_class(int(stored["keep"][0]), _kernel(stored) if "ptx" in stored else None)

    return Creator()


def _kernel(stored: dict[str, Any]) -> GatherKernel:
    name, ptx = (bytes(stored[field].astype(np.uint8)).decode() for field in ("name", "ptx"))
    gx, gy, gz, bx, by, bz, shared = (int(n) for n in stored["launch"])
    return GatherKernel(name, ptx, grid=(gx, gy, gz), block=(bx, by, bz), shared_bytes=shared)


def _stored(keep: int, kernel: GatherKernel) -> dict[str, npt.NDArray[Any]]:
    """Returns what an engine stores of the plugin; `_kernel` reads it back."""
    return {
        "keep": np.array([keep], np.int32),
        "launch": np.array([*kernel.grid, *kernel.block, kernel.shared_bytes], np.int32),
        "name": np.frombuffer(kernel.name.encode(), np.int8),
        "ptx": np.frombuffer(kernel.ptx.encode(), np.int8),
    }


def _fields(trt: ModuleType, stored: dict[str, npt.NDArray[Any]]) -> Any:
    """Returns fields that point into `stored`, which has to outlive them: they keep no reference."""
    kinds = {"int32": trt.PluginFieldType.INT32, "int8": trt.PluginFieldType.CHAR}
    return trt.PluginFieldCollection([trt.PluginField(n, a, kinds[a.dtype.name]) for n, a in stored.items()])


class _Gather:
    """x [B,S,D], score [B,S] fp32, position, token_type [B,S] int64 -> y [B,K,D], those kept of both [B,K]."""

    def __init__(self, keep: int, kernel: GatherKernel | None = None) -> None:
        for base in _bases(RTX.api()):
            base.__init__(self)
        self.plugin_name, self.plugin_namespace, self.plugin_version = NAME, NAMESPACE, VERSION
        self.num_outputs, self.keep, self.kernel = 3, keep, kernel
        self.launcher = Launcher(kernel) if kernel else None
        self.stored: dict[str, npt.NDArray[Any]] = {}

    def get_capability_interface(self, kind: Any) -> Any:
        return self

    def clone(self) -> Any:
        return type(self)(self.keep, self.kernel)

    def get_output_data_types(self, inputs: Any) -> list[Any]:
        kinds = RTX.api().DataType
        return [inputs[0], kinds.INT64, kinds.INT64]

    def get_output_shapes(self, inputs: Any, shape_inputs: Any, exprs: Any) -> list[Any]:
        y, position, token_type = (RTX.api().DimsExprs(rank) for rank in (3, 2, 2))
        for out in (y, position, token_type):
            out[0], out[1] = inputs[0][0], exprs.constant(self.keep)
        y[2] = inputs[0][2]
        return [y, position, token_type]

    def supports_format_combination(self, at: int, tensors: Any, inputs: int) -> bool:
        trt, found = RTX.api(), tensors[at].desc
        if at in (0, inputs):  # x, and y like it
            fits = found.type.name in DTYPES and found.type == tensors[0].desc.type
        else:
            fits = found.type == (trt.DataType.FLOAT if at == 1 else trt.DataType.INT64)
        return fits and found.format == trt.TensorFormat.LINEAR

    def configure_plugin(self, inputs: Any, outputs: Any) -> None:
        """Compiles the kernel, once, for exactly the static sizes."""
        batch, tokens, hidden = (int(n) for n in inputs[0].desc.dims)
        dtype = DTYPES[inputs[0].desc.type.name]
        shape = GatherShape(batch=batch, tokens=tokens, keep=self.keep, hidden=hidden, dtype=dtype)
        self.kernel = compile_gather(shape)

    def get_fields_to_serialize(self) -> Any:
        self.stored = _stored(self.keep, self.kernel) if self.kernel else {}
        return _fields(RTX.api(), self.stored)

    def attach_to_context(self, context: Any) -> Any:
        return self.clone()

    def on_shape_change(self, inputs: Any, outputs: Any) -> None:
        pass

    def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
        return 0

    def get_valid_tactics(self) -> list[int]:
        return [1]

    def set_tactic(self, tactic: int) -> None:
        pass

    def enqueue(
        self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: int, stream: int
    ) -> None:
        assert self.launcher is not None, "an engine's plugin has its kernel"
        self.launcher([*inputs, *outputs], stream)


def _bases(trt: ModuleType) -> tuple[type[Any], ...]:
    return trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime


@cache
def _plugin_class(trt: ModuleType) -> type[Any]:
    """Returns `_Gather` as TensorRT-RTX's interfaces, which exist once it is imported."""
    return type("TopKGather", (_Gather, *_bases(trt)), {})
