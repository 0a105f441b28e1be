"""What a server did, as JSON lines: one for each request, and one each when it starts, is ready, drains and stops."""

import json
import math
import threading
from datetime import UTC, datetime
from typing import TextIO

PRIVATE = ("prompt", "answer", "image")  # fields that nobody finds in a log who did not ask for them


class RequestLog:
    """Writes events to a stream, each one line of ASCII; any thread may.

    With `log_prompts` also what people asked, showed and were told.
    """

    def __init__(self, stream: TextIO, log_prompts: bool = False) -> None:
        self._stream, self._log_prompts, self._writing = stream, log_prompts, threading.Lock()

    def write(self, event: str, **fields: object) -> None:
        """Writes what happened: {"time": .., "event": .., ..}, in UTC and in the order of `fields`. Numbers that are
        not finite become null; a stream that is closed or full takes nothing, and nobody is stopped by it."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        told = {name: _finite(value) for name, value in fields.items() if self._log_prompts or name not in PRIVATE}
        # ASCII alone: no control character, line separator or half of a pair gets through. DEL is all that is left.
        line = json.dumps({"time": now, "event": event} | told, default=str).replace("\x7f", "\\u007f")
        with self._writing:
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # ValueError: it is closed. There is no other place to say so
                return


def _finite(value: object) -> object:
    """A value as JSON can spell it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
