"""`himap-validate`: proves a bundle against the PyTorch reference, and measures its speed beside the ceiling."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from himap_export.engines.command import (
    ALL_DEVICES,
    DEVICE_HELP,
    MOST_THREADS,
    Parser,
    image_size,
    number,
    run_command,
    whole,
)
from himap_export.graphs.errors import Exit
from himap_export.validate.progress import RESUMED, say


def _parser() -> Parser:
    p = Parser(prog="himap-validate", description=__doc__)
    p.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that himap-export wrote")
    p.add_argument("--model", metavar="MODEL", help="the checkpoint to compare with (default: what it was made from)")
    p.add_argument("--vision-tower", type=Path, metavar="DIR", help="its vision tower, where it names one elsewhere")
    p.add_argument("--backend", help="default: the first one in the bundle that opens here")
    p.add_argument("--device", choices=ALL_DEVICES, help=DEVICE_HELP)
    p.add_argument(
        "--plan", "--policy", action="append", default=[], metavar="NAME",
        help="one of the bundle's plans (default: its first); repeatable with --dataset (default there: all)",
    )  # fmt: skip
    p.add_argument("--text-budget", type=whole(1, 2**20), metavar="N", help="default: the bundle's smallest that fits")
    p.add_argument("--image-size", type=image_size, metavar="WxH", help="one of the bundle's (default: the nearest)")
    p.add_argument("--image", type=Path, action="append", metavar="FILE", help="an image to ask about; repeatable")
    p.add_argument("--video", type=Path, metavar="FILE", help="the film to ask about")
    p.add_argument("--prompt", metavar="TEXT", help="the question, without the model's chat template")
    p.add_argument("--load-inputs", type=Path, metavar="F.npz", help="as himap-run's; default: drawn from --seed")
    p.add_argument(
        "--save-outputs", type=Path, metavar="F.npz|DIR",
        help="F.npz: image_features, kept_k1, .., logits, tokens, and reference_ of each; "
        "a folder: what each graph wrote, as polygraphy's JSON",
    )  # fmt: skip
    p.add_argument("--save-inputs", type=Path, metavar="DIR", help="what each graph read, as polygraphy's JSON")
    p.add_argument("--prompts", type=whole(1, 256), default=4, metavar="N", help="prompts to draw (default: 4)")
    p.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of the drawn prompts (default: 0)")
    p.add_argument(
        "--max-new-tokens", type=whole(1, 2**20), metavar="N",
        help="tokens to compare, or of an answer (default: 32; --dataset: 8, or as many as the longest right answer)",
    )  # fmt: skip
    p.add_argument("--atol", type=number(0, 1e6), help="allowed difference of logits (default: by dtype)")
    p.add_argument("--rtol", type=number(0, 1), help="the same, as a share of the largest logit; added to --atol")
    p.add_argument("--no-speed", action="store_true", help="parity only; with --dataset: accuracy only")
    p.add_argument(
        "--iterations", type=whole(1, 10_000), help="repetitions of each phase (default: 10; with --dataset: 5)"
    )
    p.add_argument("--warm-up", type=whole(0, 10_000), help="repetitions not counted (default: 2; with --dataset: 1)")
    threads = len(os.sched_getaffinity(0))
    p.add_argument("--threads", type=whole(1, MOST_THREADS), default=threads, help="CPU threads (default: all)")
    p.add_argument(
        "--report", type=Path, metavar="DIR",
        help="write report.html, report.json and the plots there (default with --dataset: BUNDLE-DATASET)",
    )  # fmt: skip
    p.add_argument("--json", action="store_true", help="print one JSON object")
    scoring = p.add_argument_group("accuracy, beside the unpruned model and the baselines at equal FLOPs")
    scoring.add_argument("--dataset", type=Path, metavar="F.jsonl", help="lines of image, question, answer; options")
    scoring.add_argument("--seeds", type=whole(1, 1000), default=5, metavar="N", help="of the random one (default: 5)")
    scoring.add_argument("--limit", type=whole(1, 10**9), metavar="N", help="the first N questions only")
    scoring.add_argument("--skip-bad", action="store_true", help="leave out lines that cannot be read, and say so")
    return p


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    usual = (10, 2) if args.dataset is None else (5, 1)  # many systems take turns over a data set
    args.iterations, args.warm_up = args.iterations or usual[0], usual[1] if args.warm_up is None else args.warm_up
    for problem in _misuse(args):
        parser.error(problem)
    words = sys.argv[1:] if argv is None else argv
    if args.dataset is None:
        run_command("himap-validate", lambda: _validate(args, words))
    run_command("himap-validate", lambda: _score(args, words), RESUMED)


def _misuse(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the flags together."""
    outputs, shown = _folder_of_outputs(args), args.image or args.video
    rules = {
        "--image excludes --video: a question is about images or a film": args.image and args.video is not None,
        "--image (or --video) and --prompt go together": (shown is None) != (args.prompt is None),
        "--load-inputs excludes --image, --video and --prompt": args.load_inputs is not None and shown is not None,
        "--dataset excludes --image, --video, --prompt and --load-inputs": (
            args.dataset is not None and (shown is not None or args.load_inputs is not None)
        ),
        "--dataset excludes --save-inputs and --save-outputs: its answers go into the report": (
            args.dataset is not None and (args.save_inputs is not None or args.save_outputs is not None)
        ),
        "several --plan are for --dataset": args.dataset is None and len(args.plan) > 1,
        "--save-inputs and --save-outputs need two folders: their files go by the same names": (
            outputs is not None and args.save_inputs is not None and outputs.absolute() == args.save_inputs.absolute()
        ),
    }
    yield from (problem for problem, found in rules.items() if found)


def _folder_of_outputs(args: argparse.Namespace) -> Path | None:
    """Where --save-outputs puts polygraphy's files, if it does not name an .npz."""
    folder: Path | None = args.save_outputs
    return None if folder is None or folder.suffix == ".npz" else folder


def _score(args: argparse.Namespace, argv: list[str]) -> None:
    from himap_export.engines.backends import Opening
    from himap_export.engines.bundle import Bundle
    from himap_export.validate.accuracy.scoring import Scoring, score
    from himap_export.validate.validation import judged_bundle

    bundle, source = judged_bundle(Bundle.open(args.bundle), args.model, args.vision_tower)
    report = args.report or Path(f"{args.bundle.resolve().name}-{args.dataset.stem}")
    asked = Scoring(
        dataset=args.dataset, report=report, plans=tuple(args.plan), text_budget=args.text_budget, backend=args.backend,
        seeds=args.seeds, limit=args.limit, new_tokens=args.max_new_tokens, skip_bad=args.skip_bad,
        timing=None if args.no_speed else (args.iterations, args.warm_up), command=("himap-validate", *argv),
    )  # fmt: skip
    lines, facts = score(bundle, source, Opening(args.threads, args.device), asked)
    if args.json:
        print(json.dumps(facts, indent=1))
    _say(args, lines)


def _validate(args: argparse.Namespace, argv: list[str]) -> Exit:
    from himap_export.engines.arrays import load_inputs
    from himap_export.engines.bundle import Bundle
    from himap_export.validate.validation import check_places, validate

    folder = _folder_of_outputs(args)
    outputs = None if folder is not None else args.save_outputs
    named = {"inputs": args.save_inputs, "outputs": folder}
    captures = {what: place for what, place in named.items() if place is not None}
    check_places(args.report, outputs, captures, args.load_inputs, args.video, *(args.image or ()))
    found = validate(
        Bundle.open(args.bundle), model=args.model, vision_tower=args.vision_tower, plan=next(iter(args.plan), None),
        text_budget=args.text_budget, image_size=args.image_size, image=args.image, video=args.video,
        prompt=args.prompt,
        inputs=None if args.load_inputs is None else load_inputs(args.load_inputs), prompts=args.prompts,
        seed=args.seed, max_new_tokens=args.max_new_tokens, atol=args.atol, rtol=args.rtol, speed=not args.no_speed,
        iterations=args.iterations, warm_up=args.warm_up, backend=args.backend, device=args.device,
        threads=args.threads, outputs=outputs, captures=captures, tell=partial(_say, args), progress=say,
    )  # fmt: skip
    if args.report is not None:
        _say(args, ["", f"report: {found.write(args.report, ('himap-validate', *argv))}"])
    if args.json:
        print(json.dumps(found.to_json(), indent=1))
    if found.failed:
        print(f"himap-validate: gates failed: {', '.join(found.failed)}", file=sys.stderr)
    return Exit.GATE if found.failed else Exit.OK


def _say(args: argparse.Namespace, lines: Sequence[str]) -> None:
    if not args.json:
        print("\n".join(lines), flush=True)
