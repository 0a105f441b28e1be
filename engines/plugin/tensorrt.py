"""The gather as a plugin of TensorRT: a "quick deployable" one, whose kernel is compiled while an engine is built.

The engine holds the PTX and how to launch it, so it loads and runs without this package, Triton, Python or a plugin
library. Written from tensorrt.plugin of the bindings 11.4, which the tests run; TensorRT itself has not run it yet.
"""

from functools import cache
from typing import Any

from himap_export.engines.nvinfer.edition import DATACENTER
from himap_export.engines.plugin.ptx import DTYPES, GatherShape, compile_gather
from himap_export.graphs.errors import HimapError
from himap_export.graphs.spec import Dtype

PLUGIN = "himap::TopKGather"  # the node's domain, as its attribute plugin_namespace repeats it, and its operator


@cache
def register() -> None:
    """Lets TensorRT know the plugin, once in a process; its parser takes it from then on for every such node.

    What is raised in `describe` and `implement` TensorRT prints, and goes on to refuse the network. No autotune: left
    out, it means the types that `describe` accepts, in plain row-major layout.
    """
    DATACENTER.api()
    import tensorrt.plugin as trtp

    def describe(
        x: trtp.TensorDesc, score: trtp.TensorDesc, position: trtp.TensorDesc, token_type: trtp.TensorDesc, keep: int
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc]:
        """Returns the descriptors of y [B,K,D], kept_position and kept_type [B,K], before any size is known."""
        _dtype_of(x, score, position, token_type)
        batch, _, hidden = x.shape_expr
        y = trtp.from_shape_expr((batch, keep, hidden), x.dtype)
        return y, *(trtp.from_shape_expr((batch, keep), index.dtype) for index in (position, token_type))

    def implement(
        x: trtp.TensorDesc, score: trtp.TensorDesc, position: trtp.TensorDesc, token_type: trtp.TensorDesc, keep: int,
        outputs: tuple[trtp.TensorDesc], tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:  # fmt: skip
        """Returns the kernel's name, PTX and launch; no scalars between inputs and outputs: sizes are compiled in."""
        kernel = compile_gather(_shape(x, score, position=position, token_type=token_type, keep=keep))
        launch = trtp.KernelLaunchParams(*kernel.grid, *kernel.block, kernel.shared_bytes)
        return kernel.name, kernel.ptx, launch, trtp.SymIntExprs(0)

    trtp.register(PLUGIN)(describe)
    trtp.aot_impl(PLUGIN)(implement)


def _dtype_of(x: Any, *others: Any) -> Dtype:
    """Returns x's dtype as ours; HimapError unless all four inputs are of types that the kernel reads."""
    found = [tensor.dtype.name for tensor in (x, *others)]
    if found[0] not in DTYPES or found[1:] != ["FLOAT", "INT64", "INT64"]:
        details = f"x, score, position and token_type are {', '.join(found)}"
        raise HimapError("TensorRT's top-k gather has no kernel for its inputs' types", details)
    return DTYPES[found[0]]


def _shape(x: Any, score: Any, position: Any, token_type: Any, keep: int) -> GatherShape:
    """Returns the shape; HimapError unless x is [B,S,D], the others [B,S], all sizes fixed, and `keep` in 1..S."""
    dtype = _dtype_of(x, score, position, token_type)
    wide, *flat = (tuple(tensor.shape) for tensor in (x, score, position, token_type))
    if len(wide) != 3 or min(wide) < 1 or any(shape != wide[:2] for shape in flat) or not 0 < keep <= wide[1]:
        details = f"x is {list(wide)}, score, position and token_type are {', '.join(str(list(s)) for s in flat)}"
        raise HimapError(f"TensorRT's top-k gather cannot keep {keep} tokens of these inputs", details)
    batch, tokens, hidden = wide
    return GatherShape(batch=batch, tokens=tokens, keep=keep, hidden=hidden, dtype=dtype)
