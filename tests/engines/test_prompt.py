"""Token ids equal Hugging Face's LlavaProcessor; streamed text equals the decoded whole."""

import json
from pathlib import Path

import numpy as np
import pytest
from msgspec import to_builtins
from msgspec.structs import replace
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from himap_export.engines.documents import typed
from himap_export.engines.prompt import Detokenizer, Medium, PromptFormat, encode, load_tokenizer
from himap_export.graphs.errors import Exit, HimapError

CORPUS = [
    "USER: what color is the circle? ASSISTANT: the circle is red, the square is blue",
    "how many squares are left of the triangle? there are three squares",
    "das größte Dreieck ist grün; il y a des carrés à gauche",
] * 8
QUESTIONS = [
    "what color is the circle?",
    "",
    "  leading and trailing  ",
    "two\nlines\n\nand a tab\t!",
    "größer, naïve, déjà vu: Привет 你好 🦙👩‍👩‍👧",
    "combining e\u0301 and nbsp\u00a0and zero width\u200b",
    "</s> is special, {prompt} and {image} are not",
    "<image > or < image>",
    "unseen: ζωή ☃ \x07",
]
IMAGE_TOKENS = 64  # (112 / 14) ** 2
TEMPLATE = "USER: {pictures}{prompt} ASSISTANT:"
PICTURE = Medium("<image>", lead="{medium}\n", inline="{medium}")
HOW = PromptFormat(TEMPLATE, "USER: {prompt} ASSISTANT:", PICTURE)
MEDIA = ["<image>" * IMAGE_TOKENS]  # what one picture becomes
SPECIAL = ["<unk>", "<s>", "</s>", "<image>"]


def byte_level() -> Tokenizer:
    """As GPT-2's, LLaMA 3's, Qwen's: every byte is a letter."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As LLaMA 2's, converted from SentencePiece: a metaspace before words, unknown characters as bytes <0xNN>."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(pair) for pair in model["merges"]]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(each, normalized=False, special=True) for each in SPECIAL])
    return tokenizer


TOKENIZERS = {"byte level": byte_level, "byte fallback": byte_fallback}


@pytest.fixture(scope="module", params=TOKENIZERS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LlavaProcessor that puts <s> first, as save_pretrained writes it."""
    tokenizer = TOKENIZERS[request.param]()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"},
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 112}, crop_size=112)
    layout = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    folder = tmp_path_factory.mktemp("processor")
    LlavaProcessor(images, fast, **layout).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("question", QUESTIONS)
def test_ids_equal_hugging_face(saved: Path, question: str) -> None:
    processor = LlavaProcessor.from_pretrained(saved)
    text = TEMPLATE.replace("{pictures}", "<image>\n").replace("{prompt}", question, 1)
    expected = processor(images=Image.new("RGB", (30, 40)), text=text, return_tensors="np")["input_ids"][0]
    tokenizer = load_tokenizer(saved / "tokenizer.json")
    ids = encode(tokenizer, HOW, question, MEDIA)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, expected)
    assert ids[0] == tokenizer.token_to_id("<s>")
    assert np.count_nonzero(ids == tokenizer.token_to_id("<image>")) == IMAGE_TOKENS


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ("what is in <image>?", "USER: what is in <image>? ASSISTANT:"),
        ("<image> or <image>", "USER: <image> or <image> ASSISTANT:"),
        ("which is red?", "USER: <image>\n<image>\nwhich is red? ASSISTANT:"),
    ],
)
def test_ids_of_placed_and_of_several_pictures_equal_hugging_face(saved: Path, question: str, text: str) -> None:
    processor, count = LlavaProcessor.from_pretrained(saved), text.count("<image>")
    expected = processor(images=[Image.new("RGB", (30, 40))] * count, text=text, return_tensors="np")["input_ids"][0]
    ids = encode(load_tokenizer(saved / "tokenizer.json"), HOW, question, MEDIA * count)
    np.testing.assert_array_equal(ids, expected)


def test_template_with_its_own_bos(saved: Path) -> None:
    tokenizer = load_tokenizer(saved / "tokenizer.json")
    how = replace(HOW, template="<s>" + TEMPLATE, add_special_tokens=False)
    ids = encode(tokenizer, how, "how many?", MEDIA)
    assert np.count_nonzero(ids == tokenizer.token_to_id("<s>")) == 1


def test_stored_padding_and_truncation_are_ignored(saved: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(saved / "tokenizer.json"))
    expected = encode(tokenizer, HOW, "how many squares?", MEDIA)
    tokenizer.enable_padding(length=500)
    tokenizer.enable_truncation(8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(
        encode(load_tokenizer(tmp_path / "tokenizer.json"), HOW, "how many squares?", MEDIA), expected
    )


def test_strip() -> None:
    how = replace(HOW, strip=True)
    assert how.render(" why?\n", ["<image>"]) == "USER: <image>\nwhy? ASSISTANT:"


def test_question_that_is_not_unicode_is_refused(saved: Path) -> None:
    with pytest.raises(HimapError, match="not valid Unicode") as caught:
        encode(load_tokenizer(saved / "tokenizer.json"), HOW, "caf\udce9", MEDIA)
    assert caught.value.code == Exit.USAGE


def test_tokenizer_without_the_image_token_is_refused() -> None:
    with pytest.raises(HimapError, match="does not know the image token"):
        encode(byte_level(), replace(HOW, picture=replace(PICTURE, token="<img>")), "what?", ["<img>" * 4])


def test_unreadable_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HimapError, match="No such file"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(HimapError, match="tokenizer cannot be read") as caught:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"<s>": 1000000000}}}')
    with pytest.raises(HimapError, match="ids of nine digits"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_json_round_trip() -> None:
    film = Medium("<film>", lead="{medium}", inline="{medium}", id=7)
    how = PromptFormat("<s>" + TEMPLATE, "{prompt}", PICTURE, film, "{prompt}", add_special_tokens=False, strip=True)
    assert typed(to_builtins(how), PromptFormat, "prompt") == how


DAMAGED_PICTURES: list[dict[str, object]] = [
    {"token": ""}, {"lead": ""}, {"lead": "{medium}{medium}"}, {"inline": "here"}, {"id": 0.5}, {"tokens": 576},
]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"template": "USER: {pictures}"},
        {"template": "{prompt}"},
        {"template": "{pictures}{prompt}{pictures}"},
        {"template": "{pictures}{prompt}{prompt}"},
        {"template": "{prompt}{pictures}"},
        {"template": "<image>{pictures}{prompt}"},
        {"template": None},
        {"interleaved": "why?"},
        {"interleaved": "{prompt}{prompt}"},
        {"interleaved": "<image>{prompt}"},
        {"turn": "and?"},
        {"turn": "<image>{prompt}"},
        {"film": {**to_builtins(PICTURE), "token": "USER"}},
        {"picture": None},
        *({"picture": {**to_builtins(PICTURE), **part}} for part in DAMAGED_PICTURES),
        {"image_tokens": 576},
        {"strip": None},
        {"trim": True},
    ],
)
def test_damaged_manifests_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(HimapError, match="usable"):
        typed({**to_builtins(HOW), **change}, PromptFormat, "prompt")
    with pytest.raises(HimapError, match="prompt is not usable: Expected object, got array"):
        typed([change], PromptFormat, "prompt")


ANSWERS = [
    *QUESTIONS[:-4],
    QUESTIONS[5],
    "x 🦙",
    "你好",
    " the circle",
    "a</s>b</s> c",
    "end\ufffd",
    "\ufffd\ufffd end",
]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_streamed_pieces_join_to_the_decoded_answer(kind: str, answer: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode(answer, add_special_tokens=False).ids
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token) for token in ids]
    whole = tokenizer.decode(ids)
    assert "".join(pieces) + stream.finish() == whole
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in whole


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_comes_as_soon_as_it_is_complete(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    stream = Detokenizer(tokenizer)
    ids = tokenizer.encode("red🦙 blue", add_special_tokens=False).ids
    seen = ""
    for step, token in enumerate(ids):
        seen += stream.push(token)
        assert seen == tokenizer.decode(ids[: step + 1]).rstrip("\ufffd")
    assert seen == "red🦙 blue"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_answer_cut_inside_a_character(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer.encode("red 🦙", add_special_tokens=False).ids[:-1]
    stream = Detokenizer(tokenizer)
    assert "".join(stream.push(token) for token in ids).rstrip() == "red"
    assert set(stream.finish().strip()) == {"\ufffd"}
    assert stream.finish() == ""
    assert stream.push(ids[0]) == tokenizer.decode(ids[:1])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_broken_bytes_do_not_touch_what_was_said(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    whole = tokenizer.encode("你", add_special_tokens=False).ids
    stream = Detokenizer(tokenizer)
    said = "".join(stream.push(token) for token in [*whole, whole[-1]]).strip()
    assert said == "你"
    rest = "".join(stream.push(token) for token in tokenizer.encode("red", add_special_tokens=False).ids)
    assert rest.startswith("\ufffd") and rest.endswith("red") and rest.count("\ufffd") == 1


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_in_the_middle_give_no_text_and_keep_spaces(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    end = SPECIAL.index("</s>")
    words = tokenizer.encode("the circle is red", add_special_tokens=False).ids
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token) for word in words for token in (end, word, end)]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(words)
