"""GPU checks, for whenever a GPU is there: kernel, stages, first token, decode, and parity, in under ten minutes.

Every part runs in a process of its own and is reported, if only as "not run" with the reason. The last line is JSON.
It has not been run on a GPU yet; its parts have, on a CPU.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gpu_parts
import real_size
from prefill import work_folder

from himap_export.engines.bundle import Bundle
from himap_export.engines.isolation import isolated
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import PruningPlan

# [B,S,K,D]: the two cuts of LLaVA-7B with 192 text slots, and a long sequence.
SHAPES = ((1, 768, 480, 4096), (1, 480, 264, 4096), (8, 768, 480, 4096), (8, 480, 264, 4096), (1, 4096, 1024, 4096))
BACKENDS = {"onnxruntime": "onnxruntime-gpu", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}
PACKAGES = ("torch", "triton", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "cuda-core")
Results = dict[str, object]


@dataclass(frozen=True)
class Verdict:
    """A number and the bar it has to reach (`least`) or keep under."""

    what: str
    value: float
    bar: float
    least: bool

    def line(self) -> str:
        met = self.value >= self.bar if self.least else self.value <= self.bar
        return f"{'met    ' if met else 'NOT MET'}  {self.value:.2f} {self.what}, the bar is {self.bar}"


def verdicts(times: Mapping[str, gpu_parts.Times], torch: gpu_parts.Times) -> list[Verdict]:
    """Of one backend: first token over unpruned, scoring's share, nothing slower than PyTorch."""
    pruned, unpruned = times["pruned"], times["unpruned"]
    # By difference: each plan with one cut lacks the other's scores in a stage of the same tokens.
    scores = (pruned["prefix"] - times["second-only"]["prefix"]) + (pruned["k1"] - times["first-only"]["k1"])
    found = [
        Verdict(
            "x first token over the same backend unpruned", unpruned["first token"] / pruned["first token"], 2, True
        ),
        Verdict("% of prefill is scoring, by difference", 100 * scores / pruned["prefill"], 3, False),
    ]
    for phase in ("vision", "prefill", "decode"):
        found.append(Verdict(f"x PyTorch SDPA's time for unpruned {phase}", unpruned[phase] / torch[phase], 1, False))
    return found


def table(times: Mapping[str, gpu_parts.Times]) -> Iterator[str]:
    phases = ("vision", "prefix", "k1", "k2", "prefill", "first token", "decode")
    yield f"{'ms':44}" + "".join(f"{phase:>12}" for phase in phases)
    for name, row in times.items():
        yield f"{name:44}" + "".join(f"{row[phase] * 1e3:12.2f}" if phase in row else f"{'-':>12}" for phase in phases)


def part(results: Results, name: str, work: Callable[[], object]) -> object | None:
    """Runs one part; what it cannot do is told and kept, and the others go on."""
    try:
        results[name] = work()
    except (HimapError, RuntimeError, subprocess.CalledProcessError) as problem:
        results[name] = {"not run": " ".join(str(problem).split())}
        print(f"{name}: not run: {' '.join(str(problem).split())}", flush=True)
        return None
    return results[name]


def alone(what: str, work: Callable[..., object], *arguments: object) -> object:
    return isolated(what, {}, work, *arguments)


def need_gpu() -> str:
    """Name, driver; HimapError (missing) if there is none."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise HimapError(
            "this machine has no NVIDIA GPU", hint="run it where there is one", code=Exit.MISSING
        ) from None


def packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def export(model: Path, work: Path, batch: int, backend: str, form: str) -> Path:
    """All plans in one bundle, the weights linked or embedded."""
    out = work / f"{backend}-{batch}-{form}"
    plans = gpu_parts.plan_file(work / "plans.toml", PruningPlan())
    command = ["himap-export", model, "--plan", plans, "--batch", str(batch), "--backend", backend, "--dtype", "fp16"]
    command += ["--hard-link"] if form == "shared" else ["--weight-form", form]
    done = subprocess.run([*command, "--overwrite", "--out", out], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HimapError(f"{backend} was not exported", done.stderr.strip().splitlines()[-1])
    return out


def kernels(results: Results, machine: gpu_parts.Machine, iterations: int) -> None:
    print(f"\n{'top-k gather [B,S,K,D]':28}{'kernel':>12}{'PyTorch':>12}{'bound':>12}")
    for shape in SHAPES:
        found = part(
            results, f"kernel {shape}", lambda s=shape: alone("timing the kernel", gpu_parts.kernel, s, iterations)
        )
        if isinstance(found, dict):
            batch, _, keep, hidden = shape
            bound = 2 * batch * keep * hidden * 2 / machine.bandwidth
            cells = "".join(f"{seconds * 1e6:9.1f} us" for seconds in (found["kernel"], found["PyTorch"], bound))
            print(f"{shape!s:28}{cells}")


def stages(results: Results, model: Path, work: Path, batch: int, iterations: int, machine: gpu_parts.Machine) -> None:
    times: dict[str, gpu_parts.Times] = {}
    torch: gpu_parts.Times = {}
    for backend in BACKENDS:
        for form in ("shared", "embedded") if backend != "onnxruntime" and batch == 1 else ("shared",):
            name = f"{backend}, batch {batch}, weights {form}"
            out = part(results, f"export {name}", lambda b=backend, f=form: str(export(model, work, batch, b, f)))
            if not isinstance(out, str):
                continue
            if not times:
                ceiling = gpu_parts.roofline(Bundle.open(Path(out), verify=False).select(), machine)
                times["at the roofline, pruned"] = ceiling
                reference = part(results, f"PyTorch, batch {batch}", lambda o=out: alone(
                    "timing PyTorch", gpu_parts.torch_times, model, Path(o), "cuda", iterations))  # fmt: skip
                if isinstance(reference, dict):
                    times |= reference
                    torch = reference["PyTorch SDPA"]
            found = part(results, name, lambda o=out, b=backend: alone(
                f"timing {b}", gpu_parts.bundle_times, Path(o), b, "cuda", iterations))  # fmt: skip
            if isinstance(found, dict):
                times |= {f"{name}, {plan}": row for plan, row in found.items()}
                for verdict in verdicts(found, torch) if torch else ():
                    print(f"{name}: {verdict.line()}", flush=True)
            if batch == 1 and form == "shared":
                same = part(results, f"parity {name}", lambda o=out, b=backend: alone(
                    f"comparing {b}", gpu_parts.parity, Path(o), model, b, "cuda"))  # fmt: skip
                if isinstance(same, dict):
                    print(f"{name}: parity with PyTorch {'passed' if same['passed'] else 'FAILED'}", flush=True)
    print(f"\nbatch {batch}")
    print("\n".join(table(times)))


def run(args: argparse.Namespace) -> None:
    hardware = need_gpu()
    print(f"{hardware}; {', '.join(f'{name} {v}' for name, v in packages().items())}")
    results: Results = {"hardware": hardware, "packages": packages(), "model": args.model}
    machine = alone("measuring the GPU", gpu_parts.machine, "cuda")
    assert isinstance(machine, gpu_parts.Machine)
    print(f"roofline: {machine.flops / 1e12:.0f} TFLOP/s in fp16 products, {machine.bandwidth / 1e12:.2f} TB/s copied")
    results["machine"] = vars(machine)
    kernels(results, machine, args.iterations)
    with work_folder(args.work) as work:
        model = Path(args.model) if Path(args.model).is_dir() else real_size.prepared(args.model, work)
        for batch in (1, 8):
            stages(results, model, work, batch, args.iterations, machine)
    print(json.dumps(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llava-7b", help="alias, written at random, or a checkpoint folder")
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the model here for the next run")
    args = parser.parse_args()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        run(args)
    except HimapError as problem:
        print(f"gpu.py: {problem}", file=sys.stderr)
        sys.exit(int(problem.code))


if __name__ == "__main__":
    main()
