"""compressed-tensors' linear layers: numbers, zero points and scales, all of them [out,..]."""

from dataclasses import replace

from himap_export.engines.weight_file import check_finite
from himap_export.exporter.quantize.declared import CompressedTensors
from himap_export.exporter.quantize.grid import FLOATS, WORD, Grid, mapped, misfit, require_shape
from himap_export.exporter.quantize.layer import Layer
from himap_export.exporter.quantize.ready_linear import BELOW_ZERO, NO_ACTIVATIONS, Codes, ReadyLinear
from himap_export.graphs.ports import LinearForm

_NOT_ROUNDED = "activations stay in the model's dtype"


def compressed_linear(said: CompressedTensors, layer: Layer) -> ReadyLinear:
    """Returns a linear layer of a compressed-tensors checkpoint; HimapError as `ready_linears`."""
    found = _plain(said, layer) if layer.get("weight_packed") is None else _packed(said, layer)
    rounds = any(scheme.input_activations is not None for scheme in said.config_groups.values())
    if rounds and found.form is not None and found.form.kind != "fp8":
        return replace(found, why="; ".join(filter(None, (found.why, _NOT_ROUNDED))))
    return found


def _packed(said: CompressedTensors, layer: Layer) -> ReadyLinear:
    """Returns a layer of several numbers a word."""
    words, shape = layer.want("weight_packed", "int32"), layer.numbers("weight_shape", 2)
    if shape is None:
        raise layer.absent("weight_shape")
    out, wide = (int(n) for n in shape)
    fitting = [b for b in (4, 8) if wide > 0 and words.shape == (out, -(-wide * b // WORD))]
    if not fitting:
        raise misfit(words, f"it is {list(words.shape)}, its weight_shape says [{out}, {wide}]")
    bits = next((b for b in fitting if _sizes(said, "int", b)), fitting[0])  # a word of four inputs fits both
    scales = Grid(layer.want("weight_scale", *FLOATS), flipped=True)
    require_shape(scales, (scales.shape[0], out))
    zeros = None
    if layer.get("weight_zero_point") is not None:
        zeros = Grid(layer.want("weight_zero_point", "int32"), flipped=True, bits=bits, along=1)
        require_shape(zeros, scales.shape, spare=WORD // bits - 1)
    codes = Codes(Grid(words, flipped=True, bits=bits), 2 ** (bits - 1), zeros)
    return layer.linear(codes, scales, (out, wide), _sizes(said, "int", bits), order="weight_g_idx")


def _plain(said: CompressedTensors, layer: Layer) -> ReadyLinear:
    """Returns a layer of one number an element."""
    grid = Grid(layer.want("weight", "I8", "F8_E4M3"), flipped=True)
    scales, zeros = Grid(layer.want("weight_scale", *FLOATS), flipped=True), None
    wide, out = grid.shape
    require_shape(scales, (scales.shape[0], 1 if scales.shape == (1, 1) else out))
    if layer.get("weight_zero_point") is not None:
        zeros = Grid(layer.want("weight_zero_point", "I8", "F8_E4M3"), flipped=True)
        require_shape(zeros, scales.shape)
    codes = Codes(grid, 0, zeros)
    sizes = _sizes(said, "float", 8) if codes.is_float else _sizes(said, "int", 4, 8)
    return _activated(layer.linear(codes, scales, (out, wide), sizes), layer)


def _activated(found: ReadyLinear, layer: Layer) -> ReadyLinear:
    """Returns a layer `found`, as fp8 if that lacks nothing but the scale of activations that the checkpoint holds."""
    activation = layer.get("input_scale")
    if found.why != NO_ACTIVATIONS or activation is None:
        return found
    check_finite([activation])
    stored = mapped(layer.want("input_scale", *FLOATS)).astype("float32")
    if stored.min() <= 0:
        raise misfit(activation, f"the scale of activations is {stored.min():g}")
    if stored.size > 1:
        return replace(found, why=f"{stored.size} scales of activations")
    if found.scales.below_zero():
        return replace(found, why=BELOW_ZERO)
    return replace(found, form=LinearForm("fp8"), why="", input_scale=float(stored[0, 0]))


def _sizes(said: CompressedTensors, kind: str, *bits: int) -> list[int]:
    """Returns how many inputs share a scale in layers of this `kind` and so many `bits`, -1 for all of them."""
    schemes = (scheme.weights for scheme in said.config_groups.values())
    fitting = (w for w in schemes if w is not None and w.type == kind and w.num_bits in bits)
    return list(dict.fromkeys(w.inputs for w in fitting))
