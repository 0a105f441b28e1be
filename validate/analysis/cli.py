"""`himap-analyze`: how information flows from the image to the answer, layer by layer, and where to cut."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING

from himap_export.engines.command import MOST_THREADS, Parser, run_command, whole
from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.progress import say

if TYPE_CHECKING:
    from himap_export.engines.questions import Example
    from himap_export.validate.accuracy.prompter import Prompter
    from himap_export.validate.reference.reference import Reference

PLANS = "plans.toml"


def _parser() -> Parser:
    p = Parser(prog="himap-analyze", description=__doc__)
    p.add_argument("model", metavar="MODEL", help="alias, Hugging Face id or checkpoint folder, as for himap-export")
    p.add_argument("--dataset", type=Path, required=True, metavar="F.jsonl", help="lines of image, question, answer")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="report.html, report.json and PNGs go there")
    threads = len(os.sched_getaffinity(0))
    for flag, kind, default, letter, what in (
        ("--limit", whole(1, 10**6), 100, "N", "questions to look at (default: the first 100)"),
        ("--width", whole(1, 1024), 1, "W", "layers disrupted together (default: 1)"),
        ("--cams", whole(0, 100), 2, "N", "questions to draw Grad-CAM of (default: 2)"),
        ("--smooth", whole(0, 100), 0, "N", "noisy copies averaged per Grad-CAM (default: 0)"),
        ("--seed", whole(0, 2**32 - 1), 0, None, "of the random baseline and of the noise (default: 0)"),
        ("--threads", whole(1, MOST_THREADS), threads, None, "CPU threads (default: all)"),
    ):
        p.add_argument(flag, type=kind, default=default, metavar=letter, help=what)
    for flag, own in (("--k1", "2 of 32"), ("--k2", "8 of 32")):
        text = f"layer of a fitted plan's cut (default: HiMAP's {own}, by the depth)"
        p.add_argument(flag, type=whole(1, 9999), metavar="K", help=text)
    p.add_argument(
        "--fit", action="store_true",
        help=f"instead of the analysis, fit what debiasing and HAWK weigh with, and write their plans to {PLANS}",
    )  # fmt: skip
    p.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of PyTorch (default: fp32)")
    p.add_argument("--skip-bad", action="store_true", help="leave out lines that cannot be read, and say so")
    p.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    run_command("himap-analyze", lambda: _analyze(args, sys.argv[1:] if argv is None else argv))


def _analyze(args: argparse.Namespace, argv: list[str]) -> None:
    from himap_export.engines.bundle import digest
    from himap_export.engines.files import check_report
    from himap_export.engines.questions import read_dataset
    from himap_export.validate.accuracy.prompter import prompter_of_checkpoint
    from himap_export.validate.analysis.flow import AnalysisOptions, analyze
    from himap_export.validate.analysis.page import flow_json, flow_lines, flow_page, report_files
    from himap_export.validate.checkpoint import checkpoint_folder, load_reference
    from himap_export.validate.report.machine import provenance
    from himap_export.validate.report.page import check_libraries, finite, write_report

    if not args.fit and (args.k1 or args.k2):
        raise HimapError("--k1 and --k2 go with --fit", code=Exit.USAGE)
    check_report(args.out, (PLANS,) if args.fit else report_files(args.cams))
    if args.out.exists() and any(args.out.iterdir()) and not args.overwrite:
        hint = "choose another --out, or give --overwrite"
        raise HimapError(f"{args.out} is not an empty folder", hint=hint, code=Exit.USAGE)
    check_libraries()
    dataset = read_dataset(args.dataset, args.skip_bad)
    for line in dataset.skipped:
        say(f"left out: {line}")
    folder = checkpoint_folder(args.model)
    prompter = prompter_of_checkpoint(folder)
    if args.cams and prompter.processor.spec.newline:
        details = "its image tokens are no one grid: an overview, and rows with a token behind each"
        raise HimapError(f"no Grad-CAM of {args.model}", details, "give --cams 0", Exit.USAGE)
    reference = load_reference(folder, args.dtype, args.threads, image=prompter.processor.spec)
    if args.fit:
        _fit(reference, prompter, dataset.examples[: args.limit], args)
        return
    options = AnalysisOptions(args.width, args.cams, args.smooth, args.seed)
    flow = analyze(reference, prompter, dataset.examples[: args.limit], options)
    facts = finite(flow_json(flow) | {"model": args.model, "dataset": str(args.dataset), "dtype": args.dtype})
    made = provenance(["himap-analyze", *argv], {"data set's sha256": digest(args.dataset).sha256})
    page = write_report(args.out, flow_page(flow, args.model, args.dtype, made), facts)
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    print("\n".join([*flow_lines(flow), "", f"report: {page}"]))


def _fit(reference: "Reference", prompter: "Prompter", examples: "Sequence[Example]", args: argparse.Namespace) -> None:
    """Fits, writes the plans and prints what was found."""
    from himap_export.engines.files import write_file
    from himap_export.validate.analysis.fit import fit, fitted_lines
    from himap_export.validate.analysis.flow import Samples
    from himap_export.validate.progress import counted

    layers = reference.layers
    k1 = args.k1 or max(1, round(layers * 2 / 32))
    k2 = args.k2 or max(k1 + 1, round(layers * 8 / 32))
    if not k1 < k2 < layers:
        raise HimapError(f"no cuts at {k1} and {k2}", f"the model has {layers} layers", code=Exit.USAGE)
    with counted("fit: prompts") as count:
        found = fit(reference, Samples(prompter, examples), count)
    args.out.mkdir(parents=True, exist_ok=True)
    write_file(args.out / PLANS, methodcaller("write", found.toml(k1, k2).encode()))
    if args.json:
        print(json.dumps(asdict(found) | {"heads": found.heads, "model": args.model}, indent=1))
        return
    print("\n".join([*fitted_lines(found), "", f"plans: {args.out / PLANS}"]))
