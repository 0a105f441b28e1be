"""Exporting LLaVA at real size on a small machine: time and memory by phase, beside what the disk alone would take.

A random fp16 checkpoint is written in shards, streamed, with the names and shapes that the graphs ask for; then the
real command exports it. Memory is that of the command and its children: anonymous, and resident with the pages of
mapped files, which the system may drop at any time.
"""

import argparse
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import numpy as np
from prefill import work_folder

SHARD, PIECE = 5_000_000_000, 1 << 25  # bytes; fp16 numbers
# By the form of the weights: GiB resident above a bare interpreter, seconds without hashing. Engines that embed them
# have to fit a machine of 24 GiB, in whatever time that takes.
BARS = {"shared": (2.0, 60.0), "embedded": (24.0, float("inf"))}
Shapes = Mapping[str, tuple[int, ...]]


def weight_shapes(model: str, work: Path) -> Shapes:
    """What the graphs of `model` read, by its published names: an export without weights lists it."""
    from himap_export.engines.bundle import Bundle

    out = work / "names"
    subprocess.run(
        ["himap-export", model, "--engines-only", "--overwrite", "--out", out], check=True, capture_output=True
    )
    graphs = Bundle.open(out).manifest.graphs.values()
    shutil.rmtree(out)
    return {name: spec.shape for graph in graphs for name, spec in graph.weights.items()}


def shards(shapes: Shapes, limit: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """`shapes` in their order, in groups of at most `limit` bytes of fp16."""
    group: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        if group and size + nbytes > limit:
            yield group
            group, size = {}, 0
        group[name], size = shape, size + nbytes
    yield group


def write_checkpoint(folder: Path, config: Mapping[str, object], shapes: Shapes, limit: int = SHARD) -> int:
    """A checkpoint of random fp16 weights in Hugging Face's layout; bytes written. One piece is in memory at a time."""
    folder.mkdir(parents=True)
    rng, files = np.random.default_rng(0), list(shards(shapes, limit))
    index, written = {}, 0
    for number, group in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        header, end = {}, 0
        for name, shape in group.items():
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
            index[name], end = file, end + size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for shape in group.values():
                for piece in pieces(rng, shape):
                    out.write(piece)
        written += end
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    return written


def pieces(rng: np.random.Generator, shape: tuple[int, ...]) -> Iterator[bytes]:
    """Small random numbers, near 1 for vectors; no two tensors alike, or a compiler would store them once."""
    left = int(np.prod(shape))
    while left:
        count = min(left, PIECE)
        bits = rng.integers(0, 1 << 16, count, np.uint16)
        # Sign and mantissa at random, an exponent of 2^-7 to 2^-4: as quick as random bytes, and no infinities.
        numbers = (bits & 0x83FF) | (0x2000 + (bits & 0x0C00))
        yield (numbers.view(np.float16) + np.float16(1) if len(shape) == 1 else numbers).tobytes()
        left -= count


@dataclass(frozen=True)
class Phase:
    """Seconds of one phase of the export, and the most bytes held meanwhile: anonymous, and with mapped pages."""

    name: str
    seconds: float
    anonymous: int
    resident: int


_PHASE = re.compile(r"^(\w+)\s+([\d.]+) s   ")


def phase_of(line: str) -> tuple[str, float] | None:
    """Name and seconds from a progress line of `himap-export`."""
    found = _PHASE.match(line)
    return (found[1], float(found[2])) if found else None


def memory(process: int) -> tuple[int, int]:
    """Anonymous and resident bytes of a process and its children, now."""
    total = [0, 0]
    waiting = [process]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        try:
            status = (folder / "status").read_text()
            children = [int(c) for task in (folder / "task").iterdir() for c in (task / "children").read_text().split()]
        except OSError:  # it has just ended
            continue
        waiting += children
        for i, key in enumerate(("RssAnon", "VmRSS")):
            found = re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)
            total[i] += int(found[1]) * 1024 if found else 0
    return total[0], total[1]


@contextmanager
def peak_memory(process: int) -> Iterator[Callable[[], tuple[int, int]]]:
    """Yields what returns the most anonymous and resident bytes that a process and its children have held since."""
    peak, ended = (0, 0), Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            anonymous, resident = memory(process)
            peak = max(peak[0], anonymous), max(peak[1], resident)

    watcher = Thread(target=watch)
    watcher.start()
    try:
        yield lambda: peak
    finally:
        ended.set()
        watcher.join()


def export(command: list[str]) -> tuple[list[Phase], float]:
    """Runs the command; its phases, and its seconds in all. The memory of a phase is what is sampled until its line."""
    start, peak, phases = time.perf_counter(), [0, 0], list[Phase]()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if found := phase_of(line):
                phases.append(Phase(*found, *peak))
                peak[:] = 0, 0
            else:
                print(line, end="", file=sys.stderr)

    listener = Thread(target=listen)
    listener.start()
    while process.poll() is None:
        peak[:] = map(max, peak, memory(process.pid))
        time.sleep(0.02)
    listener.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return phases, time.perf_counter() - start


def bare_interpreter() -> int:
    """Resident bytes of a Python that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    time.sleep(0.5)
    found = memory(process.pid)[1]
    process.communicate(b"\n")
    return found


def disk_speeds(file: Path, scratch: Path) -> tuple[float, float]:
    """Bytes a second that this machine hashes and copies: one shard, as the export does it."""
    from himap_export.engines.bundle import digest

    start = time.perf_counter()
    size = digest(file).bytes
    hashed = time.perf_counter()
    shutil.copyfile(file, scratch)
    copied = time.perf_counter()
    scratch.unlink()
    return size / (hashed - start), size / (copied - hashed)


def print_phases(phases: list[Phase]) -> None:
    print(f"{'phase':10}{'seconds':>9}{'anonymous':>13}{'resident':>13}")
    for p in phases:
        print(f"{p.name:10}{p.seconds:9.1f}{p.anonymous / 2**30:9.2f} GiB{p.resident / 2**30:9.2f} GiB")


def report(phases: list[Phase], total: float, bound: float, bare: int, form: str = "shared") -> dict[str, object]:
    """Prints the table and the bars; the same as an object."""
    print_phases(phases)
    peak = max(p.resident for p in phases) - bare
    unhashed = total - next(p.seconds for p in phases if p.name == "digest")
    print(f"{'command':10}{total:9.1f}   lower bound {bound:.1f} s: its bytes hashed, and copied or linked")
    names = ("peak resident memory above a bare interpreter, GiB", "seconds without hashing")
    for what, value, bar in zip(names, (peak / 2**30, unhashed), BARS[form], strict=True):
        print(f"{'met    ' if value < bar else 'NOT MET'}  {value:.2f} {what}, the bar is {bar:g}")
    rows = {p.name: {"seconds": p.seconds, "anonymous": p.anonymous, "resident": p.resident} for p in phases}
    return {"seconds": total, "bound_s": bound, "unhashed_s": unhashed, "peak_above_bare": peak, "phases": rows}


def products(manifest: Path) -> Iterator[str]:
    """The kernels in which engines multiply quantised weights, graph by graph."""
    for backend, engines in json.loads(manifest.read_text())["engines"].items():
        for graph, engine in engines.items():
            found = [kernel for kernel in engine.get("kernels", ()) if "(DequantizeLinear, Gemm" in kernel]
            if found:
                yield f"{backend} {graph}: {', '.join(found)}"


def prepared(model: str, work: Path) -> Path:
    from himap_export.exporter.registry import ALIASES

    folder = work / model
    if not folder.exists():
        start, part = time.perf_counter(), work / f"{model}.partial-{os.getpid()}"
        written = write_checkpoint(part, ALIASES[model].config, weight_shapes(model, work))
        part.rename(folder)
        print(f"wrote a random {model}: {written / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("llava-7b", "llava-13b"), default="llava-7b")
    parser.add_argument("--backend", action="append", help="repeatable (default: onnxruntime and tensorrt-rtx)")
    parser.add_argument("--weight-form", choices=("shared", "embedded"), default="shared")
    parser.add_argument("--hard-link", action="store_true")
    parser.add_argument(
        "--quantize", choices=("int8", "int4"), help="embedded in engines, with `--weight-form embedded`"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the model here for the next run")
    args = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with work_folder(args.work) as work:
        model, out = prepared(args.model, work), work / "bundle"
        files = sorted(model.glob("*.safetensors"))
        hashing, copying = disk_speeds(files[0], work / "copy")
        size, cores = sum(f.stat().st_size for f in files), min(len(files), len(os.sched_getaffinity(0)))
        bound = size / hashing / cores + (0 if args.hard_link else size / copying)
        print(f"{size / 1e9:.2f} GB of weights, hashed at {hashing / 1e9:.2f} and copied at {copying / 1e9:.2f} GB/s")
        command = ["himap-export", str(model), "--out", str(out), "--overwrite"]
        for backend in args.backend or ["onnxruntime", "tensorrt-rtx"]:
            command += ["--backend", backend]
        command += ["--hard-link"] if args.hard_link else ["--weight-form", args.weight_form]
        command += ["--quantize", args.quantize] if args.quantize else []
        print("himap-export", args.model, *command[5:])
        try:
            phases, total = export(command)
            print("\n".join(products(out / "manifest.json")))
        finally:
            shutil.rmtree(out, ignore_errors=True)
        print(json.dumps(report(phases, total, bound, bare_interpreter(), args.weight_form)))


if __name__ == "__main__":
    main()
