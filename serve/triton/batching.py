"""The model for clients that want whole answers: Triton gathers requests, and they are answered side by side.

`execute` returns when the last answer of its batch is whole; the other model lets new questions in before that.
"""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.serve.messages import Ended, Event, Piece, Question
from himap_export.serve.service import Service
from himap_export.serve.triton.models import POLL_S, open_service, questions, refused, tokens_kept, unfinished
from himap_export.serve.triton.tensors import Output, response


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Returns when the engines have answered; an error here is Triton's reason not to be ready."""
        self._service = open_service(args)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Returns a response for each request: one that cannot be answered spoils no other."""
        batch = [Batched(self._service, request) for request in requests]
        return [batched.response() for batched in batch]

    def finalize(self) -> None:
        """Ends the engines' thread."""
        self._service.close()


class Batched:
    """One request's rows, each a question that is answered while its neighbours are."""

    def __init__(self, service: Service, request: Any) -> None:
        """Hands the questions to the service, all or none."""
        self._request, self._problem, self._rows = request, None, list[Row]()
        try:
            for question in questions(service, request):
                self._rows.append(Row(service, question))
        except Exception as problem:  # a bad request spoils no other
            self._problem = refused(problem)
            self._cancel()

    def response(self) -> Any:
        """Returns the response, when all answers are whole."""
        for row in self._rows:
            while not row.ended.wait(POLL_S):
                if self._request.is_cancelled():
                    self._cancel()
        missing = (unfinished(row.end) for row in self._rows)
        if problem := self._problem or next((said for said in missing if said is not None), None):
            return problem
        outputs: dict[str, Output] = {
            "TEXT": [row.text for row in self._rows],
            "FINISH_REASON": [row.end.reason for row in self._rows],
            "IMAGE_TOKENS_KEPT": _stacked([row.tokens_kept for row in self._rows]),
        }
        return response(outputs, (len(self._rows), 1))

    def _cancel(self) -> None:
        for row in self._rows:
            row.cancel()


class Row:
    """One question and its answer, as far as it has come; `end` is there when `ended` is set."""

    def __init__(self, service: Service, question: Question) -> None:
        self.text, self.ended, self.tokens_kept = "", threading.Event(), tokens_kept(question)
        self.end: Ended
        self.cancel = service.submit(question, self._hear)

    def _hear(self, event: Event) -> None:
        match event:
            case Piece():
                self.text += event.text
            case Ended():
                self.end = event
                self.ended.set()


def _stacked(rows: list[npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
    """Returns rows of different length as [rows, the longest]; -1 fills, where a row's plan has fewer stages."""
    found = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for filled, row in zip(found, rows, strict=True):
        filled[: len(row)] = row
    return found
