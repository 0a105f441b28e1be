"""`himap-tune`: sweeps the layers and fractions of a policy's cuts over a data set and writes the plan to export."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import TypeVar

from himap_export.engines.command import BACKENDS, MOST_THREADS, Parser, number, run_command, whole
from himap_export.validate.progress import RESUMED, say

LOG, PLANS = "sweep.jsonl", "plans.toml"
MOST_VALUES = 64  # of one option: more than there are layers to cut at, or steps worth telling apart
Number = TypeVar("Number", int, float)


def _list(kind: Callable[[str], Number]) -> Callable[[str], tuple[Number, ...]]:
    """The type of an option that takes values with commas between them."""

    def parse(text: str) -> tuple[Number, ...]:
        parts = text.split(",")
        if len(parts) > MOST_VALUES:
            raise argparse.ArgumentTypeError(f"{len(parts)} values are too many: at most {MOST_VALUES}")
        return tuple(kind(part) + 0 for part in parts)  # -0.0 + 0 is 0.0

    return parse


def _parser() -> argparse.ArgumentParser:
    p = Parser(prog="himap-tune", description=__doc__)
    p.add_argument("model", metavar="MODEL", help="alias, Hugging Face id or checkpoint folder, as for himap-export")
    p.add_argument("--dataset", type=Path, required=True, metavar="F.jsonl", help="lines of image, question, answer")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help=f"{PLANS}, the report, and the answers' log")
    p.add_argument("--policy", default="himap", metavar="NAME", help="what ranks the tokens (default: himap)")
    layers, fractions = _list(whole(1, 9999)), _list(number(0, 1))
    p.add_argument("--k1", type=layers, metavar="K,..", help="layers of the first cut (default: by the depth)")
    p.add_argument("--k2", type=layers, metavar="K,..", help="of the second, if the policy has one (default: as k1)")
    p.add_argument(
        "--r1", type=fractions, metavar="R,..", help="default: 0.25,0.5,0.75; of a policy that cuts once, 0.9 too"
    )
    p.add_argument("--r2", type=fractions, metavar="R,..", help="default: 0.5,0.75,0.9")
    p.add_argument(
        "--min-accuracy", type=number(0.001, 1), default=0.99, metavar="F",
        help="what the chosen plan must keep of the unpruned accuracy (default: 0.99)",
    )  # fmt: skip
    p.add_argument("--limit", type=whole(1, 10**9), metavar="N", help="the first N questions only")
    p.add_argument(
        "--workers", type=whole(1, MOST_THREADS), default=min(MOST_THREADS, len(os.sched_getaffinity(0))), metavar="N",
        help="processes (default: one a CPU)",
    )  # fmt: skip
    p.add_argument(
        "--iterations", "--rounds", type=whole(1, 1000), default=10, metavar="N",
        help="repetitions in which the plans of the front are timed (default: 10)",
    )  # fmt: skip
    p.add_argument(
        "--backend", choices=BACKENDS,
        help="of the engines that are timed (default: the best that is installed and runs here)",
    )  # fmt: skip
    p.add_argument(
        "--threads", type=whole(1, MOST_THREADS), metavar="N",
        help="CPU threads of the engines that are timed (default: as many as gain anything)",
    )  # fmt: skip
    p.add_argument("--no-time", action="store_true", help="measure accuracy only")
    p.add_argument(
        "--baseline", "--control", choices=("random", "none"), default="random",
        help="whom the front's rankings have to beat at their own cuts (default: random; none if --policy is random)",
    )  # fmt: skip
    p.add_argument("--seeds", type=whole(1, 1000), default=5, metavar="N", help="how often it draws (default: 5)")
    p.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32",
        help="of PyTorch and of the engines that are timed (default: fp32)",
    )  # fmt: skip
    p.add_argument(
        "--seed", type=whole(0, 2**32 - 1), default=0, help="of what is random: the first draw's (default: 0)"
    )
    p.add_argument("--skip-bad", action="store_true", help="leave out lines that cannot be read, and say so")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    run_command("himap-tune", lambda: _tune(args, sys.argv[1:] if argv is None else argv), RESUMED)


def _tune(args: argparse.Namespace, argv: list[str]) -> None:
    from himap_export.engines.backends import load_backend
    from himap_export.engines.bundle import digest
    from himap_export.engines.choice import best_backend
    from himap_export.engines.files import write_file
    from himap_export.engines.questions import Dataset, read_dataset
    from himap_export.exporter.planning import describe
    from himap_export.exporter.registry import resolve
    from himap_export.graphs.importance import require_scores
    from himap_export.validate.accuracy.answers import check_count, claim
    from himap_export.validate.checkpoint import checkpoint_folder
    from himap_export.validate.report.machine import provenance
    from himap_export.validate.report.page import check_libraries, finite, write_report
    from himap_export.validate.tuning.grid import cuts_of, grid
    from himap_export.validate.tuning.page import toml, tuned_json, tuned_lines, tuned_page
    from himap_export.validate.tuning.tune import TuneOptions, tune

    claim(args.out, LOG, PLANS)
    cuts_of(args.policy)
    data = read_dataset(args.dataset, args.skip_bad)
    for line in data.skipped:
        say(f"left out: {line}")
    data = Dataset(data.examples[: args.limit], data.skipped)
    check_libraries()
    backend = ""
    if not args.no_time:
        backend = args.backend or best_backend(args.dtype).backend
        load_backend(backend).check(args.dtype, "auto")  # now, not after hours of sweeping
    folder = checkpoint_folder(args.model)
    decoder = describe(resolve(str(folder)))[0]
    values = {key: found for key in ("k1", "r1", "k2", "r2") if (found := getattr(args, key)) is not None}
    candidates = grid(values, decoder.layers, args.policy)
    require_scores(candidates[0].plan, decoder)
    check_count((len(candidates) + 1) * len(data.examples))
    say(f"{len(candidates)} plans, {len(data.examples)} questions, up to {args.workers} at a time")
    args.out.mkdir(parents=True, exist_ok=True)
    options = TuneOptions(
        candidates=candidates, workers=args.workers, dtype=args.dtype, seed=args.seed, keep=args.min_accuracy,
        backend=backend, iterations=args.iterations, threads=args.threads,
        draws=0 if args.baseline == "none" or args.policy == "random" else args.seeds,
    )  # fmt: skip
    tuned = tune(folder, args.dataset, data=data, log_file=args.out / LOG, options=options)
    about = {"model": args.model, "dataset": str(args.dataset), "dtype": args.dtype, "seed": args.seed}
    plans, facts = args.out / PLANS, finite(about | tuned_json(tuned))
    write_file(plans, methodcaller("write", toml(tuned).encode()))
    made = provenance(["himap-tune", *argv], {"data set's sha256": digest(args.dataset).sha256})
    page = tuned_page(tuned, args.model, made, str(plans))
    report = write_report(args.out, page, facts)
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    print("\n".join([*tuned_lines(tuned), "", f"report: {report}", f"plans:  {plans}"]))
