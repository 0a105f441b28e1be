"""Where pictures and films stand in a prompt: in front of the question or where it says, each as often as it is given;
what they become; how a conversation goes on about them."""

import re
from datetime import timedelta

import numpy as np
import pytest
from msgspec import to_builtins
from msgspec.structs import replace
from tokenizers import Tokenizer, models, pre_tokenizers

from himap_export.engines.documents import typed
from himap_export.engines.prompt import Expansion, Medium, PromptFormat, Segment, encode
from himap_export.graphs.errors import Exit, HimapError

PICTURE = Medium("<pad>", lead="Picture {n}: <img>{medium}</img>\n", inline="<img>{medium}</img>")
FILM = Medium("<vid>", lead="Film: {medium}\n", inline="[{medium}]")
HOW = PromptFormat(
    "SYS USER: {pictures}{prompt} ASSISTANT:", "USER: {prompt} ASSISTANT:", PICTURE, FILM, " USER: {prompt} ASSISTANT:"
)
STILL = replace(HOW, film=None)


def test_pictures_that_the_question_does_not_place_stand_in_front() -> None:
    """In their order and counted from 1, by the template for that."""
    assert HOW.render("Why?", ["a"]) == "SYS USER: Picture 1: <img>a</img>\nWhy? ASSISTANT:"
    wanted = "SYS USER: Picture 1: <img>a</img>\nPicture 2: <img>b</img>\nWhy? ASSISTANT:"
    assert HOW.render("Why?", ["a", "b"]) == wanted
    many = HOW.render("Why?", [f"p{n}" for n in range(1, 13)])
    assert re.findall(r"Picture (\d+): <img>p(\d+)</img>\n", many) == [(str(n), str(n)) for n in range(1, 13)]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("Is <image> like <image>?", "Is <img>a</img> like <img>b</img>?"),
        ("<image><image>", "<img>a</img><img>b</img>"),
        ("<image>\nor <image>", "<img>a</img>\nor <img>b</img>"),
        ("<image> {prompt} {pictures} <image>", "<img>a</img> {prompt} {pictures} <img>b</img>"),
        (" <image> {n} {medium} <image> ", " <img>a</img> {n} {medium} <img>b</img> "),
    ],
)
def test_pictures_stand_where_the_question_says(prompt: str, wanted: str) -> None:
    """By the template without any in front; what looks like a template's own mark is text."""
    assert HOW.render(prompt, ["a", "b"]) == f"USER: {wanted} ASSISTANT:"
    assert replace(HOW, strip=True).render(prompt, ["a", "b"]) == f"USER: {wanted.strip()} ASSISTANT:"


def test_pictures_that_are_placed_are_counted_too() -> None:
    how = replace(HOW, picture=replace(PICTURE, inline="({n}: {medium})"))
    assert how.render("<image>, <image>", ["a", "b"]) == "USER: (1: a), (2: b) ASSISTANT:"


def test_a_film_stands_in_front_or_where_the_question_says() -> None:
    assert HOW.render("Why?", ["f"], film=True) == "SYS USER: Film: f\nWhy? ASSISTANT:"
    assert HOW.render("Why <video>?", ["f"], film=True) == "USER: Why [f]? ASSISTANT:"


@pytest.mark.parametrize(
    ("how", "prompt", "media", "film", "words"),
    [
        (HOW, "<image>?", 2, False, "contains <image> 1 times: 2 given"),
        (HOW, "<image><image><image>", 2, False, "contains <image> 3 times: 2 given"),
        (HOW, "<image> and <image>", 1, False, "contains <image> 2 times: 1 given"),
        (HOW, "<video><video>", 1, True, "contains <video> 2 times: 1 given"),
        (HOW, "<video>?", 1, False, "contains <video>, but images are given (leave <video> out)"),
        (HOW, "<image>?", 1, True, "contains <image>, but a film is given (leave <image> out)"),
        (HOW, "<pad>?", 1, False, "contains the placeholder <pad>"),
        (HOW, "<image> <pad>", 1, False, "contains the placeholder <pad>"),
        (HOW, "<vid>?", 1, False, "contains the placeholder <vid>"),
        (HOW, "<pad>?", 1, True, "contains the placeholder <pad>"),
        (STILL, "Why?", 1, True, "asked about no films"),
        (STILL, "<video>?", 1, True, "asked about no films"),
    ],
)
def test_marks_that_do_not_fit_are_refused(how: PromptFormat, prompt: str, media: int, film: bool, words: str) -> None:
    with pytest.raises(HimapError) as found:
        how.render(prompt, ["x"] * media, film)
    assert words in str(found.value) and "\n" not in str(found.value) and found.value.code == Exit.USAGE


def test_the_mark_of_films_is_text_to_a_model_that_knows_none() -> None:
    assert STILL.render("<video> tags in HTML?", ["a"]).endswith("<video> tags in HTML? ASSISTANT:")


def test_a_conversation_goes_on_without_pictures() -> None:
    assert HOW.next_turn(" And then?\n") == " USER:  And then?\n ASSISTANT:"
    assert replace(HOW, strip=True).next_turn(" And then?\n") == " USER: And then? ASSISTANT:"
    for spelt in ("<image>", "<video>", "<pad>", "<vid>"):
        with pytest.raises(HimapError, match=f"the question contains {spelt}") as found:
            HOW.next_turn(f"And {spelt}?")
        assert found.value.code == Exit.USAGE
    with pytest.raises(HimapError, match="asked one question at a time: its chat template has one turn") as found:
        replace(HOW, turn="").next_turn("And then?")
    assert found.value.code == Exit.USAGE


WORDS = ("?", "<pad>", "<vid>", "USER:", "ASSISTANT:", "SYS", "Why", "1", ":", "/", "img", "Picture", "Film")


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(r"\s", "removed")
    made.add_special_tokens(["<pad>", "<vid>"])
    return made


def test_image_tokens_have_the_models_id_where_the_placeholders_is_another() -> None:
    """A film's in place of a picture's, whose placeholder stays what it is."""
    how = replace(HOW, film=replace(FILM, id=-200))
    pads, films = WORDS.index("<pad>"), WORDS.index("<vid>")
    assert np.count_nonzero(encode(tokenizer(), how, "Why", ["<pad>" * 3, "<pad>" * 4]) == pads) == 7
    ids = encode(tokenizer(), how, "Why", ["<vid>" * 5], film=True)
    assert np.count_nonzero(ids == -200) == 5 and films not in ids and ids.dtype == np.int64


def test_placeholders_that_the_tokenizer_does_not_find_are_noticed() -> None:
    """It knows the word, but as none of its special tokens: side by side, two are another word."""
    plain = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(HimapError, match="wrong number of image tokens: 0, expected 2"):
        encode(plain, HOW, "Why", ["<pad><pad>"])


# --- what a medium becomes ---


def test_one_picture_is_its_placeholder_once_per_token() -> None:
    plain = Expansion((Segment("", 4),))
    assert (plain.tokens, plain.write("<p>")) == (4, "<p><p><p><p>")
    tiles = Expansion((Segment("<row_1>", 2), Segment("<row_2>", 1), Segment("\n<global>", 3)), after="<end>")
    assert (tiles.tokens, tiles.write("p")) == (6, "<row_1>pp<row_2>p\n<global>ppp<end>")


@pytest.mark.parametrize(
    ("time", "seconds", "clock"),
    [
        (0.0, "0.0", "00:00"),
        (0.25, "0.2", "00:00"),  # Python rounds to even, and so do the processors
        (0.75, "0.8", "00:00"),
        (59.96, "60.0", "00:59"),
        (60.0, "60.0", "01:00"),
        (754.5, "754.5", "12:34"),
        (6000.0, "6000.0", "100:00"),
    ],
)
def test_steps_of_a_film_say_when_they_are(time: float, seconds: str, clock: str) -> None:
    """As transformers writes them (5.23: Qwen3VLProcessor f"{:.1f}", SmolVLMProcessor's minutes and seconds)."""
    film = Expansion((Segment("<{seconds} seconds>", 2), Segment("[{clock}]", 1)))
    assert film.write("p", times=(time, time)) == f"<{seconds} seconds>pp[{clock}]p"


@pytest.mark.parametrize("duration", [0.0, 0.9, 12.7, 3599.99, 3600.0, 90061.0])
def test_a_film_says_how_long_it_is(duration: float) -> None:
    """Anywhere, whole seconds rounded down; steps have times of their own."""
    film = Expansion((Segment("of {duration}: {clock}", 1), Segment("{clock}", 1)), after="({duration})")
    said = str(timedelta(seconds=int(duration)))
    assert film.write("p", times=(1.0, 61.0), duration=duration) == f"of {said}: 00:01p01:01p({said})"
    assert re.fullmatch(r"(\d+ days?, )?\d+:\d\d:\d\d", said)


def test_segments_without_a_time_stay_as_they_are() -> None:
    """A last segment that is no step, such as an overview; a picture in whose text a brace means nothing."""
    film = Expansion((Segment("{seconds}s", 1), Segment("whole {x}", 2)))
    assert film.write("p", times=(1.5,)) == "1.5spwhole {x}pp"


@pytest.mark.parametrize(
    "change",
    [
        {"segments": []},
        {"segments": [{"text": "", "tokens": -1}]},
        {"segments": [{"text": "x" * 1001, "tokens": 1}]},
        {"segments": [{"tokens": 1}]},
        {"segments": [{"text": "", "tokens": 1}] * 10_001},
        {"after": "x" * 1001},
        {"before": ""},
    ],
)
def test_damaged_expansions_are_refused(change: dict[str, object]) -> None:
    whole = to_builtins(Expansion((Segment("", 4),)))
    assert typed(whole, Expansion, "expansion") == Expansion((Segment("", 4),))
    with pytest.raises(HimapError, match="expansion is not usable"):
        typed({**whole, **change}, Expansion, "expansion")
