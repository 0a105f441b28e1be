"""What is asked, and its answer: as it is drawn, token by token, and whole."""

import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
from PIL import Image

from himap_export.engines.arrays import Inputs
from himap_export.engines.bundle import RunSpec
from himap_export.engines.files import check_output
from himap_export.engines.film import Frames
from himap_export.engines.fitting import batches
from himap_export.engines.layout import Integers, PromptLayout
from himap_export.engines.pipeline import Pipeline
from himap_export.engines.prefill import Prefilled
from himap_export.engines.processor import Processor
from himap_export.engines.sampling import Sampling
from himap_export.graphs.errors import Exit, HimapError

STEADY = 8  # steps of decoding from which on a rate says something


class Generation(TypedDict, total=False):
    """How an answer is drawn: up to `max_new_tokens` (the bundle's budget) tokens, greedily at `temperature` 0 (the
    default), else from the smallest set of probability `top_p` (1); `seed` (0) is of sampling and of random cuts."""

    max_new_tokens: int | None
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class Request:
    """What a session is to answer: prompts as arrays, the variant that they fit, and what they were made from: pictures
    of `sizes` (width, height), upright, and a prompt; or a film, of which `pictures` are the sampled frames."""

    inputs: Inputs
    spec: RunSpec
    pictures: tuple[Image.Image, ...] = ()
    prompt: str = ""
    processor: Processor | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    film: Frames | None = None


@dataclass(frozen=True)
class Answer:
    """What a bundle answers to a `request`. `text` is empty where arrays were asked.

    `outputs`, over all prompts b: image_features [b,V0,D], tokens [b,N] int64 (shorter answers are filled with the
    padding token), logits [b,W] of the first token, and by cut kept_k1, .. [b,S_i]: the original positions that stay,
    -1 for padding. Seconds: `first_token_s` until the first token of the first batch (vision and prefill),
    `decoding_s` for all `steps` after it.
    """

    request: Request
    text: str
    outputs: Mapping[str, npt.NDArray[Any]]
    backend: str
    device: str
    first_token_s: float
    decoding_s: float
    steps: int

    @property
    def tokens(self) -> Integers:
        """[b,N]."""
        return self.outputs["tokens"]

    @property
    def tokens_per_s(self) -> float | None:
        """Of decoding; None for fewer than STEADY steps, of which a rate says nothing."""
        return self.steps / self.decoding_s if self.steps >= STEADY else None

    def draw_kept(self, file: Path | str) -> None:
        """Writes the images, or a film's frames, as PNG, with the patches that each cut kept. HimapError (usage) if
        there is no image or no cut, or if something else is in the way."""
        from himap_export.engines.drawing import draw_answer

        asked, spec = self.request, self.request.spec
        if not asked.pictures or asked.processor is None:
            raise HimapError("there is no image to draw on", "arrays were asked", code=Exit.USAGE)
        if not spec.plan.cuts:
            hint = "choose a plan that cuts"
            raise HimapError(f"the plan {spec.plan_name} cuts nothing", hint=hint, code=Exit.USAGE)
        check_output(Path(file), ".png")
        image_tokens = np.flatnonzero(spec.manifest.model.image.find(asked.inputs.input_ids[0]))
        alive = [np.isin(image_tokens, self.outputs[f"kept_{cut}"][0]) for cut in spec.plan.stages[1:]]
        draw_answer(
            Path(file), asked.pictures, spec.image, alive=alive, cuts=[cut.layer for cut in spec.plan.cuts],
            seconds=asked.film.seconds if asked.film else (), question=asked.prompt, answer=self.text,
        )  # fmt: skip


class AnswerStream(Iterator[str]):
    """The pieces of an answer's text, as they come; `answer` is the whole."""

    def __init__(self, pieces: Generator[str, None, Answer]) -> None:
        self._pieces, self._answer = pieces, list[Answer]()

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            if end.value is not None:
                self._answer.append(end.value)
            raise

    @property
    def answer(self) -> Answer:
        """The whole, when the rest has come; this waits for it."""
        for _ in self:
            pass
        return self._answer[0]


class Drawn:
    """The tokens [b] of prompts, B at a time, as they are drawn; the clock stands while the caller has them.

    Prompt n draws its random cuts, if the plan has any, by the seed + n, and its tokens by seed and n: what it is
    answered does not depend on the batch it stands in.
    """

    def __init__(self, pipeline: Pipeline, inputs: Inputs, how: Generation) -> None:
        """HimapError (usage) for an answer of more tokens than the budget, or a sampling that is none."""
        self.pipeline, self.inputs = pipeline, inputs
        limit = how.get("max_new_tokens")
        self.new_tokens = pipeline.spec.budget.new if limit is None else limit
        pipeline.check_new_tokens(self.new_tokens)
        self._sampling = Sampling(how.get("temperature", 0.0), how.get("top_p", 1.0), how.get("seed", 0))
        self._found: dict[str, list[npt.NDArray[Any]]] = {}
        self._first, self._decoding, self._steps = 0.0, 0.0, 0

    def __iter__(self) -> Iterator[Integers]:
        done = 0
        for part in batches(self.inputs, self.pipeline.spec):
            requests, start = range(done, done := done + len(part.input_ids)), time.perf_counter()
            yield from self.decoded(*self.prefilled(part, requests), requests, start)

    def prefilled(self, part: Inputs, requests: range) -> tuple[Prefilled, PromptLayout]:
        """Prefills up to B prompts, which are these `requests`."""
        seeds = self._sampling.seed + np.array(requests, np.int64)
        return self.pipeline.prefill(
            part.input_ids, part.pixel_values, part.attention_mask, seeds=seeds, seconds=part.seconds
        )  # fmt: skip

    def decoded(self, prefilled: Prefilled, layout: PromptLayout, requests: range, start: float) -> Iterator[Integers]:
        """Yields what follows `prefilled`; the clock runs from `start` in seconds."""
        p, answer = self.pipeline, list[Integers]()
        steps = p.generate(prefilled, layout, self.new_tokens, sampling=self._sampling, requests=requests)
        while (tokens := next(steps, None)) is not None:
            took = time.perf_counter() - start
            if answer:
                self._decoding, self._steps = self._decoding + took, self._steps + 1
            elif not self._found:
                self._first = took
            answer.append(tokens)
            yield tokens
            start = time.perf_counter()
        features = p.read("image_features")[: len(requests)]
        outputs = {"image_features": features, **prefilled.kept, "logits": prefilled.logits}
        for name, values in (outputs | {"tokens": np.stack(answer, axis=1)}).items():
            self._found.setdefault(name, []).append(values)

    def answer(self, request: Request, text: str) -> Answer:
        """Returns the whole, when all tokens are drawn."""
        parts, pad = self._found["tokens"], self.pipeline.manifest.model.pad_token
        width = max(part.shape[1] for part in parts)
        self._found["tokens"] = [np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=pad) for p in parts]
        outputs = {name: np.concatenate(values) for name, values in self._found.items()}
        return Answer(
            request, text, outputs=outputs, backend=self.pipeline.backend, device=self.pipeline.engines.device,
            first_token_s=self._first, decoding_s=self._decoding, steps=self._steps,
        )  # fmt: skip
