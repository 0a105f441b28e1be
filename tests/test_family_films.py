"""A film and a question through `himap-run`, against Hugging Face's own reading, sampling, prompt and `generate`."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import Workshop, call
from families import FAMILIES, FILM, film_arrays, tokenizer_of
from films import film_of
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import AutoModelForImageTextToText
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, read_video_pyav

from himap_export.engines.bundle import Bundle
from himap_export.engines.cli import main as run_main
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.errors import Exit

QUESTION, NEW = "What happens <here>, 你?", 12
FILMS = [name for name, row in FAMILIES.items() if row.frames and row.patch]
PHOTOGRAPHS = load_sample_images().images


def clip(folder: Path, name: str, frames: int = 23, rate: int = 7) -> Path:
    """A film in which a window moves over a photograph, in the size of the row; h264."""
    height, width = FAMILIES[name].size
    boxes = [(8 * i, 4 * i, 8 * i + 3 * width, 4 * i + 3 * height) for i in range(frames)]
    shown = [Image.fromarray(PHOTOGRAPHS[0]).crop(box).resize((width, height)) for box in boxes]
    file = folder / f"{name}-{frames}.mp4"
    file.write_bytes(film_of([np.asarray(picture) for picture in shown], rate=rate))
    return file


def asked_as_hugging_face(name: str, file: Path, question: str) -> dict[str, torch.Tensor]:
    """What its processor would make of the film and the question; they need torchvision, of which this does without."""
    row, tokenizer = FAMILIES[name], tokenizer_of(name)
    assert row.patch is not None
    three = name.startswith("qwen3")
    frames, about = read_video_pyav(str(file), lambda metadata: _sampled(metadata, row.frames, three))
    how = row.processor()
    pixels = ((frames / 255 - np.array(how.image_mean)) / np.array(how.image_std)).astype(np.float32)
    seconds = 2 / about.sampled_fps
    film = film_arrays(pixels.transpose(0, 3, 1, 2), row.patch, None if three else seconds)
    parts: list[dict[str, Any]] = [{"type": "video"}, {"type": "text", "text": question}]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=False
    )
    text = _timed(film["video_grid_thw"], about) if three else "<|video_pad|>" * row.tokens
    assert chat.count("<|vision_start|><|video_pad|><|vision_end|>") == 1
    ids = tokenizer(chat.replace("<|video_pad|>", text), return_tensors="pt")["input_ids"]
    return {"input_ids": ids, "mm_token_type_ids": 2 * (ids == FILM).int(), **film}


def _sampled(about: VideoMetadata, frames: int, three: bool) -> Any:
    if three:
        return Qwen3VLVideoProcessor.sample_frames(SimpleNamespace(fps=None), about, num_frames=frames)
    return default_sample_indices_fn(about, num_frames=frames)


def _timed(grid: torch.Tensor, about: VideoMetadata) -> str:
    processor = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2), video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
        _calculate_timestamps=lambda *given: Qwen3VLProcessor._calculate_timestamps(None, *given),
    )  # fmt: skip
    told: str = Qwen3VLProcessor.replace_video_token(processor, {"video_grid_thw": grid, "video_metadata": [about]}, 0)
    return told


@pytest.mark.parametrize("name", FILMS)
def test_a_question_about_a_film_is_answered_as_by_hugging_face(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = clip(tmp_path, name)
    given = asked_as_hugging_face(name, file, QUESTION)
    model = AutoModelForImageTextToText.from_pretrained(work.family(name), dtype=torch.float32).eval()
    wanted = model.generate(**given, max_new_tokens=NEW, do_sample=False)[:, given["input_ids"].shape[1] :]
    bundle = work.family_bundle(name, "--policy", "none", text_budget=160)
    with Bundle.open(bundle).session() as session:
        prepared = session.prepare_film(file, QUESTION)
        np.testing.assert_array_equal(prepared.inputs.input_ids, given["input_ids"])
        if "second_per_grid_ts" in given:
            assert prepared.inputs.seconds == pytest.approx(given["second_per_grid_ts"].tolist())
    flags = ["--video", file, "--prompt", QUESTION, "--max-new-tokens", NEW, "--threads", "1"]
    np.savez(arrays := tmp_path / "in.npz", **{key: each.numpy() for key, each in given.items() if "mm_" not in key})
    for asked in (flags, ["--load-inputs", arrays, *flags[4:]]):
        capsys.readouterr()
        assert call(run_main, bundle, *asked, "--json") == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == wanted.tolist()


def test_frames_are_drawn_with_what_was_kept(work: Workshop, tmp_path: Path) -> None:
    """Two steps of six patches, of which a cut at 2 keeps 6 and one at 4 keeps 3."""
    name, kept = "qwen3-vl-film", tmp_path / "kept.png"
    bundle = work.family_bundle(name, "--k1", 2, "--k2", 4, "--r1", 0.5, "--r2", 0.5, text_budget=160)
    flags = ["--video", clip(tmp_path, name), "--prompt", "?", "--threads", "1", "--max-new-tokens", 2]
    assert call(run_main, bundle, *flags, "--show-kept", kept) == 0
    with Image.open(kept) as page:
        assert page.width <= 2400 and page.height > page.width


@pytest.mark.slow
@pytest.mark.parametrize("name", FILMS)
def test_a_conversation_about_a_film(work: Workshop, tmp_path: Path, name: str) -> None:
    """The second answer is what Hugging Face's `generate` gives to both turns, asked all at once."""
    file = clip(tmp_path, name)
    with Bundle.open(work.family_bundle(name, "--policy", "none", text_budget=160)).session(threads=1) as session:
        talk = session.converse_film(file)
        first, second = (talk.ask(question, max_new_tokens=6) for question in (QUESTION, "And then?"))
    assert first.request.processor is not None
    given, later = asked_as_hugging_face(name, file, QUESTION), first.request.processor.turn("And then?")
    behind = torch.from_numpy(np.concatenate([first.tokens[0], later]))[None]
    given["input_ids"] = torch.cat([given["input_ids"], behind], dim=1)
    given["mm_token_type_ids"] = torch.cat([given["mm_token_type_ids"], torch.zeros_like(behind)], dim=1).int()
    model = AutoModelForImageTextToText.from_pretrained(work.family(name), dtype=torch.float32).eval()
    wanted = model.generate(**given, max_new_tokens=6, do_sample=False)[:, given["input_ids"].shape[1] :]
    np.testing.assert_array_equal(second.tokens, wanted.numpy())


def test_what_is_refused_about_films(work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, and exit code 2."""
    films, stills = (
        work.family_bundle("qwen3-vl-film", "--policy", "none", text_budget=160),
        work.family_bundle("qwen3-vl", "--policy", "none", text_budget=120),
    )
    picture, none = tmp_path / "picture.png", tmp_path / "none.mp4"
    Image.new("RGB", (96, 64)).save(picture)
    film, short = clip(tmp_path, "qwen3-vl-film"), clip(tmp_path, "qwen3-vl-film", frames=3)
    checkpoint, out = work.family("qwen3-vl"), tmp_path / "bundle"
    for main, arguments, told in (
        (run_main, (films, "--video", none, "--prompt", "?"), "cannot read film"),
        (run_main, (films, "--video", picture, "--prompt", "?"), "not a film that can be read"),
        (run_main, (films, "--video", short, "--prompt", "?"), "has 3 frames to choose from, and 4 are asked for"),
        (run_main, (films, "--video", film, "--prompt", "And <image>?"), "<image>"),
        (run_main, (films, "--image", picture, "--prompt", "?"), "export without"),
        (run_main, (stills, "--video", film, "--prompt", "?"), "export with"),
        (export_main, (checkpoint, "--frames", "3", "--out", out), "an even number from 2"),
        (export_main, (checkpoint, "--frames", "4", "--tiles", "2", "--out", out), "exclude each other"),
        (export_main, (work.family("llava"), "--frames", "4", "--out", out), "this model sees pictures"),
    ):
        capsys.readouterr()
        assert call(main, *arguments) == Exit.USAGE, arguments
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert told in said and len(said) < 400, said
