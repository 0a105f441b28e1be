"""A bundle, open: images and questions in, answers out, whole or as they come.

with Bundle.open("engines/").session() as session:
    print(session.ask("photo.jpg", "What is this?").text)
"""

import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypedDict, TypeVar, Unpack

import numpy as np
import numpy.typing as npt
from PIL import Image

from himap_export.engines.arrays import Inputs, as_inputs
from himap_export.engines.backends import ANYWAY, Opening
from himap_export.engines.bundle import Bundle, RunSpec
from himap_export.engines.command import DEVICES
from himap_export.engines.files import check_output
from himap_export.engines.film import Frames, read_film
from himap_export.engines.fitting import batches, fitting_variant
from himap_export.engines.image import load_image, nearest_size, seen_share, upright
from himap_export.engines.layout import Integers, text_tokens
from himap_export.engines.pipeline import Pipeline
from himap_export.engines.processor import Processor, load_processor
from himap_export.engines.prompt import Detokenizer
from himap_export.engines.sampling import Sampling
from himap_export.graphs.errors import Exit, HimapError, HimapWarning

T = TypeVar("T")
Picture = Image.Image | Path | str
Pictures = Picture | Sequence[Picture]
STEADY = 8  # steps of decoding from which on a rate says something
LEAST_SEEN = 0.5  # of an image; less is said: a photograph of 3:2 shows two thirds


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


class Session:
    """A bundle opened on one backend, for one caller at a time; made by `Bundle.session`.

    Each prompt is answered by the variant that fits it: at the smallest text budget that holds it and the nearest image
    size, unless the session is for one of them. What a variant needs is allocated when it is first asked, and kept; all
    share one copy of the weights.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        plan: str | None = None,
        text_budget: int | None = None,
        image_size: tuple[int, int] | None = None,
        backend: str | None = None,
        opening: Opening = ANYWAY,
    ) -> None:
        self.bundle, self._plan, self._text_budget, self._image_size = bundle, plan, text_budget, image_size
        self._backend, self._opening = backend, opening
        self._pipelines: dict[tuple[str, str, int, int], Pipeline] = {}
        self._processors: dict[str, Processor] = {}
        self._busy = threading.Lock()

    def __enter__(self) -> Self:
        """Opens the engines. HimapError (missing) if no backend of the bundle opens on this machine."""
        self.pipeline(self.bundle.select(self._plan, self._text_budget, image_size=self._image_size))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives back the engines and their memory."""
        self._pipelines.clear()

    def pipeline(self, spec: RunSpec) -> Pipeline:
        """Returns the pipeline of a variant, opened when it is first asked for."""
        key = spec.plan_name, spec.variant.image, spec.budget.images, spec.budget.text
        if key not in self._pipelines:
            opened = next(iter(self._pipelines.values()), None)
            if opened is None:
                self._pipelines[key] = open_pipeline(spec, self._backend, self._opening)
            else:
                self._pipelines[key] = Pipeline(spec, opened.backend, self._opening, opened)
        return self._pipelines[key]

    def prepare(self, images: Pictures, prompt: str) -> Request:
        """Returns the request of one question about one image or several, each a file or Pillow's; `<image>` in the
        prompt says where they stand, else they stand in front.

        HimapError (usage): an image cannot be read, the bundle has no tokenizer, nothing for so many images, or nothing
        that fits the prompt.
        """
        given = [images] if isinstance(images, Image.Image | Path | str) else list(images)
        if not given:
            raise HimapError("there is no image to ask about", hint="give one or several", code=Exit.USAGE)
        held = self.bundle.variants(self._plan, len(given), film=False)
        shown = [upright(each) if isinstance(each, Image.Image) else load_image(Path(each)) for each in given]
        sizes = [self.bundle.manifest.images[v.image].size for v in held]
        size = self._image_size or nearest_size([(each.height, each.width) for each in shown], sizes)
        spec = self.bundle.select(self._plan, image_size=size, images=len(given), film=False)
        processor = self._processor(spec.variant.image)
        if (share := min(seen_share(each, processor.image) for each in shown)) < LEAST_SEEN:
            told = f"the model sees {share:.0%} of this image: its preprocessing crops to the centre"
            warnings.warn(HimapWarning(told), stacklevel=2)
        inputs = processor.inputs(shown, prompt)
        fitting = self._with_text(spec, inputs)
        return Request(
            inputs, fitting, pictures=tuple(shown), prompt=prompt, processor=processor,
            sizes=tuple(each.size for each in shown),
        )  # fmt: skip

    def prepare_film(self, video: Path | str, prompt: str) -> Request:
        """Returns the request of one question about a film in a file; `<video>` in the prompt says where it stands.

        HimapError (usage): the film cannot be read or is too short, or as `prepare`; (missing) without PyAV.
        """
        held = self.bundle.variants(self._plan, film=True)
        how = self.bundle.manifest.images[held[0].image].film
        assert how is not None
        film = read_film(Path(video), how)
        sizes = [self.bundle.manifest.images[v.image].size for v in held]
        first = film.pictures[0]
        size = self._image_size or nearest_size([(first.height, first.width)], sizes)
        spec = self.bundle.select(self._plan, image_size=size, film=True)
        processor = self._processor(spec.variant.image)
        inputs = processor.film_inputs(film, prompt)
        return Request(
            inputs, self._with_text(spec, inputs), pictures=film.pictures, prompt=prompt, processor=processor,
            sizes=(first.size,), film=film,
        )  # fmt: skip

    def _processor(self, image: str) -> Processor:
        """That of an image spec by its name; read once, for a large vocabulary takes a second."""
        if image not in self._processors:
            self._processors[image] = load_processor(self.bundle, self.bundle.manifest.images[image])
        return self._processors[image]

    def prepare_arrays(self, arrays: Inputs | Mapping[str, npt.NDArray[Any]]) -> Request:
        """Returns the request of prompts as arrays: `input_ids` [b,S] with image placeholders expanded, `pixel_values`
        [n,3,H,W], the tiles of all their images, and `attention_mask` [b,S] if there is padding. HimapError (usage) if
        they are not that."""
        inputs = arrays if isinstance(arrays, Inputs) else as_inputs(arrays)
        return Request(inputs, self._fitting(inputs))

    def _fitting(self, inputs: Inputs) -> RunSpec:
        """Returns the variant for prompts as arrays: tiles and image tokens say of which pictures, and of how many."""
        return fitting_variant(self.bundle, inputs, self._plan, self._text_budget)

    def _with_text(self, spec: RunSpec, inputs: Inputs) -> RunSpec:
        """Returns the variant like `spec` at the text budget that fits."""
        needed = text_tokens(inputs.input_ids, inputs.attention_mask, self.bundle.manifest.model.image)
        return self.bundle.select(
            self._plan, self._text_budget, text_tokens=needed, image_size=spec.image.size, images=spec.budget.images,
            film=spec.image.film is not None,
        )  # fmt: skip

    def start(self, request: Request, **how: Unpack[Generation]) -> AnswerStream:
        """Begins to answer what was prepared. HimapError while one reads: a prompt that does not fit, or logits that
        are not finite."""
        return AnswerStream(self._answer(request, how))

    def stream(self, images: Pictures, prompt: str, **how: Unpack[Generation]) -> AnswerStream:
        """Returns the answer to one question about one image or several as it comes, piece by piece. HimapError as
        `prepare` and `start`."""
        return self.start(self.prepare(images, prompt), **how)

    def ask(self, images: Pictures, prompt: str, **how: Unpack[Generation]) -> Answer:
        """Returns the answer to one question about one image or several. HimapError as `prepare` and `start`."""
        return self.stream(images, prompt, **how).answer

    def generate(self, arrays: Inputs | Mapping[str, npt.NDArray[Any]], **how: Unpack[Generation]) -> Answer:
        """Returns the answers to prompts as arrays. HimapError as `prepare_arrays` and `start`."""
        return self.start(self.prepare_arrays(arrays), **how).answer

    def _answer(self, request: Request, how: Generation) -> Generator[str, None, Answer]:
        """Yields the text of a single question's answer, piece by piece."""
        if not self._busy.acquire(blocking=False):
            hint = "read its stream to the end, or open a session for each thread"
            raise HimapError("the session is in the middle of an answer", hint=hint)
        try:
            drawn = _Drawn(self.pipeline(request.spec), request.inputs, how)
            text = ""
            if request.processor is None:
                for _ in drawn:
                    pass
            else:
                spoken = Detokenizer(request.processor.tokenizer)
                stop = self.bundle.manifest.model.eos_tokens
                for tokens in drawn:
                    piece = spoken.push(int(tokens[0])) if tokens[0] not in stop else ""
                    piece = piece if text else piece.lstrip()  # the space that tokenizers put before a word
                    text += piece
                    if piece:
                        yield piece
                if rest := spoken.finish():
                    text += rest
                    yield rest
            return drawn.answer(request, text)
        finally:
            self._busy.release()


class _Drawn:
    """The tokens [b] of prompts, B at a time, as they are drawn; the clock stands while the caller has them.

    Prompt n draws its random cuts, if the plan has any, by the seed + n, and its tokens by seed and n: what it is
    answered does not depend on the batch it stands in.
    """

    def __init__(self, pipeline: Pipeline, inputs: Inputs, how: Generation) -> None:
        self._pipeline, self._inputs = pipeline, inputs
        limit = how.get("max_new_tokens")
        self._new_tokens = pipeline.spec.budget.new if limit is None else limit
        self._sampling = Sampling(how.get("temperature", 0.0), how.get("top_p", 1.0), how.get("seed", 0))
        self._found: dict[str, list[npt.NDArray[Any]]] = {}
        self._first, self._decoding, self._steps = 0.0, 0.0, 0

    def __iter__(self) -> Iterator[Integers]:
        spec, done = self._pipeline.spec, 0
        for part in batches(self._inputs, spec):
            yield from self._batch(part, range(done, done := done + len(part.input_ids)))

    def _batch(self, part: Inputs, requests: range) -> Iterator[Integers]:
        p, start, answer = self._pipeline, time.perf_counter(), list[Integers]()
        seeds = self._sampling.seed + np.array(requests, np.int64)
        prefilled, layout = p.prefill(
            part.input_ids, part.pixel_values, part.attention_mask, seeds=seeds, seconds=part.seconds
        )  # fmt: skip
        steps = p.generate(prefilled, layout, self._new_tokens, sampling=self._sampling, requests=requests)
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
        parts, pad = self._found["tokens"], self._pipeline.manifest.model.pad_token
        width = max(part.shape[1] for part in parts)
        self._found["tokens"] = [np.pad(p, ((0, 0), (0, width - p.shape[1])), constant_values=pad) for p in parts]
        outputs = {name: np.concatenate(values) for name, values in self._found.items()}
        return Answer(
            request, text, outputs=outputs, backend=self._pipeline.backend, device=self._pipeline.engines.device,
            first_token_s=self._first, decoding_s=self._decoding, steps=self._steps,
        )  # fmt: skip


def open_pipeline(spec: RunSpec, backend: str | None = None, opening: Opening = ANYWAY) -> Pipeline:
    """Returns the variant's pipeline, opened as `open_first` says."""
    return open_first(spec, backend, opening, Pipeline)


def open_first(spec: RunSpec, backend: str | None, opening: Opening, opened: Callable[[RunSpec, str, Opening], T]) -> T:
    """Returns what `opened` makes of a variant on `backend`, or on the first of the bundle's backends that knows the
    device and opens on this machine: of one that does not open a HimapWarning says why. HimapError (missing) if none
    does."""
    engines, device = tuple(spec.manifest.engines), opening.device
    held = tuple(name for name in engines if device in (None, *DEVICES[name])) or engines
    for name in (backend,) if backend else held:
        try:
            return opened(spec, name, opening)
        except HimapError as problem:
            if backend or problem.code != Exit.MISSING or name == held[-1]:
                raise
            warnings.warn(HimapWarning(str(problem)), stacklevel=2)
    raise HimapError(f"{spec.bundle.folder} holds no engines", code=Exit.MISSING)
