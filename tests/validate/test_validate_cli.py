"""`himap-validate` as a user meets it: text, one JSON object, exit codes. No time is asserted."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Workshop, call, save_inputs
from tiny import make_inputs

from himap_export.validate.cli import main
from himap_export.validate.criteria import himap

CUTS = himap(2, 4, 0.5, 0.5)
QUICK = ("--prompts", 2, "--max-new-tokens", 4, "--threads", 1)
Capture = pytest.CaptureFixture[str]


def bundle_of(work: Workshop, *flags: object) -> Path:
    return work.bundle("gqa2", *flags, cuts=CUTS)


def as_json(capsys: Capture) -> dict[str, Any]:
    out = capsys.readouterr().out
    found: dict[str, Any] = json.loads(out)
    json.dumps(found, allow_nan=False)
    return found


def test_text(work: Workshop, capsys: Capture) -> None:
    bundle = bundle_of(work)
    capsys.readouterr()
    assert call(main, bundle, *QUICK, "--no-speed") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) < 20 and max(map(len, lines[1:])) <= 120
    assert not any("FAIL" in line for line in lines)
    for name in ("vision", "prefix", "score k1", "k1", "k2", "logits", "decode", "kept k1", "kept k2", "tokens"):
        assert any(line.startswith(f"ok    {name} ") for line in lines), name
    assert "PyTorch reference" in err and "PyTorch reference" not in out


def test_json(work: Workshop, capsys: Capture) -> None:
    bundle = bundle_of(work)
    capsys.readouterr()
    assert call(main, bundle, *QUICK, "--no-speed", "--json") == 0
    found = as_json(capsys)
    assert found["backend"] == "onnxruntime" and found["dtype"] == "fp32" and found["passed"] and "speed" not in found
    for name in ("vision", "prefix", "k1", "k2", "score_k1", "score_k2", "logits", "decode"):
        assert set(found["parity"][name]) == {"max_abs", "scale", "cosine"}
    assert found["parity"]["kept_k1"]["verdict"] == "identical" and not found["parity"]["kept_k1"]["forced"]
    assert found["parity"]["tokens"]["equal"] == found["parity"]["tokens"]["total"]
    assert all(set(gate) == {"name", "passed", "value", "limit"} for gate in found["gates"])


def test_a_failed_gate_is_named_and_exits_3(work: Workshop, capsys: Capture) -> None:
    bundle = bundle_of(work)
    capsys.readouterr()
    assert call(main, bundle, *QUICK, "--no-speed", "--atol", 0) == 3
    out, err = capsys.readouterr()
    assert "FAIL  logits" in out and err.splitlines()[-1].startswith("himap-validate: gates failed: logits")
    assert call(main, bundle, *QUICK, "--no-speed", "--atol", 0, "--json") == 3
    found = as_json(capsys)
    assert not found["passed"]
    assert "logits" in [gate["name"] for gate in found["gates"] if not gate["passed"]]
    assert call(main, bundle, *QUICK, "--no-speed", "--rtol", 1e-3) == 0


def test_the_users_prompts_and_all_that_came_of_them(work: Workshop, tmp_path: Path) -> None:
    inputs = make_inputs(work.tiny("gqa2"), text_lengths=[9, 4, 6], system_lengths=[5, 2, 0], seed=1)
    asked, saved = save_inputs(tmp_path / "in.npz", inputs), tmp_path / "out.npz"
    bundle = bundle_of(work, "--batch", 2)
    assert call(main, bundle, "--load-inputs", asked, "--save-outputs", saved, *QUICK, "--no-speed") == 0
    with np.load(saved) as stored:
        found = dict(stored)
    for name in ("image_features", "kept_k1", "kept_k2", "logits", "tokens"):
        assert len(found[name]) == len(found[f"reference_{name}"]) == 3
    answered = work.answer(bundle, inputs, "--max-new-tokens", 4)
    for name, values in answered.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-4)


def test_the_same_seed_draws_the_same_prompts(work: Workshop, tmp_path: Path) -> None:
    found = []
    for n, seed in enumerate((0, 0, 1)):
        file = tmp_path / f"{n}.npz"
        assert call(main, bundle_of(work), *QUICK, "--no-speed", "--seed", seed, "--save-outputs", file) == 0
        with np.load(file) as stored:
            found.append(stored["reference_logits"])
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_speed_in_the_same_run(work: Workshop, capsys: Capture) -> None:
    bundle = bundle_of(work)
    capsys.readouterr()
    assert call(main, bundle, *QUICK, "--iterations", 1, "--warm-up", 0, "--json") == 0
    speed = as_json(capsys)["speed"]
    assert list(speed["contenders"]) == ["pruned", "unpruned", "PyTorch SDPA"]
    assert speed["ceiling"] > 1
    for times in speed["contenders"].values():
        assert all(times[what] > 0 for what in ("vision", "prefill", "decode", "peak_bytes"))
    for over in speed["over"].values():
        for middle, low, high in over.values():
            assert low <= middle <= high


def moved(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle whose checkpoint has gone."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["model"]["source"] = str(tmp_path / "gone")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_a_checkpoint_that_has_gone(work: Workshop, tmp_path: Path, capsys: Capture) -> None:
    copy = moved(bundle_of(work), tmp_path)
    capsys.readouterr()
    assert call(main, copy, *QUICK, "--no-speed") == 4
    out, err = capsys.readouterr()
    assert not out and "--model" in err and len(err.splitlines()) == 1
    assert call(main, copy, *QUICK, "--no-speed", "--model", work.checkpoint("gqa2")) == 0


def test_another_models_weights_fail(work: Workshop, capsys: Capture) -> None:
    """Same sizes but for the dtype and the seed: everything runs, and nothing agrees."""
    capsys.readouterr()
    bundle = work.bundle("half", "--dtype", "fp32", cuts=CUTS)
    other = work.folder / "other-half"
    if not other.exists():
        from tiny import TINY, make_llava

        make_llava(other, TINY["half"], seed=99)
    assert call(main, bundle, *QUICK, "--no-speed", "--model", other) == 3


def test_a_backend_that_the_bundle_does_not_hold(work: Workshop, capsys: Capture) -> None:
    bundle = bundle_of(work)
    capsys.readouterr()
    assert call(main, bundle, *QUICK, "--no-speed", "--backend", "tensorrt-rtx") == 4
    assert capsys.readouterr().err.startswith("himap-validate: error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--image", "a.png"),
        ("--prompt", "what?"),
        ("--load-inputs", "a.npz", "--image", "a.png", "--prompt", "what?"),
        ("--iterations", 0),
        ("--prompts", 0),
        ("--warm-up", -1),
        ("--atol", -1),
    ],
)
def test_usage(work: Workshop, arguments: tuple[object, ...]) -> None:
    assert call(main, work.folder / "nothing", *arguments) == 2


def test_no_bundle(tmp_path: Path, capsys: Capture) -> None:
    assert call(main, tmp_path) == 2
    assert "is not a bundle" in capsys.readouterr().err
