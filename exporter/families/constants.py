"""Vision modules without storage, and what they compute from their configuration alone, kept beside them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

if TYPE_CHECKING:
    import torch

NONE: Mapping[str, npt.NDArray[Any]] = MappingProxyType({})


def on_meta(
    make: "Callable[[], torch.nn.Module]",
    dtype: "torch.dtype",
    constants: Mapping[str, npt.NDArray[Any]] = NONE,
    owner: str = "",
) -> "torch.nn.Module":
    """Returns the module that `make` makes, in `dtype` on the meta device. The part of it called `owner`, or a part of
    that, gets a buffer for each of `constants`, whose values become the module's `constants`."""
    import torch

    with torch.device("meta"):
        made = make().to(dtype).eval()
    part, prefix = made.get_submodule(owner), f"{owner}." if owner else ""
    for name, values in constants.items():  # behind `.to(dtype)`, which would round the tables
        home, _, own = name.rpartition(".")
        part.get_submodule(home).register_buffer(own, torch.from_numpy(values).to("meta"), persistent=False)
    made.constants = {prefix + name: values for name, values in constants.items()}  # type: ignore[assignment]
    return made
