"""What made a report: the command, the machine and the features of its CPU, the versions, the inputs' digests."""

import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from himap_export.validate.report.page import Block, Command, Table

CPUINFO = Path("/proc/cpuinfo")
# What decides how fast matrices are multiplied, as the kernel names it: x86-64, then AArch64.
FEATURES = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8",
    "amx_bf16", "amx_fp16", "asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
PACKAGES = (
    "himap-export", "numpy", "torch", "transformers", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-rtx-cu13",
    "tensorrt",
)  # fmt: skip


def provenance(program: str, argv: Sequence[str], facts: Mapping[str, str]) -> tuple[Block, ...]:
    """Returns the command as a shell takes it, and a table of when, where and with what it ran; `facts` lead it."""
    cpu, features = cpu_and_features(CPUINFO)
    rows = {
        **facts,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{cpu}, {len(os.sched_getaffinity(0))} CPUs of {os.cpu_count()}, {platform.platform()}",
        "CPU features": features,
        "versions": ", ".join([f"Python {platform.python_version()}", *_versions()]),
    }
    line = shlex.join([program, *argv])
    return Command(line), Table("made", ("", ""), tuple(rows.items()))


def cpu_and_features(cpuinfo: Path) -> tuple[str, str]:
    """Returns the CPU's name and those of FEATURES that it has, as Linux tells them in `cpuinfo`; says so if it cannot
    be read."""
    try:
        lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
    except OSError:
        return platform.machine(), f"unknown: {cpuinfo} cannot be read"
    told = {key.strip(): value.strip() for key, _, value in reversed(lines)}  # the first CPU's win
    flags = (told.get("flags") or told.get("Features") or "").split()
    return told.get("model name", platform.machine()), ", ".join(f for f in FEATURES if f in flags) or "none of note"


def _versions() -> list[str]:
    """Returns those of PACKAGES that are installed, with their versions."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found
