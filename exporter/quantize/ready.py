"""Checkpoints that come quantised: which of their tensors are which weight, held against what config.json says.

    AWQ (GEMM)           qweight I32 [in,out/8]   qzeros I32 [groups,out/8]   scales [groups,out]
    GPTQ                 qweight I32 [in/n,out]   qzeros I32 [groups,out/n]   scales [groups,out]   g_idx [in]
    compressed-tensors   weight_packed I32 [out,in/n], weight_shape [2], or weight F8_E4M3 or I8 [out,in]
                         weight_zero_point [out/n,groups]   weight_scale [out,groups]   weight_g_idx [in]   input_scale

n numbers of 32/n bits lie in one word, the first in its low bits; AWQ's are in an order of their own.
"""

from collections.abc import Mapping

from himap_export.engines.weight_file import StoredTensor
from himap_export.exporter.quantize.compressed_tensors import compressed_linear
from himap_export.exporter.quantize.declared import Awq, CompressedTensors, Declared
from himap_export.exporter.quantize.grid import misfit
from himap_export.exporter.quantize.layer import Layer
from himap_export.exporter.quantize.ready_linear import ReadyLinear
from himap_export.exporter.quantize.words import awq_linear, gptq_linear
from himap_export.graphs.errors import Exit, HimapError

_MARKS = (".qweight", ".qzeros", ".weight_packed", ".weight_scale")  # what a quantised layer has and no other


def ready_linears(said: Declared | None, tensors: Mapping[str, StoredTensor]) -> dict[str, ReadyLinear]:
    """Returns the quantised linear layers of a checkpoint by the names that their weights would have unquantised; none
    of an unquantised one. Reads zero points, orders and scales; the weights stay unread.

    HimapError: usage for what is quantised otherwise than can be read, or than config.json `said`; missing for a tensor
    that is not there; failure for a scale that is not finite.
    """
    layers = sorted({name.removesuffix(mark) for name in tensors for mark in _MARKS if name.endswith(mark)})
    if said is None and layers:
        details = f"config.json has no quantization_config that says how {layers[0][:200]} is quantised"
        raise HimapError("the checkpoint is quantised", details, "fetch its config.json again", Exit.USAGE)
    found = {}
    for layer in layers:
        linear = _linear(said, Layer(layer, tensors))
        if linear.name in tensors and linear.codes.grid.tensor.name != linear.name:
            raise misfit(tensors[linear.name], "the checkpoint holds it quantised, too")
        found[linear.name] = linear
    return found


def _linear(said: Declared | None, layer: Layer) -> ReadyLinear:
    if isinstance(said, CompressedTensors):
        return compressed_linear(said, layer)
    assert said is not None
    return awq_linear(said, layer) if isinstance(said, Awq) else gptq_linear(said, layer)
