"""What both models share: the service that config.pbtxt describes, and the questions in a request.

Inputs are PROMPT, IMAGE (the bytes of a PNG or JPEG file) and, optionally, MAX_NEW_TOKENS, TEMPERATURE, TOP_P, SEED and
PLAN. A request of several rows, to the model that batches, pads the files of its images with zeros.
"""

import json
import math
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.image import decode_image
from himap_export.engines.sampling import Sampling
from himap_export.graphs.errors import Exit, HimapError, suggestion
from himap_export.serve.kept import image_tokens_kept
from himap_export.serve.messages import Ended, Question
from himap_export.serve.service import Draining, QueueFull, Service, Settings
from himap_export.serve.triton.tensors import backend, check_stub, numbers, refusal, texts

FORMATS = ("PNG", "JPEG")  # Pillow's rarer decoders stay closed to strangers
MAX_PIXELS = 2**25
# Of config.pbtxt, each as JSON; Triton may add others.
PARAMETERS = (
    *("bundle", "weights", "verify", "name", "plans"),
    *("backend", "device", "threads", "max_batch", "max_queue", "prefills"),
)
POLL_S = 0.1  # between two looks whether a client has cancelled what waits


def open_service(args: Mapping[str, str]) -> Service:
    """Returns the service that a model's parameters describe, when each of its variants has answered a question.
    HimapError if one cannot, or if this stub corrupts arrays."""
    check_stub()
    parameters = json.loads(args["model_config"])["parameters"]
    said = {name: json.loads(value["string_value"]) for name, value in parameters.items() if name in PARAMETERS}
    bundle = Bundle.open(Path(said["bundle"]), verify=said["verify"])
    if weights := said.get("weights"):
        bundle = bundle.with_weights([Path(folder) for folder in weights], said["verify"])
    service = Service(
        bundle, said["name"], plans=said.get("plans", ()), backend=said.get("backend"),
        opening=Opening(said.get("threads"), said.get("device")),
        settings=Settings(said.get("max_batch"), said["max_queue"], said["prefills"]),
    )  # fmt: skip
    service.open()
    return service


def questions(service: Service, request: Any) -> list[Question]:
    """Returns the questions of a request, one for each row. HimapError for what cannot be asked."""
    prompts, files = texts(request, "PROMPT") or [], numbers(request, "IMAGE")
    assert files is not None and prompts  # Triton has compared the request with config.pbtxt
    models = [_model(service, plan) for plan in texts(request, "PLAN") or []]
    asked = time.monotonic()
    deadline = asked + request.timeout() / 1e6 if request.timeout() else math.inf
    found = []
    for row, (prompt, file) in enumerate(zip(prompts, files.reshape(len(prompts), -1), strict=True)):
        image = decode_image(file.tobytes(), "IMAGE", FORMATS, MAX_PIXELS)
        found.append(
            Question(
                id=request.request_id(), model=(model := models[row] if models else service.name),
                request=service.prepare(model, [image], prompt), max_new_tokens=_limit(service, request, row),
                asked=asked, sampling=_sampling(request, row), deadline=deadline,
            )
        )  # fmt: skip
    return found


def tokens_kept(question: Question) -> npt.NDArray[np.int32]:
    """Returns how many image tokens each stage has, [stages]."""
    return np.array([*image_tokens_kept(question.request).values()], np.int32)


def refused(problem: Exception) -> Any:
    """Returns the response that says why there is no answer; Triton's log has the traceback of a bug."""
    match problem:
        case QueueFull() | Draining():
            return refusal(str(problem), "UNAVAILABLE")
        case HimapError(code=Exit.USAGE):
            return refusal(str(problem), "INVALID_ARG")
        case HimapError():
            return refusal(str(problem), "INTERNAL")
    log_bug(problem)
    return refusal(f"a bug: {type(problem).__name__}", "INTERNAL")


def log_bug(problem: Exception) -> None:
    """Writes a traceback into Triton's log."""
    backend().Logger.log_error("".join(traceback.format_exception(problem)))


def unfinished(end: Ended) -> Any:
    """Returns the response to a question that ended before its answer did; None if the answer is whole."""
    if end.reason in ("stop", "length"):
        return None
    if end.problem is not None:
        return refused(end.problem)
    why = "the request's timeout has passed" if end.reason == "timeout" else "cancelled"
    return refusal(f"{why} after {end.tokens} tokens", "CANCELLED")


def _model(service: Service, plan: str) -> str:
    """The id of the model that answers by `plan`. HimapError (usage) if none does."""
    model = f"{service.name}:{plan}"
    if model not in service.models:
        served = tuple(dict.fromkeys(service.models.values()))
        details = f"there are {', '.join(served)}{suggestion(plan, served)}"
        raise HimapError(f"there is no plan {plan[:80]}", details, code=Exit.USAGE)
    return model


def _limit(service: Service, request: Any, row: int) -> int:
    limit = int(_number(request, "MAX_NEW_TOKENS", row, service.max_new_tokens))
    if not 1 <= limit <= service.max_new_tokens:
        details = f"the bundle's budget allows 1 to {service.max_new_tokens}"
        raise HimapError(f"MAX_NEW_TOKENS is {limit}", details, code=Exit.USAGE)
    return limit


def _sampling(request: Any, row: int) -> Sampling:
    return Sampling(
        float(_number(request, "TEMPERATURE", row, 0.0)),
        float(_number(request, "TOP_P", row, 1.0)),
        int(_number(request, "SEED", row, 0)),
    )


def _number(request: Any, name: str, row: int, default: float) -> float:
    found = numbers(request, name)
    return default if found is None else found.reshape(-1)[row].item()
