"""What the exporter reads of a checkpoint's processor answers like Hugging Face's processor on the same folder."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoProcessor, AutoTokenizer, LlavaConfig, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from himap_export.engines.image import CLIP_MEAN, ImagePreprocessing, clip_preprocessing, preprocess
from himap_export.engines.manifest import ImageSpec
from himap_export.engines.prompt import Expansion, Medium, Segment, encode, load_tokenizer
from himap_export.exporter import template
from himap_export.exporter.families import llava
from himap_export.exporter.family import VisionSpec
from himap_export.exporter.processor import ProcessorData, read_image_preprocessing, read_processor
from himap_export.graphs.errors import HimapError

CHINA, FLOWER = (Image.fromarray(each) for each in load_sample_images().images)
IMAGE_TOKENS = 64  # (112 / 14) ** 2
IMAGE_ID = 3
SPECIAL = ["<unk>", "<s>", "</s>", "<image>"]
# llava-hf/llava-1.5-7b-hf's chat template, without its last branch for assistant messages
LLAVA_CHAT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PARTS = "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<image>{% else %}"
BOS_CHAT = "{{ bos_token }}[INST] " + PARTS + "{{ part['text'] | trim }}{% endif %}{% endfor %} [/INST]"
QUESTIONS = ["what color is the circle?", "  two\nlines ", "größer 你好 🦙 <b>&amp;</b>", "</s> {prompt}", ""]


def fast_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["USER: what color is the circle? ASSISTANT: red"] * 4, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **names, extra_special_tokens={"image_token": "<image>"}, add_bos_token=True
    )


def save(folder: Path, chat_template: str | None = LLAVA_CHAT) -> Path:
    """A checkpoint folder without weights, as transformers 5 writes it."""
    LlavaConfig(image_token_index=IMAGE_ID).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112})
    layout = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, fast_tokenizer(), **layout, chat_template=chat_template).save_pretrained(folder)
    return folder


def change_json(path: Path, **values: object) -> None:
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**data, **values}))


def as_old_flat_files(folder: Path) -> None:
    """The layout of llava-hf's repositories: preprocessor_config.json, processor_config.json, chat_template.json."""
    nested = json.loads((folder / "processor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(nested.pop("image_processor")))
    (folder / "processor_config.json").write_text(json.dumps(nested))
    template = folder / "chat_template.jinja"
    if template.exists():
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
        template.unlink()


def read(folder: Path, side: int = 112, image_id: int = IMAGE_ID) -> ProcessorData:
    config = {"image_token_index": image_id}
    tower = VisionSpec((side, side), 3, IMAGE_TOKENS, (side // 14, side // 14))
    return read_processor(folder, llava.Llava.parse(config), {"": tower})


def our_ids(data: ProcessorData, question: str, tmp_path: Path) -> np.ndarray:
    assert data.prompt is not None
    path = tmp_path / "bundle.json"
    path.write_bytes(data.files["tokenizer.json"])
    picture = data.images[""].expansion.write(data.prompt.picture.token)
    return encode(load_tokenizer(path), data.prompt, question, [picture])


def hf_inputs(folder: Path, question: str, image: Image.Image) -> Any:
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "np"}
    return processor.apply_chat_template(chat, **options)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("chat", [LLAVA_CHAT, BOS_CHAT], ids=["llava", "bos and trim"])
@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_answers_like_hugging_face(layout: str, chat: str, question: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", chat)
    if layout == "flat":
        as_old_flat_files(folder)
    data = read(folder)
    for image in (CHINA, FLOWER.rotate(90, expand=True)):
        expected = hf_inputs(folder, question, image)
        np.testing.assert_array_equal(our_ids(data, question, tmp_path), expected["input_ids"][0])
        np.testing.assert_array_equal(preprocess(image, data.images[""].preprocessing), expected["pixel_values"])


def test_prompt_format(tmp_path: Path) -> None:
    prompt = read(save(tmp_path)).prompt
    assert prompt is not None and prompt.template == llava.TEMPLATE
    assert prompt.picture == Medium("<image>", "{medium}\n", "{medium}", IMAGE_ID)
    assert (prompt.add_special_tokens, prompt.strip) == (True, False)
    prompt = read(save(tmp_path, BOS_CHAT)).prompt
    assert prompt is not None and prompt.template == "<s>[INST] {pictures}{prompt} [/INST]"
    assert prompt.picture == Medium("<image>", "{medium}", "{medium}", IMAGE_ID)
    assert not prompt.add_special_tokens and prompt.strip


def test_without_chat_template_the_default_holds(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", None)
    data = read(folder)
    assert data.prompt is not None and data.prompt.template == llava.TEMPLATE
    text = "USER: <image>\nhow many? ASSISTANT:"
    expected = AutoProcessor.from_pretrained(folder)(images=CHINA, text=text, return_tensors="np")
    np.testing.assert_array_equal(our_ids(data, "how many?", tmp_path), expected["input_ids"][0])


def test_tokenizers_own_template_counts_only_if_it_places_the_image(tmp_path: Path) -> None:
    folder = save(tmp_path, None)
    change_json(folder / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
    assert getattr(read(folder).prompt, "template", None) == llava.TEMPLATE
    change_json(folder / "tokenizer_config.json", chat_template=[{"name": "default", "template": BOS_CHAT}])
    assert getattr(read(folder).prompt, "template", "").startswith("<s>[INST]")


def test_tokens_that_only_tokenizer_config_knows(tmp_path: Path) -> None:
    """Older checkpoints add <image> and BOS in tokenizer_config.json; the bundle's file must hold them."""
    folder = save(tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] != "<image>"]
    content["model"]["vocab"] = {
        piece if piece != "<image>" else "unused": index for piece, index in content["model"]["vocab"].items()
    }
    new_id = len(content["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    token = {"content": "<image>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    change_json(folder / "tokenizer_config.json", added_tokens_decoder={str(new_id): {**token, "special": True}})
    expected = hf_inputs(folder, "what color?", CHINA)["input_ids"][0]
    assert np.count_nonzero(expected == new_id) == IMAGE_TOKENS
    np.testing.assert_array_equal(our_ids(read(folder, image_id=new_id), "what color?", tmp_path), expected)


def test_empty_folder_gives_the_default_and_no_prompt(tmp_path: Path) -> None:
    plain = Expansion((Segment("", IMAGE_TOKENS),))
    picture = ImageSpec((56, 56), 1, IMAGE_TOKENS, (4, 4), clip_preprocessing(56), plain)
    assert read(tmp_path, side=56) == ProcessorData({"": picture}, None, {})


def test_no_code_and_no_pickle_of_the_checkpoint_is_touched(tmp_path: Path) -> None:
    folder = save(tmp_path)
    trap = f"from pathlib import Path\nPath({str(folder / 'ran')!r}).touch()\n"
    for name in ("custom.py", "processing_llava.py", "tokenization_llava.py"):
        (folder / name).write_text(trap)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    auto = {"AutoProcessor": "custom.Evil", "AutoTokenizer": [None, "custom.Evil"], "AutoImageProcessor": "custom.Evil"}
    for name in ("processor_config.json", "tokenizer_config.json", "preprocessor_config.json", "config.json"):
        change_json(folder / name, auto_map=auto)
    try:
        read(folder)
    except HimapError as error:
        assert "\n" not in str(error)
    assert not (folder / "ran").exists()


def test_template_cannot_escape_the_sandbox(tmp_path: Path) -> None:
    folder = save(tmp_path, "{{ ''.__class__.__mro__[1].__subclasses__() }}<image>" + PARTS)
    with pytest.raises(HimapError, match="chat template cannot be rendered"):
        read(folder)


def spread_vocabulary(path: Path) -> None:
    content = json.loads(path.read_text())
    content["model"]["vocab"]["a"] = 10**9
    path.write_text(json.dumps(content))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "not json": (lambda f: (f / "processor_config.json").write_text("{"), "processor_config.json is not JSON"),
    "not an object": (
        lambda f: (f / "processor_config.json").write_text("[]"),
        "processor_config.json is not usable: Expected object",
    ),
    "not utf-8": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), "chat_template.jinja is not valid UTF-8"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"model": 1}'), "tokenizer cannot be loaded"),
    "empty tokenizer": (lambda f: (f / "tokenizer.json").write_text(""), "tokenizer cannot be loaded"),
    "no image": (lambda f: save(f, "{{ messages[0]['content'][1]['text'] }}"), "unsupported chat template"),
    "two questions": (lambda f: save(f, LLAVA_CHAT + "{{ messages[0]['content'][1]['text'] }}"), "unsupported chat"),
    "escapes": (lambda f: save(f, PARTS + "{{ part['text'] | e }}{% endif %}{% endfor %}"), "changes the text"),
    "raises": (lambda f: save(f, "{{ raise_exception('no images here') }}"), "rendered: no images here"),
    "syntax": (lambda f: save(f, "{% for %}"), "chat template cannot be rendered"),
    "not text": (lambda f: change_json(f / "processor_config.json", chat_template={"x": "y"}), "is not text"),
    "a template's type": (lambda f: change_json(f / "processor_config.json", chat_template=[1]), r"\$.chat_template"),
    "a processor's type": (
        lambda f: change_json(f / "processor_config.json", image_processor=7),
        r"\$.image_processor",
    ),
    "a token's type": (lambda f: change_json(f / "processor_config.json", image_token=["x"]), r"\$.image_token"),
    "deep nesting": (lambda f: (f / "processor_config.json").write_text("[" * 90000), "nested too deeply"),
    "a deep tokenizer": (lambda f: (f / "tokenizer.json").write_text("[" * 90000), "tokenizer cannot be loaded"),
    "twice": (lambda f: (f / "processor_config.json").write_text('{"a": 1, "a": 2}'), "holds 'a' twice"),
    "not a number": (lambda f: (f / "processor_config.json").write_text('{"x": NaN}'), "NaN is no JSON number"),
    "a large tokenizer": (lambda f: os.truncate(f / "tokenizer.json", 10**9), "too large: 1000000000 bytes"),
    "a large template": (lambda f: os.truncate(f / "chat_template.jinja", 10**7), "too large"),
    "a large configuration": (lambda f: os.truncate(f / "tokenizer_config.json", 10**9), "too large"),
    "a list of tokens": (lambda f: (f / "added_tokens.json").write_text("[1]"), "added_tokens.json is not usable"),
    "ids that are none": (lambda f: change_json(f / "tokenizer_config.json", added_tokens_decoder={"x": {}}), "loaded"),
    "a class of no name": (lambda f: change_json(f / "tokenizer_config.json", tokenizer_class=[1]), "cannot be loaded"),
    "a token of no vocabulary": (lambda f: spread_vocabulary(f / "tokenizer.json"), "ids of nine digits"),
    "endless": (lambda f: save(f, "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4), "it takes more than"),
    "a terabyte": (lambda f: save(f, "{{ 'x' * 10**12 }}"), "it takes more than 256 MB"),
}
FILES = (
    "processor_config.json", "preprocessor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_give_one_clear_line(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path)
    damage, message = BROKEN[case]
    damage(folder)
    monkeypatch.setattr(template, "MOST_SECONDS", 1)
    with pytest.raises(HimapError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name)])
@pytest.mark.parametrize("name", FILES)
def test_files_of_odd_kinds_are_refused_in_a_line(name: str, make: Callable[[Path], object], tmp_path: Path) -> None:
    """A folder, a pipe that nobody writes to, a link to itself: under no name is it as if there were none."""
    folder = save(tmp_path)
    if name != "processor_config.json":
        as_old_flat_files(folder)
    if name == "chat_template.jinja":
        (folder / "chat_template.json").unlink()
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(HimapError, match=name) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_names_no_files_and_meets_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers is given a folder of copies, in which no other file is named."""
    folder, seen = save(tmp_path / "model"), dict[str, str]()
    (folder / "tokenization_x.py").write_text("raise SystemExit")
    paths = {"vocab_file": "/etc/passwd", "gguf_file": "/x", "fast_tokenizer_files": ["../x"], "init_inputs": ["/x"]}
    change_json(folder / "tokenizer_config.json", **paths)
    change_json(folder / "config.json", num_labels=10**9, tokenizer_class="Evil", _name_or_path="/x")
    expected, load = our_ids(read(folder), "a?", tmp_path), AutoTokenizer.from_pretrained

    def looked(place: Path, **options: Any) -> Any:
        assert options == {"trust_remote_code": False, "local_files_only": True}
        seen.update({file.name: file.read_text() for file in Path(place).iterdir()})
        return load(place, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", looked)
    np.testing.assert_array_equal(our_ids(read(folder), "a?", tmp_path), expected)
    assert set(seen) == {"tokenizer.json", "tokenizer_config.json", "config.json"}
    assert json.loads(seen["config.json"]) == {"model_type": "llava"}
    assert not set(paths) & set(json.loads(seen["tokenizer_config.json"]))


def test_misfits_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path)
    with pytest.raises(HimapError, match="image processor gives 112 x 112, the vision tower expects 336 x 336"):
        read(folder, side=336)
    with pytest.raises(HimapError, match="'<image>' is 3 in the tokenizer, 32000 in the model's config"):
        read(folder, image_id=32000)


def test_old_ways_to_write_sizes() -> None:
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336, "resample": 3}
    assert read_image_preprocessing(old) == clip_preprocessing(336)
    fast = {"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 336}, "crop_size": [336, 300]}
    assert read_image_preprocessing(fast) == ImagePreprocessing(336, (336, 300))
    assert read_image_preprocessing({"size": None}) == clip_preprocessing(224)


def test_other_processors() -> None:
    half = (0.5, 0.5, 0.5)
    siglip = read_image_preprocessing({"image_processor_type": "SiglipImageProcessor", "size": 384})
    assert siglip == ImagePreprocessing((384, 384), None, mean=half, std=half)
    padded = read_image_preprocessing({"image_processor_type": "LlavaImageProcessor", "do_pad": True})
    color = (int(CLIP_MEAN[0] * 255), int(CLIP_MEAN[1] * 255), int(CLIP_MEAN[2] * 255))
    assert padded == ImagePreprocessing(224, (224, 224), pad_color=color)
    raw = read_image_preprocessing({"do_rescale": False, "do_normalize": False, "do_resize": False})
    assert raw == ImagePreprocessing(None, (224, 224), rescale_factor=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_processor_type": "LlavaNextImageProcessor"}, "unsupported image processor LlavaNextImageProcessor"),
        ({"image_grid_pinpoints": [[336, 672]]}, "unsupported option image_grid_pinpoints"),
        ({"image_processor_type": "CLIPImageProcessor", "do_pad": True}, "unsupported option do_pad"),
        ({"size": {"shortest_edge": 224, "longest_edge": 448}}, r"Expected null, got int - at \$.size.longest_edge"),
        ({"size": {"max_height": 1, "max_width": 2}}, r"Expected null, got int - at \$.size.max_height"),
        ({"size": {"height": 224}}, "unsupported size"),
        ({"crop_size": {"shortest_edge": 224}}, "unsupported crop_size"),
        ({"size": "224"}, r"got str - at \$.size"),
        ({"size": [0, 224]}, r"Expected int >= 1 - at \$.size\[0\]"),
        ({"do_center_crop": False}, "unusable image preprocessing"),
        ({"do_center_crop": "no"}, r"got str - at \$.do_center_crop"),
        ({"crop_size": {"height": -1, "width": 224}}, r"Expected int >= 1 - at \$.crop_size.height"),
        ({"crop_size": 10**9}, r"Expected int <= 16384 - at \$.crop_size"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, r"image_mean\[2\]"),
        ({"image_std": [0.5, 0.5, float("inf")]}, r"image_std\[2\]"),
        ({"image_std": [0.5, 0.5, -0.5]}, "unusable image preprocessing"),
        ({"image_std": 0}, "unusable image preprocessing"),
        ({"rescale_factor": 0}, "unusable image preprocessing"),
        ({"rescale_factor": True}, r"got bool - at \$.rescale_factor"),
        ({"image_mean": [0.5]}, "configuration is not usable"),
        ({"image_mean": "half"}, "configuration is not usable"),
        ({"image_std": [0, 0, 0]}, "unusable image preprocessing"),
        ({"resample": 9}, r"Expected int <= 5 - at \$.resample"),
        ({"resample": []}, "configuration is not usable"),
        ({"rescale_factor": "1/255"}, "configuration is not usable"),
    ],
)
def test_unsupported_options_are_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(HimapError, match=message) as caught:
        read_image_preprocessing(config)
    assert "\n" not in str(caught.value)
