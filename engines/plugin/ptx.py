"""The kernel as PTX, compiled without a GPU: what TensorRT's ahead-of-time plugin carries in the engine."""

import re
from dataclasses import dataclass
from importlib.util import find_spec

from himap_export.engines.extras import how_to_install, missing_extra
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.spec import Dtype

POINTERS = {  # the kernel's parameters, in TensorRT's order: inputs, then outputs; "" is x's own dtype
    "x": "",
    "score": "fp32",
    "position": "i64",
    "token_type": "i64",
    "y": "",
    "kept_position": "i64",
    "kept_type": "i64",
}
DTYPES: dict[str, Dtype] = {"HALF": "fp16", "BF16": "bf16", "FLOAT": "fp32"}  # by TensorRT's names
ALIGNMENT = 16  # bytes, of every pointer: TensorRT's buffers have 256; it is what loads of four words need
TARGET = 80  # compute capability: every GPU since runs its PTX; from 90 on Triton writes for one generation only
PTX_VERSION = 80  # CUDA 12.0, though Triton knows newer: older drivers load it, and nothing here needs more


@dataclass(frozen=True)
class GatherShape:
    """`keep` of `tokens` rows of `hidden` numbers each, in each of `batch` sequences."""

    batch: int
    tokens: int
    keep: int
    hidden: int
    dtype: Dtype


@dataclass(frozen=True)
class GatherKernel:
    """One launch: `name` in `ptx` takes POINTERS and no more; `grid` in blocks, `block` in threads."""

    name: str
    ptx: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int


@dataclass(frozen=True)
class Tiling:
    """How the kernel's work is divided; `constants` are its compile-time arguments."""

    grid: tuple[int, int, int]
    warps: int
    constants: dict[str, int]


def check_compiler() -> None:
    """Raises HimapError (missing) if the kernel cannot be compiled here: asked before an engine is built."""
    if find_spec("triton") is None:
        hint = f"{how_to_install('plugin')}; or use `gather` ops"
        raise HimapError("the plugin's kernel needs triton, which is not installed", hint=hint, code=Exit.MISSING)


def tiling(shape: GatherShape) -> Tiling:
    """Returns at most 256 programs a sequence: enough to fill a GPU, few because each repeats the selection.

    A thread holds 8 keys (more above 8192 tokens) and moves 128 bytes at a time.
    """
    width = _power_of_two(shape.tokens)
    rows = max(width // 256, 1)
    warps = min(max(width // 256, 4), 32)
    at_once = 32 * warps * 128 // (4 if shape.dtype == "fp32" else 2)
    columns = min(_power_of_two(shape.hidden), at_once // rows)
    sizes = {"tokens": shape.tokens, "keep": shape.keep, "hidden": shape.hidden}
    blocks = {"width": width, "rows": rows, "columns": columns}
    return Tiling((-(-shape.tokens // rows), shape.batch, 1), warps, sizes | blocks)


def compile_gather(shape: GatherShape) -> GatherKernel:
    """Returns the kernel for one shape. HimapError if Triton is missing."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from himap_export.engines.plugin.kernel import top_k_gather
    except ModuleNotFoundError as missing:
        raise missing_extra(missing) or missing from None

    plan = tiling(shape)
    signature = {name: f"*{dtype or shape.dtype}" for name, dtype in POINTERS.items()}
    signature |= dict.fromkeys(plan.constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", ALIGNMENT]] for i in range(len(POINTERS))}
    source = ASTSource(top_k_gather, signature, plan.constants, aligned)
    options = {"num_warps": plan.warps, "ptx_version": PTX_VERSION, "enable_fp_fusion": False}  # unset, the last warns
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # it names this machine's folders
        compiled = triton.compile(source, GPUTarget("cuda", TARGET, 32), options)
    metadata = compiled.metadata
    ptx = without_hidden_parameters(compiled.asm["ptx"], len(POINTERS))
    block = (32 * metadata.num_warps, 1, 1)
    return GatherKernel(metadata.name, ptx, grid=plan.grid, block=block, shared_bytes=metadata.shared)


def without_hidden_parameters(ptx: str, count: int) -> str:
    """Returns `ptx` whose entry takes its first `count` parameters only: TensorRT passes no more.

    Triton appends pointers to scratch memory, which this kernel does not use; one that reads them is refused.
    """
    entry = re.search(r"(?<=\.entry )\w+\(([^)]*)\)", ptx)
    assert entry, "no entry in Triton's PTX"
    parameters = entry[1].split(",")
    assert len(parameters) >= count, f"{len(parameters)} parameters in Triton's PTX"
    head, body = ptx[: entry.start(1)] + ",".join(parameters[:count]).rstrip() + "\n", ptx[entry.end(1) :]
    for hidden in (parameter.split()[-1] for parameter in parameters[count:]):
        if re.search(rf"\b{hidden}\b", body):
            raise ValueError(f"the kernel reads {hidden}, which TensorRT does not pass")
    return head + body.lstrip()


def _power_of_two(number: int) -> int:
    """Returns the smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()
