"""What OpenAI's chat API takes, as far as one question about pictures goes; anything else is refused by its name."""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from himap_export.engines.prompt import IMAGE_MARK
from himap_export.engines.sampling import Sampling
from himap_export.graphs.errors import suggestion
from himap_export.serve.errors import ApiError

MAX_PROMPT = 100_000  # characters: tokenizing more takes seconds, and no text budget holds it
MAX_STOPS, MAX_STOP = 4, 256  # texts, and characters of one
EXPECTED = "one message of the user, with image_url parts and text parts"
CONTENT = "messages[0].content"
# What the API has and this server does not do, with the values that ask for nothing; null always does.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "user": (),
    "verbosity": (),
    "web_search_options": (),
}


class ImageUrl(Struct, frozen=True, forbid_unknown_fields=True):
    url: str
    detail: Literal["auto"] = "auto"


class TextPart(Struct, tag="text", frozen=True, forbid_unknown_fields=True):
    text: str


class ImagePart(Struct, tag="image_url", frozen=True, forbid_unknown_fields=True):
    image_url: ImageUrl


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str | list[TextPart | ImagePart]


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False


class Extension(Struct, frozen=True, forbid_unknown_fields=True):
    """Ours: `return_kept`: which patches each cut kept; `return_timing`: what the server measured."""

    return_kept: bool = False
    return_timing: bool = False


@dataclass(frozen=True)
class Style:
    """What is told of an answer: it as it comes, its tokens, the patches that each cut kept, its times."""

    stream: bool = False
    usage: bool = False
    kept: bool = False
    timing: bool = False


class Chat(Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/chat/completions, without what is neutral. `temperature` is 0, the reproducible one, where
    it is not given; `seed` is 0 then, and any for answers that are drawn."""

    model: str
    messages: list[Message]
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    himap: Extension | None = None

    @property
    def parts(self) -> list[TextPart | ImagePart]:
        """The one message's."""
        content = self.messages[0].content
        return [TextPart(content)] if isinstance(content, str) else content

    @property
    def prompt(self) -> str:
        """Its texts, those side by side a line each. Pictures that stand between texts are marked where they stand; a
        single run of them, before all texts or behind, is left out: it goes where the model was taught to see it, in
        front, and the question is behind it, by which cuts rank."""
        runs = [(kind, [*parts]) for kind, parts in groupby(self.parts, type)]
        return "".join(
            "\n".join(part.text for part in parts if isinstance(part, TextPart)) if kind is TextPart
            else IMAGE_MARK * len(parts) if len(runs) > 2 else ""
            for kind, parts in runs
        )  # fmt: skip

    @property
    def images(self) -> dict[str, str]:
        """The pictures' URLs in their order, by the names of the fields that hold them."""
        found = ((n, part.image_url.url) for n, part in enumerate(self.parts) if isinstance(part, ImagePart))
        return {f"{CONTENT}[{n}].image_url.url": url for n, url in found}

    @property
    def sampling(self) -> Sampling:
        temperature = self.temperature or 0.0
        seed = self.seed if self.seed is not None else secrets.randbits(32) if temperature else 0
        return Sampling(temperature, 1.0 if self.top_p is None else self.top_p, seed)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def style(self) -> Style:
        """How the answer is to be told."""
        usage, more = self.stream_options is not None and self.stream_options.include_usage, self.himap or Extension()
        return Style(bool(self.stream), usage, kept=more.return_kept, timing=more.return_timing)

    def new_tokens(self, budget: int) -> int:
        """Returns how many tokens the answer may have; ApiError for more than the bundle's `budget`."""
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        asked: int | None = getattr(self, name)
        if asked is not None and asked > budget:
            raise ApiError(400, f"{name} is {asked}, this model answers in at most {budget} tokens", param=name)
        return budget if asked is None else asked


def read_chat(body: bytes) -> Chat:
    """Returns a request that this server can answer as it is asked. ApiError (400) names the field that it cannot."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as problem:
        raise ApiError(400, f"the body is not JSON: {problem}", code="invalid_json") from None
    if not isinstance(document, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    for name, neutral in NEUTRAL.items():
        _check_neutral(name, document.pop(name, None), neutral)
    try:
        chat = msgspec.convert(document, Chat)
    except msgspec.ValidationError as problem:
        raise _misfit(str(problem)) from None
    _check_message(chat)
    _check_fields(chat)
    return chat


def _check_neutral(name: str, value: object, neutral: tuple[Any, ...]) -> None:
    """Refuses a field that asks for what is not done; 1 and true are not the same."""
    if value is None or any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral):
        return
    taken = " or ".join(msgspec.json.encode(v).decode() for v in (*neutral, None))
    raise ApiError(400, f"{name} is not supported: leave it out, or give {taken}", param=name, code="unsupported_value")


def _misfit(problem: str) -> ApiError:
    """Returns the error for a field of another type, out of its range, unknown or missing, as msgspec says it."""
    what, _, path = problem.partition(" - at `")
    param = path.rstrip("`").removeprefix("$").removeprefix(".")
    if named := re.fullmatch("Object (?:contains unknown|missing required) field `(.*)`", what, re.DOTALL):
        param, unknown = f"{param}.{named[1]}".lstrip("."), "unknown" in what
        if not unknown:
            return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
        known = [*Chat.__struct_fields__, *NEUTRAL] if param == named[1] else []
        return ApiError(400, f"unknown field {param}{suggestion(param, known)}", param=param, code="unknown_parameter")
    if param.endswith("].type"):
        what += ", expected text or image_url"
    elif param.endswith(".detail"):
        what += ', only "auto" is supported'
    code = "invalid_type" if ", got `" in what else "invalid_value"
    return ApiError(400, f"{param or 'the body'}: {what.replace('`', '')}", param=param or None, code=code)


def _check_message(chat: Chat) -> None:
    for n, message in enumerate(chat.messages):
        if message.role != "user":
            name = f"messages[{n}].role"
            text = f"{name} {message.role[:40]!r} is not supported: expected {EXPECTED}"
            raise ApiError(400, text, param=name, code="unsupported_value")
    if len(chat.messages) != 1:
        raise ApiError(400, f"{len(chat.messages)} messages: expected {EXPECTED}", param="messages")
    _check_content(chat.parts)


def _check_content(parts: Sequence[TextPart | ImagePart]) -> None:
    if not any(isinstance(part, ImagePart) for part in parts):
        raise ApiError(400, f"there is no picture: expected {EXPECTED}", param=CONTENT)
    texts = {n: part.text for n, part in enumerate(parts) if isinstance(part, TextPart)}
    if not any(text.strip() for text in texts.values()):
        raise ApiError(400, f"there is no question: expected {EXPECTED}", param=CONTENT)
    if (length := sum(map(len, texts.values()))) > MAX_PROMPT:
        text = f"the question has {length} characters, at most {MAX_PROMPT} are read"
        raise ApiError(400, text, param=CONTENT, code="string_above_max_length")
    for n, text in texts.items():
        if IMAGE_MARK in text:
            said = f"the text contains {IMAGE_MARK}: image_url parts say where pictures stand"
            raise ApiError(400, said, param=f"{CONTENT}[{n}].text")


def _check_fields(chat: Chat) -> None:
    if len(chat.stops) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP for text in chat.stops):
        text = f"stop takes a text of 1 to {MAX_STOP} characters, or up to {MAX_STOPS} of them"
        raise ApiError(400, text, param="stop")
    if chat.stream_options is not None and not chat.stream:
        raise ApiError(400, "stream_options needs stream true", param="stream_options")
    if chat.max_tokens is not None and chat.max_completion_tokens is not None:
        text = "max_tokens and max_completion_tokens are the same: give one of them"
        raise ApiError(400, text, param="max_completion_tokens")
