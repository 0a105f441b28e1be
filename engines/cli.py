"""`himap-run`: answers questions about an image with a bundle. Needs neither torch nor transformers."""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

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
from himap_export.graphs.errors import Exit, HimapError

if TYPE_CHECKING:
    from himap_export.engines.answer import Answer, AnswerStream, Generation, Request
    from himap_export.engines.bundle import Bundle
    from himap_export.engines.session import Session


def _parser() -> argparse.ArgumentParser:
    p = Parser(prog="himap-run", description=__doc__)
    p.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that himap-export wrote")
    p.add_argument("--image", type=Path, action="append", metavar="FILE", help="an image to ask about; repeatable")
    p.add_argument("--video", type=Path, metavar="FILE", help="the film to ask about")
    p.add_argument(
        "--prompt", metavar="TEXT",
        help="the question, without the model's chat template; <image> (or <video>) says where images stand, else they "
        "stand in front",
    )  # fmt: skip
    p.add_argument("--backend", help="default: the first one in the bundle that opens here")
    p.add_argument("--device", choices=ALL_DEVICES, help=DEVICE_HELP)
    p.add_argument("--threads", type=whole(1, MOST_THREADS), help="CPU threads (default: all that gain anything)")
    p.add_argument("--plan", "--policy", metavar="NAME", help="one of the bundle's plans (default: its first)")
    p.add_argument("--text-budget", type=whole(1, 2**20), metavar="N", help="default: the bundle's smallest that fits")
    p.add_argument(
        "--image-size", type=image_size, metavar="WxH", help="one of the bundle's (default: the nearest to the image)"
    )
    p.add_argument("--max-new-tokens", type=whole(1, 2**20), metavar="N", help="default: the bundle's budget")
    p.add_argument("--temperature", type=number(0, 1000), default=0.0, help="0 is greedy (default)")
    p.add_argument("--top-p", type=number(1e-9, 1), default=1.0, help="share of probability to draw from (default: 1)")
    p.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of sampling and of random cuts (default: 0)")
    p.add_argument("--show-kept", type=Path, metavar="FILE.png", help="draw the image with the patches each cut kept")
    p.add_argument(
        "--load-inputs", type=Path, metavar="F.npz",
        help="input_ids, pixel_values (images, or patches and image_grid_thw), attention_mask",
    )  # fmt: skip
    p.add_argument("--save-outputs", type=Path, metavar="F.npz", help="image_features, kept_k1, .., logits, tokens")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    p.add_argument(
        "--chat", action="store_true",
        help="answer questions from standard input, a line each, behind the first: they are appended to its caches and "
        "see the image tokens that it kept",
    )  # fmt: skip
    add_bundle_options(p)
    return p


def add_bundle_options(p: argparse.ArgumentParser) -> None:
    """Adds the options by which `open_bundle` opens a bundle."""
    p.add_argument(
        "--weights", type=Path, action="append", default=[], metavar="DIR",
        help="checkpoint that completes an --engines-only bundle; repeatable: its vision tower may lie elsewhere",
    )  # fmt: skip
    p.add_argument("--expect-sha256", metavar="HEX", help="digest that the bundle's export printed: no other is opened")
    p.add_argument("--no-verify", action="store_true", help="do not compare the files' content with the manifest")


def check_bundle_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Leaves with a line of usage if these options exclude each other."""
    if args.expect_sha256 is not None and re.fullmatch("[0-9a-fA-F]{64}", args.expect_sha256) is None:
        parser.error("--expect-sha256 takes 64 hexadecimal digits")
    if args.expect_sha256 is not None and args.no_verify:
        parser.error("--expect-sha256 excludes --no-verify: the digest stands for files that are compared with it")


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    shown = args.image or args.video
    if args.image is not None and args.video is not None:
        parser.error("--image excludes --video: a question is about images or a film")
    if args.load_inputs is None and (shown is None or (args.prompt is None and not args.chat)):
        parser.error("give --image FILE or --video FILE, and --prompt TEXT or --chat, or --load-inputs F.npz")
    if args.load_inputs is not None and (shown is not None or args.prompt is not None):
        parser.error("--load-inputs excludes --image, --video and --prompt")
    if args.chat and (args.load_inputs is not None or args.save_outputs is not None):
        parser.error("--chat excludes --load-inputs and --save-outputs")
    check_bundle_options(parser, args)
    run_command("himap-run", lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    from himap_export.engines.arrays import save_outputs
    from himap_export.engines.chat import chat
    from himap_export.engines.files import check_output

    for file, kind in ((args.save_outputs, ".npz"), (args.show_kept, ".png")):
        if file is not None:
            check_output(file, kind, *(args.image or ()), args.video, args.load_inputs)
    if args.show_kept is not None and args.load_inputs is not None:
        raise HimapError("--show-kept needs --image or --video", "the kept patches are drawn over it", code=Exit.USAGE)
    session = open_bundle("himap-run", args).session(
        plan=args.plan, text_budget=args.text_budget, image_size=args.image_size, backend=args.backend,
        device=args.device, threads=args.threads,
    )  # fmt: skip
    sampling: Generation = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    sampling["max_new_tokens"] = args.max_new_tokens
    if args.chat:
        chat(session, args, sampling)
        return
    request = _request(args, session)
    start = time.perf_counter()
    session.pipeline(request.spec)
    opened = time.perf_counter() - start
    answer = _said(session.start(request, **sampling), args)
    if args.save_outputs is not None:
        save_outputs(args.save_outputs, answer.outputs)
    if args.show_kept is not None:
        answer.draw_kept(args.show_kept)
    if args.json:
        print(_as_json(answer, opened))
    else:
        print(_as_line(answer), file=sys.stderr)


def open_bundle(command: str, args: argparse.Namespace) -> "Bundle":
    """Returns the bundle of a command's options, with its weights; HimapError if it is not as they say."""
    from himap_export.engines.bundle import Bundle, skipped_checks

    bundle = Bundle.open(args.bundle, verify=not args.no_verify, expected_digest=args.expect_sha256)
    if args.no_verify:
        print(f"{command}: {skipped_checks(bundle.manifest)}", file=sys.stderr)
    if args.weights:
        bundle = bundle.with_weights(args.weights, not args.no_verify)
    bundle.weights()  # a bundle of engines only says that it needs --weights, before it looks for anything else
    return bundle


def _request(args: argparse.Namespace, session: "Session") -> "Request":
    from himap_export.engines.arrays import load_inputs

    if args.load_inputs is not None:
        return session.prepare_arrays(load_inputs(args.load_inputs))
    film = args.video is not None
    request = session.prepare_film(args.video, args.prompt) if film else session.prepare(args.image, args.prompt)
    if args.show_kept is not None and not request.spec.plan.cuts:
        hint = "choose another plan with --plan"
        raise HimapError(f"the plan {request.spec.plan_name} cuts nothing", "--show-kept draws cuts", hint, Exit.USAGE)
    return request


def _said(stream: "AnswerStream", args: argparse.Namespace) -> "Answer":
    """Returns the answer; prints it as it comes, if it is to be text."""
    if not args.json and args.load_inputs is None:
        for piece in stream:
            print(piece, end="", flush=True)
        print()
    return stream.answer


def _as_json(answer: "Answer", opened: float) -> str:
    spec = answer.request.spec
    facts = {
        "text": answer.text,
        "tokens": answer.tokens.tolist(),
        "device": answer.device,
        "open_s": round(opened, 3),
        "first_token_s": round(answer.first_token_s, 4),
        "tokens_per_s": None if answer.tokens_per_s is None else round(answer.tokens_per_s, 1),
        "image_tokens": list(spec.budget.visual),
        "plan": spec.plan_name,
        "text_budget": spec.budget.text,
    }
    return json.dumps(facts)


def _as_line(answer: "Answer") -> str:
    spec = answer.request.spec
    rate = answer.tokens_per_s
    speed = f"{answer.steps + 1} tokens" if rate is None else f"{rate:.0f} tokens/s"
    tokens = " -> ".join(map(str, spec.budget.visual))
    spoken = [f"first token {answer.first_token_s * 1e3:.0f} ms", speed, f"image tokens {tokens}"]
    if len(spec.manifest.variants) > 1:
        spoken.append(f"plan {spec.plan_name}, text budget {spec.budget.text}")
    return f"[{', '.join(spoken)}, {answer.backend} on {answer.device}]"
