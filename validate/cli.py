"""`himap-validate`: proves a bundle against the PyTorch reference, and measures its speed beside the ceiling."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from himap_export.engines.command import run_command
from himap_export.graphs.errors import Exit, HimapError

if TYPE_CHECKING:
    from himap_export.engines.bundle import Bundle
    from himap_export.graphs.spec import Dtype
    from himap_export.validate.reference import Reference


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="himap-validate", description=__doc__)
    p.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder that himap-export wrote")
    p.add_argument(
        "--model", metavar="MODEL", help="the checkpoint to compare with (default: the one it was made from)"
    )
    p.add_argument("--backend", help="default: the first one in the bundle that opens here")
    p.add_argument(
        "--device", choices=("cpu", "cuda"), help="for onnxruntime (default: cuda where it has the provider)"
    )
    p.add_argument("--plan", metavar="NAME", help="one of the bundle's plans (default: its first)")
    p.add_argument("--text-budget", type=int, metavar="N", help="default: the smallest of the bundle's that fits")
    p.add_argument("--image", type=Path, metavar="FILE")
    p.add_argument("--prompt", metavar="TEXT")
    p.add_argument("--load-inputs", type=Path, metavar="F.npz", help="as himap-run's; default: drawn from --seed")
    p.add_argument(
        "--save-outputs", type=Path, metavar="F.npz", help="kept_k1, kept_k2, logits, tokens, and reference_ of each"
    )
    p.add_argument("--prompts", type=int, default=4, metavar="N", help="prompts to draw (default: 4)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="tokens to compare (default: 32)")
    p.add_argument("--atol", type=float, help="allowed difference of logits (default: by dtype)")
    p.add_argument("--rtol", type=float, help="the same, as a share of the largest logit; added to --atol")
    p.add_argument("--no-speed", action="store_true", help="parity only")
    p.add_argument("--iterations", type=int, default=10, help="rounds of the speed comparison (default: 10)")
    p.add_argument("--warm-up", type=int, default=2, help="rounds not counted (default: 2)")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (default: all)")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.image is None) != (args.prompt is None):
        parser.error("--image and --prompt go together")
    if args.load_inputs is not None and args.image is not None:
        parser.error("--load-inputs excludes --image and --prompt")
    for name in ("prompts", "max_new_tokens", "iterations", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("atol", "rtol", "warm_up"):
        if (getattr(args, name) or 0) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    run_command("himap-validate", lambda: _validate(args))


def _validate(args: argparse.Namespace) -> Exit:
    from himap_export.engines.arrays import save_outputs
    from himap_export.engines.backends import Opening
    from himap_export.engines.bundle import completed, open_bundle
    from himap_export.engines.cli import open_pipeline
    from himap_export.engines.layout import text_tokens
    from himap_export.validate.parity import Asked, compare
    from himap_export.validate.questions import drawn_inputs, user_inputs
    from himap_export.validate.report import gates_json, parity_json, parity_lines

    bundle = open_bundle(args.bundle)
    checkpoint = _checkpoint(bundle, args.model)
    if bundle.manifest.weight_form == "absent":
        bundle = completed(bundle, checkpoint)
    inputs = user_inputs(bundle, args.load_inputs, args.image, args.prompt, checkpoint)
    image_token = bundle.manifest.model.image_token
    needed = text_tokens(inputs.input_ids, inputs.attention_mask, image_token) if inputs else 0
    bundle = bundle.at(args.plan, args.text_budget, needed)
    inputs = inputs or drawn_inputs(bundle, args.prompts, args.seed)
    pipeline = open_pipeline(bundle, args.backend, Opening(args.threads, args.device), "himap-validate")
    backend, asked = pipeline.backend, Asked(min(args.max_new_tokens, bundle.budget.new), args.atol, args.rtol)
    parity = compare(pipeline, lambda dtype: _reference(checkpoint, dtype, args.threads), inputs, asked, _progress)
    del pipeline
    result: dict[str, Any] = {"bundle": str(args.bundle), "backend": backend, "dtype": bundle.manifest.dtype}
    result |= {"plan": bundle.variant.plan_name, "text_budget": bundle.budget.text}
    result |= {"passed": parity.passed, "parity": parity_json(parity), "gates": gates_json(parity)}
    _say(args, parity_lines(parity, bundle, backend))
    if args.save_outputs is not None:
        save_outputs(args.save_outputs, parity.outputs)
    if not args.no_speed:
        result["speed"] = _speed(args, bundle, checkpoint, backend)
    if args.json:
        print(json.dumps(result, indent=1))
    failed = [gate.name for gate in parity.gates if not gate.passed]
    if failed:
        print(f"himap-validate: gates failed: {', '.join(failed)}", file=sys.stderr)
    return Exit.GATE if failed else Exit.OK


def _speed(args: argparse.Namespace, bundle: "Bundle", checkpoint: Path, backend: str) -> dict[str, Any]:
    from himap_export.validate.report import speed_json, speed_lines
    from himap_export.validate.speed import ceiling, measure

    _say(args, [f"\nspeed: FLOPs allow {ceiling(bundle):.2f}x over the unpruned decoder prefill"])
    _progress(f"exporting the unpruned twin, then {args.warm_up} + {args.iterations} rounds of three processes")
    speed = measure(bundle, checkpoint, backend, args.iterations, args.warm_up, args.threads)
    _say(args, speed_lines(speed))
    return speed_json(speed)


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say(args: argparse.Namespace, lines: list[str]) -> None:
    if not args.json:
        print("\n".join(lines), flush=True)


def _checkpoint(bundle: "Bundle", model: str | None) -> Path:
    from himap_export.exporter.checkpoint import open_checkpoint
    from himap_export.exporter.registry import resolve

    name = model or bundle.manifest.model.source
    try:
        folder = resolve(name).folder
    except HimapError as problem:
        if model is not None or problem.code == Exit.MISSING:
            raise
        hint = "give its checkpoint with --model"
        raise HimapError(f"the model of {bundle.folder} is not at {name}", hint=hint, code=Exit.MISSING) from None
    assert folder is not None  # `resolve` fetches weights unless told not to
    open_checkpoint(folder)
    return folder


def _reference(checkpoint: Path, dtype: "Dtype", threads: int) -> "Reference":
    import torch
    from transformers.utils import logging

    from himap_export.validate.reference import Reference

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return Reference(checkpoint, {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
    except (OSError, ValueError) as problem:
        raise HimapError(f"PyTorch cannot load {checkpoint}", str(problem).splitlines()[0]) from None
