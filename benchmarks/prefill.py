"""CPU prefill at LLaVA's layout: staged and pruned, the same backend unpruned, and PyTorch, interleaved in one run.

A random LLaVA with 16 decoder layers of 1024 (about 200 M parameters in them) and 35 + 576 + 135 prompt tokens. It is
random because times do not depend on weights; scoring and gather are included, the vision tower is timed apart.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from himap_export.validate.speed.results import speed_json, speed_lines

if TYPE_CHECKING:
    from himap_export.engines.bundle import RunSpec

TEXT = 35 + 135
BARS = (("of the FLOPs ceiling", 0.97), ("over PyTorch SDPA", 3.5), ("decode over PyTorch SDPA", 1.0))


def write_model(folder: Path, **tower: int) -> None:
    """A random checkpoint in Hugging Face format, fp32, its tower small, unless it is told otherwise."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16, max_position_embeddings=4096,
    )  # fmt: skip
    small = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    vision = CLIPVisionConfig(image_size=336, patch_size=14, **(small | tower))
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=31999, image_seq_length=576)
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def export_pruned(model: Path, out: Path) -> "RunSpec":
    import himap_export as hx

    bundle = hx.export(
        model, out=out, overwrite=True, progress=partial(print, file=sys.stderr), k1=2, k2=8, r1=0.5, r2=0.75,
        text_budget=TEXT, max_new_tokens=64, dtype="fp32", backend="onnxruntime",
    )  # fmt: skip
    return bundle.select()


@contextmanager
def work_folder(kept: Path | None) -> Iterator[Path]:
    """`kept`, where the model of an earlier run is used again, or a folder that vanishes."""
    if kept is None:
        with tempfile.TemporaryDirectory(prefix="himap-bench-") as folder:
            yield Path(folder)
    else:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept


def prepared(work: Path) -> tuple[Path, "RunSpec"]:
    """The checkpoint and its pruned bundle. The model is made once; the bundle always, so that it is today's graphs."""
    model, out = work / "model", work / "bundle"
    if not (model / "config.json").exists():
        part = work / f"model.partial-{os.getpid()}"
        write_model(part)
        part.rename(model)
    return model, export_pruned(model, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the model here for the next run")
    args = parser.parse_args()
    from himap_export.validate.speed.measure import UNPRUNED, ceiling, measure

    with work_folder(args.work) as work:
        model, run = prepared(work)
        stored = sum(t.nbytes for t in run.bundle.tensors.values())
        print(f"prompt 35 + 576 + 135 tokens, S = {list(run.budget.total)}, {args.threads} threads, fp32")
        print(f"FLOPs allow {ceiling(run):.2f}x over unpruned prefill; weights on disk {stored / 2**20:.0f} MiB, once")
        speed = measure(
            run, model, "onnxruntime", "cpu", iterations=args.iterations, warm_up=args.warm_up, threads=args.threads
        )
    print("\n".join(speed_lines(speed)))
    torch = speed.others[-1]
    found = (
        speed.over(UNPRUNED, "prefill")[0] / speed.ceiling,
        speed.over(torch, "prefill")[0],
        speed.over(torch, "decode")[0],
    )
    for (name, bar), value in zip(BARS, found, strict=True):
        print(f"{'met    ' if value >= bar else 'NOT MET'}  {value:.2f} {name}, the bar is {bar}")
    print(json.dumps(speed_json(speed) | {"weights_bytes": stored, "threads": args.threads}))


if __name__ == "__main__":
    main()
