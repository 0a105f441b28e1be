"""Bad input: each kind gets one clear line, the right exit code, and leaves nothing behind."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import HIMAP_TINY, ORT, SHAPES_64, Workshop, call, golden_inputs, save_inputs
from forked import environment, forked
from PIL import Image
from tiny import Inputs

from himap_export.engines.cli import main as run_main
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.plan import himap
from himap_export.validate.cli import main as validate_main

Main = Callable[[list[str]], object]


def refused(capsys: pytest.CaptureFixture[str], code: int, words: str, main: Main, *arguments: object) -> None:
    """The command leaves with `code` and says `words` in its one line of error."""
    capsys.readouterr()
    assert call(main, *arguments) == code
    said = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in said if "error:" in line]
    assert len(errors) == 1 and words in errors[0], said
    assert not any("Traceback" in line for line in said)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of himap-tiny that a test may spoil."""
    return Path(shutil.copytree(HIMAP_TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.npz")))


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        part, _, inner = key.partition("__")
        if inner:
            config[part][inner] = value
        else:
            config[part] = value
    (folder / "config.json").write_text(json.dumps(config))


# --- what is to be exported ---


def test_unknown_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    refused(capsys, 2, "unknown model lava-7b", export_main, "lava-7b", "--out", out)
    refused(capsys, 2, "holds no config.json", export_main, tmp_path, "--out", out)
    refused(capsys, 4, "cannot fetch no/model", export_main, "no/model", "--out", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "supported: LlavaForConditionalGeneration"),
        ({"text_config__hidden_act": "gelu"}, "unsupported activation gelu"),
        (
            {"text_config__rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "unsupported rotary embedding linear",
        ),
        ({"vision_config__model_type": "siglip_vision_model"}, "unsupported vision tower"),
        ({"text_config__num_hidden_layers": "many"}, "$.text_config.num_hidden_layers"),
        ({"text_config__max_position_embeddings": 64}, "the model has 64"),
        ({"dtype": "float8"}, "unsupported dtype float8"),
    ],
)
def test_configurations(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    edit_config(checkpoint, **changes)
    refused(capsys, 2, words, export_main, checkpoint, "--k2", 5, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_config_is_not_json(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint / "config.json").write_text("{")
    refused(capsys, 2, "is not JSON", export_main, checkpoint, "--out", tmp_path / "out")


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def corrupt(file: Path) -> None:
    with file.open("r+b") as f:
        f.seek(20)
        f.write(b"\xff\xfe")


def endless_header(file: Path) -> None:
    with file.open("r+b") as f:
        f.write(struct.pack("<Q", 1 << 60))


def pickle_only(file: Path) -> None:
    file.rename(file.with_name("pytorch_model.bin"))


def drop_tensor(file: Path) -> None:
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = raw[8 : 8 + size].replace(b"layers.3.mlp.up_proj.weight", b"layers.3.mlp.op_proj.weight")
    file.write_bytes(raw[:8] + header + raw[8 + size :])


def list_missing_shard(file: Path) -> None:
    index = {"weight_map": {"a": file.name, "b": "model-00002-of-00002.safetensors"}}
    file.with_name("model.safetensors.index.json").write_text(json.dumps(index))


def index_without_map(file: Path) -> None:
    file.with_name("model.safetensors.index.json").write_text("{}")


def index_that_climbs(file: Path) -> None:
    file.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (Path.unlink, 4, "holds no weights"),
        (truncate, 1, "truncated or corrupt"),
        (corrupt, 1, "truncated or corrupt"),
        (endless_header, 1, "truncated or corrupt"),
        (pickle_only, 4, "only pickled weights"),
        (drop_tensor, 4, "layers.3.mlp.up_proj.weight"),
        (list_missing_shard, 4, "lacks model-00002-of-00002.safetensors"),
        (index_without_map, 1, "has no weight_map"),
        (index_that_climbs, 4, "lacks ../x.safetensors"),
    ],
)
def test_weights(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
    code: int,
    words: str,
) -> None:
    spoil(checkpoint / "model.safetensors")
    refused(capsys, code, words, export_main, checkpoint, "--k2", 5, "--out", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_weights_of_another_model(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(checkpoint, text_config__intermediate_size=160)
    refused(capsys, 2, "configuration says [160, 64]", export_main, checkpoint, "--k2", 5, "--out", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--k1", 5, "--k2", 5), "--k2 5 is not above --k1 5"),
        (("--k1", 0), "--k1 0 is below 1"),
        (("--k2", 10), "the model has 10 layers"),
        (("--r1", 1), "--r1 1.0 is outside [0, 1)"),
        (("--r2", -0.1), "--r2 -0.1 is outside [0, 1)"),
        (("--r1", "nan"), "'nan' is not a number"),
        (("--text-budget", 0), "--text-budget: '0' is not a whole number from 1"),
        (("--batch", 0), "--batch: '0' is not a whole number from 1"),
        (("--max-new-tokens", 0), "--max-new-tokens: '0' is not a whole number from 1"),
        (("--text-budget", 10**9), "is not a whole number from 1 to 1048576"),
        (("--batch", "٣"), "is not a whole number"),
        (("--k2", 5, "--dtype", "bf16", *ORT), "do not compute in bf16"),
        (("--k2", 5, "--dtype", "fp32", "--backend", "tensorrt-rtx"), "fp32"),
    ],
)
def test_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[object, ...], words: str) -> None:
    refused(capsys, 2, words, export_main, HIMAP_TINY, *flags, "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_largest_ratio_keeps_a_token() -> None:
    plan = himap(2, 5, 0.999999, 0.999999)
    assert plan.kept(576) == (576, 1, 1)


# --- where it goes ---


def test_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a bundle may go: tests/exporter/test_target.py. Here that nothing is done before that is settled."""
    nowhere = tmp_path / "no-model"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    refused(capsys, 2, "is not empty", export_main, nowhere, "--out", tmp_path / "notes")
    refused(capsys, 2, "is a file", export_main, nowhere, "--out", tmp_path / "notes" / "mine.txt")
    refused(capsys, 1, "cannot write", export_main, nowhere, "--out", "/proc/himap")
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep me"


def test_an_existing_bundle_stays(work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(shutil.copytree(work.bundle("golden", "--k2", 5), tmp_path / "out"))
    before = (out / "manifest.json").read_bytes()
    refused(capsys, 2, "already holds a bundle", export_main, HIMAP_TINY, "--k2", 5, "--out", out)
    spoiled = Path(shutil.copytree(HIMAP_TINY, tmp_path / "model"))
    drop_tensor(spoiled / "model.safetensors")
    refused(capsys, 4, "up_proj", export_main, spoiled, "--k2", 5, "--out", out, "--overwrite")
    assert (out / "manifest.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on a file's size fails like a full disk, part way through the weights."""
    out = tmp_path / "deep" / "out"
    small_files = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
from himap_export.exporter.cli import main
main()
"""
    words = ["himap-export", str(HIMAP_TINY), "--k2", "5", "--out", str(out)]
    done = forked(small_files, words, tmp_path, environment())
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# tests/fuzz/test_crashes.py sends SIGTERM, too, at every step.
@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupted(tmp_path: Path, sent: signal.Signals) -> None:
    command = [Path(sys.executable).with_name("himap-export"), HIMAP_TINY, "--k2", "5", "--out", tmp_path / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob(".out.partial-*")):
        time.sleep(0.02)
    process.send_signal(sent)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert said.strip().splitlines()[-1].endswith("interrupted, nothing was left behind") and "Traceback" not in said
    assert not list(tmp_path.iterdir())


# --- what is asked of a bundle ---


@pytest.fixture
def bundle(work: Workshop) -> Path:
    return work.bundle("golden", "--k2", 5)


def prompts(**changes: Any) -> Inputs:
    golden = golden_inputs()
    parts = {
        "input_ids": golden.input_ids,
        "attention_mask": golden.attention_mask,
        "pixel_values": golden.pixel_values,
    }
    return Inputs(**{**parts, **changes})


IDS = golden_inputs().input_ids


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_ids": np.where(IDS == 255, 7, IDS)}, "holds no image token"),
        ({"input_ids": np.full_like(IDS, 255)}, "holds 30 image tokens"),
        ({"input_ids": np.where(np.arange(30) == 6, 7, IDS)}, "holds 15 image tokens"),
        ({"input_ids": np.where(np.arange(30) == 1, 256, IDS)}, "holds token 256"),
        ({"input_ids": np.where(np.arange(30) == 1, -5, IDS)}, "holds token -5"),
        ({"pixel_values": np.zeros((1, 3, 57, 56), np.float32)}, "no graph for images of 56x57 pixels"),
        ({"pixel_values": np.zeros((2, 3, 56, 56), np.float32)}, "expected [1, 3, 56, 56], of one image"),
    ],
)
def test_prompts(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    inputs = save_inputs(tmp_path / "in.npz", prompts(**changes))
    out = tmp_path / "out.npz"
    refused(capsys, 2, words, run_main, bundle, "--load-inputs", inputs, "--save-outputs", out)
    assert not out.exists()


def test_too_much_text(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.concatenate([IDS, np.full((1, 20), 9)], axis=1)
    inputs = save_inputs(tmp_path / "in.npz", prompts(input_ids=ids, attention_mask=np.ones_like(ids)))
    refused(capsys, 2, "34 text tokens: the budget is 24", run_main, bundle, "--load-inputs", inputs)


def test_arrays(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = prompts()
    cases: list[tuple[dict[str, Any] | bytes, str]] = [
        (b"PK nothing", "is not a readable .npz"),
        ({"input_ids": good.input_ids}, "holds no pixel_values"),
        ({"input_ids": good.input_ids[0], "pixel_values": good.pixel_values}, "expected 2 dimensions of integers"),
        ({"input_ids": good.input_ids * 1.0, "pixel_values": good.pixel_values}, "expected 2 dimensions of integers"),
        ({"input_ids": np.array([{"a": 1}], object), "pixel_values": good.pixel_values}, "is not a readable .npz"),
        (
            {"input_ids": IDS, "pixel_values": good.pixel_values, "attention_mask": np.ones((1, 3), np.int64)},
            "has another shape",
        ),
    ]
    file = tmp_path / "in.npz"
    for content, words in cases:
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            np.savez(file, **content)
        refused(capsys, 2, words, run_main, bundle, "--load-inputs", file)
    refused(capsys, 2, "cannot read inputs", run_main, bundle, "--load-inputs", tmp_path / "none.npz")


def test_places_for_outputs(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = save_inputs(tmp_path / "in.npz", prompts())
    asked = (bundle, "--load-inputs", inputs)
    refused(capsys, 2, "is no folder", run_main, *asked, "--save-outputs", tmp_path / "no" / "out.npz")
    refused(capsys, 2, "--show-kept needs --image", run_main, *asked, "--show-kept", tmp_path / "kept.png")
    refused(capsys, 2, "outside the bundle's budget", run_main, *asked, "--max-new-tokens", 33)
    refused(capsys, 2, "--top-p: '0' is not a number", run_main, *asked, "--top-p", 0)
    refused(capsys, 4, "holds no tensorrt-rtx engines", run_main, *asked, "--backend", "tensorrt-rtx")


def test_images(work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "shapes"
    assert call(export_main, SHAPES_64, *ORT, "--out", bundle) == 0
    picture, text, cut = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    Image.effect_noise((200, 200), 50).convert("RGB").save(picture)
    text.write_text("not an image")
    cut.write_bytes(picture.read_bytes()[:2000])
    for file, words in (
        (tmp_path / "none.png", "none.png"),
        (text, "b.png"),
        (cut, "c.png"),
        (tmp_path, str(tmp_path)),
    ):
        refused(capsys, 2, words, run_main, bundle, "--image", file, "--prompt", "what?")
    refused(capsys, 2, "<image> 2 times: 1 given", run_main, bundle, "--image", picture, "--prompt", "<image><image>")
    refused(
        capsys, 2, "no prompt of 2 images", run_main, bundle, "--image", picture, "--image", picture, "--prompt", "?"
    )
    refused(capsys, 2, "text tokens", run_main, bundle, "--image", picture, "--prompt", "why? " * 200)
    assert call(run_main, bundle, "--image", picture, "--prompt", "what?", "--show-kept", tmp_path / "kept.png") == 0
    assert Image.open(tmp_path / "kept.png").width > 1500


def test_a_bundle_without_tokenizer(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    refused(capsys, 2, "holds no tokenizer", run_main, bundle, "--image", tmp_path / "a.png", "--prompt", "what?")


# --- bundles that are not what they were ---


@pytest.mark.parametrize("name", ["k1.onnx", "decode.onnx", "weights/model.safetensors"])
def test_a_changed_byte(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    inputs = save_inputs(tmp_path / "in.npz", prompts())
    raw = bytearray((copy / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / name).write_bytes(raw)
    refused(capsys, 1, f"{name} has changed since export", run_main, copy, "--load-inputs", inputs)
    refused(capsys, 1, f"{name} has changed since export", validate_main, copy)
    (copy / name).unlink()
    refused(capsys, 1, f"lacks {name}", run_main, copy, "--load-inputs", inputs)


def test_manifests(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    inputs = save_inputs(tmp_path / "in.npz", prompts())
    good = json.loads((copy / "manifest.json").read_text())
    for changed, words in (
        (good | {"schema": 9}, "update himap-export"),
        (good | {"schema": 7}, "export it again"),
        (good | {"variants": 3}, "is damaged"),
        ({k: v for k, v in good.items() if k != "graphs"}, "is damaged"),
    ):
        (copy / "manifest.json").write_text(json.dumps(changed))
        refused(capsys, 1, words, run_main, copy, "--load-inputs", inputs)
    (copy / "manifest.json").write_text("{")
    refused(capsys, 1, "is damaged", run_main, copy, "--load-inputs", inputs)
    (copy / "manifest.json").unlink()
    refused(capsys, 2, "is not a bundle", run_main, copy, "--load-inputs", inputs)


@pytest.mark.parametrize("main", [export_main, run_main, validate_main])
def test_wrong_flags(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(main, "--no-such-flag") == 2
    assert "usage:" in capsys.readouterr().err
