"""int4 as ONNX stores it: two's complement, two in a byte, the even column in the low four bits."""

from typing import Any

import numpy as np
import numpy.typing as npt


def pack_int4(q: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Returns integers of -8..7, [.., 2n] int8, as bytes [.., n]."""
    low, high = q[..., 0::2].view(np.uint8) & 15, q[..., 1::2].view(np.uint8) << 4
    return np.asarray(low | high, np.uint8)


def unpack_int4(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """Returns the inverse of `pack_int4`: [.., 2n] int8 of bytes [.., n]."""
    both: npt.NDArray[Any] = np.stack([packed << 4, packed], axis=-1).view(np.int8) >> 4  # shifts the sign along
    return both.reshape(*packed.shape[:-1], -1)
