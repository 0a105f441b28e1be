"""What a vision module computes from its configuration alone, kept beside it while it has no storage."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

if TYPE_CHECKING:
    import torch


def register_constants(module: "torch.nn.Module", constants: Mapping[str, npt.NDArray[Any]], owner: str = "") -> None:
    """Gives the part of `module` called `owner` a meta buffer for each constant; their values become its `constants`.

    Call it behind `.to(dtype)`, which would round the tables.
    """
    import torch

    part = module.get_submodule(owner)
    for name, values in constants.items():
        part.register_buffer(name, torch.from_numpy(values).to("meta"), persistent=False)
    prefix = f"{owner}." if owner else ""
    module.constants = {prefix + name: values for name, values in constants.items()}  # type: ignore[assignment]
