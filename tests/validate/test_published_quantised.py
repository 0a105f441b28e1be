"""Checkpoints that others have quantised: what judges bundles of them, and where there is no judge."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ORT, QUESTIONS_64, Workshop, call
from legacy import make_qwen_vl
from msgspec.structs import replace
from ready_checkpoints import write_awq, write_gptq

from himap_export.engines.bundle import Bundle
from himap_export.exporter.cli import main as export_main
from himap_export.exporter.quantize import taking
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import PruningPlan
from himap_export.validate.analysis.cli import main as analyze_main
from himap_export.validate.baseline import export_baseline
from himap_export.validate.checkpoint import Source
from himap_export.validate.dequantised import has_original
from himap_export.validate.parity.quantised import EXACT, READY_MADE
from himap_export.validate.tuning.cli import main as tune_main
from himap_export.validate.validation import judged_bundle, validate

FLAGS = ("--k1", 1, "--k2", 3, "--text-budget", 24, *ORT)


@pytest.mark.parametrize("form", ["awq", "in order of activation", "fused"])
def test_a_checkpoint_that_was_published_quantised(work: Workshop, tmp_path: Path, form: str) -> None:
    """Taken over, multiplied out, and with query, key and value in one: transformers alone could load none of them."""
    made, bundle = tmp_path / "made", tmp_path / "bundle"
    if form == "fused":
        make_qwen_vl(tmp_path / "source")
        write_gptq(tmp_path / "source", made)
    elif form == "awq":
        write_awq(work.checkpoint("mqa4"), made)
    else:
        write_gptq(work.checkpoint("mqa4"), made, activation_order=True)
    flags = ("--k1", 1, "--k2", 3, "--text-budget", 24, *ORT)
    assert call(export_main, made, *flags, "--out", bundle) == 0
    found = validate(Bundle.open(bundle), speed=False, threads=1, max_new_tokens=4, prompts=2)
    assert found.passed and "weights" not in {gate.name for gate in found.parity.gates}
    if form == "in order of activation":
        assert found.quantised is None  # floats, as far as the bundle goes
    else:
        assert found.quantised is not None and [d.over for d in found.quantised.drifts] == [EXACT]
        assert READY_MADE in "\n".join(found.lines()) and found.to_json()["quantised"]["note"] == READY_MADE


@pytest.mark.parametrize("level", [(), ("text_config",)])
def test_a_config_that_says_null_is_of_a_checkpoint_with_its_weights(
    work: Workshop, tmp_path: Path, level: tuple[str, ...]
) -> None:
    """As some tools write it; one rule says for all rooms what is quantised."""
    shutil.copytree(work.checkpoint("mqa4"), tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    (config[level[0]] if level else config)["quantization_config"] = None
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    write_awq(work.checkpoint("mqa4"), tmp_path / "awq")
    found = [has_original(Source(tmp_path / name, None, own_image=False)) for name in ("plain", "awq")]
    assert found == [True, False]


@pytest.fixture
def multiplied_out(work: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle of a quantised checkpoint in floats, as if a backend that it was made for, too, had no such kernels."""
    write_awq(work.checkpoint("mqa4"), tmp_path / "made")
    with monkeypatch.context() as patched:
        patched.setattr(taking, "lacks", lambda name, form: "such weights")
        assert call(export_main, tmp_path / "made", *FLAGS, "--out", tmp_path / "bundle") == 0
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.quantization is None
    return bundle


def test_a_baseline_is_multiplied_out_as_its_bundle_is(multiplied_out: Bundle, tmp_path: Path) -> None:
    budget = multiplied_out.select().budget
    made = export_baseline(
        tmp_path / "made", budget, dtype="fp32", backend="onnxruntime", out=tmp_path / "none", beside=multiplied_out,
        plans={"none": (PruningPlan(), budget.visual[:1])},
    )  # fmt: skip
    assert made.manifest.quantization is None and made.select().plan.policy == "none"
    ours, theirs = ({name: t.file.read_bytes()[t.offset :][: t.nbytes] for name, t in each.tensors.items()}
                    for each in (made, multiplied_out))  # fmt: skip
    assert ours == theirs


@pytest.mark.parametrize("form", ["quantised here", "multiplied out"])
def test_weights_inside_engines_have_no_judge(work: Workshop, request: pytest.FixtureRequest, form: str) -> None:
    """Said before an engine is opened. One whose checkpoint is its judge may well hold them inside."""
    if form == "quantised here":
        bundle = Bundle.open(work.bundle("mha", "--quantize", "int4", "--block", "32"))
    else:
        bundle = request.getfixturevalue("multiplied_out")
    inside = Bundle(bundle.folder, replace(bundle.manifest, weight_form="embedded", weights=()))
    with pytest.raises(HimapError, match="holds its weights inside its engines") as refused:
        judged_bundle(inside, None, None)
    assert refused.value.code == Exit.USAGE and "onnxruntime or openvino, too" in refused.value.hint
    plain = Bundle.open(work.bundle("mha"))
    plain = Bundle(plain.folder, replace(plain.manifest, weight_form="embedded", weights=()))
    assert judged_bundle(plain, None, None)[0] is plain


@pytest.mark.parametrize("main", [analyze_main, tune_main])
def test_analysis_needs_the_weights_before_rounding(
    work: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], object]
) -> None:
    write_awq(work.checkpoint("mqa4"), tmp_path / "made")
    data = QUESTIONS_64
    assert call(main, tmp_path / "made", "--dataset", data, "--limit", 2, "--out", tmp_path / "out") == Exit.USAGE
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "comes quantised: analysis and tuning need the unquantised checkpoint" in told
    assert not (tmp_path / "out").exists()
