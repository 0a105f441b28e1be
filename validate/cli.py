"""`himap-validate`: proves a bundle against the PyTorch reference, and measures its speed beside the ceiling."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from himap_export.engines.command import MOST_THREADS, Parser, image_size, number, run_command, whole
from himap_export.graphs.errors import Exit
from himap_export.validate.progress import RESUMED, say

if TYPE_CHECKING:
    from himap_export.engines.arrays import Inputs
    from himap_export.engines.bundle import Bundle, RunSpec
    from himap_export.engines.pipeline import Pipeline
    from himap_export.validate.checkpoint import Source
    from himap_export.validate.parity.compare import Parity
    from himap_export.validate.speed.measure import Speed


def _parser() -> Parser:
    p = Parser(prog="himap-validate", description=__doc__)
    p.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that himap-export wrote")
    p.add_argument(
        "--model", metavar="MODEL", help="the checkpoint to compare with (default: the one it was made from)"
    )
    p.add_argument(
        "--vision-tower", type=Path, metavar="DIR", help="its vision tower, where the checkpoint names one elsewhere"
    )
    p.add_argument("--backend", help="default: the first one in the bundle that opens here")
    p.add_argument(
        "--device", choices=("cpu", "cuda"), help="for onnxruntime (default: cuda where it has the provider)"
    )
    p.add_argument(
        "--plan", "--policy", action="append", default=[], metavar="NAME",
        help="one of the bundle's plans (default: its first); repeatable with --dataset (default there: all)",
    )  # fmt: skip
    p.add_argument(
        "--text-budget", type=whole(1, 2**20), metavar="N", help="default: the smallest of the bundle's that fits"
    )
    p.add_argument(
        "--image-size", type=image_size, metavar="WxH", help="one of the bundle's (default: the nearest to the image)"
    )
    p.add_argument("--image", type=Path, metavar="FILE", help="the image to ask about")
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
    p.add_argument("--no-speed", action="store_true", help="parity only")
    p.add_argument("--iterations", type=whole(1, 10_000), default=10, help="repetitions of each phase (default: 10)")
    p.add_argument("--warm-up", type=whole(0, 10_000), default=2, help="repetitions not counted (default: 2)")
    p.add_argument(
        "--threads",
        type=whole(1, MOST_THREADS),
        default=len(os.sched_getaffinity(0)),
        help="CPU threads (default: all)",
    )
    p.add_argument(
        "--report", type=Path, metavar="DIR",
        help="write report.html, report.json and the plots there (default with --dataset: BUNDLE-DATASET)",
    )  # fmt: skip
    p.add_argument("--json", action="store_true", help="print one JSON object")
    scoring = p.add_argument_group("accuracy, beside the unpruned model and the baselines at equal FLOPs")
    scoring.add_argument("--dataset", type=Path, metavar="F.jsonl", help="lines of image, question, answer; options")
    scoring.add_argument(
        "--seeds", type=whole(1, 1000), default=5, metavar="N", help="of the random baseline (default: 5)"
    )
    scoring.add_argument("--limit", type=whole(1, 10**9), metavar="N", help="the first N questions only")
    scoring.add_argument("--skip-bad", action="store_true", help="leave out lines that cannot be read, and say so")
    return p


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    for problem in _misuse(args):
        parser.error(problem)
    words = sys.argv[1:] if argv is None else argv
    if args.dataset is None:
        run_command("himap-validate", lambda: _validate(args, words))
    run_command("himap-validate", lambda: _score(args, words), RESUMED)


def _misuse(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the flags together."""
    outputs = _folder_of_outputs(args)
    rules = {
        "--image and --prompt go together": (args.image is None) != (args.prompt is None),
        "--load-inputs excludes --image and --prompt": args.load_inputs is not None and args.image is not None,
        "--dataset excludes --image, --prompt and --load-inputs": (
            args.dataset is not None and (args.image is not None or args.load_inputs is not None)
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


def _check_places(args: argparse.Namespace) -> None:
    """What can be known of outputs before a bundle is read."""
    from himap_export.engines.files import check_output, check_report
    from himap_export.validate.report.page import check_libraries

    if args.report is not None:
        check_report(args.report, ("report.html", "report.json", "speed.png"))
        check_libraries()
    if args.save_outputs is not None and _folder_of_outputs(args) is None:
        check_output(args.save_outputs, ".npz", args.load_inputs, args.image)
    for folder in (args.save_inputs, _folder_of_outputs(args)):
        if folder is not None:
            check_report(folder, ())


def _opened(args: argparse.Namespace) -> tuple["Bundle", "Source"]:
    """The bundle, and the checkpoint it is judged by."""
    from himap_export.engines.bundle import open_bundle
    from himap_export.validate.checkpoint import source_of

    bundle = open_bundle(args.bundle)
    source = source_of(bundle, args.model, args.vision_tower)
    if bundle.manifest.weight_form == "absent":
        bundle = bundle.with_weights([folder for folder in (source.folder, source.tower) if folder is not None])
    return bundle, source


def _score(args: argparse.Namespace, argv: list[str]) -> None:
    from himap_export.engines.backends import Opening
    from himap_export.validate.accuracy.scoring import Scoring, score

    bundle, source = _opened(args)
    report = args.report or Path(f"{args.bundle.resolve().name}-{args.dataset.stem}")
    asked = Scoring(
        dataset=args.dataset, report=report, plans=tuple(args.plan), text_budget=args.text_budget, backend=args.backend,
        seeds=args.seeds, limit=args.limit, new_tokens=args.max_new_tokens, skip_bad=args.skip_bad,
        argv=tuple(argv), vision_tower=source.tower,
    )  # fmt: skip
    lines, facts = score(bundle, source.folder, Opening(args.threads, args.device), asked)
    if args.json:
        print(json.dumps(facts, indent=1))
    _say(args, lines)


def _validate(args: argparse.Namespace, argv: list[str]) -> Exit:
    from himap_export.engines.arrays import save_outputs
    from himap_export.engines.layout import text_tokens
    from himap_export.validate.parity.page import parity_page
    from himap_export.validate.parity.prompts import drawn_inputs, user_inputs
    from himap_export.validate.parity.results import gates_json, parity_json, parity_lines
    from himap_export.validate.report.machine import provenance
    from himap_export.validate.report.page import finite, write_report
    from himap_export.validate.speed.results import speed_json

    _check_places(args)
    bundle, source = _opened(args)
    inputs = user_inputs(bundle, args.load_inputs, args.image, args.prompt, args.image_size)
    needed = text_tokens(inputs.input_ids, inputs.attention_mask, bundle.manifest.model.image) if inputs else 0
    size = inputs.image_size if inputs else args.image_size
    run = bundle.select(next(iter(args.plan), None), args.text_budget, needed, size)
    inputs = inputs or drawn_inputs(run, args.prompts, args.seed)
    parity, backend, device = _compare(args, run, source, inputs)
    result: dict[str, Any] = {"bundle": str(args.bundle), "backend": backend, "device": device}
    result |= {"dtype": bundle.manifest.dtype, "plan": run.plan_name, "text_budget": run.budget.text}
    result |= {"passed": parity.passed, "parity": parity_json(parity), "gates": gates_json(parity)}
    _say(args, parity_lines(parity, bundle, backend))
    if args.save_outputs is not None and _folder_of_outputs(args) is None:
        save_outputs(args.save_outputs, parity.outputs)
    speed = None if args.no_speed else _speed(args, run, source, backend, device)
    if speed is not None:
        result["speed"] = speed_json(speed)
    if args.report is not None:
        made = provenance("himap-validate", argv, {"bundle's digest": bundle.manifest.digest, "device": device})
        page = parity_page(parity, speed, run, backend, made)
        _say(args, ["", f"report: {write_report(args.report, page, result)}"])
    if args.json:
        print(json.dumps(finite(result), indent=1))
    failed = [gate.name for gate in parity.gates if not gate.passed]
    if failed:
        print(f"himap-validate: gates failed: {', '.join(failed)}", file=sys.stderr)
    return Exit.GATE if failed else Exit.OK


def _compare(args: argparse.Namespace, run: "RunSpec", source: "Source", inputs: "Inputs") -> tuple["Parity", str, str]:
    """The parity, and the backend and device that it is of."""
    from himap_export.engines.backends import Opening
    from himap_export.engines.session import open_pipeline
    from himap_export.validate.checkpoint import load_reference
    from himap_export.validate.parity.compare import compare
    from himap_export.validate.parity.limits import ParityOptions
    from himap_export.validate.parity.pixels import compare_pixels, with_pixels

    pixels = None if args.image is None else compare_pixels(inputs.pixel_values, args.image, run.image, source)
    _check_captured(args, run)
    pipeline = open_pipeline(run, args.backend, Opening(args.threads, args.device))
    _save_captured(args, pipeline, inputs)
    new_tokens, outputs = min(args.max_new_tokens or 32, run.budget.new), args.save_outputs is not None
    options = ParityOptions(new_tokens, args.atol, args.rtol, outputs)
    say(f"judged by the checkpoint in {source.folder}")
    load = partial(load_reference, source.folder, threads=args.threads, vision_tower=source.tower)
    parity = compare(pipeline, load, inputs, options, progress=say)
    return with_pixels(parity, pixels) if pixels else parity, pipeline.backend, pipeline.engines.device


def _check_captured(args: argparse.Namespace, run: "RunSpec") -> None:
    folders = [folder for folder in (args.save_inputs, _folder_of_outputs(args)) if folder is not None]
    if folders:
        from himap_export.validate.parity.polygraphy_json import check_folders

        check_folders(run, *folders)


def _save_captured(args: argparse.Namespace, pipeline: "Pipeline", inputs: "Inputs") -> None:
    """What each graph reads and writes, as polygraphy's JSON, where folders were asked for."""
    folder = _folder_of_outputs(args)
    if args.save_inputs is None and folder is None:
        return
    from himap_export.validate.parity import polygraphy_json

    captured = polygraphy_json.capture(pipeline, inputs)
    if args.save_inputs is not None:
        polygraphy_json.save_inputs(args.save_inputs, captured)
    if folder is not None:
        polygraphy_json.save_outputs(folder, captured, "himap-validate")


def _speed(args: argparse.Namespace, run: "RunSpec", source: "Source", backend: str, device: str) -> "Speed":
    from himap_export.validate.speed.measure import ceiling, measure
    from himap_export.validate.speed.results import speed_lines

    _say(args, [f"\nspeed: FLOPs allow {ceiling(run):.2f}x over the unpruned decoder prefill"])
    say(
        f"exporting the unpruned baseline; then {args.warm_up} + {args.iterations} repetitions by three processes, "
        f"on {device}"
    )
    speed = measure(
        run, source.folder, backend, device, iterations=args.iterations, warm_up=args.warm_up, threads=args.threads,
        vision_tower=source.tower,
    )  # fmt: skip
    _say(args, speed_lines(speed))
    return speed


def _say(args: argparse.Namespace, lines: list[str]) -> None:
    if not args.json:
        print("\n".join(lines), flush=True)
