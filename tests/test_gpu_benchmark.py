"""The GPU benchmark without a GPU: it says so, and its parts work on a CPU."""

import subprocess
import sys
from pathlib import Path

import gpu
import gpu_parts
import pytest
from commands import Workshop

from himap_export.engines.bundle import Bundle
from himap_export.graphs.errors import HimapError
from himap_export.graphs.plan import himap


@pytest.fixture(scope="module")
def bundle(work: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plans = gpu_parts.plan_file(tmp_path_factory.mktemp("plans") / "plans.toml", himap(1, 3, 0.5, 0.75))
    return work.bundle("gqa2", "--plan", plans)


def test_without_a_gpu_it_leaves_with_4_and_one_line() -> None:
    done = subprocess.run([sys.executable, gpu.__file__], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert done.returncode == 4 and done.stderr.count("\n") == 1 and "no NVIDIA GPU" in done.stderr


def test_a_bundles_plans_are_timed_side_by_side(bundle: Path) -> None:
    found = gpu_parts.bundle_times(bundle, "onnxruntime", "cpu", 3)
    assert list(found) == [name.replace(" ", "-") for name in gpu_parts.PLANS]
    acts = {"vision", "prefix", "k1", "k2", "prefill", "first token", "decode"}
    assert all(row.keys() == acts and min(row.values()) > 0 for row in found.values())
    assert [v.bar for v in gpu.verdicts(found, found["unpruned"])] == [2, 3, 1, 1, 1]
    assert len(list(gpu.table(found))) == 1 + len(found)


def test_pytorch_is_timed_both_ways(work: Workshop, bundle: Path) -> None:
    found = gpu_parts.torch_times(work.checkpoint("gqa2"), bundle, "cpu", 2)
    assert found["PyTorch SDPA"].keys() == {"vision", "prefill", "first token", "decode"}
    assert found["PyTorch HiMAP, eager"]["first token"] > 0


def test_parity_is_judged(work: Workshop, bundle: Path) -> None:
    assert gpu_parts.parity(bundle, work.checkpoint("gqa2"), "onnxruntime", "cpu")["passed"]


def test_roofline_is_arithmetic(bundle: Path) -> None:
    run = Bundle.open(bundle).select()
    found = gpu_parts.roofline(run, gpu_parts.Machine("x", 1e9, 1e9))
    assert found["prefill"] == pytest.approx(found["prefix"] + found["k1"] + found["k2"])
    stored = sum(run.bundle.tensors[name].nbytes for name in run.graph("decode").weights)
    assert stored / 1e9 < found["decode"] < 2 * stored / 1e9
    assert gpu_parts.machine("cpu", 256).flops > 1e8


def test_verdicts_and_failures_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.Verdict("x faster", 1.5, 2, True).line().startswith("NOT MET")
    assert gpu.Verdict("% spent", 1.5, 2, False).line().startswith("met")
    results: gpu.Results = {}

    def fails() -> object:
        raise HimapError("no such backend", "it is\nnot there")

    assert gpu.part(results, "a part", fails) is None and gpu.part(results, "another", lambda: 3) == 3
    assert results == {"a part": {"not run": "no such backend: it is not there"}, "another": 3}
    assert capsys.readouterr().out == "a part: not run: no such backend: it is not there\n"
