"""Constant matrices that resize a grid of positions or of features along one axis.

Interpolation is linear and separable, so resizing [old, old, channels] to [new, new, channels] is one matrix
[new, old] applied to the rows and to the columns: two small matrix products every runtime can execute.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def interpolation(old: int, new: int, mode: Literal["bicubic", "bilinear"] = "bicubic") -> NDArray[np.float32]:
    """Returns the matrix [new, old] that resizes one axis of a grid: `matrix @ rows @ matrix.T` resizes a square one as
    ``torch.nn.functional.interpolate(align_corners=False)`` does. ValueError for a length below 1."""
    import torch
    from torch.nn import functional

    if old < 1 or new < 1:
        raise ValueError(f"cannot resize {old} samples to {new}")
    # One channel per unit vector, constant along the width: the height is then resized alone.
    with torch.device("cpu"):
        units = torch.eye(old, dtype=torch.float32)[None, :, :, None]
        columns = functional.interpolate(units, size=(new, 1), mode=mode, align_corners=False)
    matrix: NDArray[np.float32] = columns[0, :, :, 0].T.contiguous().numpy()
    return matrix


def resampled(grids: "torch.Tensor", rows: "torch.Tensor", columns: "torch.Tensor") -> "torch.Tensor":
    """Returns grids [n,h,w,C] as [n,r,c,C], through `rows` [r,h] and `columns` [c,w], in fp32."""
    n, height, width, channels = grids.shape
    tall = (rows @ grids.float().reshape(n, height, width * channels)).reshape(n, -1, width, channels)
    return (columns @ tall).to(grids.dtype)


def resized(positions: "torch.Tensor", weights: "torch.Tensor | None") -> "torch.Tensor":
    """Returns positions [n*n,C] of a square grid as [m*m,C]: rows, then columns, through `weights` [m,n], in fp32."""
    if weights is None:
        return positions
    n, channels = weights.shape[1], positions.shape[-1]
    return resampled(positions.reshape(1, n, n, channels), weights, weights).reshape(-1, channels)
