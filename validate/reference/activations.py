"""Linear layers that round what they read, as quantised engines do: for how far that rounding alone carries values."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

Rounding = Callable[[Tensor], Tensor]


def int8_dynamic(x: Tensor) -> Tensor:
    """Returns `x` rounded to 256 steps between its least and largest value and 0, as ONNX's DynamicQuantizeLinear."""
    values = x.float()
    low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
    step = (high - low) / 255
    if not step > 0:
        return x
    zero = (-low / step).round().clamp(0, 255)
    return (((values / step).round() + zero).clamp(0, 255) - zero).mul(step).to(x.dtype)


ROUNDINGS: Mapping[str, Rounding] = {"int8-dynamic": int8_dynamic}


def round_activations(decoder: Any, head: Any, kinds: Mapping[str, str]) -> None:
    """Makes the linear layers of Hugging Face's `decoder` and `head` round what they read, where `kinds` says how their
    weights are quantised, by role ("layers.0.mlp.up_proj.weight", "lm_head.weight"), and engines round activations."""
    for role, kind in kinds.items():
        if kind in ROUNDINGS:
            name = role.removesuffix(".weight")
            module: nn.Module = head if name == "lm_head" else decoder.get_submodule(name)
            module.register_forward_pre_hook(_hook(ROUNDINGS[kind]))


def rounds(kinds: Iterable[str]) -> bool:
    """Tells whether engines over weights of one of `kinds` round activations whatever they are asked for: of those that
    lie beside engines, too, which fp8 and nvfp4 never do."""
    return any(kind in ROUNDINGS for kind in kinds)


def _hook(rounding: Rounding) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda module, inputs: (rounding(inputs[0]), *inputs[1:])
