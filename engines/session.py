"""A bundle, open: images and questions in, answers out, whole or as they come.

with Bundle.open("engines/").session() as session:
    print(session.ask("photo.jpg", "What is this?").text)
"""

import threading
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

import numpy.typing as npt
from PIL import Image

from himap_export.engines.answer import Answer, AnswerStream, Drawn, Generation, Request
from himap_export.engines.arrays import Inputs, as_inputs
from himap_export.engines.backends import ANYWAY, Opening
from himap_export.engines.bundle import Bundle, RunSpec
from himap_export.engines.command import DEVICES
from himap_export.engines.conversation import Conversation
from himap_export.engines.film import read_film
from himap_export.engines.fitting import fitting_variant
from himap_export.engines.image import load_image, nearest_size, seen_share, upright
from himap_export.engines.layout import text_tokens
from himap_export.engines.pipeline import Pipeline
from himap_export.engines.processor import Processor, load_processor
from himap_export.engines.prompt import Detokenizer
from himap_export.graphs.errors import Exit, HimapError, HimapWarning

T = TypeVar("T")
Picture = Image.Image | Path | str
Pictures = Picture | Sequence[Picture]
LEAST_SEEN = 0.5  # of an image; less is said: a photograph of 3:2 shows two thirds


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
        self.asker: object = None  # the conversation that the caches hold, if they hold one

    def __enter__(self) -> Self:
        """Opens the engines. HimapError (missing) if no backend of the bundle opens on this machine."""
        self.pipeline(self.bundle.select(self._plan, self._text_budget, image_size=self._image_size))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives back the engines and their memory."""
        self._pipelines.clear()
        self.asker = None

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
        self.bundle.variants(self._plan, len(given), film=False)  # so many are refused before any is read
        shown = [upright(each) if isinstance(each, Image.Image) else load_image(Path(each)) for each in given]
        spec = self._nearest(shown, len(given), film=False)
        processor = self._processor(spec.variant.image)
        if (share := min(seen_share(each, processor.image) for each in shown)) < LEAST_SEEN:
            told = f"the model sees {share:.0%} of this image: its preprocessing crops to the centre"
            warnings.warn(HimapWarning(told), stacklevel=2)
        inputs = processor.inputs(shown, prompt)
        return Request(
            inputs, self._with_text(spec, inputs), pictures=tuple(shown), prompt=prompt, processor=processor,
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
        first = film.pictures[0]
        spec = self._nearest([first], 1, film=True)
        processor = self._processor(spec.variant.image)
        inputs = processor.film_inputs(film, prompt)
        return Request(
            inputs, self._with_text(spec, inputs), pictures=film.pictures, prompt=prompt, processor=processor,
            sizes=(first.size,), film=film,
        )  # fmt: skip

    def _nearest(self, shown: Sequence[Image.Image], images: int, film: bool) -> RunSpec:
        """Returns a variant for so many `images`, or a `film`, of the size that is nearest to what is `shown`."""
        held = self.bundle.variants(self._plan, images, film)
        sizes = [self.bundle.manifest.images[v.image].size for v in held]
        size = self._image_size or nearest_size([(each.height, each.width) for each in shown], sizes)
        return self.bundle.select(self._plan, image_size=size, images=images, film=film)

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
        return Request(inputs, fitting_variant(self.bundle, inputs, self._plan, self._text_budget))

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

    def converse(self, images: Pictures) -> Conversation:
        """Returns a conversation about one image or several, as yet without a question. HimapError (usage) if the
        model's prompts have no second turn."""
        return Conversation(self, partial(self.prepare, images))

    def converse_film(self, video: Path | str) -> Conversation:
        """Returns a conversation about a film in a file. HimapError as `converse`."""
        return Conversation(self, partial(self.prepare_film, video))

    def _answer(self, request: Request, how: Generation) -> Generator[str, None, Answer]:
        """Yields the text of a single question's answer, piece by piece."""

        def begin() -> Drawn:
            self.asker = None
            return Drawn(self.pipeline(request.spec), request.inputs, how)

        return self.spoken(request, begin)

    def spoken(self, request: Request, begin: Callable[[], "Drawn"]) -> Generator[str, None, Answer]:
        """Yields the text of what `begin` draws; meanwhile the session is busy. HimapError if it already is."""
        if not self._busy.acquire(blocking=False):
            hint = "read its stream to the end, or open a session for each thread"
            raise HimapError("the session is in the middle of an answer", hint=hint)
        try:
            drawn = begin()
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
