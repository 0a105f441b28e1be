"""AWQ's and GPTQ's linear layers: numbers, zero points and scales, all of them [..,out]."""

from himap_export.exporter.quantize.declared import Awq, Gptq
from himap_export.exporter.quantize.grid import FLOATS, WORD, Grid, misfit, require_shape
from himap_export.exporter.quantize.layer import Layer
from himap_export.exporter.quantize.ready_linear import Codes, ReadyLinear
from himap_export.graphs.errors import Exit, HimapError

SLOTS = (0, 4, 1, 5, 2, 6, 3, 7)  # which slot of an AWQ word holds its output j


def awq_linear(said: Awq, layer: Layer) -> ReadyLinear:
    """Returns a linear layer of an AWQ checkpoint; HimapError as `ready_linears`."""
    scales = Grid(layer.want("scales", *FLOATS))
    codes = Grid(layer.want("qweight", "int32"), bits=4, along=1, order=SLOTS)
    zeros = Grid(layer.want("qzeros", "int32"), bits=4, along=1, order=SLOTS)
    wide, out = codes.shape[0], scales.shape[1]
    require_shape(codes, (wide, out))
    require_shape(zeros, scales.shape)
    whole = [said.group_size] if wide % max(said.group_size, 1) == 0 else []  # its last block is never cut short
    return layer.linear(Codes(codes, 8, zeros), scales, (out, wide), whole)


def gptq_linear(said: Gptq, layer: Layer) -> ReadyLinear:
    """Returns a linear layer of a GPTQ checkpoint; HimapError as `ready_linears`, and (usage) for zero points that
    contradict `said` or that GPTQ's first format has two meanings for."""
    scales, packed = Grid(layer.want("scales", *FLOATS)), layer.want("qzeros", "int32")
    (groups, out), words = scales.shape, layer.want("qweight", "int32")
    bits = WORD * packed.shape[1] // out
    if bits not in ((4, 8) if said.dynamic else (said.bits,)):
        details = f"it has {bits} bits for each of {out} outputs, config.json says {said.bits}"
        raise misfit(packed, details)
    codes, zeros = Grid(words, bits=bits), Grid(packed, bits=bits, along=1)
    wide = codes.shape[0]
    require_shape(codes, (wide, out))
    require_shape(zeros, scales.shape)
    sizes = [said.group_size, wide // groups] if said.dynamic else [said.group_size]
    missing = 0 if said.checkpoint_format == "gptq_v2" else 1
    held = Codes(codes, 2 ** (bits - 1), zeros, missing)
    found = layer.linear(held, scales, (out, wide), sizes)
    if found.codes.zeros is not None:
        _check_zeros(said, found.codes.zeros, held)
    return found


def _check_zeros(said: Gptq, zeros: Grid, codes: Codes) -> None:
    found = zeros.read(slice(0, zeros.shape[0]), slice(0, zeros.shape[1])).astype(int) + codes.missing
    if said.sym and not said.dynamic:
        other = "gptq" if said.checkpoint_format == "gptq_v2" else "gptq_v2"
        details = f"a zero point is {found[found != codes.middle][0]}, that of symmetric weights is {codes.middle}"
        raise misfit(zeros.tensor, details, f"is config.json's checkpoint_format {other}?")
    if codes.missing and (found == 2**zeros.bits).any():
        details = f"a zero point is stored as {2**zeros.bits - 1}: some readers take it for {2**zeros.bits}, some for 0"
        hint = "store the checkpoint as gptq_v2"
        raise HimapError(f"tensor {zeros.tensor.name[:200]} has no certain meaning", details, hint, Exit.USAGE)
