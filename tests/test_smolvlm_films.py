"""A film and a question through `himap-run`, as SmolVLM2's own processor asks: reading, sampling, text, pixels."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from commands import Workshop, call
from families import AROUND, FAMILIES, OVERVIEW, tokenizer_of
from films import film_of
from PIL import Image
from pytest import CaptureFixture
from test_family_prompts import CHINA, QUESTION
from transformers import AutoModelForImageTextToText
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from transformers.video_utils import read_video_pyav

from himap_export.engines.bundle import Bundle
from himap_export.engines.cli import main as run_main
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.errors import Exit
from himap_export.validate.cli import main as validate_main

FRAMES, NEW = 4, 12
TEXT = 400  # what stands between four frames takes 250 tokens where most are single bytes


def clip(folder: Path, frames: int = 61, rate: int = 7) -> Path:
    """A window that moves over a photograph, in the size of the row."""
    height, width = FAMILIES["smolvlm"].size
    boxes = [(4 * i, 3 * i, 4 * i + 3 * width, 3 * i + 3 * height) for i in range(frames)]
    file = folder / "film.mp4"
    file.write_bytes(film_of([np.asarray(CHINA.crop(box).resize((width, height))) for box in boxes], rate=rate))
    return file


def asked_as_hugging_face(file: Path) -> dict[str, torch.Tensor]:
    """What its processors make of the film; the one of films needs torchvision, and sees frames as the one of pictures
    sees those that it does not cut."""
    sample = SmolVLMVideoProcessor.sample_frames
    found, about = read_video_pyav(str(file), lambda metadata: sample(None, metadata, num_frames=FRAMES, fps=1.0))
    pictures: Any = FAMILIES["smolvlm"].processor()
    frames = [[Image.fromarray(frame) for frame in found]]
    seen = pictures(images=frames, do_image_splitting=False, return_tensors="pt")
    said: Any = SimpleNamespace(
        image_seq_len=4, image_token="<image>", fake_image_token=AROUND, global_image_token=OVERVIEW
    )
    film = {"pixel_values": seen["pixel_values"], "video_metadata": [about]}
    tokenizer = tokenizer_of("smolvlm")
    parts: list[dict[str, Any]] = [{"type": "video"}, {"type": "text", "text": QUESTION}]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    text = chat.replace("<video>", SmolVLMProcessor.replace_video_token(said, film, 0))
    return {**tokenizer(text, return_tensors="pt"), **seen}


def test_a_question_about_a_film_is_answered_as_by_hugging_face(
    work: Workshop, tmp_path: Path, capsys: CaptureFixture[str]
) -> None:
    file = clip(tmp_path)
    given = asked_as_hugging_face(file)
    model = AutoModelForImageTextToText.from_pretrained(work.family("smolvlm"), dtype=torch.float32).eval()
    wanted = model.generate(**given, max_new_tokens=NEW, do_sample=False)[:, given["input_ids"].shape[1] :]
    bundle = work.family_bundle("smolvlm", "--policy", "none", "--frames", FRAMES, text_budget=TEXT)
    with Bundle.open(bundle).session() as session:
        prepared = session.prepare_film(file, QUESTION).inputs
        np.testing.assert_array_equal(prepared.input_ids, given["input_ids"])
        np.testing.assert_array_equal(prepared.pixel_values, given["pixel_values"][0])
    capsys.readouterr()
    flags = ["--video", file, "--prompt", QUESTION, "--max-new-tokens", NEW, "--threads", "1", "--json"]
    assert call(run_main, bundle, *flags) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == wanted.tolist()


def test_pruned_films_pass_validation(work: Workshop) -> None:
    bundle = work.family_bundle("smolvlm", "--k1", 2, "--k2", 4, "--frames", FRAMES, text_budget=TEXT)
    flags = ["--prompts", 2, "--no-speed", "--threads", 1]
    assert call(validate_main, bundle, "--model", work.family("smolvlm"), *flags) == 0


def test_a_film_has_no_tiles(work: Workshop, tmp_path: Path, capsys: CaptureFixture[str]) -> None:
    flags = ["--frames", 4, "--tiles", 9, "--out", tmp_path / "bundle"]
    assert call(export_main, work.family("smolvlm"), *flags) == Exit.USAGE
    assert "--frames and --tiles exclude each other" in capsys.readouterr().err
