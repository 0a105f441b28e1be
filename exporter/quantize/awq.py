"""Activation-aware scaling (AWQ, arXiv 2306.00978, section 3.2): channels with large inputs are rounded finer.

    x W^T = (x / s) (W s)^T

Before they are rounded, the columns of linear layers are multiplied by s; what makes their input is divided by it: the
weight of a norm, or the rows of the linear layer before. So the layer computes what it did, and its rounding errs less
where its input is large. s = mean|x|^alpha of each channel; alpha is the one of a grid whose output errs least.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from himap_export.engines.weight_file import as_numbers, as_stored
from himap_export.graphs.errors import HimapError
from himap_export.graphs.spec import DecoderSpec, Dtype

Floats = npt.NDArray[np.float32]
Rounded = Callable[[Floats], Floats]  # a weight [out,in] as it is after rounding, in the same shape
STEPS = 20  # of the grid: alpha = 0, 1/20, .. 19/20; the first scales nothing
_LEAST = 1e-4  # of the largest channel's mean: one that is hardly ever used is not divided by nothing
# Readers by what makes their input, within a layer.
_READERS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}


class Group(NamedTuple):
    """Linear layers, `readers`, whose input `maker` makes: "layers.0.input_layernorm", "layers.0.mlp.up_proj"."""

    maker: str
    readers: tuple[str, ...]


HEAD = Group("norm", ("lm_head",))
_MAKERS = {reader: maker for maker, readers in (*_READERS.items(), HEAD) for reader in readers}


def layer_groups(layer: int) -> tuple[Group, ...]:
    """Returns the groups of a decoder layer: all of its linear layers, each in one."""
    p = f"layers.{layer}."
    return tuple(Group(p + maker, tuple(p + reader for reader in readers)) for maker, readers in _READERS.items())


@dataclass(frozen=True)
class Activations:
    """What a group reads, over all tokens that were seen: by channel, `mean` and `largest` of |x|, [in]; and x itself
    at some of them, `rows` [n,in]. fp32."""

    mean: Floats
    largest: Floats
    rows: Floats


@dataclass(frozen=True)
class Scaled:
    """How a group was scaled: by mean|x|^`alpha`. Its output's error from rounding, root mean square relative to the
    output's, `before` (alpha 0) and `after`."""

    maker: str
    alpha: float
    before: float
    after: float


@dataclass(frozen=True)
class Folding:
    """What scaling makes of a decoder's weights. `scales`: s by the maker that is divided by it, [its outputs] fp32."""

    spec: DecoderSpec
    scales: Mapping[str, Floats]

    def factors(self, role: str) -> tuple[Floats | None, Floats | None]:
        """Returns by what the weight or bias `role` ("layers.0.mlp.up_proj.bias") is divided, [out], and by what its
        columns are multiplied, [in]; None: by nothing."""
        name, _, kind = role.rpartition(".")
        maker = _maker(name) if kind == "weight" else ""
        columns = spread(self.spec, maker, self.scales[maker]) if maker in self.scales else None
        return self.scales.get(name), columns

    def changes(self, role: str) -> bool:
        """Tells whether the weight or bias `role` becomes another."""
        return any(factor is not None for factor in self.factors(role))

    def fold(self, role: str, values: npt.NDArray[Any]) -> "Folded":
        """Returns what the weight [out,in] or [D], or the bias [out], of `role` becomes."""
        return Folded(values, *self.factors(role))


@dataclass(frozen=True)
class Folded:
    """An array that is folded where it is read: `folded[rows, columns]` is fp32, the rest is left alone."""

    values: npt.NDArray[Any]
    divisors: Floats | None  # [out]
    factors: Floats | None  # [in]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def __getitem__(self, at: tuple[slice, ...]) -> Floats:
        found = self.values[at].astype(np.float32)
        if self.divisors is not None:
            found = (found.T / self.divisors[at[0]]).T
        if self.factors is not None:
            found = found * self.factors[at[1]]
        return found

    def whole(self) -> Floats:
        return self[(slice(None),) * self.values.ndim]


def spread(spec: DecoderSpec, maker: str, scales: Floats) -> Floats:
    """Returns scales of a maker's outputs as those of its readers' inputs: each of v's heads is read by several."""
    groups, each = _shared(spec, maker)
    return np.repeat(scales.reshape(groups, 1, -1), each, axis=1).ravel()


def _shared(spec: DecoderSpec, maker: str) -> tuple[int, int]:
    """Returns into how many groups its readers' inputs fall, and how many inputs of each are one output of `maker`."""
    return (spec.kv_heads, spec.heads // spec.kv_heads) if maker.endswith(".v_proj") else (1, 1)


def _maker(reader: str) -> str:
    """Returns what makes the input of the linear layer `reader`; "" if it is none."""
    *layer, name = reader.split(".", 2)
    return ".".join((*layer, _MAKERS[name])) if name in _MAKERS else ""


def search(spec: DecoderSpec, maker: str, seen: Activations, weight: Floats, rounded: Rounded) -> tuple[Floats, Scaled]:
    """Returns the scales [outputs of `maker`] that leave the least error of x W^T at the rows x that were `seen`, and
    how good they are. `weight`: rows W [n,in] of what reads x; `rounded` is what becomes of them, HimapError if they do
    not fit its dtype. HimapError if that is so of all scales, or outputs are not finite."""
    groups, each = _shared(spec, maker)
    mean = seen.mean.reshape(groups, each, -1).mean(axis=1).ravel()
    found = list[tuple[float, float, Floats]]()
    with np.errstate(over="ignore", invalid="ignore"):
        power = _power(seen.rows @ weight.T)
        for alpha in (step / STEPS for step in range(STEPS)):
            scales = _scales(mean, alpha)
            found.append((_error(seen.rows, weight, spread(spec, maker, scales), rounded), alpha, scales))
    error, alpha, scales = min(found, key=lambda tried: tried[0])  # of equals, the smallest alpha
    if not np.isfinite([error, power]).all():
        raise HimapError(f"cannot calibrate: what reads the output of {maker} overflows", "its weights or its outputs")
    before, after = (float(np.sqrt(e / power)) if power else 0.0 for e in (found[0][0], error))
    return scales, Scaled(maker, alpha, before, after)


def _error(x: Floats, weight: Floats, scales: Floats, rounded: Rounded) -> float:
    """Returns by how much x W^T errs once W is multiplied by `scales` [in] and rounded, squared; infinite if it does
    not fit."""
    try:
        error = _power(x @ (rounded(weight * scales) / scales - weight).T)
    except HimapError:
        return float("inf")
    return error if np.isfinite(error) else float("inf")


def _power(y: Floats) -> float:
    return float(np.square(y, dtype=np.float64).sum())


def _scales(mean: Floats, alpha: float) -> Floats:
    """Returns mean^alpha [n], the largest as far above 1 as the smallest is below."""
    if not mean.any():
        return np.ones_like(mean)
    scales: Floats = np.maximum(mean, mean.max() * np.float32(_LEAST)) ** np.float32(alpha)
    middle: np.float32 = np.sqrt(scales.max() * scales.min())
    return scales / middle


def storable(norm: Floats, scales: Floats, dtype: Dtype) -> Floats:
    """Returns the scales next to `scales` [D] by which the weight of a norm [D] can be divided without error in
    `dtype`: what rounding would add there is multiplied into the readers."""
    divided = as_numbers(as_stored(norm / scales, dtype), dtype).astype(np.float32)
    return np.divide(norm, divided, out=scales.copy(), where=(divided != 0) & np.isfinite(divided))
