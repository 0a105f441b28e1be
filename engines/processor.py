"""A bundle's processor: from pictures or a film and a question to arrays, and from an answer's tokens to text."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from himap_export.engines.arrays import Inputs
from himap_export.engines.bundle import Bundle
from himap_export.engines.film import Frames
from himap_export.engines.image import ImagePreprocessing, preprocess
from himap_export.engines.manifest import ImageSpec
from himap_export.engines.prompt import (
    TOKENIZER,
    Detokenizer,
    Ids,
    PromptFormat,
    encode,
    load_tokenizer,
    tokenize_behind,
)
from himap_export.graphs.errors import Exit, HimapError


@dataclass(frozen=True)
class Processor:
    """The tokenizer, the prompt's format, and what a picture becomes, or a film: pixels, and image tokens in a
    prompt."""

    tokenizer: Tokenizer
    prompt: PromptFormat
    spec: ImageSpec

    @property
    def image(self) -> ImagePreprocessing:
        return self.spec.preprocessing

    def inputs(self, images: Sequence[Image.Image], prompt: str) -> Inputs:
        """Returns `input_ids` [1,S] and `pixel_values` [n*tiles,3,H,W] of a question about n images. HimapError as
        `encode` and `preprocess`."""
        token = self.prompt.picture.token
        ids = encode(self.tokenizer, self.prompt, prompt, [self.spec.expansion.write(token)] * len(images))
        return Inputs(ids[None], np.concatenate([preprocess(image, self.image) for image in images]))

    def film_inputs(self, film: Frames, prompt: str) -> Inputs:
        """Returns `input_ids` [1,S], `pixel_values` [frames,3,H,W] and the `seconds` between steps of a question about
        a film. HimapError as `inputs`."""
        assert self.spec.film is not None
        medium, each = self.prompt.film or self.prompt.picture, self.spec.film.frames // self.spec.film.steps
        text = self.spec.expansion.write(medium.token, film.step_seconds(self.spec.film.steps), film.duration)
        ids = encode(self.tokenizer, self.prompt, prompt, [text], film=True)
        pixels = np.concatenate([preprocess(image, self.image) for image in film.pictures])
        return Inputs(ids[None], pixels, seconds=(each * film.duration / len(film.pictures),))

    def turn(self, prompt: str) -> Ids:
        """Returns the ids [n] that go on behind an answer with the next question. HimapError as
        `PromptFormat.next_turn` and `tokenize_behind`."""
        return tokenize_behind(self.tokenizer, self.prompt.next_turn(prompt))

    def text(self, tokens: Sequence[int], stop_tokens: Collection[int]) -> str:
        """Returns what `tokens` say up to the first of `stop_tokens`, without the space before the first word."""
        detokenizer = Detokenizer(self.tokenizer)
        pieces = [detokenizer.push(token) for token in takewhile(lambda token: token not in stop_tokens, tokens)]
        return ("".join(pieces) + detokenizer.finish()).lstrip()


def load_processor(bundle: Bundle, image: ImageSpec) -> Processor:
    """Returns the bundle's processor for images as `image` says. Of a bundle of engines only, the tokenizer lies where
    its weights do. HimapError (usage) if there is none."""
    manifest, prompt = bundle.manifest, bundle.manifest.prompt
    held = [bundle.path(manifest.tokenizer)] if manifest.tokenizer else [f / TOKENIZER for f in bundle.weight_folders]
    file = next((file for file in held if file.is_file()), None)
    if prompt is None or file is None:
        hint = f"put {TOKENIZER} into the weights' folder" if prompt is not None else "its checkpoint had none"
        raise HimapError(f"{bundle.folder} holds no tokenizer", hint=f"{hint}; or ask by arrays", code=Exit.USAGE)
    return Processor(load_tokenizer(file), prompt, image)
