"""How far a tensor of a bundle may lie from the reference's."""

from dataclasses import dataclass
from math import isfinite, sqrt

from himap_export.graphs.spec import Dtype
from himap_export.validate.parity.tensors import TensorDiff

ROUNDOFF: dict[Dtype, float] = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 2.0**-24}
FP32_LOGITS = 1e-3  # absolute: the project's definition of parity (docs: "this is HiMAP")
FP32_SCORES = 1e-4  # of the largest score; measured 1e-6 to 7e-6
ROUNDING_FACTOR = 4.0  # 33 random tiny checkpoints in fp16, ours over PyTorch's error: median 0.8 to 1.0, largest 3.0
WORST = 0.25  # of the largest value: however badly a model is conditioned, a wrong graph must fail


@dataclass(frozen=True)
class ParityOptions:
    """What to compare: answers of `new_tokens`, and the user's own tolerance of logits, atol + rtol * the largest.

    `outputs`: whether the arrays of all prompts are kept for whoever wants to save them.
    """

    new_tokens: int
    atol: float | None = None
    rtol: float | None = None
    outputs: bool = True


def limit_of(t: TensorDiff, *, dtype: Dtype, layers: int, rounding: float | None, options: ParityOptions) -> float:
    """Returns how far tensor `t` may lie from the reference in fp32.

    fp32: 1e-3 on logits, the project's definition; 1e-4 of the largest on scores; elsewhere 1e-3 or, for large values,
    2 u sqrt(8 L) of the largest (8 tensors a layer rounded by the unit roundoff u, errors adding like a random walk).

    Half precision: how far rounding carries values depends on the model, through the conditioning of its attention, by
    an order of magnitude; no formula in u and L knows that. So the measure is measured: `rounding`, the distance of
    PyTorch's own run in the bundle's dtype, its activations rounded where the engines round theirs to 8 bits, same
    prompts, same tokens kept. Ours may be 4 times that: two roundings of
    one computation, neither the better one. Never above a quarter of the largest value, whatever PyTorch does.
    """
    if t.name in ("logits", "decode") and (options.atol is not None or options.rtol is not None):
        return (options.atol or 0.0) + (options.rtol or 0.0) * t.scale
    walk, most = 2 * ROUNDOFF[dtype] * sqrt(8 * layers) * t.scale, WORST * t.scale
    measured = ROUNDING_FACTOR * rounding if rounding is not None and isfinite(rounding) else None
    if dtype == "fp32":
        limit = FP32_SCORES * t.scale if t.name.startswith("score") else max(FP32_LOGITS, walk)
        return max(limit, min(measured or 0.0, most))
    return min(max(walk if measured is None else measured, ROUNDOFF[dtype] * t.scale), most)
