"""What made a report: the command, the machine and the features of its CPU, the versions, the inputs' digests."""

import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

from himap_export.validate.report.page import Block, Command, Table

# What decides how fast matrices are multiplied, as Linux names it: x86-64, then AArch64.
FEATURES = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8",
    "amx_bf16", "amx_fp16", "asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
PACKAGES = {
    "himap-export", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt_rtx_cu13", "torch",
    "transformers",
}  # fmt: skip


def provenance(command: Sequence[str], facts: Mapping[str, str]) -> tuple[Block, ...]:
    """Returns the command as a shell takes it, and a table of when, where and with what it ran; `facts` lead it."""
    cpu, features = cpu_and_features(Path("/proc/cpuinfo"))
    rows = {
        **facts,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{cpu}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} CPUs, {platform.platform()}",
        "CPU features": features,
        "versions": ", ".join([
            f"Python {platform.python_version()}",
            *sorted({f"{d.name} {d.version}" for d in distributions() if d.name in PACKAGES}),
        ]),
    }  # fmt: skip
    return Command(shlex.join(command)), Table("made", ("", ""), tuple(rows.items()))


def cpu_and_features(cpuinfo: Path) -> tuple[str, str]:
    """Returns the CPU's name and those of FEATURES that it has, as Linux tells them; says so if it does not."""
    try:
        lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
    except OSError:
        return platform.machine(), f"unknown: {cpuinfo} cannot be read"
    told = {key.strip(): value.strip() for key, _, value in reversed(lines)}  # the first CPU's win
    flags = (told.get("flags") or told.get("Features") or "").split()
    return told.get("model name", platform.machine()), ", ".join(f for f in FEATURES if f in flags) or "none of note"
