"""From an example to what a model reads, and from its tokens to what it said, by the processor of its model."""

from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace
from tokenizers import Tokenizer

from himap_export.engines.arrays import Inputs
from himap_export.engines.bundle import Bundle
from himap_export.engines.image import load_image
from himap_export.engines.processor import Processor, load_processor
from himap_export.engines.prompt import TOKENIZER, Segment
from himap_export.engines.questions import Example, expected, located, prompt_of
from himap_export.exporter.planning import describe
from himap_export.exporter.processor import read_processor
from himap_export.exporter.registry import resolve
from himap_export.graphs.errors import Exit, HimapError


@dataclass(frozen=True)
class Prompter:
    """A model's processor, asked by examples."""

    processor: Processor

    def arrays(self, example: Example) -> Inputs:
        """Returns what a model reads of `example`. HimapError (usage) names its line."""
        with located(example):
            return self.processor.inputs([load_image(example.image)], prompt_of(example))

    def label(self, example: Example) -> int:
        """Returns the id of the first token of the right answer, as it follows the prompt. HimapError as `answer`."""
        return self.answer(example)[0]

    def answer(self, example: Example) -> list[int]:
        """Returns the right answer's ids, as they follow the prompt.

        The answer is a word of its own: a space goes before it unless the prompt ends in white space. HimapError if the
        tokenizer would join the two, so that no token starts the answer.
        """
        prompt = self._rendered(example)
        space = "" if prompt[-1:].isspace() else " "
        before, whole = self._ids(prompt), self._ids(prompt + space + expected(example))
        if whole[: len(before)] != before or len(whole) == len(before):
            details = f"line {example.line} of the data set: {prompt[-20:]!r}, then {expected(example)[:20]!r}"
            raise HimapError("no token starts the answer after the prompt", details)
        return whole[len(before) :]

    def text_tokens(self, example: Example) -> int:
        """Counts the tokens of the prompt that are not of the image: what a text budget has to hold. HimapError as
        `arrays`."""
        with located(example):
            prompt = self._rendered(example)
            return len(self._ids(prompt)) - prompt.count(self.processor.prompt.picture.token)

    def _rendered(self, example: Example) -> str:
        """The prompt with the placeholder once for each of the image's segments: it is a token by itself, whatever
        follows it."""
        token, image = self.processor.prompt.picture.token, self.processor.spec.expansion
        once = replace(image, segments=tuple(Segment(each.text, 1) for each in image.segments))
        return self.processor.prompt.render(prompt_of(example), [once.write(token)])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer.encode(
            text, add_special_tokens=self.processor.prompt.add_special_tokens
        ).ids
        return ids


def prompter_of_bundle(bundle: Bundle) -> Prompter:
    """Returns the processor of a bundle, for its first image spec. HimapError (usage) without a tokenizer, or for a
    bundle whose first variant is not for one image."""
    run = bundle.select(images=1, film=False)
    return Prompter(load_processor(bundle, run.image))


def prompter_of_checkpoint(folder: Path, vision_tower: Path | None = None) -> Prompter:
    """Returns the processor in a checkpoint's folder, read as an export reads it; `vision_tower` as for `resolve`.
    HimapError (usage) without a tokenizer."""
    model = resolve(str(folder), vision_tower=vision_tower)
    _, (vision,) = describe(model)
    found = read_processor(folder, model.family, {"": vision})
    if found.prompt is None:
        raise HimapError(f"{folder} holds no tokenizer", f"expected {TOKENIZER}", code=Exit.USAGE)
    tokenizer = Tokenizer.from_buffer(found.files[TOKENIZER])
    return Prompter(Processor(tokenizer, found.prompt, found.images[""]))
