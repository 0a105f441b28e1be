"""The checkpoint that judges a quantised bundle: what the bundle holds, multiplied out, in the layout of its source."""

import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from commands import ORT, Workshop, call
from legacy import make_qwen_vl
from safetensors.numpy import load_file

from himap_export.engines.bundle import Bundle
from himap_export.exporter.cli import main as export_main
from himap_export.graphs.errors import HimapError
from himap_export.validate.dequantised import dequantised, write_dequantised
from himap_export.validate.reference.criteria import reference_himap
from himap_export.validate.reference.reference import Reference

CUTS = reference_himap(2, 4, 0.5, 0.5)
INT4 = ("--quantize", "int4", "--block", "32")
Arrays = Mapping[str, npt.NDArray[Any]]


def stated(parts: Arrays, out: int, wide: int) -> npt.NDArray[np.float64]:
    """A weight [out,in], one number at a time."""
    weight, scale = np.zeros((out, wide)), parts["scale"].astype(np.float64)
    for o in range(out):
        for i in range(wide):
            if "int4" in parts:
                byte = int(parts["int4"][i, o // 2])
                code = byte >> 4 if o % 2 else byte & 15
                number = code - 16 if code > 7 else code
            else:
                number = int(parts["int8"][i, o])
            block = wide // len(scale) if scale.ndim == 2 else 1
            weight[o, i] = number * (scale[i // block, o] if scale.ndim == 2 else scale[o])
    return weight


RANDOM, OUT, WIDE = np.random.default_rng(0), 6, 64
INT8 = RANDOM.integers(-128, 128, (WIDE, OUT)).astype(np.int8)
BYTES = RANDOM.integers(0, 256, (WIDE, OUT // 2)).astype(np.uint8)
FLOATS = RANDOM.standard_normal((WIDE, OUT)).astype(np.float32)
PARTS: dict[str, Arrays] = {
    "int8": {"int8": INT8, "scale": FLOATS[0]},
    "int8 in blocks": {"int8": INT8, "scale": FLOATS[:2]},
    "int8 in fp16": {"int8": INT8, "scale": FLOATS[0].astype(np.float16)},
    "int4": {"int4": BYTES, "scale": FLOATS[:2]},
}


@pytest.mark.parametrize("kind", PARTS)
def test_dequantised_is_q_times_scale(kind: str) -> None:
    found = dequantised(PARTS[kind])
    assert found.shape == (OUT, WIDE) and found.dtype == np.float32
    np.testing.assert_allclose(found, stated(PARTS[kind], OUT, WIDE), rtol=1e-6)


def read_parts(bundle: Path, name: str) -> Arrays:
    held = load_file(bundle / "weights" / "quantised.safetensors")
    return {key.rpartition(".")[2]: array for key, array in held.items() if key.rpartition(".")[0] == name}


def read_all(folder: Path) -> dict[str, npt.NDArray[Any]]:
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


@pytest.mark.parametrize(("name", "flags"), [("mha", INT4), ("half", ("--quantize", "int8", "--dtype", "fp32"))])
def test_the_dequantised_checkpoint(work: Workshop, tmp_path: Path, name: str, flags: tuple[str, ...]) -> None:
    """Every linear is the bundle's, everything else the source's, bit for bit, under the source's names."""
    bundle, source = work.bundle(name, *flags, cuts=CUTS), work.checkpoint(name)
    write_dequantised(Bundle.open(bundle), source, tmp_path)
    made, theirs = read_all(tmp_path), read_all(source)
    assert made.keys() == theirs.keys()
    changed = {key for key in made if not np.array_equal(made[key], theirs[key])}
    assert changed == set(Bundle.open(bundle).manifest.quantised()) and len(changed) == 7 * work.tiny(name).layers
    for key in sorted(changed)[::9]:
        out, wide = theirs[key].shape
        np.testing.assert_allclose(made[key], stated(read_parts(bundle, key), out, wide), rtol=1e-6)
        assert made[key].dtype == np.float32
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (tmp_path / "generation_config.json").samefile(source / "generation_config.json")


@pytest.mark.parametrize("flags", [INT4, ("--quantize", "int8"), (*INT4, "--dtype", "fp16")])
def test_as_much_room_is_asked_for_as_is_written(
    work: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    """A 7B checkpoint in int4 is refused for want of room only where it has none."""
    bundle, source = Bundle.open(work.bundle("mha", *flags, cuts=CUTS)), work.checkpoint("mha")
    write_dequantised(bundle, source, tmp_path)
    written = sum(array.nbytes for array in read_all(tmp_path).values())
    for free, fits in ((1.05 * written, True), (0.95 * written, False)):
        (out := tmp_path / str(free)).mkdir()
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: shutil._ntuple_diskusage(0, 0, free))
        with nullcontext() if fits else pytest.raises(HimapError, match="no room for the dequantised weights"):
            write_dequantised(bundle, source, out)


def test_parts_of_a_fused_tensor_go_back_into_their_rows(tmp_path: Path) -> None:
    source, bundle, out = (tmp_path / name for name in ("source", "bundle", "out"))
    make_qwen_vl(source)
    flags = ("--text-budget", 24, "--k1", 1, "--k2", 3, "--keep-dtype", "*.k_proj", *INT4, *ORT)
    assert call(export_main, source, *flags, "--out", bundle) == 0
    out.mkdir()
    write_dequantised(Bundle.open(bundle), source, out)
    fused, made, theirs = "transformer.h.1.attn.c_attn.weight", read_all(out), read_all(source)
    for part in range(3):  # queries and values are quantised, keys are not
        rows = slice(128 * part, 128 * part + 128)
        if part == 1:
            np.testing.assert_array_equal(made[fused][rows], theirs[fused][rows])
        else:
            parts = read_parts(bundle, f"{fused}[{rows.start}:{rows.stop}]")
            np.testing.assert_allclose(made[fused][rows], stated(parts, 128, 128), rtol=1e-6)
    assert made.keys() == theirs.keys()


def test_a_quantised_head_that_was_tied_is_a_tensor_of_its_own(work: Workshop, tmp_path: Path) -> None:
    bundle, source = work.bundle("tied", "--quantize-head", *INT4, cuts=CUTS), work.checkpoint("tied")
    write_dequantised(Bundle.open(bundle), source, tmp_path)
    found, theirs = Reference(tmp_path), Reference(source)
    embedding = theirs.decoder.embed_tokens.weight
    assert torch.equal(found.decoder.embed_tokens.weight, embedding)
    head = found.adapter.whole.lm_head.weight
    with torch.no_grad():
        assert 0.02 < float((head - embedding).norm() / embedding.norm()) < 0.2
