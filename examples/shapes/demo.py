"""`make demo`: exports `shapes`, asks it a question pruned and unpruned, judges and times it, and tells what came out.

    python examples/shapes/demo.py --out demo

The engines that answer are those of the fastest backend for this CPU that is installed; beside them TensorRT-RTX
engines are built, which need no GPU until they run. Everything told is in OUT/index.json and on one page,
OUT/index.html; the validation has a report of its own, OUT/report/report.html.
"""

import argparse
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import himap_export as hx
from himap_export.engines.choice import best_backend, fast_dtype
from himap_export.engines.command import run_command
from himap_export.engines.questions import Example, read_dataset
from himap_export.exporter.aliases import ALIASES
from himap_export.graphs.errors import Exit
from himap_export.validate.accuracy.prompter import prompter_of_checkpoint
from himap_export.validate.report.page import check_libraries, write_report
from himap_export.validate.speed.results import ratio

MODEL = "shapes"
PLANS = Path(__file__).with_name("demo.toml")  # its first plan is shown, its "unpruned" one beside it
QUESTIONS = Path(__file__).parent / "images" / "questions.jsonl"
NEW_TOKENS = 8
say = partial(print, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Rtx:
    """The TensorRT-RTX engines that were built, bytes by graph, for `targets` (89 is SM 8.9). `answer`: theirs, if they
    ran; else `problem` says why not, or why none was built."""

    dtype: str
    engines: dict[str, int]
    targets: tuple[int, ...] = ()
    answer: str = ""
    problem: str = ""

    def told(self) -> str:
        """Returns it as one line."""
        if not self.engines:
            return f"not built: {self.problem}"
        size, lowest, highest = sum(self.engines.values()) / 2**20, min(self.targets) / 10, max(self.targets) / 10
        built = f"{len(self.engines)} engines built, {size:.1f} MiB, {self.dtype}, for SM {lowest} to {highest}"
        return f"{built}; not run: {self.problem}" if self.problem else f"{built}; answer {self.answer!r}"


@dataclass(frozen=True)
class Found:
    """What a demonstration found. `answers`: in words, by who gives them (pruned, unpruned, reference); `policy`: what
    ranks the image tokens; `cuts`: layers before which the least of them leave; `validation`: himap-validate's JSON;
    `page`: its file; `next_commands`: of the shell."""

    question: str
    image: str
    expected: str
    answers: dict[str, str]
    policy: str
    cuts: tuple[int, ...]
    validation: dict[str, Any]
    threads: int
    rtx: Rtx
    page: str
    next_commands: tuple[str, ...]
    seconds: float = 0.0

    @property
    def tokens(self) -> str:
        """Image tokens from stage to stage: 576 -> 288 -> 72."""
        return " -> ".join(map(str, self.validation["image_tokens"]))

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(gate["name"] for gate in self.validation["gates"] if not gate["passed"])

    @property
    def gates(self) -> str:
        """How many gates of parity are passed: 12 of 12, or which are not."""
        total = len(self.validation["gates"])
        return f"{total - len(self.failed)} of {total}" + f" (failed: {', '.join(self.failed)})" * bool(self.failed)

    def speed_up(self, phase: str) -> str:
        """Returns how many times faster pruned engines are than unpruned ones: median, lowest, highest repetition."""
        return ratio(self.validation["speed"]["over"]["unpruned"][phase])

    def timed(self, phase: str, ceiling: str) -> str:
        """Returns times of `phase` side by side, with the speed-up that FLOPs allow."""
        speed = self.validation["speed"]
        ms = (f"{name} {1e3 * speed['systems'][name][phase]:5.1f} ms" for name in ("pruned", "unpruned"))
        return f"{', '.join(ms)}: {self.speed_up(phase)}; FLOPs allow {speed[ceiling]:.2f}x"

    @property
    def measured_on(self) -> str:
        v, speed = self.validation, self.validation["speed"]
        machine = f"{v['backend']} {v['dtype']} on {v['device']}, {self.threads} threads"
        return f"{machine}; median (lowest to highest) of {speed['repetitions']} interleaved repetitions"


def ending(found: Found) -> list[str]:
    """Returns what a newcomer wants to see, a line each, its names in one column."""
    spoken = ", ".join(f"{who} {answer!r}" for who, answer in found.answers.items())
    first, *others = found.next_commands
    rows = [
        ("question", f"{found.question}  ({found.image}; right: {found.expected!r})"),
        ("answer", spoken),
        ("image tokens", f"{found.tokens}, chosen by {found.policy} before layer {' and '.join(map(str, found.cuts))}"),
        ("parity", f"{found.gates} gates ok, against PyTorch in fp32"),
        ("first token", found.timed("first_token", "first_token_ceiling")),
        ("prefill of it", found.timed("prefill", "ceiling")),
        ("measured on", found.measured_on),
        ("TensorRT-RTX", found.rtx.told()),
        ("page", f"{found.page}  (after {found.seconds:.0f} s)"),
        ("next", first),
        *(("", line) for line in others),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:{width}}  {text}" for name, text in rows]


def text_budget(examples: Sequence[Example]) -> int:
    """Returns the least budget that holds each of the questions in its prompt, a multiple of 8."""
    prompter = prompter_of_checkpoint(Path(ALIASES[MODEL].source))
    return -(-max(map(prompter.text_tokens, examples)) // 8) * 8


def build_rtx(out: Path, budget: int, asked: Example) -> Rtx:
    """Returns what TensorRT-RTX made of the same plans, and its answer where there is a GPU for it."""
    dtype = "fp16"
    try:
        bundle = hx.export(
            MODEL, out=out, overwrite=True, plan=PLANS, text_budget=budget, max_new_tokens=NEW_TOKENS,
            backend="tensorrt-rtx", dtype=dtype, progress=say,
        )  # fmt: skip
    except hx.HimapError as problem:
        if problem.code != Exit.MISSING:
            raise
        return Rtx(dtype, {}, problem=problem.summary)
    records = bundle.manifest.engines["tensorrt-rtx"]
    sizes = {graph: bundle.manifest.files[record.file].bytes for graph, record in records.items()}
    built = Rtx(dtype, sizes, targets=next(iter(records.values())).targets)
    try:
        with bundle.session() as session:
            return replace(built, answer=session.ask(asked.image, asked.question).text)
    except hx.HimapError as problem:
        if problem.code != Exit.MISSING:
            raise
        return replace(built, problem=problem.summary)


def next_commands(bundle: Path, other: Example) -> tuple[str, ...]:
    """Returns what to type next, as a shell in this folder takes it."""
    activate = Path(sys.executable).with_name("activate")
    asked = shlex.join(["--image", relative(other.image), "--prompt", other.question])
    return (
        *([] if shutil.which("himap-run") else [f". {relative(activate)}"]),
        f"himap-run {bundle} {asked}",
        f"himap-validate {bundle} --dataset {relative(QUESTIONS)} --report {bundle.parent / 'accuracy'}",
        "himap-export llava-7b --dry-run",
    )


def relative(path: Path) -> str:
    return os.path.relpath(path)


def demonstrate(out: Path) -> Found:
    """Exports, asks, judges and times; writes all but the page and its JSON into `out`."""
    examples = read_dataset(QUESTIONS).examples
    asked, other = examples[:2]
    budget, backend = text_budget(examples), best_backend(cpu=True).backend
    bundle = hx.export(
        MODEL, out=out / MODEL, overwrite=True, plan=PLANS, text_budget=budget, max_new_tokens=NEW_TOKENS,
        backend=backend, dtype=fast_dtype(backend), progress=say,
    )  # fmt: skip
    with bundle.session() as session:
        pruned = session.ask(asked.image, asked.question)
        pruned.draw_kept(out / "kept.png")
    with bundle.session(plan="unpruned") as session:
        unpruned = session.ask(asked.image, asked.question).text
    threads = len(os.sched_getaffinity(0))
    report = hx.validate(
        bundle, image=asked.image, prompt=asked.question, threads=threads, progress=say,
        tell=lambda lines: print("\n".join(lines), flush=True),
    )  # fmt: skip
    report.write(out / "report", ("make", "demo"))
    facts = report.to_json()
    return Found(
        question=asked.question, image=relative(asked.image), expected=asked.answer,
        answers={"pruned": pruned.text, "unpruned": unpruned, "reference": facts["answer"]["reference"]},
        policy=report.run.plan.policy, cuts=tuple(cut.layer for cut in report.run.plan.cuts), validation=facts,
        threads=threads, rtx=build_rtx(out / f"{MODEL}-rtx", budget, asked), page=str(out / "index.html"),
        next_commands=next_commands(out / MODEL, other),
    )  # fmt: skip


def main() -> Exit:
    from demo_page import demo_page  # beside this file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="bundles, page, pictures (default: demo)")
    out, start = parser.parse_args().out, time.perf_counter()
    check_libraries()
    out.mkdir(parents=True, exist_ok=True)
    found = demonstrate(out)
    found = replace(found, seconds=time.perf_counter() - start)
    write_report(out, demo_page(found, (out / "kept.png").read_bytes()), asdict(found), "index")
    print("\n".join(["", *ending(found)]))
    return Exit.GATE if found.failed else Exit.OK


if __name__ == "__main__":
    run_command("demo", main)
