"""Triton's Python module and its requests, as far as the models use them; the real server is `make test-triton`'s."""

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

FINAL = 1


class Tensor:
    """As the stub's, over an array that is right."""

    def __init__(self, name: str, array: npt.NDArray[Any]) -> None:
        self.name, self.array = name, array

    @classmethod
    def from_dlpack(cls, name: str, tensor: Any) -> "Tensor":
        return cls(name, np.from_dlpack(tensor))

    def as_numpy(self) -> npt.NDArray[Any]:
        assert self.array.dtype == object or self.name == "back", "only strings may be read past DLPack"
        return self.array

    def __dlpack__(self, **how: Any) -> Any:
        return self.array.__dlpack__(**how)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


class CorruptingTensor(Tensor):
    """Of a stub compiled for NumPy 1, in an environment with NumPy 2."""

    @classmethod
    def from_dlpack(cls, name: str, tensor: Any) -> "Tensor":
        return cls(name, np.full_like(np.from_dlpack(tensor), np.from_dlpack(tensor)[0]))


@dataclass
class TritonError:
    message: str
    code: str
    INVALID_ARG = "invalid argument"
    UNAVAILABLE = "unavailable"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


@dataclass
class Response:
    tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None

    def output(self, name: str) -> list[Any] | None:
        """An output's values, strings decoded; None if it has none."""
        found = next((t.array for t in self.tensors if t.name == name), None)
        if found is None:
            return None
        return [v.decode() for v in found.reshape(-1)] if found.dtype == object else found.tolist()


@dataclass
class Sender:
    sent: list[Response] = field(default_factory=list)
    final: threading.Event = field(default_factory=threading.Event)

    def send(self, response: Response, flags: int = 0) -> None:
        assert not self.final.is_set(), "something came behind the end"
        self.sent.append(response)
        if flags == FINAL:
            self.final.set()


@dataclass
class Request:
    """`cancelled` tells whether its client has cancelled it, each time that it is asked."""

    inputs: dict[str, npt.NDArray[Any]]
    cancelled: Callable[[], bool] = lambda: False
    timeout_us: int = 0
    sender: Sender = field(default_factory=Sender)

    def get_response_sender(self) -> Sender:
        return self.sender

    def is_cancelled(self) -> bool:
        return self.cancelled()

    def request_id(self) -> str:
        return "one"

    def timeout(self) -> int:
        return self.timeout_us


def backend(tensor: type[Tensor] = Tensor) -> Any:
    """The module `triton_python_backend_utils`; `logged` holds what was written into Triton's log."""
    logged: list[str] = []
    return SimpleNamespace(
        Tensor=tensor,
        TritonError=TritonError,
        InferenceResponse=lambda tensors=(), error=None: Response(list(tensors), error),
        get_input_tensor_by_name=lambda request, name: (
            tensor(name, request.inputs[name]) if name in request.inputs else None
        ),
        Logger=SimpleNamespace(log_info=logged.append, log_error=logged.append),
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
        logged=logged,
    )


def model_args(config: Path) -> dict[str, str]:
    """What Triton gives `initialize`: the parameters of a config.pbtxt, their escapes undone."""
    found = re.findall(r'^parameters \{ key: "(\w+)" value \{ string_value: "(.*)" \} \}$', config.read_text(), re.M)
    said = {key: {"string_value": re.sub(r"\\(.)", r"\1", value)} for key, value in found}
    return {"model_config": json.dumps({"parameters": said})}
