"""What calibration sees, against hooks on Hugging Face's own modules; what it refuses, and what it holds in memory."""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ORT, Workshop, call
from families import FAMILIES, family_inputs, hugging_face_inputs, processed, tokenizer_of
from forked import environment, forked
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from himap_export.engines.bundle import Bundle
from himap_export.engines.questions import prompt_of
from himap_export.exporter.bind import WeightNames
from himap_export.exporter.checkpoint import open_checkpoint
from himap_export.exporter.cli import main as export_main
from himap_export.exporter.planning import Request, plan_export
from himap_export.exporter.processor import read_processor
from himap_export.exporter.quantize.awq import Activations
from himap_export.exporter.quantize.calibration import LEAST, MOST, Source, activations, read_questions
from himap_export.exporter.registry import resolve
from himap_export.graphs.errors import Exit, HimapError

Floats = NDArray[np.float32]


def questions(folder: Path, size: tuple[int, int], count: int = LEAST) -> Path:
    """A data set of questions of different lengths about noise."""
    random, rows = np.random.default_rng(0), []
    for n in range(count):
        pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        rows.append({"image": f"{n}.png", "question": "what is " + "so " * (n % 3) + f"no. {n}?", "answer": "it"})
    (folder / "set.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "set.jsonl"


def source(folder: Path, **asked: object) -> Source:
    model = resolve(str(folder))
    planned = plan_export(model, Request(backends=("onnxruntime",), k1=1, k2=3, **asked))
    checkpoint = open_checkpoint(folder)
    names = WeightNames(checkpoint.names, model.family)
    return Source(planned, checkpoint.tensors, names, read_processor(folder, model.family, planned.images))


def family_source(folder: Path, name: str) -> Source:
    row = FAMILIES[name]
    return source(folder, image_sizes=(row.size,) if row.patch else (), tiles=row.tiles if row.tiles > 1 else None)


@dataclass
class Read:
    """What one of Hugging Face's linear layers read: rows of all prompts."""

    rows: list[Floats]

    def __call__(self, module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        self.rows.append(given[0].reshape(-1, given[0].shape[-1]).numpy())


@torch.no_grad()
def hugging_face_reads(folder: Path, name: str, file: Path) -> Mapping[str, Floats]:
    """By linear layer, its input [tokens,in] at all tokens of all questions."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    linears = {n: m for n, m in model.model.language_model.named_modules() if isinstance(m, torch.nn.Linear)}
    reads = {}
    for linear, module in (linears | {"lm_head": model.lm_head}).items():
        module.register_forward_pre_hook(reads.setdefault(linear, Read([])))
    for example in read_questions(file):
        model(**processed(name, [Image.open(example.image)], None, prompt_of(example)))
    return {linear: np.concatenate(read.rows) for linear, read in reads.items()}


def check(found: Activations, rows: Floats) -> None:
    """All tokens count, padding does not; the rows kept are some of them."""
    size = np.abs(rows)
    np.testing.assert_allclose(found.mean, size.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.largest, size.max(axis=0), rtol=1e-4)
    near = [np.abs(rows - kept).max(axis=1).min() for kept in found.rows]
    assert len(found.rows) >= 200 and max(near) < 1e-4 * size.max()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llava", torch.float16),
        ("qwen2.5-vl", torch.float32),
        ("qwen3-vl", torch.bfloat16),
        ("internvl-tiles", torch.float32),
    ],
)
def test_layers_read_what_hugging_faces_read(work: Workshop, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In fp32, whatever the weights are stored as."""
    folder = Path(shutil.copytree(work.family(name), tmp_path / "model"))
    AutoModelForImageTextToText.from_pretrained(work.family(name)).to(dtype).save_pretrained(folder)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {dtype}
    file, seen = questions(tmp_path, FAMILIES[name].size), set[str]()
    expected = hugging_face_reads(folder, name, file)
    for group, found in activations(family_source(folder, name), read_questions(file), head=True):
        for reader in group.readers:
            check(found, expected[reader])
            seen.add(reader)
    assert seen == expected.keys()


def test_questions_come_from_all_over_the_set(tmp_path: Path) -> None:
    file = questions(tmp_path, (8, 8), count=3)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines * 33))
    found = [example.line for example in read_questions(file)]
    assert len(found) == MOST and found[0] == 1 and found[-1] == 96 and set(np.diff(found)) == {3, 4}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (0, "holds no example: it is empty"),
        (1, f"is too small to calibrate with: it holds 1 question, expected at least {LEAST}"),
        (LEAST - 1, f"is too small to calibrate with: it holds 7 questions, expected at least {LEAST}"),
    ],
)
def test_a_small_set_is_refused_before_anything_is_built(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: int, words: str
) -> None:
    file, out = questions(tmp_path, (8, 8), count=lines), tmp_path / "out"
    flags = ("--k1", 1, "--k2", 3, "--quantize", "int8", "--calibrate", file, *ORT)
    folder = work.family("llava")
    capsys.readouterr()
    assert call(export_main, folder, *flags, "--out", out) == Exit.USAGE
    told = capsys.readouterr().err
    assert words in told and "vision" not in told and len(told.strip().splitlines()) == 1 and not out.exists()


def test_bad_lines_and_flags_are_told_in_one_line(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = questions(tmp_path, (8, 8)), tmp_path / "out"
    good = file.read_text()
    small = ("--quantize", "int8")
    long = json.dumps({"image": "0.png", "question": "so " * 200, "answer": "it"})
    for content, flags, words in (
        (good + "\n{", small, "line 9 of"),
        (good.replace("7.png", "none.png"), small, "none.png"),
        (good.replace("no. 5?", "<image>" * 2), small, "line 6 of the data set: the prompt contains <image> 2 times"),
        (good + "\n" + long, small, "line 9 of the data set: prompt 0 has"),
        (good, (), "--calibrate goes with --quantize"),
    ):
        file.write_text(content)
        given = ("--k1", 1, "--k2", 3, "--calibrate", file, *flags, *ORT)
        assert call(export_main, work.family("llava"), *given, "--out", out) == Exit.USAGE
        told = [line for line in capsys.readouterr().err.strip().splitlines() if "error" in line]
        assert len(told) == 1 and words in told[0] and not out.exists()


def test_a_checkpoint_without_a_tokenizer_is_refused(work: Workshop, tmp_path: Path) -> None:
    with pytest.raises(HimapError, match="holds no tokenizer") as told:
        next(activations(source(work.checkpoint("gqa2")), read_questions(questions(tmp_path, (56, 56))), head=False))
    assert told.value.code == Exit.USAGE


@pytest.mark.filterwarnings("error:.*(overflow|invalid value):RuntimeWarning")
@pytest.mark.parametrize(
    ("weight", "words"),
    [
        ("input_layernorm", "the output of layers.1.input_layernorm is not finite"),
        ("mlp.down_proj", "what reads the output of layers.1.mlp.up_proj overflows"),
    ],
)
def test_activations_that_overflow_are_told_by_their_layer(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], weight: str, words: str
) -> None:
    folder = Path(shutil.copytree(work.family("llava"), tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(f"layers.1.{weight}.weight") and "language" in name)
    save_file(weights | {name: torch.full_like(weights[name], 3e38)}, folder / "model.safetensors", {"format": "pt"})
    flags = ("--k1", 1, "--k2", 3, "--quantize", "int8", *ORT, "--out", tmp_path / "out")
    assert call(export_main, folder, *flags, "--calibrate", questions(tmp_path, FAMILIES["llava"].size)) == Exit.FAILURE
    told = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(told) == 1 and words in told[0], told
    assert not (tmp_path / "out").exists()


MEASURE = """
import gc, re, sys
from pathlib import Path

sys.path[:0] = sys.argv[3:]
from himap_export.exporter.quantize.calibration import activations, read_questions
from test_calibration import source

def memory(kind):
    return int(re.search(rf"{kind}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

large, asked = source(Path(sys.argv[1])), read_questions(Path(sys.argv[2]))
next(activations(large, asked, head=False))  # what libraries keep for themselves
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = memory("VmRSS")
groups = [group for group, _ in activations(large, asked, head=True)]
print(len(groups), memory("VmHWM") - before)
"""


@pytest.mark.slow
def test_one_layer_is_in_memory(tmp_path: Path) -> None:
    """Eight layers of 16.8 million weights are 268 MB in fp16, 537 MB in fp32. One is 34 MB, mapped, and the largest of
    its matrices has 17 MB in fp32. Its own process has no holes in its heap to begin with."""
    config = FAMILIES["llava"].config()
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    for name, value in (text | {"head_dim": 128, "num_hidden_layers": 8}).items():
        setattr(config.text_config, name, value)
    folder, file = tmp_path / "model", questions(tmp_path, FAMILIES["llava"].size)
    AutoModelForImageTextToText.from_config(config).to(torch.float16).save_pretrained(folder)
    tokenizer_of("llava").save_pretrained(folder)
    words = ["-c", str(folder), str(file), str(Path(__file__).parent), *sys.path]
    found = forked(MEASURE, words, tmp_path, environment())
    assert not found.returncode, found.stderr
    groups, kilobytes = map(int, found.stdout.split())
    assert groups == 8 * 4 + 1 and kilobytes < 160e3  # measured: 24 to 106 MB


def uneven(source: Path, folder: Path) -> Path:
    """A checkpoint like `source`, in which some channels are far larger than others wherever a linear layer reads."""
    shutil.copytree(source, folder)
    weights, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        if "layers." in name and any(word in name for word in ("layernorm", "v_proj", "up_proj")):
            spread = torch.exp(torch.randn(len(tensor), generator=generator))
            rows = spread.view(-1, *[1] * (tensor.ndim - 1))
            weights[name] = tensor * rows / spread.square().mean().sqrt()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
def logits(folder: Path, name: str) -> torch.Tensor:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found: torch.Tensor = model(**hugging_face_inputs(name, family_inputs(name))).logits
    return found


def test_a_calibrated_bundle_is_the_same_model(work: Workshop, tmp_path: Path) -> None:
    """Its weights, dequantised, in Hugging Face's modules: what its norms and biases are divided by is in its linear
    layers. With any of them as it was before, it is another model."""
    name = "qwen2.5-vl"
    folder, out, row = uneven(work.family(name), tmp_path / "model"), tmp_path / "out", FAMILIES[name]
    flags = ("--policy", "none", "--quantize", "int8", "--quantize-head", "--keep-dtype", "*.2.*.v_proj", *row.flags)
    assert call(export_main, folder, *flags, "--calibrate", questions(tmp_path, row.size), *ORT, "--out", out) == 0
    quantization = Bundle.open(out).manifest.quantization
    assert quantization is not None and quantization.method.startswith("AWQ scales from 8 prompts")
    before = load_file(folder / "model.safetensors")
    stored = {k: v for f in (out / "weights").iterdir() for k, v in load_file(f).items()}
    weights = before | {key: tensor for key, tensor in stored.items() if key in before}
    for key in quantization.weights:
        weights[key] = (stored[f"{key}.int8"] * stored[f"{key}.scale"]).T.contiguous()
    changed = [k for k in before if k not in quantization.weights and not torch.equal(weights[k], before[k])]
    kinds = {".".join(key.split(".")[-2:]) for key in changed}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"}
    assert kinds == norms | {"v_proj.bias", "v_proj.weight"}
    made, original = Path(shutil.copytree(folder, tmp_path / "made")), logits(folder, name)

    def error(**others: torch.Tensor) -> float:
        save_file(weights | others, made / "model.safetensors", {"format": "pt"})
        return float((logits(made, name) - original).norm() / original.norm())

    exact = error()
    wrong = {kind: error(**{k: before[k] for k in changed if k.endswith(kind)}) for kind in kinds}
    assert exact < 0.1 and min(wrong.values()) > 1.5 * exact, (exact, wrong)
