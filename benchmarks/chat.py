"""A second question about the same two pictures, three ways in one run: asked anew, asked anew of pictures that were
seen before, and appended to the first one's caches as a conversation does it. Seconds to its first token.

The decoder is the random one of `prefill.py` (16 layers of 1024), the tower CLIP-B's sizes at 336 pixels; the bundle
holds the pruned plan and the unpruned one. Beside the seconds stand the FLOPs of what each way computes.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prefill import work_folder
from serve_model import BEFORE, PRUNED, SIDE, UNPRUNED, export_bundle, question, write_checkpoint

if TYPE_CHECKING:
    from PIL import Image

    from himap_export.engines.bundle import Bundle, RunSpec
    from himap_export.engines.session import Session

Rows = list[list[float]]  # of a round each, in seconds, by WAYS
TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
WORDS = (4, 32)  # of the second question
FIRST, ANSWER = 16, 8  # words of the first question, tokens of its answer
IMAGES, PATCH = 2, 14
WAYS = ("anew", "anew, pictures known", "conversation")


def drawn(number: int) -> list["Image.Image"]:
    """Pictures that nobody has seen before."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(number)
    return [Image.fromarray(random.integers(0, 256, (SIDE, SIDE, 3), np.uint8)) for _ in range(IMAGES)]


def timed(session: "Session", number: int, words: int) -> tuple[list[float], int]:
    """Seconds to the first token of one second question, by WAYS, and how many tokens the conversation appended."""
    pictures, asked = drawn(number), question(number, words)
    anew = [session.ask(pictures, asked, max_new_tokens=1).first_token_s for _ in range(2)]
    talk = session.converse(pictures)
    talk.ask(question(number + 1, FIRST), max_new_tokens=ANSWER)
    appended = talk.ask(asked, max_new_tokens=1).first_token_s
    return [*anew, appended], talk.appended


def flops(run: "RunSpec", appended: int) -> dict[str, float]:
    """GFLOPs of the tower over all pictures, of prefill, and of as many decode steps as tokens are appended."""
    from himap_export.graphs.flops import layer_flops, stage_costs

    d, m, layers = (TOWER[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    spec, budget, s = run.manifest.decoder, run.budget, (SIDE // PATCH) ** 2 + 1
    layer = 2 * s * (4 * d * d + 2 * d * m) + 4 * s * s * d
    tower = layers * layer + 2 * s * (3 * PATCH * PATCH * d + d * spec.hidden + spec.hidden**2)
    head = 2 * spec.hidden * spec.vocab
    costs = stage_costs(spec, run.plan, budget, "fp32")
    seen = sum(len(c.layers) * 4 * (c.tokens + appended) * spec.heads * spec.head_dim for c in costs)
    step = spec.layers * layer_flops(1, spec) + seen + head
    found = {"tower": budget.images * tower, "prefill": sum(c.flops for c in costs) + head, "steps": appended * step}
    return {name: count / 1e9 for name, count in found.items()}


def lines(run: "RunSpec", rows: Mapping[int, Rows], appended: Mapping[int, int]) -> list[str]:
    """A table of one plan: rows are seconds by WAYS, of each length of the question."""
    told = [f"{run.plan_name}: image tokens {' -> '.join(map(str, run.budget.visual))}, text budget {run.budget.text}"]
    for words, found in rows.items():
        n, work = appended[words], flops(run, appended[words])
        whole = work["tower"] + work["prefill"]
        shares = (whole, work["prefill"], work["steps"])
        anew, known, talk = (statistics.median(column) for column in zip(*found, strict=True))
        told.append(f"  {words} words, {n} tokens appended ({talk / n * 1e3:.1f} ms each)")
        for way, share, column in zip(WAYS, shares, zip(*found, strict=True), strict=True):
            middle = statistics.median(column)
            told.append(
                f"    {way:21} {middle * 1e3:7.0f} ms ({min(column) * 1e3:.0f} to {max(column) * 1e3:.0f}), "
                f"{middle / anew:4.0%} of asked anew; {share:6.1f} GFLOP, {share / whole:4.0%}"
            )
        told.append(f"    as long as prefill takes, {known / (talk / n):.0f} tokens could be appended")
    return told


def measured(bundle: "Bundle", plan: str, threads: int, rounds: int) -> tuple[dict[int, Rows], dict[int, int]]:
    """Seconds of a plan by words, a row a round, and the tokens appended; the three ways take turns."""
    found: dict[int, Rows] = {words: [] for words in WORDS}
    appended: dict[int, int] = {}
    with bundle.session(plan=plan, threads=threads) as session:
        for n in range(rounds + 1):  # the first one does not count
            for words in WORDS:
                row, appended[words] = timed(session, 1000 * n + 10 * words, words)
                found[words] += [row] if n else []
            print(f"{plan}: round {n} of {rounds}", file=sys.stderr)
    return found, appended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the model here for the next run")
    args = parser.parse_args()
    import himap_export as hx
    from himap_export.validate.report.machine import cpu_and_features

    with work_folder(args.work) as work:
        model, out = work / "model-chat", work / "chat"
        if not (model / "generation_config.json").exists():
            write_checkpoint(model, **TOWER)
        export_bundle(
            model, out, backend=args.backend, dtype=args.dtype, images=IMAGES, text_budget=BEFORE + max(WORDS),
            max_new_tokens=128, progress=partial(print, file=sys.stderr),
        )  # fmt: skip
        bundle = hx.Bundle.open(out)
        cpu, features = cpu_and_features(Path("/proc/cpuinfo"))
        print(f"{cpu} ({features}), {args.threads} threads, {args.backend} {args.dtype}, {args.rounds} rounds")
        seconds: dict[str, dict[int, Rows]] = {}
        for plan in (PRUNED, UNPRUNED):
            seconds[plan], appended = measured(bundle, plan, args.threads, args.rounds)
            run = bundle.select(plan, images=IMAGES)
            print("\n".join(lines(run, seconds[plan], appended)), flush=True)
    print(json.dumps({"seconds": seconds, "ways": WAYS, "cpu": cpu, "features": features, "threads": args.threads}))


if __name__ == "__main__":
    main()
