"""A conversation: question after question about the same pictures or film, each appended to the caches of the first.

conversation = session.converse(["before.jpg", "after.jpg"])
print(conversation.ask("What has changed?").text)
print(conversation.ask("And in the sky?").text)
"""

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Unpack

import numpy as np

from himap_export.engines.answer import Answer, AnswerStream, Drawn, Generation, Request
from himap_export.engines.layout import Integers, PromptLayout, check_words
from himap_export.engines.pipeline import Pipeline
from himap_export.engines.prefill import Prefilled
from himap_export.engines.prompt import Ids
from himap_export.graphs.errors import Exit, HimapError

if TYPE_CHECKING:
    from himap_export.engines.session import Session

Begun = tuple[Prefilled, PromptLayout]


@dataclass
class _Caches:
    """What a pipeline's caches hold of a conversation that began with `request`: the tokens before `position`.

    `pending` is the last token of an answer that no stop token ended: only the next step writes it. A stop token is
    never written, for what the template puts behind an answer brings its own. `begun`: what the first prompt gave.
    """

    pipeline: Pipeline
    request: Request
    begun: Begun | None = None
    turns: int = 0
    position: int = 0
    pending: tuple[int, ...] = ()
    appended: int = 0

    @property
    def left(self) -> int:
        """How many tokens the next question may take; -1 if the pending one has no slot either."""
        return self.pipeline.spec.budget.capacity[0] - self.position - len(self.pending)

    def open(self, begun: Begun) -> Begun:
        """Takes over what the first prompt gave."""
        self.begun, self.position = begun, int(begun[1].lengths[0])
        return begun

    def append(self, begun: Begun, question: Ids) -> Begun:
        """Appends what is pending, then a question [n], one token a step; returns what an answer follows from."""
        (prefilled, layout), fed = begun, (*self.pending, *question)
        logits, self.appended = prefilled.logits, len(fed)
        for token in fed:
            logits = self.pipeline.step(np.array([token]), np.array([self.position]))
            self.position, self.pending = self.position + 1, ()
        return replace(prefilled, logits=logits), replace(layout, lengths=np.array([self.position]))

    def follow(self, answer: Iterator[Integers]) -> Iterator[Integers]:
        """Yields an answer's tokens [1]: when one comes, those before it are written."""
        start, stop = self.position, self.pipeline.manifest.model.eos_tokens
        self.turns += 1
        for step, tokens in enumerate(answer):
            token = int(tokens[0])
            self.position, self.pending = start + step, () if token in stop else (token,)
            yield tokens


class _Turn(Drawn):
    """The answer to the question [n] that goes on behind what `caches` hold, or to their first one."""

    def __init__(self, caches: _Caches, question: Ids, how: Generation) -> None:
        super().__init__(caches.pipeline, caches.request.inputs, how)
        self._caches, self._question = caches, question
        if caches.begun is None:
            return
        if (needed := len(question)) > (left := caches.left):
            hint = f"begin another, or export with `max_new_tokens` {self.pipeline.spec.budget.new + needed - left}"
            details = f"it takes {needed} tokens, {max(0, left)} slots of the caches are left"
            raise HimapError("the question does not fit into this conversation", details, hint, Exit.USAGE)
        self.new_tokens = min(self.new_tokens, left - needed + 1)  # the last one needs no slot

    def __iter__(self) -> Iterator[Integers]:
        caches, start = self._caches, time.perf_counter()
        turn = range(caches.turns, caches.turns + 1)
        if caches.begun is None:
            prefilled, layout = caches.open(self.prefilled(self.inputs, turn))
        else:
            prefilled, layout = caches.append(caches.begun, self._question)
        yield from caches.follow(self.decoded(prefilled, layout, turn, start))


class Conversation:
    """Questions one after the other about the same pictures or film; made by `Session.converse`.

    The first is prefilled as any. Each later one is appended to the same KV caches, one token a step, and sees what
    these hold: all questions and answers and, of the pictures, what the first question's cuts kept. Image tokens are
    ranked once, by the first question, whatever the later ones ask about; nothing is looked at or prefilled again.

    What follows the first prompt has the slots of the budget's new tokens, and those of the text budget that this
    prompt left over. The conversation ends with the first question that its session is asked outside of it.

    HimapError (usage) if the model's prompts have one turn.
    """

    def __init__(self, session: "Session", prepare: Callable[[str], Request]) -> None:
        if (prompt := session.bundle.manifest.prompt) is not None:
            prompt.next_turn("")
        self._session, self._prepare = session, prepare
        self._caches: _Caches | None = None

    @property
    def left(self) -> int | None:
        """How many tokens the next question may take, with what the model's template puts around it; None before the
        first."""
        return None if self._caches is None or self._caches.begun is None else max(0, self._caches.left)

    @property
    def appended(self) -> int:
        """How many tokens were appended for the last question; 0 for the first."""
        return 0 if self._caches is None else self._caches.appended

    def stream(self, prompt: str, **how: Unpack[Generation]) -> AnswerStream:
        """Returns the answer to the next question as it comes; it ends where the caches are full.

        HimapError (usage) while one reads, before anything is written: of the first question as `Session.prepare`, or
        if the bundle answers several prompts at once; of a later one if it does not fit behind the others or says where
        an image stands, or if the session was asked something else. At a temperature, each question draws anew.
        """
        return AnswerStream(self._answer(prompt, how))

    def ask(self, prompt: str, **how: Unpack[Generation]) -> Answer:
        """Returns the answer to the next question. HimapError as `stream`."""
        return self.stream(prompt, **how).answer

    def _answer(self, prompt: str, how: Generation) -> Generator[str, None, Answer]:
        caches, session = self._caches, self._session
        if caches is None or caches.begun is None:
            request, question = self._prepare(prompt), np.zeros(0, np.int64)
            if (batch := request.spec.budget.batch) > 1:
                summary = f"{request.spec.bundle.folder} answers {batch} prompts together"
                raise HimapError(summary, "a conversation goes on alone", "export it with `batch` 1", Exit.USAGE)
        else:
            request = replace(caches.request, prompt=prompt)
            assert request.processor is not None
            question = request.processor.turn(prompt)
            check_words(question, session.bundle.manifest.decoder.vocab, caches.turns)

        def begin() -> Drawn:
            if caches is None or caches.begun is None:
                self._caches = _Caches(session.pipeline(request.spec), request)
                session.asker = self
                return _Turn(self._caches, question, how)
            if session.asker is not self:
                details = "its session was asked something else, or closed"
                raise HimapError("the conversation is over", details, "begin another", Exit.USAGE)
            return _Turn(caches, question, how)

        return (yield from session.spoken(request, begin))
