"""What a model reads equals Hugging Face's processor; labels are the tokens that the answer really starts with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import ORT, Workshop, call
from msgspec import structs
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoProcessor, AutoTokenizer

from himap_export.engines.bundle import Bundle
from himap_export.engines.image import clip_preprocessing
from himap_export.engines.manifest import ImageSpec
from himap_export.engines.processor import Processor
from himap_export.engines.prompt import Expansion, Medium, PromptFormat, Segment
from himap_export.engines.questions import Example, read_dataset
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.accuracy.prompter import Prompter, prompter_of_bundle, prompter_of_checkpoint

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "exporter" / "shapes"
QUESTIONS = ROOT / "examples" / "shapes" / "images" / "questions.jsonl"


@pytest.fixture(scope="module")
def shapes() -> Prompter:
    return prompter_of_checkpoint(SHAPES)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("shapes") / "bundle"
    assert call(export_main, "shapes", "--text-budget", "48", *ORT, "--out", folder) == 0
    return Bundle.open(folder)


def example(
    question: str = "which?", answer: str = "dog", options: tuple[str, ...] = (), image: Path = Path()
) -> Example:
    return Example(7, "q", image, question, answer, "", options)


def word_pieces(*words: str) -> Tokenizer:
    """As LLaMA's: "▁" for a space, before every word; unknown letters as bytes; <s> is not put by itself."""
    pieces = ["<unk>", "<s>", "</s>", "<image>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *words]
    letters = sorted({letter for word in words for letter in word} - set(pieces))
    vocab, merges = {p: n for n, p in enumerate(dict.fromkeys([*pieces, *letters]))}, list[tuple[str, str]]()
    for word in words:
        for end in range(1, len(word)):
            vocab.setdefault(word[: end + 1], len(vocab))
            merges.append((word[:end], word[end]))
    tokenizer = Tokenizer(models.BPE(vocab, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<s>", "</s>", "<image>")])
    return tokenizer


def prompter(tokenizer: Tokenizer, template: str = "{pictures}{prompt} ASSISTANT:") -> Prompter:
    how = PromptFormat(template, template.replace("{pictures}", ""), Medium("<image>", "{medium} ", "{medium}"))
    picture = ImageSpec((16, 16), 1, 4, (2, 2), clip_preprocessing(16), Expansion((Segment("", 4),)))
    return Prompter(Processor(tokenizer, how, picture))


def test_arrays_equal_hugging_faces_processor(shapes: Prompter) -> None:
    processor = AutoProcessor.from_pretrained(SHAPES, use_fast=False)
    for one in read_dataset(QUESTIONS).examples:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one.question}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        theirs = processor(images=Image.open(one.image), text=text, return_tensors="np")
        ours = shapes.arrays(one)
        np.testing.assert_array_equal(ours.input_ids, theirs["input_ids"])
        np.testing.assert_array_equal(ours.pixel_values, theirs["pixel_values"])
        assert ours.attention_mask is None and ours.pixel_values.dtype == np.float32


def test_text_tokens_are_what_the_image_leaves(shapes: Prompter) -> None:
    for one in read_dataset(QUESTIONS).examples:
        ids = shapes.arrays(one).input_ids[0]
        assert shapes.text_tokens(one) == np.count_nonzero(ids != shapes.processor.tokenizer.token_to_id("<image>"))


def test_the_shipped_answers_are_one_token_each(shapes: Prompter) -> None:
    theirs = AutoTokenizer.from_pretrained(SHAPES)
    for one in read_dataset(QUESTIONS).examples:
        label = shapes.label(one)
        assert theirs.decode([label]).strip() == one.answer
        assert shapes.processor.text([label, theirs.eos_token_id, label], (theirs.eos_token_id,)) == one.answer


def test_a_bundle_and_its_checkpoint_say_the_same(shapes: Prompter, bundle: Bundle) -> None:
    found, expected = prompter_of_bundle(bundle).processor, shapes.processor
    assert (found.prompt, found.image) == (expected.prompt, expected.image)
    assert found.tokenizer.to_str() == expected.tokenizer.to_str()


def test_a_bundle_that_knows_its_prompt_takes_the_checkpoints_tokenizer(
    shapes: Prompter, bundle: Bundle, tmp_path: Path
) -> None:
    bare = replace(bundle, manifest=structs.replace(bundle.manifest, tokenizer=None))  # as exported by an alias alone
    asked = read_dataset(QUESTIONS).examples[0]
    found = prompter_of_bundle(replace(bare, weight_folders=(tmp_path, SHAPES))).arrays(asked)
    np.testing.assert_array_equal(found.input_ids, shapes.arrays(asked).input_ids)
    for folders in ((), (tmp_path,)):
        with pytest.raises(HimapError, match="holds no tokenizer"):
            prompter_of_bundle(replace(bare, weight_folders=folders))


def test_nothing_to_prompt_with(work: Workshop) -> None:
    with pytest.raises(HimapError, match="holds no tokenizer") as told:
        found = replace(Bundle.open(work.bundle("mha")), weight_folders=(SHAPES,))
        prompter_of_bundle(found)  # no prompt format: a tokenizer is not enough
    assert told.value.code == Exit.USAGE
    with pytest.raises(HimapError, match="holds no tokenizer") as told:
        prompter_of_checkpoint(work.checkpoint("mha"))
    assert told.value.code == Exit.USAGE


def test_a_label_is_the_first_token_after_the_prompt() -> None:
    words = word_pieces("▁dog", "▁B", "dog", "B")
    ids = words.get_vocab()
    assert prompter(words).label(example()) == ids["▁dog"]
    assert prompter(words).label(example(answer="dog", options=("cat", "dog"))) == ids["▁B"]
    assert (
        prompter(words, "{pictures}{prompt}\n").label(example()) == ids["dog"]
    )  # nothing goes before it on a new line
    assert prompter(words).label(example(answer="é")) == ids["▁"]  # then come its bytes


def test_an_answer_that_melts_into_the_prompt_has_no_label() -> None:
    with pytest.raises(HimapError, match="no token starts the answer") as told:
        prompter(word_pieces("▁dog"), "{pictures}{prompt} ").label(example())  # its last token would be ▁, not ▁dog
    assert "line 7" in told.value.details


def test_text_stops_and_loses_the_leading_space() -> None:
    words = word_pieces("▁dog", "▁cat")
    dog, cat = (words.token_to_id(w) for w in ("▁dog", "▁cat"))
    one = prompter(words)
    assert one.processor.text([dog, cat], ()) == "dog cat"
    assert one.processor.text([dog, cat, dog], (cat,)) == "dog"
    assert one.processor.text([cat], (cat,)) == one.processor.text([], ()) == ""
    assert one.processor.text([dog, words.token_to_id("<0xC3>")], ()) == "dog\ufffd"


def test_a_prompt_or_picture_that_cannot_be_used_is_told_by_line(tmp_path: Path, shapes: Prompter) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for one, summary in (
        (
            example("is <image> this <image>?", image=tmp_path / "a.png"),
            "line 7 of the data set: the prompt contains <image> 2 times: 1 given",
        ),
        (example(image=tmp_path / "b.png"), "line 7 of the data set: cannot read image"),
    ):
        with pytest.raises(HimapError, match=summary) as told:
            shapes.arrays(one)
        assert told.value.code == Exit.USAGE
