"""`himap-validate` as a user meets it: text, one JSON object, exit codes. No time is asserted."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ORT, Workshop, blocked_python, call, plan_flags, save_inputs
from legacy import FIXTURES
from msgspec import structs
from tiny import make_inputs

from himap_export.engines.bundle import Bundle
from himap_export.engines.manifest import finalised, manifest_json, read_manifest
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.errors import HimapError
from himap_export.validate.cli import main
from himap_export.validate.parity.prompts import drawn_inputs
from himap_export.validate.reference.criteria import reference_himap

CUTS = reference_himap(2, 4, 0.5, 0.5)
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
    assert call(main, bundle, *QUICK, "--device", "cpu", "--iterations", 1, "--warm-up", 0, "--json") == 0
    found = as_json(capsys)
    speed = found["speed"]
    assert found["device"] == "cpu" and list(speed["systems"]) == ["pruned", "unpruned", "PyTorch SDPA fp32, cpu"]
    assert speed["ceiling"] > 1
    for times in speed["systems"].values():
        assert all(times[what] > 0 for what in ("vision", "prefill", "decode", "peak_bytes", "open_s"))
    for over in speed["over"].values():
        for middle, low, high in over.values():
            assert low <= middle <= high


@pytest.mark.slow
def test_a_vision_tower_that_lies_elsewhere(tmp_path: Path, capsys: Capture) -> None:
    """It is needed three times: by the reference, by the unpruned baseline, and by the PyTorch that is timed."""
    model, tower = Path(shutil.copytree(FIXTURES / "internvl-v1-tiny", tmp_path / "model")), tmp_path / "tower"
    (model / "vision_tower_intern_vit_6b").rename(tower)
    bundle, flag = tmp_path / "bundle", ("--vision-tower", tower)
    small = ("--text-budget", 40, "--max-new-tokens", 8, *ORT, *plan_flags(reference_himap(2, 5, 0.5, 0.75)))
    assert call(export_main, model, *small, *flag, "--out", bundle) == 0
    capsys.readouterr()
    assert call(main, bundle, *QUICK, "--no-speed") == 4
    assert "Traceback" not in capsys.readouterr().err
    assert call(main, bundle, *QUICK, *flag, "--iterations", 1, "--warm-up", 0) == 0


def moved(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the bundle whose checkpoint has gone."""
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    found = read_manifest(copy)
    model = structs.replace(found.model, source=str(tmp_path / "gone"))
    (copy / "manifest.json").write_bytes(manifest_json(finalised(structs.replace(found, model=model))))
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


def test_a_model_of_other_sizes_is_not_compared(work: Workshop, tmp_path: Path, capsys: Capture) -> None:
    bundle, ids = bundle_of(work), tmp_path / "ids"
    config = json.loads((work.checkpoint("gqa2") / "config.json").read_text())
    shutil.copytree(work.checkpoint("gqa2"), ids)
    (ids / "config.json").write_text(json.dumps(config | {"image_token_index": 7, "image_token_id": 7}))
    for other, words in (
        (ids, "an image token's id: 7"),
        (work.checkpoint("mha"), "layers: 10, in the bundle 6"),
        ("shapes", "is not the model of"),
    ):
        capsys.readouterr()
        assert call(main, bundle, *QUICK, "--no-speed", "--model", other) == 2
        out, err = capsys.readouterr()
        assert not out and words in err and "Traceback" not in err and len(err.splitlines()) == 1


def test_prompts_that_are_none_are_refused_before_the_reference_sees_them(
    work: Workshop, tmp_path: Path, capsys: Capture
) -> None:
    bundle, inputs = bundle_of(work), make_inputs(work.tiny("gqa2"), text_lengths=[9], system_lengths=[5])
    for change, words in ((-7, "holds token -7"), (10**6, "holds token 1000000")):
        ids = inputs.input_ids.copy()
        ids[0, 0] = change
        asked = save_inputs(tmp_path / "in.npz", replace(inputs, input_ids=ids))
        capsys.readouterr()
        assert call(main, bundle, "--load-inputs", asked, *QUICK, "--no-speed") == 2
        assert words in capsys.readouterr().err


def test_a_backend_that_the_bundle_does_not_hold(work: Workshop, capsys: Capture) -> None:
    bundle = bundle_of(work)
    capsys.readouterr()
    assert call(main, bundle, *QUICK, "--no-speed", "--backend", "tensorrt-rtx") == 4
    assert capsys.readouterr().err.startswith("himap-validate: error: ")


NOWHERE = Path("/no/bundle/here")  # what is refused without reading it is refused before any work


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--image", "a.png"), "--image (or --video) and --prompt go together"),
        (("--prompt", "what?"), "--image (or --video) and --prompt go together"),
        (("--load-inputs", "a.npz", "--image", "a.png", "--prompt", "what?"), "--load-inputs excludes"),
        (("--dataset", "a.jsonl", "--save-outputs", "a.npz"), "--dataset excludes"),
        (("--save-inputs", "here", "--save-outputs", "here"), "need two folders"),
        (("--prompts", 10**9), "is not a whole number from 1 to 256"),
        (("--prompts", 0), "--prompts"),
        (("--prompts", "1e3"), "--prompts"),
        (("--iterations", 0), "--iterations"),
        (("--iterations", 10**30), "--iterations"),
        (("--warm-up", -1), "--warm-up"),
        (("--threads", 100_000), "--threads"),
        (("--seeds", 10**9), "--seeds"),
        (("--seed", -1), "--seed"),
        (("--limit", 0), "--limit"),
        (("--max-new-tokens", 10**12), "--max-new-tokens"),
        (("--text-budget", 0), "--text-budget"),
        (("--atol", -1), "--atol"),
        (("--atol", "nan"), "--atol"),
        (("--rtol", "inf"), "--rtol"),
        (("--rtol", 2), "--rtol"),
    ],
)
def test_usage(arguments: tuple[object, ...], words: str, capsys: Capture) -> None:
    assert call(main, NOWHERE, *arguments) == 2
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1


def test_places_are_checked_before_any_work(work: Workshop, tmp_path: Path, capsys: Capture) -> None:
    bundle, mine, link = bundle_of(work), tmp_path / "mine.txt", tmp_path / "taken"
    before = {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    mine.write_text("mine")
    link.mkdir()
    (link / "report.json").symlink_to(mine)
    for arguments in (
        ("--report", bundle),
        ("--report", bundle / "weights" / "new"),
        ("--report", mine),
        ("--report", link),
        ("--report", "/dev/null"),
        ("--save-outputs", bundle / "out.npz"),
        ("--save-outputs", tmp_path / "none" / "out.npz"),
        ("--save-outputs", bundle / "manifest.json"),
        ("--save-outputs", "/dev/null"),
        ("--save-inputs", bundle),
        ("--save-inputs", mine / "below"),
    ):
        capsys.readouterr()
        assert call(main, NOWHERE, *arguments) == 2, arguments
        out, err = capsys.readouterr()
        assert not out and "cannot write" in err and len(err.splitlines()) == 1, err
    assert {p: p.read_bytes() for p in bundle.rglob("*") if p.is_file()} == before and mine.read_text() == "mine"


@pytest.mark.slow
def test_a_report_without_its_libraries_is_refused_before_any_work(tmp_path: Path) -> None:
    code = "from himap_export.validate.cli import main\nmain(sys.argv[1:])"
    done = blocked_python(code, ["altair"], NOWHERE, "--report", tmp_path / "report")
    assert done.returncode == 4 and "a report needs altair" in done.stderr and "Traceback" not in done.stderr


def test_drawn_prompts_stay_within_memory(work: Workshop) -> None:
    run = Bundle.open(bundle_of(work), verify=False).select()
    with pytest.raises(HimapError, match="1000000000 prompts are too many"):
        drawn_inputs(run, 10**9, 0)


def test_no_bundle(tmp_path: Path, capsys: Capture) -> None:
    assert call(main, tmp_path) == 2
    assert "is not a bundle" in capsys.readouterr().err
