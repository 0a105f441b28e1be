"""From a question to `input_ids`, and from generated ids back to text, with `tokenizers` only.

The prompt's shape is data, `PromptFormat`, rendered once from the checkpoint's chat template at export and stored in
the bundle's manifest. The ids equal those of Hugging Face's LlavaProcessor (transformers 5.23, processing_llava.py:
the placeholder repeated once per image token, then the tokenizer); tests/engines/test_prompt.py compares them.
"""

import re
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from himap_export.engines.documents import MEGABYTE, Id, read_file
from himap_export.graphs.errors import Exit, HimapError

MOST_TOKENIZER = 256 * MEGABYTE  # the largest published vocabularies take 40
HUGE_ID = re.compile(rb'"\s*:\s*\d{9,}')  # tokenizers makes a table as long as the largest id, whatever it is
TOKENIZER = "tokenizer.json"  # by this name in a checkpoint's folder and in a bundle
QUESTION = "{prompt}"  # where the question goes in a template


class PromptFormat(Struct, frozen=True, forbid_unknown_fields=True):
    """How a question becomes text: `template` holds `{prompt}` once and the placeholder `image_token` once.

    The placeholder stands for all tokens of the image. `add_special_tokens`: the tokenizer adds its own, such as BOS
    (False if the template writes them). `strip`: white space around the question is removed, as some chat templates do.
    `image_id`: what stands for an image token in `input_ids`, -1 if that is the placeholder's id. Raises HimapError for
    a template that breaks these rules.
    """

    template: Annotated[str, Meta(max_length=MEGABYTE)]
    image_token: Annotated[str, Meta(max_length=1000)]
    add_special_tokens: bool = True
    strip: bool = False
    image_id: Id = -1

    def __post_init__(self) -> None:
        problem = ""
        if self.template.count(QUESTION) != 1:
            problem = f"{QUESTION} must occur once in the template {self.template!r}"
        elif not self.image_token or self.template.count(self.image_token) != 1:
            problem = f"the image token {self.image_token!r} must occur once in the template {self.template!r}"
        if problem:
            raise HimapError("unusable prompt format", problem)

    def render(self, prompt: str) -> str:
        """Returns the text around one question, the placeholder still single.

        Raises HimapError (Exit.USAGE) if the question itself spells the placeholder: it would be a second image.
        """
        before, after = self.template.split(QUESTION)
        text = before + (prompt.strip() if self.strip else prompt) + after
        if text.count(self.image_token) != 1:
            summary = f"the prompt contains the image placeholder {self.image_token}"
            raise HimapError(summary, hint="the image is put in by itself: leave the placeholder out", code=Exit.USAGE)
        return text


def read_tokenizer(path: Path) -> bytes:
    """Returns the content of a `tokenizer.json` that the library may be given. HimapError (failure) if it may not."""
    content = read_file(path, "tokenizer", MOST_TOKENIZER, Exit.FAILURE)
    if HUGE_ID.search(content):
        raise HimapError("tokenizer cannot be read", str(path), "it has ids of nine digits and more")
    return content


def load_tokenizer(path: Path) -> Tokenizer:
    """Returns the tokenizer in a `tokenizer.json`, without stored padding or truncation. HimapError if it is none."""
    content = read_tokenizer(path)
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises bare Exception
        raise HimapError("tokenizer cannot be read", str(path), " ".join(str(error).split())) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode(tokenizer: Tokenizer, how: PromptFormat, prompt: str, image_tokens: int) -> NDArray[np.int64]:
    """Returns `input_ids` int64 [S] of one question about one image, the placeholder expanded to `image_tokens` (V0)
    ids, special tokens added.

    Raises HimapError (Exit.USAGE) if the question contains the image placeholder or is not valid Unicode.
    """
    text = how.render(prompt).replace(how.image_token, how.image_token * image_tokens)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a byte of the command line that was not UTF-8
        raise HimapError("the prompt is not valid Unicode", error.reason, code=Exit.USAGE) from error
    ids: list[int] = tokenizer.encode(text, add_special_tokens=how.add_special_tokens).ids
    placeholder = image_token_id(tokenizer, how.image_token)
    found = ids.count(placeholder)
    if found != image_tokens:
        raise HimapError("the prompt has the wrong number of image tokens", f"{found}, expected {image_tokens}")
    written = np.array(ids, np.int64)
    return written if how.image_id == -1 else np.where(written == placeholder, how.image_id, written)


def image_token_id(tokenizer: Tokenizer, image_token: str) -> int:
    """Returns the id of the placeholder. HimapError if the tokenizer does not know it as one token."""
    token = tokenizer.token_to_id(image_token)
    if token is None:
        raise HimapError("the tokenizer does not know the image token", image_token)
    return token


class Detokenizer:
    """Text from generated ids, piece by piece: what `push` and `finish` return, joined, is the decoded answer.

    (Where the model writes bytes that are no UTF-8, the number of U+FFFD may differ.) A piece comes once its bytes are
    complete UTF-8. Special tokens give no text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._begin()

    def _begin(self) -> None:
        self._stream, self._waiting = DecodeStream(skip_special_tokens=True), list[int]()

    def push(self, token: int) -> str:
        """Returns the text that `token` completes; "" if it is special or ends inside a character."""
        self._waiting.append(int(token))
        try:
            text = self._stream.step(self._tokenizer, int(token))
        except Exception:  # a bare one. SentencePiece: one bad byte spoils the whole run of bytes, emitted ones too
            return self.finish()
        if text is None:
            return ""
        self._waiting = []
        return text

    def finish(self) -> str:
        """Returns what is left: an incomplete character becomes U+FFFD. The detokenizer can then start a new text."""
        text: str = self._tokenizer.decode(self._waiting, skip_special_tokens=True)
        self._begin()
        return text
