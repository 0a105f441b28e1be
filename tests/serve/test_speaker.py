"""An answer's text: as it is sampled, as it is decoded, where it ends."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel

from himap_export.engines.sampling import Sampling
from himap_export.graphs.errors import HimapError
from himap_export.serve.speaker import Speaker

WORDS = ["</s>", "a", "b", "c", " ", "ab", "xyz"]
EOS = 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="</s>"))
    made.decoder = Fuse()
    return made


def logits(token: int) -> npt.NDArray[np.float32]:
    return np.eye(len(WORDS), dtype=np.float32)[token : token + 1]


def spoken(
    tokenizer: Tokenizer, text: list[str], most: int = 99, stop: tuple[str, ...] = ()
) -> tuple[list[str], Speaker]:
    """What is said of words drawn one by one, and the speaker; it is not asked again when it has ended."""
    speaker, pieces = Speaker(tokenizer, (EOS,), most=most, sampling=Sampling(), stop=stop), []
    for word in text:
        pieces.append(speaker.say(logits(WORDS.index(word))))
        if speaker.reason is not None:
            break
    return pieces, speaker


def test_words_come_as_they_are_drawn_until_the_end_of_sequence(tokenizer: Tokenizer) -> None:
    pieces, speaker = spoken(tokenizer, [" ", "a", " ", "b", "</s>", "c"])
    assert pieces == ["", "a", " ", "b", ""] and (speaker.reason, speaker.count) == ("stop", 5)


def test_the_longest_answer_ends_by_its_length(tokenizer: Tokenizer) -> None:
    pieces, speaker = spoken(tokenizer, ["a", "b", "c", "a"], most=3)
    assert pieces == ["a", "b", "c"] and (speaker.reason, speaker.count) == ("length", 3)


def test_a_stop_text_ends_the_answer_and_is_not_said(tokenizer: Tokenizer) -> None:
    pieces, speaker = spoken(tokenizer, ["c", "a", "b", "a", "b", "c", "xyz"], stop=("bc", "zzz"))
    assert "".join(pieces) == "caba" and (speaker.reason, speaker.count) == ("stop", 6)
    assert pieces == ["c", "a", "", "ba", "", ""]  # what may begin a stop text is held back


def test_what_was_held_back_is_said_at_the_end(tokenizer: Tokenizer) -> None:
    for last in (["</s>"], []):
        pieces, speaker = spoken(tokenizer, ["a", "b", *last], most=2 if not last else 9, stop=("bcc",))
        assert "".join(pieces) == "ab" and speaker.reason == ("stop" if last else "length")


@given(
    st.lists(st.sampled_from(WORDS[1:]), min_size=1, max_size=12),
    st.lists(st.text("abcxyz", min_size=1, max_size=4), max_size=3),
)
def test_the_pieces_are_the_text_up_to_the_first_stop(text: list[str], stops: list[str]) -> None:
    made = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="</s>"))
    made.decoder = Fuse()
    pieces, speaker = spoken(made, [*text, "</s>"], stop=tuple(stops))
    whole = "".join(text).lstrip()
    drawn = [("".join(text[:n]).lstrip(), n) for n in range(1, len(text) + 1)]
    # The first token behind which a stop text stands, and there the one that begins first.
    ends = next(((min(t.find(s) for s in stops if s in t), n) for t, n in drawn if any(s in t for s in stops)), None)
    assert "".join(pieces) == (whole if ends is None else whole[: ends[0]])
    assert speaker.count == (len(text) + 1 if ends is None else ends[1]) and speaker.reason == "stop"


def test_the_seed_says_what_is_drawn(tokenizer: Tokenizer) -> None:
    def drawn(seed: int) -> list[str]:
        speaker = Speaker(tokenizer, (EOS,), most=20, sampling=Sampling(5.0, seed=seed))
        return [speaker.say(logits(1)) for _ in range(20) if speaker.reason is None]

    assert drawn(1) == drawn(1) != drawn(2)


def test_logits_that_are_no_numbers_are_an_error(tokenizer: Tokenizer) -> None:
    speaker = Speaker(tokenizer, (EOS,), most=3, sampling=Sampling())
    with pytest.raises(HimapError, match="the model gives no answer"):
        speaker.say(np.full((1, len(WORDS)), np.nan, np.float32))
