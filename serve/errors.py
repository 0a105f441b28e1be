"""Errors as OpenAI's API gives them: a status, and {"error": {"message", "type", "param", "code"}}."""

from typing import Any

import msgspec

from himap_export.engines.command import as_options, shortened
from himap_export.graphs.errors import Exit, HimapError
from himap_export.serve.service import Draining, QueueFull

_BAD, _BROKEN = "invalid_request_error", "server_error"
# The type, and the code where an error names none of its own.
_KINDS = {
    400: (_BAD, "invalid_value"),
    401: (_BAD, "invalid_api_key"),
    404: (_BAD, "unknown_url"),
    405: (_BAD, "method_not_allowed"),
    408: (_BAD, "request_timeout"),
    413: (_BAD, "request_too_large"),
    415: (_BAD, "unsupported_media_type"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    431: (_BAD, "headers_too_large"),
    500: (_BROKEN, "internal_error"),
    501: (_BAD, "not_implemented"),
    503: (_BROKEN, "service_unavailable"),
}
RETRY_AFTER_S = 5  # of a server that drains, or has too many connections
LEFT = 499  # the status, in logs, of a client that left before its answer was whole; nothing is sent


class ApiError(Exception):
    """What a client is told. `param`: the field that is wrong, as "messages[0].content"; `headers` of the response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, default = _KINDS.get(status, _KINDS[400 if status < 500 else 500])
        self.status, self.message, self.param = status, shortened(message), param
        self.code, self.headers = code or default, headers or {}

    def document(self) -> dict[str, Any]:
        """Returns {"error": ..}."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def content(self) -> bytes:
        """Returns the document as JSON."""
        return msgspec.json.encode(self.document())


def unavailable(message: str, code: str | None = None) -> ApiError:
    """Returns the 503 that asks to come back."""
    return ApiError(503, message, code=code, headers={"retry-after": str(RETRY_AFTER_S)})


def as_api_error(problem: HimapError, param: str | None = None, code: str | None = None) -> ApiError:
    """Returns what a client is told of `problem`; `param` and `code` are of what it could have done better."""
    message = as_options(str(problem))
    if isinstance(problem, QueueFull):
        return ApiError(429, message, headers={"retry-after": str(problem.retry_after_s)})
    if isinstance(problem, Draining):
        return unavailable(message)
    if problem.code == Exit.USAGE:
        return ApiError(400, message, param=param, code=code)
    return ApiError(500, message, code="engine_error")
