"""From a question to `input_ids`, and from generated ids back to text, with `tokenizers` only.

The prompt's shape is data, `PromptFormat`, rendered once from the checkpoint's chat template at export and stored in
the bundle's manifest. The ids equal those of Hugging Face's LlavaProcessor (transformers 5.23, processing_llava.py:
the placeholder repeated once per image token, then the tokenizer); tests/engines/test_prompt.py compares them.
"""

import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from himap_export.engines.documents import MEGABYTE, Id, read_file
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import Tokens

Ids = NDArray[np.int64]
MOST_TOKENIZER = 256 * MEGABYTE  # the largest published vocabularies take 40
HUGE_ID = re.compile(rb'"\s*:\s*\d{9,}')  # tokenizers makes a table as long as the largest id, whatever it is
TOKENIZER = "tokenizer.json"  # by this name in a checkpoint's folder and in a bundle
QUESTION = "{prompt}"  # where the question goes in a template
PICTURES = "{pictures}"  # and where pictures that the question does not place
MEDIUM = "{medium}"  # what one picture or film becomes
IMAGE_MARK, FILM_MARK = "<image>", "<video>"  # how a question places them, whatever the model's own placeholder is
WORD = "a"  # any will do
Words = Annotated[str, Meta(max_length=MEGABYTE)]
Placeholder = Annotated[str, Meta(max_length=1000)]


class Segment(Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of what a picture or film becomes in a prompt: `text`, then so many image `tokens`."""

    text: Annotated[str, Meta(max_length=1000)]
    tokens: Tokens


class Expansion(Struct, frozen=True, forbid_unknown_fields=True):
    """What the placeholder of one picture or film becomes: its segments, then `after`.

    In a film's texts `{seconds}` is the time of the segment's step, as 1.5, `{clock}` the same as 00:01, and
    `{duration}` the film's, as 0:00:12.
    """

    segments: Annotated[tuple[Segment, ...], Meta(min_length=1, max_length=10_000)]
    after: Annotated[str, Meta(max_length=1000)] = ""

    @property
    def tokens(self) -> int:
        """V."""
        return sum(segment.tokens for segment in self.segments)

    def write(self, placeholder: str, times: Sequence[float] = (), duration: float = 0.0) -> str:
        """Returns the text, `placeholder` once for each image token; `times` in seconds of a film's steps."""
        parts = [s.text + placeholder * s.tokens for s in self.segments]
        for n, time in enumerate(times[: len(parts)]):
            clock = f"{int(time // 60):02d}:{int(time % 60):02d}"
            parts[n] = parts[n].replace("{seconds}", f"{time:.1f}").replace("{clock}", clock)
        return ("".join(parts) + self.after).replace("{duration}", str(timedelta(seconds=int(duration))))


class Medium(Struct, frozen=True, forbid_unknown_fields=True):
    """How prompts say that here is a picture, or a film. `token`: the placeholder of its image tokens in the tokenizer,
    and `id` in `input_ids`, -1 if that is the placeholder's own.

    `lead`: what stands for it in front of a question, `inline` within one; `{medium}` in each is what it becomes. `{n}`
    counts pictures from 1.
    """

    token: Annotated[str, Meta(min_length=1, max_length=1000)]
    lead: Placeholder
    inline: Placeholder
    id: Id = -1

    def __post_init__(self) -> None:
        for text in (self.lead, self.inline):
            if text.count(MEDIUM) != 1:
                raise HimapError("unusable prompt format", f"{MEDIUM} must occur once in {text!r}")

    def write(self, form: str, texts: Sequence[str]) -> list[str]:
        """Returns `lead` or `inline`, whichever `form` is, of pictures that become `texts`."""
        return [form.replace("{n}", str(n)).replace(MEDIUM, text) for n, text in enumerate(texts, 1)]


class PromptFormat(Struct, frozen=True, forbid_unknown_fields=True):
    """How a question becomes text: `template` holds `{prompt}` once and, in front of it, `{pictures}` once.

    `interleaved`: the template of a question that places its pictures itself, with `{prompt}` alone. `turn`: what goes
    on behind an answer, up to the next one, with `{prompt}` once; empty if no conversation was told of.
    `add_special_tokens`: the tokenizer adds its own, such as BOS (False if the template writes them). `strip`: white
    space around the question is removed, as some chat templates do. Raises HimapError for templates that break these
    rules.
    """

    template: Words
    interleaved: Words
    picture: Medium
    film: Medium | None = None
    turn: Words = ""
    add_special_tokens: bool = True
    strip: bool = False

    def __post_init__(self) -> None:
        rules = [(self.template, QUESTION), (self.template, PICTURES), (self.interleaved, QUESTION)]
        for text, part in [*rules, *([(self.turn, QUESTION)] if self.turn else [])]:
            if text.count(part) != 1:
                raise HimapError("unusable prompt format", f"{part} must occur once in the template {text!r}")
        if self.template.index(PICTURES) > self.template.index(QUESTION):
            raise HimapError("unusable prompt format", f"pictures stand behind the question in {self.template!r}")
        for token in (medium.token for medium in (self.picture, self.film) if medium is not None):
            if token in self.template or token in self.interleaved or token in self.turn:
                raise HimapError("unusable prompt format", f"a template holds the placeholder {token!r}")

    def render(self, prompt: str, media: Sequence[str], film: bool = False) -> str:
        """Returns the text of one question about pictures that become `media`, or a `film`.

        The question places all of them, by `<image>` (or `<video>`), or none; they then stand in front. HimapError
        (usage) if it places more or fewer, or spells the model's own placeholder.
        """
        medium, mark = (self.film, FILM_MARK) if film else (self.picture, IMAGE_MARK)
        if medium is None:
            details = "its prompt format knows pictures only"
            raise HimapError("this model is asked about no films", details, code=Exit.USAGE)
        if (other := IMAGE_MARK if film else FILM_MARK) in prompt and self.film is not None:
            given = "a film is" if film else "images are"
            hint = f"leave {other} out"
            raise HimapError(f"the prompt contains {other}, but {given} given", hint=hint, code=Exit.USAGE)
        placed = prompt.count(mark)
        if placed not in (0, len(media)):
            details, hint = f"{len(media)} given", "say where each stands, or leave it out: they then stand in front"
            raise HimapError(f"the prompt contains {mark} {placed} times", details, hint, Exit.USAGE)
        pieces = (prompt.strip() if self.strip else prompt).split(mark)
        own = {m.token for m in (self.picture, self.film) if m is not None}
        if spelt := next((token for token in own for piece in pieces if token in piece), ""):
            hint = f"say where images go by {mark}, or leave it out"
            raise HimapError(f"the prompt contains the placeholder {spelt}", hint=hint, code=Exit.USAGE)
        if not placed:
            before, after = self.template.split(QUESTION)
            return before.replace(PICTURES, "".join(medium.write(medium.lead, media))) + pieces[0] + after
        before, after = self.interleaved.split(QUESTION)
        inline = medium.write(medium.inline, media)
        return before + pieces[0] + "".join(a + b for a, b in zip(inline, pieces[1:], strict=True)) + after

    def next_turn(self, prompt: str) -> str:
        """Returns the text that goes on behind an answer. HimapError (usage) if the checkpoint tells of no
        conversations, or the question spells a placeholder: no picture can join later."""
        if not self.turn:
            details = "its chat template has one turn"
            raise HimapError("this model is asked one question at a time", details, code=Exit.USAGE)
        known = (IMAGE_MARK, FILM_MARK, self.picture.token, *([self.film.token] if self.film else []))
        if spelt := next((mark for mark in known if mark in prompt), ""):
            hint = "a conversation goes on about the pictures it began with"
            raise HimapError(f"the question contains {spelt}", hint=hint, code=Exit.USAGE)
        return self.turn.replace(QUESTION, prompt.strip() if self.strip else prompt)


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


def encode(tokenizer: Tokenizer, how: PromptFormat, prompt: str, media: Sequence[str], film: bool = False) -> Ids:
    """Returns `input_ids` int64 [S] of one question about `media`: for each picture, or the `film`, what its
    placeholder becomes. Special tokens are added.

    HimapError (usage) as `PromptFormat.render`, or if the question is not valid Unicode.
    """
    medium, text = (how.film if film else None) or how.picture, how.render(prompt, media, film)
    ids = tokenize(tokenizer, text, how.add_special_tokens)
    placeholder, wanted = image_token_id(tokenizer, medium.token), text.count(medium.token)
    if (found := int((ids == placeholder).sum())) != wanted:
        raise HimapError("the prompt has the wrong number of image tokens", f"{found}, expected {wanted}")
    return ids if medium.id == -1 else np.where(ids == placeholder, medium.id, ids)


def tokenize(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> Ids:
    """Returns the ids [S] of a text; HimapError (usage) if it is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a byte of the command line that was not UTF-8
        raise HimapError("the prompt is not valid Unicode", error.reason, code=Exit.USAGE) from error
    return np.array(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids, np.int64)


def tokenize_behind(tokenizer: Tokenizer, text: str) -> Ids:
    """Returns the ids [n] of a text that goes on behind a word: without what a tokenizer puts in front of a text, such
    as SentencePiece's space.

    HimapError (usage) if it is not valid Unicode; (failure) if the tokenizer joins it to the word."""
    before, ids = tokenize(tokenizer, WORD, False), tokenize(tokenizer, WORD + text, False)
    if not np.array_equal(ids[: len(before)], before):
        details = f"the tokenizer joins {text[:40]!r} to the word before it"
        raise HimapError("no question can go on behind an answer", details)
    return ids[len(before) :]


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
