"""`himap-run`: answers questions about an image with a bundle. Needs neither torch nor transformers."""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from himap_export.engines.command import MOST_THREADS, Parser, image_size, number, run_command, whole
from himap_export.graphs.errors import Exit, HimapError

if TYPE_CHECKING:
    from himap_export.engines.answer import Answer, Question
    from himap_export.engines.backends import Opening
    from himap_export.engines.bundle import RunSpec
    from himap_export.engines.pipeline import Pipeline


def _parser() -> argparse.ArgumentParser:
    p = Parser(prog="himap-run", description=__doc__)
    p.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that himap-export wrote")
    p.add_argument("--image", type=Path, action="append", metavar="FILE", help="the image to ask about")
    p.add_argument("--prompt", metavar="TEXT", help="the question, without the model's chat template")
    p.add_argument("--backend", help="default: the first one in the bundle that opens here")
    p.add_argument(
        "--device", choices=("cpu", "cuda"), help="for onnxruntime (default: cuda where it has the provider)"
    )
    p.add_argument("--threads", type=whole(1, MOST_THREADS), help="CPU threads (default: all)")
    p.add_argument("--plan", "--policy", metavar="NAME", help="one of the bundle's plans (default: its first)")
    p.add_argument(
        "--text-budget", type=whole(1, 2**20), metavar="N", help="default: the smallest of the bundle's that fits"
    )
    p.add_argument(
        "--image-size", type=image_size, metavar="WxH", help="one of the bundle's (default: the nearest to the image)"
    )
    p.add_argument(
        "--weights", type=Path, action="append", default=[], metavar="DIR",
        help="checkpoint that completes an --engines-only bundle; repeatable: its vision tower may lie elsewhere",
    )  # fmt: skip
    p.add_argument("--max-new-tokens", type=whole(1, 2**20), metavar="N", help="default: the bundle's budget")
    p.add_argument("--temperature", type=number(0, 1000), default=0.0, help="0 is greedy (default)")
    p.add_argument(
        "--top-p", type=number(1e-9, 1), default=1.0, help="share of the probability to draw from (default: 1)"
    )
    p.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of sampling and of random cuts (default: 0)")
    p.add_argument(
        "--show-kept", type=Path, metavar="FILE.png", help="draw the image with the patches kept by each cut"
    )
    p.add_argument(
        "--load-inputs",
        type=Path,
        metavar="F.npz",
        help="input_ids, pixel_values (pictures, or patches and image_grid_thw), attention_mask",
    )
    p.add_argument("--save-outputs", type=Path, metavar="F.npz", help="image_features, kept_k1, .., logits, tokens")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    p.add_argument(
        "--expect-sha256", metavar="HEX", help="the bundle's digest, as its export printed it: no other is opened"
    )
    p.add_argument("--no-verify", action="store_true", help="do not compare the files' content with the manifest")
    return p


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.load_inputs is None and (args.image is None or args.prompt is None):
        parser.error("give --image FILE and --prompt TEXT, or --load-inputs F.npz")
    if args.load_inputs is not None and (args.image is not None or args.prompt is not None):
        parser.error("--load-inputs excludes --image and --prompt")
    if args.image is not None:
        if len(args.image) > 1:
            parser.error(f"{len(args.image)} images, but a bundle's plan has one: give --image once")
        args.image = args.image[0]
    if args.expect_sha256 is not None and re.fullmatch("[0-9a-fA-F]{64}", args.expect_sha256) is None:
        parser.error("--expect-sha256 takes 64 hexadecimal digits")
    if args.expect_sha256 is not None and args.no_verify:
        parser.error("--expect-sha256 excludes --no-verify: the digest stands for files that are compared with it")
    run_command("himap-run", lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from himap_export.engines.answer import load_question, run_arrays, show
    from himap_export.engines.arrays import load_inputs, save_outputs
    from himap_export.engines.backends import Opening
    from himap_export.engines.bundle import open_bundle, skipped_checks
    from himap_export.engines.files import check_output
    from himap_export.engines.layout import text_tokens
    from himap_export.engines.sampling import Sampling

    for file, kind in ((args.save_outputs, ".npz"), (args.show_kept, ".png")):
        if file is not None:
            check_output(file, kind, args.image, args.load_inputs)
    if args.show_kept is not None and args.image is None:
        raise HimapError("--show-kept needs --image", "the picture is drawn over it", code=Exit.USAGE)
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    bundle = open_bundle(args.bundle, not args.no_verify, args.expect_sha256)
    if args.no_verify:
        print(f"himap-run: {skipped_checks(bundle.manifest)}", file=sys.stderr)
    if args.weights:
        bundle = bundle.with_weights(args.weights, not args.no_verify)
    bundle.weights()  # a bundle of engines only says that it needs --weights, before it looks for anything else
    question = None
    if args.load_inputs is None:
        question = load_question(bundle, args.image, args.prompt, args.weights, args.image_size)
    arrays = question.arrays if question is not None else load_inputs(args.load_inputs)
    needed = text_tokens(arrays.input_ids, arrays.attention_mask, bundle.manifest.model.image)
    run = bundle.select(args.plan, args.text_budget, needed, arrays.image_size)
    if args.show_kept is not None and not run.plan.cuts:
        hint = "choose another plan with --plan"
        raise HimapError(f"the plan {run.plan_name} cuts nothing", "--show-kept draws cuts", hint, Exit.USAGE)
    new_tokens = run.budget.new if args.max_new_tokens is None else args.max_new_tokens
    start = time.perf_counter()
    pipeline = open_pipeline(run, args.backend, Opening(args.threads, args.device))
    opened = time.perf_counter() - start
    stream = None if args.json or question is None else sys.stdout
    answer = run_arrays(pipeline, arrays, new_tokens, sampling, question, stream)
    if args.save_outputs is not None:
        save_outputs(args.save_outputs, answer.outputs)
    if args.show_kept is not None:
        assert question is not None
        _draw(args.show_kept, run, question, answer)
    show(answer, pipeline, opened, args.json)


def _draw(file: Path, run: "RunSpec", question: "Question", answer: "Answer") -> None:
    import numpy as np

    from himap_export.engines.drawing import draw_kept, kept_patches
    from himap_export.engines.image import tile_grid

    image = np.flatnonzero(run.manifest.model.image.find(question.arrays.input_ids[0]))
    tiles, plan = tile_grid(question.image, question.preprocessing), run.plan
    alive = [np.isin(image, answer.outputs[f"kept_{cut}"][0]) for cut in plan.stages[1:]]
    masks = [kept_patches(a, run.image.grid, tiles) for a in alive]
    layers = [cut.layer for cut in plan.cuts]
    draw_kept(file, question.image, question.preprocessing, masks, layers, question.prompt, answer.text)


def open_pipeline(run: "RunSpec", backend: str | None, opening: "Opening", command: str = "himap-run") -> "Pipeline":
    """The pipeline on `backend`, or on the first backend of the bundle that opens on this machine."""
    from himap_export.engines.pipeline import Pipeline

    held = tuple(run.manifest.engines)
    for name in (backend,) if backend else held:
        try:
            return Pipeline(run, name, opening)
        except HimapError as problem:
            if backend or problem.code != Exit.MISSING or name == held[-1]:
                raise
            print(f"{command}: {problem}", file=sys.stderr)
    raise HimapError(f"{run.bundle.folder} holds no engines", code=Exit.MISSING)
