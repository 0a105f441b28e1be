"""From an example to what a model reads, and from its tokens to what it said, by the processor of its model."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from tokenizers import Tokenizer

from himap_export.engines.answer import load_processor
from himap_export.engines.arrays import Inputs
from himap_export.engines.bundle import Bundle
from himap_export.engines.image import ImagePreprocessing, load_image, preprocess
from himap_export.engines.prompt import TOKENIZER, Detokenizer, PromptFormat, encode
from himap_export.exporter.planning import describe
from himap_export.exporter.processor import read_processor
from himap_export.exporter.registry import resolve
from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.accuracy.dataset import Example, expected, prompt_of


@dataclass(frozen=True)
class Prompter:
    """The processor of one model: its tokenizer, its prompt's format, how images are made, tokens of one."""

    tokenizer: Tokenizer
    prompt: PromptFormat
    image: ImagePreprocessing
    image_tokens: int

    def arrays(self, example: Example) -> Inputs:
        """`input_ids` [1,S] and `pixel_values` [tiles,3,H,W]. HimapError (usage) names the example's line."""
        with _named(example):
            ids = encode(self.tokenizer, self.prompt, prompt_of(example), self.image_tokens)
            pixels = preprocess(load_image(example.image), self.image)
        return Inputs(ids[None], pixels)

    def text(self, tokens: Sequence[int], stop_tokens: Collection[int]) -> str:
        """What `tokens` say up to the first of `stop_tokens`, as himap-run prints it."""
        detokenizer = Detokenizer(self.tokenizer)
        pieces = [detokenizer.push(token) for token in takewhile(lambda token: token not in stop_tokens, tokens)]
        return ("".join(pieces) + detokenizer.finish()).lstrip()

    def label(self, example: Example) -> int:
        """The id of the first token of the right answer, as it follows the prompt. HimapError as `answer`."""
        return self.answer(example)[0]

    def answer(self, example: Example) -> list[int]:
        """The right answer's ids, as they follow the prompt.

        The answer is a word of its own: a space goes before it unless the prompt ends in white space. HimapError if the
        tokenizer would join the two, so that no token starts the answer.
        """
        prompt = self.prompt.render(prompt_of(example))
        space = "" if prompt[-1:].isspace() else " "
        before, whole = self._ids(prompt), self._ids(prompt + space + expected(example))
        if whole[: len(before)] != before or len(whole) == len(before):
            details = f"line {example.line} of the data set: {prompt[-20:]!r}, then {expected(example)[:20]!r}"
            raise HimapError("no token starts the answer after the prompt", details)
        return whole[len(before) :]

    def text_tokens(self, example: Example) -> int:
        """Tokens of the prompt that are not of the image: what a text budget has to hold. HimapError as `arrays`."""
        with _named(example):
            return len(self._ids(self.prompt.render(prompt_of(example)))) - 1

    def _ids(self, text: str) -> list[int]:
        """The image's placeholder counts once: it is a token by itself, whatever follows it."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=self.prompt.add_special_tokens).ids
        return ids


@contextmanager
def _named(example: Example) -> Iterator[None]:
    """What goes wrong is told with the example's line."""
    try:
        yield
    except HimapError as problem:
        summary = f"line {example.line} of the data set: {problem.summary}"
        raise HimapError(summary, problem.details, problem.hint, problem.code) from None


def prompter_of_bundle(bundle: Bundle, checkpoint: Path | None) -> Prompter:
    """The processor of a bundle, for its first image spec; where it was exported without a tokenizer, that file comes
    from the `checkpoint` folder. HimapError (usage) if neither has one.
    """
    tokenizer, prompt = load_processor(bundle, () if checkpoint is None else (checkpoint,))
    image = bundle.manifest.images[bundle.image_name()]
    return Prompter(tokenizer, prompt, image.preprocessing, image.tokens)


def prompter_of_checkpoint(folder: Path, vision_tower: Path | None = None) -> Prompter:
    """The processor in a checkpoint's folder, read as an export reads it; `vision_tower` as for `resolve`. HimapError
    (usage) without a tokenizer."""
    model = resolve(str(folder), vision_tower=vision_tower)
    _, (vision,) = describe(model)
    found = read_processor(folder, model.family, {"": vision})
    if found.prompt is None:
        raise HimapError(f"{folder} holds no tokenizer", f"expected {TOKENIZER}", code=Exit.USAGE)
    return Prompter(Tokenizer.from_buffer(found.files[TOKENIZER]), found.prompt, found.images[""], vision.tokens)
