"""What pruning costs the shipped model: accuracy unpruned, at the default plan, and with as many tokens kept at random.

The first token decides: every answer is one token. All three run on the PyTorch reference, sample by sample.
"""

import argparse
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from draw import TYPES, held_out

from himap_export.engines.bundle import open_bundle
from himap_export.engines.image import ImagePreprocessing, preprocess
from himap_export.engines.prompt import PromptFormat, encode, load_tokenizer
from himap_export.validate.reference import Cuts, Reference

SEED = 2  # of the held-out stream; training evaluates itself on stream 1


def random_sets(ids: np.ndarray, image_token: int, keep: tuple[int, int], seed: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions [1,S1] and [1,S2]: all text, and `keep` image tokens drawn at random, the second from the first."""
    rng = np.random.default_rng([ord(c) for c in seed])
    text, images = np.flatnonzero(ids != image_token), np.flatnonzero(ids == image_token)
    first = rng.choice(images, keep[0], replace=False)
    second = rng.choice(first, keep[1], replace=False)
    a, b = (np.sort(np.concatenate([text, kept]))[None] for kept in (first, second))
    return a, b


def answers(job: tuple[Path, int, int, int, int]) -> list[tuple[str, dict[str, bool]]]:
    """(type, right under each setting) of every `step`-th held-out question from `start` on."""
    folder, count, seeds, start, step = job
    import torch

    torch.set_num_threads(1)
    bundle = open_bundle(folder, verify=False)
    m = bundle.manifest
    assert m.image and m.prompt and m.tokenizer
    tokenizer = load_tokenizer(bundle.path(m.tokenizer))
    how, prompt = ImagePreprocessing.from_json(m.image), PromptFormat.from_json(m.prompt)
    model, cuts = Reference(Path(m.model.source)), Cuts(bundle.plan.k1, bundle.plan.k2, bundle.plan.r1, bundle.plan.r2)
    found = []
    for n, (image, question, answer, kind) in enumerate(held_out(count, SEED)):
        if n % step != start:
            continue
        ids, pixels = encode(tokenizer, prompt, question), preprocess(image, how)[None]
        wanted = tokenizer.encode(f" {answer}", add_special_tokens=False).ids
        assert len(wanted) == 1

        def right(**pruning: object) -> bool:
            return int(model.prefill(ids[None], pixels, **pruning).logits[0].argmax()) == wanted[0]  # noqa: B023

        results = {"unpruned": right(), "himap": right(cuts=cuts)}
        for seed in range(seeds):
            forced = random_sets(ids, m.model.image_token, bundle.budget.visual[1:], f"{n} {seed}")
            results[f"random {seed}"] = right(cuts=cuts, forced=forced)
        found.append((kind, results))
    return found


def table(found: list[tuple[str, dict[str, bool]]]) -> Iterator[str]:
    """Accuracy by type; random control as mean with the lowest and highest seed."""
    right: dict[str, Counter[str]] = defaultdict(Counter)
    asked: Counter[str] = Counter()
    for kind, results in found:
        for name in (kind, "all"):
            asked[name] += 1
            for setting, ok in results.items():
                right[setting][name] += ok
    seeds = [s for s in right if s.startswith("random")]
    yield f"| type | questions | unpruned | HiMAP | random, mean of {len(seeds)} seeds | random, min to max |"
    yield "|---|---|---|---|---|---|"
    for name in (*TYPES, "all"):
        spread = [right[s][name] / asked[name] for s in seeds]
        shares = (right["unpruned"][name] / asked[name], right["himap"][name] / asked[name], statistics.mean(spread))
        cells = " | ".join(f"{s:.1%}" for s in shares)
        yield f"| {name} | {asked[name]} | {cells} | {min(spread):.1%} to {max(spread):.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="a bundle of `shapes`: its plan is what is measured")
    parser.add_argument("--questions", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=20, help="of the random control (default: 20)")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    jobs = [(args.bundle, args.questions, args.seeds, start, args.workers) for start in range(args.workers)]
    with ProcessPoolExecutor(args.workers) as pool:
        found = [row for part in pool.map(answers, jobs) for row in part]
    bundle = open_bundle(args.bundle, verify=False)
    print(f"plan {bundle.plan}, image tokens {list(bundle.budget.visual)}\n")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
