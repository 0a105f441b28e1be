"""A bundle's processor: from an image and a question to what a pipeline reads, and from its tokens to text."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile

from PIL import Image
from tokenizers import Tokenizer

from himap_export.engines.arrays import Inputs
from himap_export.engines.bundle import Bundle
from himap_export.engines.image import ImagePreprocessing, preprocess
from himap_export.engines.manifest import ImageSpec
from himap_export.engines.prompt import TOKENIZER, Detokenizer, PromptFormat, encode, load_tokenizer
from himap_export.graphs.errors import Exit, HimapError


@dataclass(frozen=True)
class Processor:
    """The tokenizer, the prompt's format, and the preprocessing of images that become `image_tokens` = V0 tokens."""

    tokenizer: Tokenizer
    prompt: PromptFormat
    image: ImagePreprocessing
    image_tokens: int

    def inputs(self, image: Image.Image, prompt: str) -> Inputs:
        """Returns `input_ids` [1,S] and `pixel_values` [tiles,3,H,W]. HimapError as `encode` and `preprocess`."""
        ids = encode(self.tokenizer, self.prompt, prompt, self.image_tokens)
        return Inputs(ids[None], preprocess(image, self.image))

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
    return Processor(load_tokenizer(file), prompt, image.preprocessing, image.tokens)
