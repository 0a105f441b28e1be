"""The benchmark's own parts: a random checkpoint that the real command accepts, its table, its bars."""

import os
from pathlib import Path

import numpy as np
import pytest
import real_size
from commands import ORT, Workshop, call
from oracle_criteria import coefficients

from himap_export.engines.bundle import Bundle
from himap_export.exporter.checkpoint import open_checkpoint, read_config
from himap_export.exporter.cli import main as export_main


def test_a_random_checkpoint_is_whole_and_exports(work: Workshop, tmp_path: Path) -> None:
    """The tensors of a tiny model, in shards of 50 kB, so that no tensor's bytes or place can be wrong unseen."""
    like = open_checkpoint(work.checkpoint("gqa2"))
    shapes = {name: t.shape for name, t in like.tensors.items()}
    written = real_size.write_checkpoint(tmp_path / "model", read_config(work.checkpoint("gqa2")), shapes, limit=50_000)
    made = open_checkpoint(tmp_path / "model")
    files = {t.file for t in made.tensors.values()}
    assert {name: t.shape for name, t in made.tensors.items()} == shapes and len(files) > 3
    assert written == sum(t.nbytes for t in made.tensors.values())
    assert max(sum(t.nbytes for t in made.tensors.values() if t.file == f) for f in files) <= 50_000
    out = tmp_path / "bundle"
    flags = ("--k1", 1, "--k2", 3, "--text-budget", 24, "--dtype", "fp16", "--hard-link", *ORT)
    assert call(export_main, tmp_path / "model", *flags, "--out", out) == 0
    bundle = Bundle.open(out)
    assert bundle.manifest.dtype == "fp16" and bundle.tensors.keys() <= shapes.keys()


@pytest.mark.parametrize("shape", [(300, 70), (5000,)])
def test_random_numbers_are_finite_small_and_never_the_same_twice(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    first, second = (np.frombuffer(b"".join(real_size.pieces(rng, shape)), np.float16) for _ in range(2))
    assert first.size == np.prod(shape) and not np.array_equal(first, second)
    middle = 1 if len(shape) == 1 else 0
    assert np.isfinite(first).all() and np.abs(first - middle).max() < 0.13 and abs(first.mean() - middle) < 0.01


def test_progress_lines_are_read_and_others_are_not() -> None:
    assert real_size.phase_of("compile      7.4 s   onnxruntime 0.3 s, tensorrt-rtx 6.9 s\n") == ("compile", 7.4)
    assert real_size.phase_of("himap-export: error: no such thing\n") is None


def test_memory_counts_children() -> None:
    own, resident = real_size.memory(os.getpid())
    assert 10 << 20 < own <= resident
    assert real_size.bare_interpreter() < resident


def test_bars_are_judged(capsys: pytest.CaptureFixture[str]) -> None:
    phases = [real_size.Phase("vision", 3.0, 1 << 30, 3 << 30), real_size.Phase("digest", 50.0, 1 << 20, 1 << 30)]
    found = real_size.report(phases, 55.0, 9.0, 1 << 20)
    said = capsys.readouterr().out
    assert found["unhashed_s"] == 5.0 and "NOT MET  3.00 peak resident" in said and "met      5.00 seconds" in said


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["instruction-debiased", "hawk", "dart", "key-norm", "v2drop"])
def test_selectors_build_at_the_size_of_7b(tmp_path: Path, criterion: str) -> None:
    """TensorRT-RTX, fp16, weights left out: beside a score, too, both layers' attention is one kernel each."""
    cut = f'{{layer = 2, criterion = "{criterion}", remove = 0.5, coefficients = {list(coefficients(criterion, 32))}}}'
    (tmp_path / "plan.toml").write_text(f"[{criterion}]\ncuts = [{cut}]\n")
    flags = ("--engines-only", "--backend", "tensorrt-rtx", "--plan", tmp_path / "plan.toml", "--out", tmp_path / "out")
    assert call(export_main, "llava-7b", *flags) == 0
    engines = Bundle.open(tmp_path / "out").manifest.engines["tensorrt-rtx"]
    assert set(engines) == {"vision", "prefix", "k1", "decode"}
    attention = [kernel for kernel in engines["prefix"].kernels or () if "mha" in kernel]
    assert [kernel.split("x")[0] for kernel in attention] == ["2"], engines["prefix"].kernels
    assert all((tmp_path / "out" / record.file).stat().st_size < 20e6 for record in engines.values())
