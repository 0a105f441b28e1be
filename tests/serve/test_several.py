"""Several pictures in one question: each answer is what a session alone gives, and each refusal names its field."""

import json
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import openai
import pytest
from commands import QUESTIONS_64
from served import KEY, Served, data_uri, served

from himap_export.engines.answer import Request
from himap_export.engines.arrays import Inputs
from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.film import Film
from himap_export.engines.image import ImagePreprocessing
from himap_export.engines.layout import ImageTokens
from himap_export.engines.manifest import ImageSpec
from himap_export.engines.prompt import Expansion, Segment
from himap_export.engines.session import Session
from himap_export.graphs.errors import Exit, HimapError
from himap_export.serve.kept import describe_kept
from himap_export.serve.messages import Began, Event, Question
from himap_export.serve.schema import read_chat
from himap_export.serve.service import Service

LETTER, COUNT, RELATION = (QUESTIONS_64.parent / f"{name}.png" for name in ("letter", "count", "relation"))
QUESTION = "which letter is in the yellow box?"
CONTENT = "messages[0].content"


@pytest.fixture(scope="module")
def began() -> list[tuple[Question, Began]]:
    """What the server below has prefilled."""
    return []


@pytest.fixture(scope="module")
def hall(several: Bundle, began: list[tuple[Question, Began]]) -> Iterator[Served]:
    """A server for two or three pictures."""

    def watch(question: Question, event: Event) -> None:
        if isinstance(event, Began):
            began.append((question, event))

    service = Service(several, "several", opening=Opening(threads=1), watch=watch)
    service.open()
    with served(service) as server:
        yield server
    service.close()


@pytest.fixture(scope="module")
def client(hall: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{hall.url}/v1", api_key=KEY, max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def alone(several: Bundle) -> Iterator[Session]:
    with several.session(threads=1) as session:
        yield session


def body(*parts: Any, model: str = "several", **more: Any) -> dict[str, Any]:
    """A request whose message has these parts: texts, and files of pictures or their URLs."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) and not part.startswith("data:")
        else {"type": "image_url", "image_url": {"url": part if isinstance(part, str) else data_uri(part.read_bytes())}}
        for part in parts
    ]  # fmt: skip
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


def test_two_pictures_in_both_orders(client: openai.OpenAI, alone: Session) -> None:
    told = []
    for pair in ((LETTER, COUNT), (COUNT, LETTER)):
        answer = client.chat.completions.create(**body(*pair, QUESTION))
        told.append(alone.ask(pair, QUESTION))
        assert answer.choices[0].message.content == told[-1].text
        usage = answer.usage
        assert usage is not None and usage.prompt_tokens == told[-1].request.inputs.input_ids.shape[1] > 128
        assert usage.model_extra == {"image_tokens_kept": {"prefix": 128, "k1": 64, "k2": 16}}
    one, other = (answer.outputs["logits"] for answer in told)
    assert np.abs(one - other).max() > 0.1  # the order is seen


def test_three_where_two_were(hall: Served, alone: Session) -> None:
    """Variants of one plan and one text budget, that differ in how many pictures they are for, are told apart."""
    for files in ((LETTER, COUNT, RELATION), (LETTER, COUNT)):
        status, _, document = hall.chat(body(*files, QUESTION))
        assert status == 200
        assert document["choices"][0]["message"]["content"] == alone.ask(files, QUESTION).text
        assert document["usage"]["image_tokens_kept"]["prefix"] == 64 * len(files)
        assert hall.ask("GET", "/health")[0] == 200  # by now the line of the answer is written
        assert hall.lines()[-1]["images"] == len(files)


def test_pictures_stand_where_they_were_placed(
    hall: Served, alone: Session, began: list[tuple[Question, Began]]
) -> None:
    placed = "see<image>and<image>which letter?"
    status, _, document = hall.chat(body("see", LETTER, "and", COUNT, "which letter?"))
    assert status == 200 and began[-1][0].request.prompt == placed
    answer = alone.ask([LETTER, COUNT], placed)
    assert document["choices"][0]["message"]["content"] == answer.text
    np.testing.assert_array_equal(began[-1][0].request.inputs.input_ids, answer.request.inputs.input_ids)


A, B = "data:a", "data:b"


@pytest.mark.parametrize(
    ("parts", "prompt", "fields"),
    [
        ((A, B, "one", "two"), "one\ntwo", {0: A, 1: B}),
        (("one", "two", B, A), "one\ntwo", {2: B, 3: A}),
        ((A, "one", B), "<image>one<image>", {0: A, 2: B}),
        ((A, "one", "two", B, A, "three"), "<image>one\ntwo<image><image>three", {0: A, 3: B, 4: A}),
        (("one", A, "two"), "one<image>two", {1: A}),
    ],
)
def test_parts_become_a_prompt(parts: tuple[str, ...], prompt: str, fields: dict[int, str]) -> None:
    chat = read_chat(json.dumps(body(*parts)).encode())
    assert chat.prompt == prompt
    assert [*chat.images.items()] == [(f"{CONTENT}[{n}].image_url.url", url) for n, url in fields.items()]


@pytest.mark.parametrize(
    ("model", "count", "says"),
    [
        ("several", 1, "several takes no prompt of one image: its plan qa is for 2 or 3: where tokens are cut, fewer"),
        ("several", 4, "several takes no prompt of 4 images: its plan qa is for 2 or 3 (give as many, or export with"),
        ("several:none", 4, "several:none takes no prompt of 4 images: its plan none is for 2 or 3"),
    ],
)
def test_too_few_and_too_many(hall: Served, several: Bundle, model: str, count: int, says: str) -> None:
    """They are told before any picture is read: these are none."""
    status, _, document = hall.chat(body(*["data:none"] * count, QUESTION, model=model))
    error = document["error"]
    assert (status, error["param"], error["code"]) == (400, CONTENT, "invalid_value")
    assert error["message"].startswith(says) and str(several.folder) not in error["message"]


def test_fewer_do_where_nothing_is_cut(hall: Served, several: Bundle) -> None:
    status, _, document = hall.chat(body(LETTER, QUESTION, model="several:none"))
    assert status == 200 and document["usage"]["image_tokens_kept"] == {"prefix": 64}
    with several.session(plan="none", threads=1) as session:
        assert document["choices"][0]["message"]["content"] == session.ask(LETTER, QUESTION).text


def test_a_bad_picture_is_named(hall: Served) -> None:
    status, _, document = hall.chat(body(LETTER, QUESTION, "data:none"))
    assert status == 400 and document["error"]["code"] == "invalid_image"
    assert document["error"]["param"] == f"{CONTENT}[2].image_url.url"


def test_what_was_kept_of_each(hall: Served, alone: Session) -> None:
    pair = (LETTER, COUNT)
    _, _, document = hall.chat(body(*pair, QUESTION, himap={"return_kept": True}))
    told, answer = document["himap"], alone.ask(pair, QUESTION)
    assert list(told) == ["stages", "image_tokens", "pictures"]
    assert told["stages"] == ["prefix", "k1", "k2"] and told["image_tokens"] == [128, 64, 16]
    places = np.flatnonzero(answer.request.spec.manifest.model.image.find(answer.request.inputs.input_ids[0]))
    for own, picture in zip(np.split(places, 2), told["pictures"], strict=True):
        assert (picture["rows"], picture["columns"], picture["box"]) == (8, 8, [0, 0, 1, 1])
        for cut in ("k1", "k2"):
            assert picture["kept"][cut] == [n for n, p in enumerate(own) if p in answer.outputs[f"kept_{cut}"][0]]


@pytest.mark.parametrize(
    ("front", "newline", "behind", "several"), [(0, 0, 0, False), (1, 0, 0, False), (6, 1, 0, False), (0, 0, 1, True)]
)
def test_tokens_that_stand_for_no_place(front: int, newline: int, behind: int, several: bool) -> None:
    """A class token or an overview in front, newlines behind each row, or one behind the whole: of two pictures of 2 x
    3 patches the second keeps the corners."""
    each = front + 2 * (3 + newline) + behind
    image = ImageSpec(
        size=(2, 3), tiles=1, tokens=each, grid=(2, 3), newline=newline, several=several,
        preprocessing=ImagePreprocessing(resize=(2, 3), crop=None), expansion=Expansion((Segment("", each),)),
    )  # fmt: skip
    corners = [front + row * (3 + newline) + column for row in (0, 1) for column in (0, 2)]
    spec = SimpleNamespace(
        image=image, plan=SimpleNamespace(stages=("prefix", "k1")), budget=SimpleNamespace(visual=(2 * each, 4)),
        manifest=SimpleNamespace(model=SimpleNamespace(image=ImageTokens(7))),
    )  # fmt: skip
    ids = np.array([[1, *[7] * each, 1, *[7] * each, 1]])
    request = Request(Inputs(ids, np.zeros((2, 3, 2, 3), np.float32)), cast(Any, spec), sizes=((3, 2), (3, 2)))
    one, other = describe_kept(request, {"kept_k1": np.array([0, *[2 + each + n for n in corners], -1])}).pictures
    assert one.kept == {"k1": []} and other.kept == {"k1": [0, 2, 3, 5]} and (other.rows, other.columns) == (2, 3)


def test_features_are_known_the_second_time(hall: Served, began: list[tuple[Question, Began]]) -> None:
    fresh = QUESTIONS_64.parent / "color.png"
    for model in ("several", "several", "several:none"):  # plans have their tower in common
        assert hall.chat(body(fresh, fresh, QUESTION, model=model))[0] == 200
    assert [(each.known, each.looked) for _, each in began[-3:]] == [(1, 1), (2, 0), (2, 0)]


def test_films_are_not_served(several: Bundle) -> None:
    film = Film(frames=1, steps=1, sampling="arange", fps=1.0)
    images = {name: msgspec.structs.replace(spec, film=film) for name, spec in several.manifest.images.items()}
    bundle = replace(several, manifest=msgspec.structs.replace(several.manifest, images=images))
    with pytest.raises(HimapError, match="is for films: only pictures are served") as refused:
        Service(bundle, "films")
    assert refused.value.code == Exit.USAGE
