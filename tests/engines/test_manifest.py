"""The manifest carries its digest; nothing in it leads out of the bundle, asks for what is not there, or is unread."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Workshop, call, golden_inputs, save_inputs
from msgspec import json as msgspec_json

from himap_export.engines.bundle import Bundle
from himap_export.engines.cli import main as run_main
from himap_export.engines.manifest import Manifest, finalised, manifest_json, read_manifest
from himap_export.graphs.errors import Exit, HimapError

Json = dict[str, Any]


@pytest.fixture
def bundle(work: Workshop, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(work.bundle("golden", "--k2", 5), tmp_path / "bundle"))


def rewrite(bundle: Path, change: Callable[[Json], object], finalise: bool) -> None:
    """Edits the manifest as JSON; `finalise` as an attacker would, who knows how."""
    file = bundle / "manifest.json"
    data = json.loads(file.read_text())
    change(data)
    if finalise:
        file.write_bytes(manifest_json(finalised(msgspec_json.decode(json.dumps(data), type=Manifest))))
    else:
        file.write_text(json.dumps(data))


def refused(bundle: Path, words: str) -> None:
    with pytest.raises(HimapError) as caught:
        Bundle.open(bundle)
    assert words in str(caught.value) and caught.value.code == Exit.FAILURE


def put(*path: Any) -> Callable[[Json], object]:
    """Sets the value behind the keys: put("model", "pad_token", 7)."""

    def change(data: Json) -> None:
        *keys, last, value = path
        place: Any = data
        for key in keys:
            place = place[key]
        place[last] = value

    return change


PREPROCESSING = ("images", "56x56", "preprocessing")


def test_the_digest_is_of_the_content_not_of_the_spelling(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert finalised(manifest) == manifest and len(manifest.digest) == 64
    data = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(dict(reversed(data.items()))))
    assert Bundle.open(bundle).manifest == manifest


@pytest.mark.parametrize(
    "change",
    [
        put(*PREPROCESSING, "mean", [0.5, 0.5, 0.5]),
        put("model", "eos_tokens", [7]),
        put("model", "pad_token", 7),
        put("model", "source", "/elsewhere"),
        put("variants", 0, "plan", "cuts", 0, "remove", 0.25),
        put("decoder", "vocab", 200),
        put("decoder", "norm_eps", 1e-6),
        put("weight_form", "embedded"),
        put("dtype", "fp16"),
        put("files", "k1.onnx", "bytes", 1),
        put("digest", "0" * 64),
        put("digest", ""),
        lambda data: data.pop("digest"),
    ],
)
def test_a_changed_manifest_is_refused(bundle: Path, change: Callable[[Json], object]) -> None:
    rewrite(bundle, change, finalise=False)
    refused(bundle, "has changed since export")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("trust", True), "unknown field trust"),
        (put("model", "trust", True), "unknown field trust - at $.model"),
        (put("variants", 0, "budget", "text", "24"), "$.variants[0].budget.text"),
        (put("variants", 0, "budget", "text", 10**9), "<= 1048576 - at $.variants[0].budget.text"),
        (put("decoder", "layers", 10**9), "<= 1024 - at $.decoder.layers"),
        (put("decoder", "norm_eps", -1), "> 0.0 - at $.decoder.norm_eps"),
        (put("graphs", []), "Expected object, got array - at $.graphs"),
        (put("model", "eos_tokens", None), "$.model.eos_tokens"),
        (put(*PREPROCESSING, "std", [1, 1, 0]), "unusable image preprocessing"),
        (put("variants", []), "length >= 1"),
    ],
)
def test_fields_are_typed_bounded_and_known(bundle: Path, change: Callable[[Json], object], words: str) -> None:
    rewrite(bundle, change, finalise=False)
    refused(bundle, "is damaged")
    refused(bundle, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"schema": 5, "schema": 5}', "'schema' twice"),
        ('{"schema": NaN}', "NaN is no JSON number"),
        ('{"schema": "\\ud800"}', "not valid UTF-8"),
        ("[]", "names no schema"),
        ('{"schema": true}', "names no schema"),
        ('{"schema": "5"}', "names no schema"),
    ],
)
def test_what_is_no_manifest(bundle: Path, text: str, words: str) -> None:
    (bundle / "manifest.json").write_text(text)
    refused(bundle, words)


def test_a_manifest_that_is_no_file(bundle: Path) -> None:
    file = bundle / "manifest.json"
    for make in (Path.mkdir, os.mkfifo, lambda p: p.symlink_to(p), lambda p: p.symlink_to("/dev/zero")):
        file.rmdir() if file.is_dir() else file.unlink()
        make(file)
        refused(bundle, "cannot read manifest")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../k1.onnx", "weights/../k1.onnx", "./k1.onnx", "a//b", "a\\b", "a\nb"]
)
def test_paths_lead_nowhere_else(bundle: Path, name: str) -> None:
    def listed(data: Json) -> None:
        data["graphs"]["k1"]["file"] = name
        data["files"][name] = data["files"]["k1.onnx"]

    rewrite(bundle, listed, finalise=True)
    refused(bundle, "leads out of the bundle")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["files"].pop("k2.onnx"), "k2.onnx is not listed"),
        (lambda d: d["files"].pop("weights/model.safetensors"), "model.safetensors is not listed"),
        (put("tokenizer", "tokenizer.json"), "tokenizer.json is not listed"),
        (put("variants", 0, "graphs", "k1", "k3"), "does not name a graph"),
        (put("variants", 0, "image", "9x9"), "which are not there"),
        (put("variants", 0, "budget", "visual", [16, 2, 8]), "keeps [16, 2, 8]"),
        (put("variants", 0, "plan", "cuts", 1, "layer", 10), "behind the decoder's last layer"),
        (lambda d: d["engines"]["onnxruntime"].pop("k1"), "engines are not those of its graphs"),
    ],
)
def test_what_it_refers_to_is_there(bundle: Path, change: Callable[[Json], object], words: str) -> None:
    """Even with a new digest."""
    rewrite(bundle, change, finalise=True)
    refused(bundle, words)


def test_files_are_plain_and_no_others_lie_there(bundle: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.onnx"
    (bundle / "k1.onnx").rename(elsewhere)
    (bundle / "k1.onnx").symlink_to(elsewhere)
    refused(bundle, "k1.onnx is not a plain file")
    (bundle / "k1.onnx").unlink()
    refused(bundle, "lacks k1.onnx")
    elsewhere.rename(bundle / "k1.onnx")
    (bundle / "weights" / "more.safetensors").write_bytes(b"")
    refused(bundle, "holds weights/more.safetensors, which its manifest does not list")
    (bundle / "weights" / "more.safetensors").unlink()
    (bundle / "weights").rename(tmp_path / "weights")
    (bundle / "weights").symlink_to(tmp_path / "weights")
    refused(bundle, "holds weights, which its manifest does not list")


def test_a_deployment_can_pin_the_digest(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest, inputs = read_manifest(bundle).digest, save_inputs(tmp_path / "in.npz", golden_inputs())
    asked = (bundle, "--load-inputs", inputs, "--max-new-tokens", 1, "--threads", 1)
    assert call(run_main, *asked, "--expect-sha256", digest.upper()) == 0
    rewrite(bundle, put("model", "pad_token", 7), finalise=True)
    assert call(run_main, *asked) == 0  # given a new digest, nothing tells
    capsys.readouterr()
    assert call(run_main, *asked, "--expect-sha256", digest) == 1
    assert "is not the bundle expected" in capsys.readouterr().err
    for flags, words in (
        (("--expect-sha256", "xyz"), "64 hexadecimal digits"),
        (("--expect-sha256", digest, "--no-verify"), "excludes --no-verify"),
    ):
        assert call(run_main, *asked, *flags) == 2
        assert words in capsys.readouterr().err


def test_no_verify_names_what_it_skips(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = save_inputs(tmp_path / "in.npz", golden_inputs())
    flags = ("--load-inputs", inputs, "--max-new-tokens", 1, "--threads", 1, "--no-verify")
    assert call(run_main, bundle, *flags) == 0
    files = len(read_manifest(bundle).files)
    assert f"not verified: the content of {files} files" in capsys.readouterr().err
    rewrite(bundle, put("model", "pad_token", 7), finalise=False)
    assert call(run_main, bundle, *flags) == 1  # the digest is always checked
