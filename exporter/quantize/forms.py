"""Which linear layers of a decoder are quantised, and how: what was asked, checked against the layers' sizes."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import Kind, LinearForm
from himap_export.graphs.quantization import BLOCKS, linear_shapes
from himap_export.graphs.quantization_fp import FP4_BLOCK
from himap_export.graphs.spec import DecoderSpec, Dtype

HEAD = "lm_head.weight"
_DEFAULT_BLOCK: Mapping[Kind, int] = {"int4": 32, "nvfp4": FP4_BLOCK}  # the others: one scale for each output
# What may be asked for.
_BLOCKS: Mapping[Kind, tuple[int, ...]] = {"int4": BLOCKS, "int8": (0, *BLOCKS), "nvfp4": (FP4_BLOCK,)}


def plan_forms(
    decoder: DecoderSpec, dtype: Dtype, kind: Kind | None, block: int | None, keep: Sequence[str], head: bool
) -> dict[str, LinearForm]:
    """Returns the form of each weight that is quantised, by its role: all linear layers but those whose role, without
    ".weight", matches a pattern of `keep`; the head only if asked for.

    HimapError (usage) for a block that does not divide a layer's inputs, a pattern that matches none, patterns
    that match all, or options without a `kind`.
    """
    if kind is None:
        _check_nothing_asked({"block": block, "keep_dtype": keep, "quantize_head": head})
        return {}
    if kind == "int8-dynamic" and dtype != "fp32":
        details = f"ONNX rounds activations of fp32 only, not of {dtype}"
        raise HimapError("int8-dynamic weights need `dtype` fp32", details, code=Exit.USAGE)
    form = LinearForm(kind, _DEFAULT_BLOCK.get(kind, 0) if block is None else block)
    if form.block not in (allowed := _BLOCKS.get(kind, (0,))):
        details = f"it takes {', '.join(map(str, allowed))}" if len(allowed) > 1 else "it has no blocks to choose"
        raise HimapError(f"{kind} weights have no blocks of {form.block}", details, "change `block`", Exit.USAGE)
    shapes = {role: shape for role, shape in linear_shapes(decoder).items() if head or role != HEAD}
    kept = set[str]()
    for pattern in keep:
        found = {role for role in shapes if fnmatchcase(role.removesuffix(".weight"), pattern)}
        if not found:
            details = f"there are layers.0 to layers.{decoder.layers - 1}, as in layers.0.mlp.down_proj"
            raise HimapError(f"`keep_dtype` {pattern} matches no layer", details, code=Exit.USAGE)
        kept |= found
    if kept == shapes.keys():
        raise HimapError("`keep_dtype` leaves no layer to quantise", hint="leave `quantize` out", code=Exit.USAGE)
    shapes = {role: shape for role, shape in shapes.items() if role not in kept}
    for role, (out, wide) in shapes.items():
        _check_shape(role, out=out, wide=wide, form=form)
    return dict.fromkeys(shapes, form)


def _check_nothing_asked(options: Mapping[str, object]) -> None:
    for name, value in options.items():
        if value is not None and value is not False and value != ():
            raise HimapError(f"`{name}` goes with `quantize`", code=Exit.USAGE)


def _check_shape(role: str, out: int, wide: int, form: LinearForm) -> None:
    if form.block and wide % form.block:
        fitting = ", ".join(str(block) for block in BLOCKS if wide % block == 0)
        hint = f"{fitting} would" if fitting else "no block does: leave the layer in its dtype with `keep_dtype`"
        name = role.removesuffix(".weight")
        details = f"{name} has {wide} inputs"
        raise HimapError(f"a block of {form.block} does not divide every layer", details, hint, Exit.USAGE)
    if form.kind in ("int4", "nvfp4") and out % 2:
        details = f"{role.removesuffix('.weight')} has {out} outputs, two of which share a byte"
        raise HimapError(
            f"{form.kind} needs an even number of outputs", details, "leave it out with `keep_dtype`", Exit.USAGE
        )
