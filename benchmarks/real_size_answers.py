"""A LLaVA of real size, quantised, that answers on this machine: first token, decode, memory, and who stands beside it.

The random checkpoint of `real_size.py` is exported once for each backend, with both plans in one bundle. In each round
the pruned plan is opened, answers and is closed, then the unpruned one, each in a process of its own, so that one of
them is in memory at a time. Then llama.cpp and onnxruntime-genai answer, on random weights of the same sizes in 4 bits.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import real_size
from answering import Answering
from peer_bars import Verdict, decode_bytes, reading
from peer_models import ENVIRONMENT, Models
from peer_systems import DECODE, MEMORY, OPENED, OVER, PREFILL, PROMPT, QUIET, Running, llama_bench, peak_bytes, peer
from prefill import TEXT, work_folder

from himap_export.engines.bundle import Bundle, RunSpec
from himap_export.engines.isolation import child
from himap_export.graphs.errors import HimapError
from himap_export.validate.report.machine import cpu_and_features
from himap_export.validate.speed.measure import ceiling

PRUNED, UNPRUNED = "himap", "none"
NEW_TOKENS = 64
SPEED_BAR, MEMORY_BAR, EXPORT_BAR = 2.2, 8 * 2**30, 2 * 2**30
DTYPES = {"onnxruntime": "fp32", "openvino": OVER}


@dataclass(frozen=True)
class Answered:
    """One opening and what it answered: seconds to open, to the first token of the first prompt and of the next one,
    of decode per token; the most bytes that its process held, anonymous and with the pages of mapped files."""

    opened: float
    first: float
    next: float
    decode: float
    anonymous: int
    resident: int


def answered(run: RunSpec, backend: str, threads: int) -> Answered:
    """Opens a plan in a process of its own and returns what it took to answer; HimapError if it cannot."""
    limits = QUIET | {"OMP_NUM_THREADS": str(threads)}
    with (
        child(f"answering on {backend}", limits, Answering, run, backend, threads) as one,
        real_size.peak_memory(one.pid) as peak,
    ):
        seconds = [one.ask(phase) for phase in ("opened", "first", "first", "decode")]
        return Answered(*seconds, peak()[0], peak_bytes(one.pid))


@dataclass(frozen=True)
class Measured:
    """A backend's bundle: the phases of its export, bytes of its weights, bytes that a decode step reads by plan, the
    speed-up that FLOPs allow the decoder, and what each plan answered in each round."""

    phases: Sequence[real_size.Phase]
    weights: int
    read_bytes: Mapping[str, int]
    ceiling: float
    rounds: Mapping[str, Sequence[Answered]]

    def median(self, plan: str, what: str) -> float:
        return statistics.median(getattr(each, what) for each in self.rounds[plan])

    def faster(self, what: str) -> tuple[float, float, float]:
        """Returns how many times faster the pruned plan is, within each round: median, lowest, highest."""
        both = zip(self.rounds[PRUNED], self.rounds[UNPRUNED], strict=True)
        found = [getattr(slow, what) / getattr(fast, what) for fast, slow in both]
        return statistics.median(found), min(found), max(found)


def measured(model: Path, out: Path, backend: str, args: argparse.Namespace) -> Measured:
    """Exports for a backend, lets both plans answer in turn, and deletes the bundle."""
    quantized = ["--quantize", args.quantize, *(["--block", str(args.block)] if args.block else [])]
    quantized += ["--quantize-head"] if args.quantize_head else []
    command = ["himap-export", str(model), "--out", str(out), "--overwrite", "--backend", backend, "--dtype"]
    command += [DTYPES[backend], *quantized, "--text-budget", str(TEXT), "--max-new-tokens", str(NEW_TOKENS)]
    command += ["--policy", PRUNED, "--policy", UNPRUNED]
    print("himap-export", model.name, *command[5:])
    try:
        phases, _ = real_size.export(command)
        real_size.print_phases(phases)
        bundle = Bundle.open(out, verify=False)
        runs = {plan: bundle.select(plan) for plan in (PRUNED, UNPRUNED)}
        rounds: dict[str, list[Answered]] = {plan: [] for plan in runs}
        for number in range(args.rounds):
            for plan, run in runs.items():
                rounds[plan].append(answered(run, backend, args.threads))
                print(f"{backend}, {plan}, round {number + 1}: {rounds[plan][-1]}", file=sys.stderr, flush=True)
        stored = sum(t.nbytes for t in bundle.tensors.values())
        read = {plan: decode_bytes(run) for plan, run in runs.items()}
        return Measured(phases, stored, read, ceiling(runs[PRUNED]), rounds)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def lines(backend: str, m: Measured, byte_seconds: float) -> Iterator[str]:
    """Yields what a backend took, beside what FLOPs and memory allow."""
    yield f"{backend}, {m.weights / 1e9:.2f} GB of weights; FLOPs allow {m.ceiling:.2f}x over the unpruned decoder"
    for plan in (PRUNED, UNPRUNED):
        anonymous, resident = (max(getattr(a, w) for a in m.rounds[plan]) / 2**30 for w in ("anonymous", "resident"))
        floor = m.read_bytes[plan] * byte_seconds
        yield (
            f"  {plan:6} opens in {m.median(plan, 'opened'):.1f} s; first token {m.median(plan, 'next'):.2f} s, just "
            f"opened {m.median(plan, 'first'):.2f}; decode {1e3 * m.median(plan, 'decode'):.0f} ms a token, "
            f"{m.median(plan, 'decode') / floor:.2f}x the reading of {m.read_bytes[plan] / 1e9:.2f} GB; "
            f"peak {anonymous:.2f} GiB anonymous, {resident:.2f} resident"
        )


def verdicts(found: Mapping[str, Measured]) -> Iterator[Verdict]:
    for backend, m in found.items():
        most = max(phase.resident for phase in m.phases)
        yield Verdict(f"export, {backend}", most <= EXPORT_BAR, f"{most / 2**30:.2f} GiB resident, the bar is 2")
        middle, low, high = m.faster("next")
        told = f"{middle:.2f}x ({low:.2f} to {high:.2f}), the bar is {SPEED_BAR}"
        yield Verdict(f"first token, {backend}, pruned over unpruned", middle >= SPEED_BAR, told)
        most = max(answer.anonymous for answer in m.rounds[PRUNED])
        told = f"{most / 2**30:.2f} GiB beside files' pages, which the system may drop; the bar is 8"
        yield Verdict(f"memory, {backend}, pruned", most <= MEMORY_BAR, told)


def peers(models: Models, config: Path, threads: int) -> Iterator[tuple[str, dict[str, float] | str]]:
    """Yields each peer's name, and its seconds by phase and peak bytes, or why it cannot be run here. What it reads is
    made first and deleted then."""

    def genai(made: Path) -> AbstractContextManager[Running]:
        return peer("genai", "ort_genai", models, {"folder": str(made), "precision": "int4", "threads": threads})

    def llama(made: Path) -> AbstractContextManager[Running]:
        return nullcontext(llama_bench("llama", models, made, threads))

    for name, make, opened in (
        ("llama.cpp Q4_0", models.random_gguf, llama),
        ("onnxruntime-genai int4", models.random_onnxruntime_genai, genai),
    ):
        try:
            with deleted(make(config)) as made, opened(made) as one:
                yield name, {phase: one.ask(phase) for phase in (OPENED, PREFILL, DECODE, MEMORY)}
        except HimapError as problem:
            yield name, str(problem)


@contextmanager
def deleted(file: Path) -> Iterator[Path]:
    """Yields a file or folder and deletes it."""
    try:
        yield file
    finally:
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink()


def report(args: argparse.Namespace, work: Path) -> None:
    """Measures and prints."""
    cpu, features = cpu_and_features(Path("/proc/cpuinfo"))
    print(f"{cpu}, {args.threads} threads; {features}")
    model = real_size.prepared(args.model, work)
    found = {backend: measured(model, work / "bundle", backend, args) for backend in args.backend or DTYPES}
    with child("reading memory", {"OMP_NUM_THREADS": str(args.threads)}, reading, args.threads) as reader:
        byte_seconds = min(reader.ask(DECODE) for _ in range(3))
    print(f"prompts of {PROMPT} tokens; memory is read at {1e-9 / byte_seconds:.1f} GB/s")
    for backend, m in found.items():
        print(*lines(backend, m, byte_seconds), sep="\n")
    beside = dict(peers(Models(work, args.environment.absolute()), model / "config.json", args.threads))
    for name, took in beside.items():
        if isinstance(took, str):
            print(f"{name} is left out: {took}")
            continue
        print(
            f"{name}: opens in {took[OPENED]:.1f} s; prefill {took[PREFILL]:.2f} s, without vision; decode "
            f"{1e3 * took[DECODE]:.0f} ms a token; peak {took[MEMORY] / 2**30:.2f} GiB resident"
        )
    for verdict in verdicts(found):
        print(verdict.line())
    told = {backend: asdict(m) for backend, m in found.items()}
    print(json.dumps({"cpu": cpu, "features": features, "seconds_to_read_a_byte": byte_seconds, **told, **beside}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("llava-7b", "llava-13b"), default="llava-7b")
    parser.add_argument("--backend", action="append", choices=tuple(DTYPES), help="repeatable (default: both)")
    parser.add_argument("--quantize", default="int4")
    parser.add_argument("--block", type=int, default=128, help="inputs that share a scale; 0: the kind's own")
    parser.add_argument("--quantize-head", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the model here for the next run")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, metavar="DIR", help="the peers' Python")
    args = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        with work_folder(args.work and args.work.absolute()) as work:
            report(args, work)
    except HimapError as problem:
        print(problem, file=sys.stderr)
        sys.exit(problem.code)


if __name__ == "__main__":
    main()
