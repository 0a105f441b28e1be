"""`himap-export`: a Hugging Face multimodal LLM in, a bundle of staged, pruned, compiled engines out."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import get_args

from himap_export.engines.command import BACKENDS, Parser, image_size, number, run_command, whole
from himap_export.exporter.aliases import ALIASES
from himap_export.graphs.plan import MOST_FRAMES, MOST_IMAGES, POLICIES, TASKS, Quota
from himap_export.graphs.ports import Kind
from himap_export.graphs.selectors import is_policy

KINDS = get_args(Kind)
TOKENS = 2**20  # the longest contexts are a million tokens


class _Policies(tuple[str, ...]):
    """Those that are told of; of others it is seen whether a package offers them."""

    def __contains__(self, policy: object) -> bool:
        return isinstance(policy, str) and is_policy(policy)


def _parser() -> argparse.ArgumentParser:
    p = Parser(prog="himap-export", description=__doc__)
    p.add_argument("model", metavar="MODEL", help=f"{', '.join(ALIASES)}, a Hugging Face id, or a checkpoint folder")
    _planning(p)
    _budgeting(p)
    _compiling(p)
    _weighing(p)
    _quantising(p)
    _locating(p)
    p.add_argument("--dry-run", action="store_true", help="print the plan; needs no weights")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--overwrite", action="store_true", help="replace a bundle that is already at --out")
    p.add_argument("--out", type=Path, metavar="DIR", help="the bundle's folder")
    return p


def _planning(p: argparse.ArgumentParser) -> None:
    """Adds what says which image tokens are kept."""
    plan = p.add_argument_group("pruning plan (HiMAP, arXiv 2503.13108, and what it is compared with)")
    plan.add_argument("--task", choices=tuple(TASKS), default="qa", help="the authors' plan for a task (default: qa)")
    plan.add_argument(
        "--plan", action="append", default=[], metavar="PLAN",
        help=f"repeatable, all in one bundle: {', '.join(TASKS)}, or a TOML file of plans",
    )  # fmt: skip
    plan.add_argument(
        "--policy", action="append", default=[], choices=_Policies(POLICIES), metavar="POLICY",
        help=f"repeatable, all in one bundle: {', '.join(POLICIES)}, or a package's (default: himap)",
    )  # fmt: skip
    plan.add_argument("--k1", type=whole(-1024, 1024), help="layer of the first cut")
    plan.add_argument("--k2", type=whole(-1024, 1024), help="layer of the second cut")
    plan.add_argument("--r1", type=number(-1, 1), help="fraction of image tokens removed at k1")
    plan.add_argument("--r2", type=number(-1, 1), help="fraction removed at k2 of what k1 left")
    plan.add_argument(
        "--quota",
        choices=get_args(Quota),
        help="rank a prompt's images together (default), or keep as many of each",
    )
    plan.add_argument(
        "--keep", type=whole(0, TOKENS), metavar="N", help="image tokens that a policy of one cut keeps, for --r1"
    )


def _budgeting(p: argparse.ArgumentParser) -> None:
    """Adds the sizes, which are static."""
    budget = p.add_argument_group("static budgets")
    budget.add_argument(
        "--text-budget", type=whole(1, TOKENS), nargs="+", default=[192], metavar="N",
        help="all tokens but image tokens (default: 192); several go into one bundle",
    )  # fmt: skip
    budget.add_argument(
        "--image-size", type=image_size, nargs="+", action="extend", default=[], metavar="WxH",
        help="pixels, for models of any resolution; several go into one bundle, images are letterboxed to the nearest",
    )  # fmt: skip
    budget.add_argument(
        "--images", type=whole(1, MOST_IMAGES), nargs="+", default=[1], metavar="N",
        help="images in a prompt (default: 1); several numbers go into one bundle",
    )  # fmt: skip
    budget.add_argument(
        "--frames",
        type=whole(1, MOST_FRAMES),
        metavar="N",
        help="questions are about films, of which so many frames are seen",
    )
    budget.add_argument(
        "--tiles", type=whole(1, 10_000), metavar="N", help="tiles of an image, its thumbnail included (InternVL)"
    )
    budget.add_argument(
        "--align", type=whole(1, TOKENS), metavar="N", help="keep more image tokens, up to a multiple of N a stage"
    )
    budget.add_argument(
        "--max-new-tokens", type=whole(1, TOKENS), default=128, metavar="N", help="answer tokens (default: 128)"
    )
    budget.add_argument(
        "--batch", type=whole(1, 4096), default=1, metavar="N", help="prompts answered together (default: 1)"
    )
    budget.add_argument(
        "--slots", type=whole(0, 4096), default=0, metavar="N",
        help="questions that himap-serve answers at a time (default: 0, one after the other)",
    )  # fmt: skip


def _compiling(p: argparse.ArgumentParser) -> None:
    """Adds what engines are built, and in which dtype."""
    p.add_argument(
        "--dtype", choices=("fp16", "bf16", "fp32"), help="default: the checkpoint's, if the backend computes it"
    )
    p.add_argument(
        "--backend", action="append", default=[], choices=BACKENDS,
        help="repeatable (default: the best that is installed and runs here)",
    )  # fmt: skip
    p.add_argument(
        "--gather", choices=("auto", "plugin", "ops"), default="auto",
        help="top-k gather as a TensorRT plugin or in standard operators (auto: plugin on tensorrt, else ops)",
    )  # fmt: skip


def _weighing(p: argparse.ArgumentParser) -> None:
    """Adds how weights are stored."""
    weights = p.add_argument_group("weights").add_mutually_exclusive_group()
    weights.add_argument(
        "--weight-form", choices=("shared", "embedded"),
        help="one copy for all engines (default), or each engine its own (TensorRT's, of quantised weights)",
    )  # fmt: skip
    weights.add_argument("--engines-only", action="store_true", help="no weights: himap-run --weights brings them")
    weights.add_argument("--hard-link", action="store_true", help="link the checkpoint's files instead of copying them")
    p.add_argument(
        "--allow-overflow", action="store_true",
        help="weights beyond the range of --dtype become its largest number (default: they are refused)",
    )  # fmt: skip


def _quantising(p: argparse.ArgumentParser) -> None:
    """Adds which weights are stored in fewer bits."""
    small = p.add_argument_group("quantised weights (of the decoder's linear layers)")
    small.add_argument("--quantize", choices=KINDS, help="integers, or floats of 8 or 4 bits, and scales")
    small.add_argument(
        "--block", type=whole(0, 1024), metavar="N",
        help="inputs that share a scale: 32 (default for int4), 64, 128; for int8 also 0 (default), one an output",
    )  # fmt: skip
    small.add_argument(
        "--keep-dtype", action="append", default=[], metavar="PATTERN",
        help="repeatable: layers that stay as they are, as layers.0.* or *.down_proj",
    )  # fmt: skip
    small.add_argument("--quantize-head", action="store_true", help="the head, too")
    small.add_argument(
        "--calibrate", type=Path, metavar="FILE",
        help="questions (JSON lines, as himap-validate --dataset): scale weights by the activations they meet (AWQ); "
        "fp8 and nvfp4 need it for their ranges",
    )  # fmt: skip


def _locating(p: argparse.ArgumentParser) -> None:
    """Adds where the checkpoint lies."""
    p.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    p.add_argument("--checkpoint", type=Path, metavar="DIR", help="folder that holds an alias's weights")
    p.add_argument(
        "--vision-tower", type=Path, metavar="DIR",
        help="folder of the vision tower, where a checkpoint names one outside its own folder",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.out is None and not args.dry_run:
        parser.error("--out DIR is needed (or --dry-run)")
    run_command("himap-export", lambda: _export(args, sys.argv[1:] if argv is None else argv))


def _export(args: argparse.Namespace, argv: list[str]) -> None:
    from himap_export.exporter.api import plan
    from himap_export.exporter.report import plan_json, plan_table
    from himap_export.exporter.target import settle_target

    out = None if args.dry_run else settle_target(args.out, args.overwrite)
    planned = plan(
        args.model, weights=not (args.dry_run or args.engines_only), task=args.task, plan=args.plan, policy=args.policy,
        k1=args.k1, k2=args.k2, r1=args.r1, r2=args.r2, keep=args.keep, text_budget=args.text_budget,
        max_new_tokens=args.max_new_tokens, batch=args.batch, slots=args.slots, align=args.align,
        image_size=args.image_size, tiles=args.tiles, images=args.images, frames=args.frames, quota=args.quota,
        backend=args.backend, dtype=args.dtype, gather=args.gather,
        weight_form="absent" if args.engines_only else args.weight_form, hard_link=args.hard_link,
        allow_overflow=args.allow_overflow, revision=args.revision, checkpoint=args.checkpoint,
        vision_tower=args.vision_tower, quantize=args.quantize, block=args.block, keep_dtype=args.keep_dtype,
        quantize_head=args.quantize_head, calibrate=args.calibrate,
    )  # fmt: skip
    if not args.json:
        print(plan_table(planned))
    result = plan_json(planned)
    if out is not None:
        from himap_export.exporter.export import write_bundle

        say = partial(print, file=sys.stderr, flush=True)
        told = ("himap-export", *argv)
        manifest = write_bundle(planned, out, command=told, overwrite=args.overwrite, progress=say).manifest
        if not args.json:
            weights = " --weights CHECKPOINT" if args.engines_only else ""
            print(f"\nsha256: {manifest.digest}   pin it with: himap-run --expect-sha256")
            shown = "--video FILE" if args.frames else " ".join(["--image FILE"] * min(args.images))
            print(f"bundle: {args.out}   answer with: himap-run {args.out}{weights} {shown} --prompt TEXT")
        result |= {"bundle": str(args.out), "sha256": manifest.digest, "backends": list(manifest.engines)}
        result["bytes"] = sum(f.bytes for f in manifest.files.values())
    if args.json:
        print(json.dumps(result, indent=1))
