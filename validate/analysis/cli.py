"""`himap-analyze`: how information flows from the image to the answer, layer by layer, and where to cut."""

import argparse
import json
import os
import sys
from pathlib import Path

from himap_export.engines.command import run_command
from himap_export.graphs.errors import Exit, HimapError
from himap_export.validate.progress import say


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="himap-analyze", description=__doc__)
    p.add_argument("model", metavar="MODEL", help="alias, Hugging Face id or checkpoint folder, as for himap-export")
    p.add_argument("--dataset", type=Path, required=True, metavar="F.jsonl", help="lines of image, question, answer")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="report.html, report.json and PNGs go there")
    p.add_argument("--limit", type=int, default=100, metavar="N", help="questions to look at (default: the first 100)")
    p.add_argument("--width", type=int, default=1, metavar="W", help="layers disrupted together (default: 1)")
    p.add_argument("--cams", type=int, default=2, metavar="N", help="questions to draw Grad-CAM of (default: 2)")
    p.add_argument("--smooth", type=int, default=0, metavar="N", help="noisy copies averaged per Grad-CAM (default: 0)")
    p.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of PyTorch (default: fp32)")
    p.add_argument("--seed", type=int, default=0, help="of the random control and of the noise (default: 0)")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (default: all)")
    p.add_argument("--skip-bad", action="store_true", help="leave out lines that cannot be read, and say so")
    p.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    for name, least in (("limit", 1), ("width", 1), ("cams", 0), ("smooth", 0), ("threads", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    run_command("himap-analyze", lambda: _analyze(args, sys.argv[1:] if argv is None else argv))


def _analyze(args: argparse.Namespace, argv: list[str]) -> None:
    from himap_export.validate.analysis.flow import Asked, analyze
    from himap_export.validate.analysis.page import flow_json, flow_lines, flow_page
    from himap_export.validate.dataset import read_dataset
    from himap_export.validate.html.drawing import matplotlib
    from himap_export.validate.html.page import finite, write_report
    from himap_export.validate.loading import checkpoint_folder, load_reference
    from himap_export.validate.prompter import prompter_of_checkpoint

    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())) and not args.overwrite:
        hint = "choose another --out, or give --overwrite"
        raise HimapError(f"{args.out} is not an empty folder", hint=hint, code=Exit.USAGE)
    matplotlib()
    dataset = read_dataset(args.dataset, args.skip_bad)
    for line in dataset.skipped:
        say(f"left out: {line}")
    folder = checkpoint_folder(args.model)
    prompter = prompter_of_checkpoint(folder)
    reference = load_reference(folder, args.dtype, args.threads)
    asked = Asked(args.width, args.cams, args.smooth, args.seed)
    flow = analyze(reference, prompter, dataset.examples[: args.limit], asked)
    facts = finite(flow_json(flow) | {"model": args.model, "dataset": str(args.dataset), "dtype": args.dtype})
    page = write_report(args.out, flow_page(flow, args.model, args.dtype, " ".join(["himap-analyze", *argv])), facts)
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    print("\n".join([*flow_lines(flow), "", f"report: {page}"]))
