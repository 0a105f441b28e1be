"""The plugin's kernel as PTX: what TensorRT will be handed, and that every GPU it may meet can run it."""

import re
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import triton
from commands import blocked_python

from himap_export.engines.plugin.ptx import (
    POINTERS,
    GatherKernel,
    GatherShape,
    compile_gather,
    tiling,
    without_hidden_parameters,
)
from himap_export.graphs.errors import Exit
from himap_export.graphs.spec import Dtype

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
CAPABILITIES = (80, 86, 89, 90, 100, 120)
LLAVA = GatherShape(1, 768, 480, 4096, "fp16")
SHAPES = [
    LLAVA,
    GatherShape(1, 480, 264, 4096, "bf16"),
    GatherShape(2, 123, 47, 128, "fp32"),
    GatherShape(1, 4096, 1024, 5120, "fp16"),
    GatherShape(3, 10000, 10000, 7, "bf16"),
    GatherShape(1, 1, 1, 1, "fp32"),
]
COMPILE = f"""
from himap_export.engines.plugin.ptx import *
from himap_export.graphs.errors import HimapError
try:
    print(compile_gather({LLAVA!r}).ptx)
except HimapError as error:
    print(int(error.code), error)
"""


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled here and now: nothing from Triton's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def assemble(kernel: GatherKernel, capability: int, folder: Path) -> str:
    """ptxas's account of the kernel."""
    source = folder / "kernel.ptx"
    source.write_text(kernel.ptx)
    command = [PTXAS, "-v", f"--gpu-name=sm_{capability}", source, "-o", folder / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_gpu_assembles_it(shape: GatherShape, tmp_path: Path) -> None:
    """Compiled for 8.0, in PTX that old drivers know; no registers spilled, and a block's fit."""
    kernel = compile_gather(shape)
    assert re.findall(r"\.(?:version|target) .*", kernel.ptx) == [".version 8.0", ".target sm_80"]
    for capability in CAPABILITIES:
        log = assemble(kernel, capability, tmp_path)
        assert f"entry function '{kernel.name}' for 'sm_{capability}'" in log and "0 bytes spill stores" in log
        (registers,) = map(int, re.findall(r"Used (\d+) registers", log))
        assert registers * kernel.block[0] <= 65536


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_the_launch_is_told(shape: GatherShape) -> None:
    """Triton's own account of the compilation, and seven parameters."""
    accounts: list[dict[str, Any]] = []
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = lambda **compilation: accounts.append(compilation["metadata"])
        kernel = compile_gather(shape)
    (account,) = accounts
    assert (kernel.name, kernel.shared_bytes) == (account["name"], account["shared"])
    assert kernel.block == (32 * account["num_warps"], 1, 1)
    assert f".reqntid {kernel.block[0]}\n" in kernel.ptx
    assert account["global_scratch_size"] == account["profile_scratch_size"] == 0
    ((name, parameters),) = re.findall(r"\.entry (\w+)\(([^)]*)\)", kernel.ptx)
    assert name == kernel.name
    assert re.findall(r"\.u64 .*param_(\d)\b", parameters) == list("0123456")
    assert kernel.grid[0] * tiling(shape).constants["rows"] >= shape.tokens and kernel.grid[1:] == (shape.batch, 1)


def test_parameters_are_the_kernels() -> None:
    """In its order, which test_kernel.py proves; sizes follow, and none is left to run time."""
    from himap_export.engines.plugin.kernel import top_k_gather

    assert top_k_gather.arg_names == [*POINTERS, *tiling(LLAVA).constants]


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_rows_move_in_pieces_of_16_bytes(dtype: Dtype) -> None:
    """One block of columns, so that no loop hides how often."""
    shape = replace(LLAVA, hidden=1024, dtype=dtype)
    kernel, constants = compile_gather(shape), tiling(shape).constants
    pieces = constants["rows"] * shape.hidden * (4 if dtype == "fp32" else 2) // (16 * kernel.block[0])
    moves = Counter(re.findall(r"(?:ld|st)\.global[.\w]*", kernel.ptx))
    assert constants["columns"] == 1024 and pieces in (4, 8)
    assert moves.pop("ld.global.v4.b32") == pieces + 3  # and scores: 8 of 1024 for each thread, then all of 4
    assert moves.pop("st.global.v4.b32") == pieces
    assert moves == {"ld.global.b32": 1, "ld.global.b64": 2, "st.global.b64": 2}  # a score; position and token_type


def test_hidden_parameters_are_cut_off_unless_read() -> None:
    ptx = compile_gather(LLAVA).ptx
    last, more = "top_k_gather_param_6\n)", "\t.param .u64 .ptr .global .align 1 top_k_gather_param_7\n)"
    assert ptx.count(last) == 1
    doctored = ptx.replace(last, last.replace("\n)", ",\n") + more)
    assert without_hidden_parameters(doctored, 7) == ptx
    assert without_hidden_parameters(ptx, 7) == ptx
    reading = doctored.replace("\tret;", "\tld.param.b64 %rd1, [top_k_gather_param_7];\n\tret;")
    assert reading != doctored
    with pytest.raises(ValueError, match="reads top_k_gather_param_7"):
        without_hidden_parameters(reading, 7)


def test_a_shape_without_an_answer_is_refused() -> None:
    """More kept than there are."""
    with pytest.raises(triton.CompilationError):
        compile_gather(replace(LLAVA, keep=769))


def test_without_triton() -> None:
    done = blocked_python(COMPILE, ["triton"])
    hint = "(pip install 'himap-export[plugin]'; in a checkout: pip install -e '.[plugin]')"
    said = f"{int(Exit.MISSING)} triton is not installed {hint}\n"
    assert done.stdout == said, done.stderr


def test_without_torch_the_same_and_nothing_of_this_machine() -> None:
    done = blocked_python(COMPILE, ["torch", "transformers"])
    ptx = compile_gather(LLAVA).ptx
    assert done.stdout == ptx + "\n", done.stderr
    assert done.stderr == "" and ".file" not in ptx and "/" not in re.sub(r"//.*", "", ptx)
