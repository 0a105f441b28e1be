"""Peak memory and seconds of the information-flow analysis at real size: a random LLaVA of 1.1 B parameters and CLIP-L.

The weights are random because neither time nor memory depends on them. The peak is the process's resident memory
(VmHWM), weights and the mapped pages of their files included. Exit 1 if it is over the bar.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from prefill import work_folder
from real_size import write_checkpoint

if TYPE_CHECKING:
    from himap_export.validate.analysis.sample import Sample
    from himap_export.validate.reference.reference import Reference

SHARD = 1_000_000_000  # bytes
SYSTEM, INSTRUCTION = 35, 20  # text tokens before and after the image, as in LLaVA's prompt for a short question
TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32064,
}
VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def write_model(folder: Path, text: dict[str, int], vision: dict[str, int]) -> int:
    """A random fp16 checkpoint, shard by shard; its bytes. The last token of the vocabulary stands for the image."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**vision),
        image_token_index=text["vocab_size"] - 1,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
    )
    with torch.device("meta"):
        weights = LlavaForConditionalGeneration(config).state_dict()
    return write_checkpoint(folder, config.to_dict(), {n: tuple(w.shape) for n, w in weights.items()}, SHARD)


def prompts(reference: "Reference", count: int) -> list["Sample"]:
    """Random text around one random image, and a random answer."""
    from himap_export.validate.analysis.sample import Sample

    config, random = reference.adapter.whole.config, np.random.default_rng(0)
    side = config.vision_config.image_size
    image = np.full(config.image_seq_length, config.image_token_id)
    made = []
    for _ in range(count):
        words = random.integers(3, config.text_config.vocab_size - 1, SYSTEM + INSTRUCTION)
        ids = np.concatenate([words[:SYSTEM], image, words[SYSTEM:]])
        pixels = random.standard_normal((1, 3, side, side), np.float32)
        made.append(Sample(ids, pixels, int(random.integers(3, config.text_config.vocab_size - 1))))
    return made


def analyses(reference: "Reference", samples: "Sequence[Sample]") -> dict[str, Callable[[], object]]:
    """What is measured, by name: every layer, every kind of disruption at every layer."""
    from himap_export.validate.analysis.disruption import disruption
    from himap_export.validate.analysis.gradcam import grad_cams
    from himap_export.validate.analysis.saliency import saliency, shares

    return {
        "saliency": lambda: saliency(reference, samples),
        "shares": lambda: shares(reference, samples),
        "gradcam": lambda: [grad_cams(reference, sample) for sample in samples],
        "disruption": lambda: disruption(reference, samples),
    }


def peak_gib() -> float:
    """The most memory this process has had resident until now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) / 2**20


def measure(model: Path, dtype: str, count: int) -> dict[str, Any]:
    """Seconds of each analysis on `count` prompts, and the peak when the weights were loaded and at the end of each."""
    import torch

    from himap_export.validate.reference.reference import Reference

    reference = Reference(model, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], attn_implementation="sdpa")
    samples = prompts(reference, count)
    parameters = sum(p.numel() for p in reference.adapter.whole.parameters())
    found: dict[str, Any] = {"parameters": parameters, "dtype": dtype, "prompts": count, "loaded_gib": peak_gib()}
    for name, work in analyses(reference, samples).items():
        start = time.perf_counter()
        work()
        found |= {f"{name}_s": time.perf_counter() - start, f"{name}_gib": peak_gib()}
        print(f"{name:10} {found[f'{name}_s']:8.1f} s   peak so far {found[f'{name}_gib']:.2f} GiB")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=12.0, help="the bar for resident memory")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32", help="what the analysis computes in")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the model here for the next run")
    args = parser.parse_args()
    with work_folder(args.work) as work:
        model = work / "model"
        if not (model / "config.json").exists():
            print(f"{write_model(model, TEXT, VISION) / 1e9:.2f} GB of weights written", file=sys.stderr)
        found = measure(model, args.dtype, args.prompts)
    peak = peak_gib()
    print(f"{'met    ' if peak <= args.gib else 'NOT MET'}  {peak:.2f} GiB peak resident, the bar is {args.gib:g}")
    print(json.dumps(found | {"peak_gib": peak, "bar_gib": args.gib}))
    raise SystemExit(peak > args.gib)


if __name__ == "__main__":
    main()
