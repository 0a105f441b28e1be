"""What goes through Triton's Python stub, which is not always to be trusted with arrays.

Stubs before Triton 24.11 were compiled for NumPy 1. With NumPy 2 they take every stride for 0: an array of bytes comes
out as its first byte, repeated, without a word, and a string ends the process. So images are read through DLPack, which
NumPy has no part in, and `check_stub` refuses to start on such a pair.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.graphs.errors import Exit, HimapError

Code = str  # of a TritonError: INVALID_ARG, ..
Output = Sequence[str] | npt.NDArray[Any]


def backend() -> Any:
    """Returns Triton's own module, which only its Python stub has."""
    return import_module("triton_python_backend_utils")


def check_stub() -> None:
    """Sends four bytes through the stub. HimapError (missing) if others come back."""
    tensor, sent = backend().Tensor, np.arange(4, dtype=np.uint8)
    found = tensor.from_dlpack("back", tensor("sent", sent)).as_numpy()
    if not np.array_equal(found, sent):
        details = (
            f"it was compiled for another NumPy than {np.__version__}: {sent.tolist()} comes back {found.tolist()}"
        )
        hint = "use Triton 24.11 or newer, or NumPy 1.26 in the environment of its Python stub"
        raise HimapError("Triton's Python stub corrupts arrays", details, hint, Exit.MISSING)


def numbers(request: Any, name: str) -> npt.NDArray[Any] | None:
    """Returns a copy of an input's numbers, in its shape; None if the request has no such input."""
    found = backend().get_input_tensor_by_name(request, name)
    return None if found is None else np.from_dlpack(found).copy()


def texts(request: Any, name: str) -> list[str] | None:
    """Returns an input's strings, row by row; None if the request has no such input. HimapError (usage) for bytes that
    are no UTF-8."""
    found = backend().get_input_tensor_by_name(request, name)
    if found is None:
        return None
    try:
        return [text.decode() for text in found.as_numpy().reshape(-1).tolist()]
    except UnicodeDecodeError:
        raise HimapError(f"{name} is no UTF-8", code=Exit.USAGE) from None


def response(outputs: Mapping[str, Output], shape: tuple[int, ...]) -> Any:
    """Returns a response of numbers as they are, and strings in `shape`."""
    made = []
    for name, values in outputs.items():
        if not isinstance(values, np.ndarray):
            values = np.array([text.encode() for text in values], object).reshape(shape)
        made.append(backend().Tensor(name, values))
    return backend().InferenceResponse(made)


def refusal(message: str, code: Code) -> Any:
    """Returns a response that is an error, in one line."""
    error = backend().TritonError
    return backend().InferenceResponse(error=error(" ".join(message.split()), getattr(error, code)))
