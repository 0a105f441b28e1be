"""CPU prefill of several pictures, and of films: pruned beside unpruned, in turn, and what FLOPs promise.

Random models with prefill.py's decoder (16 layers of 1024, about 200 M parameters) and HiMAP's default plan: a LLaVA
whose prompts hold 1 to 8 pictures of 576 tokens, and a Qwen2.5-VL whose prompt is a film of 8 to 32 frames, 196 tokens
a step of two. What is timed is the decoder's prefill, ranking and gathers included; the towers are small, and whether
a tower should see pictures one by one or all at once is timed apart (`picture_parts.py`).
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from picture_parts import AtOnce, at_once, caches
from prefill import work_folder

from himap_export.engines.bundle import Bundle, RunSpec
from himap_export.graphs.flops import scoring_flops, stage_costs
from himap_export.graphs.spec import Dtype
from himap_export.validate.report.machine import cpu_and_features
from himap_export.validate.speed.benchmark import System, benchmark, ratios
from himap_export.validate.speed.measure import ceiling

TEXT, NEW = 192, 64
IMAGES, FRAMES = (1, 2, 4, 8), (8, 16, 32)
PRUNED, UNPRUNED, PLAN = "himap", "none", "qa"
Ask = tuple[str, RunSpec, RunSpec]
# With at least MANY pictures: times over unpruned, and the share of the promise on the better backend.
MANY, LEAST, SHARE = 4, 2.2, 0.97
DECODER = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 8192,
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A prompt on a backend: image tokens by stage, bytes of KV caches (of the tensors that are there), median seconds.

    `promise`: the speed-up that FLOPs allow; `ranking`: what scores add to the pruned prefill's FLOPs; `over`: the
    speed-up, median, lowest and highest.
    """

    prompt: str
    images: int
    backend: str
    dtype: Dtype
    tokens: tuple[int, ...]
    promise: float
    ranking: float
    caches: tuple[int, int]
    pruned: float
    unpruned: float
    over: tuple[float, float, float]

    @property
    def share(self) -> float:
        """Of the promise."""
        return self.over[0] / self.promise


def write_llava(folder: Path) -> None:
    """A random checkpoint in Hugging Face format, fp32. Its tower is as wide as CLIP-L, and 4 of its 24 layers deep."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**DECODER), image_token_index=31999, image_seq_length=576
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def write_qwen(folder: Path) -> None:
    """The same decoder under M-RoPE, behind a small tower."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    vision = {"depth": 2, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "out_hidden_size": 1024}
    config = Qwen2_5_VLConfig(
        text_config=DECODER | {"rope_parameters": rope},
        vision_config=vision | {"window_size": 112, "fullatt_block_indexes": [1]},
        image_token_id=31999, video_token_id=31998,
    )  # fmt: skip
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)


def prepared(work: Path, name: str) -> Path:
    """The checkpoint `name`, made once."""
    folder = work / name
    if not folder.exists():
        part = work / f"{name}.partial-{os.getpid()}"
        {"llava": write_llava, "qwen": write_qwen}[name](part)
        part.rename(folder)
    return folder


def export(model: Path, out: Path, backend: str, dtype: Dtype, **asked: object) -> Bundle:
    """The model with HiMAP's default plan, and without cuts."""
    import himap_export as hx

    return hx.export(
        model, out=out, overwrite=True, progress=partial(print, file=sys.stderr), policy=(PRUNED, UNPRUNED),
        text_budget=TEXT, max_new_tokens=NEW, dtype=dtype, backend=backend, **asked,
    )  # fmt: skip


def bundles(work: Path, backend: str, dtype: Dtype, images: tuple[int, ...], frames: tuple[int, ...]) -> Iterator[Ask]:
    """Every prompt by its name: pruned, unpruned."""
    if images:
        held = export(prepared(work, "llava"), work / "pictures", backend, dtype, images=images)
        for n in images:
            name = f"{n} image{'s' * (n > 1)}"
            yield name, held.select(PLAN, images=n), held.select(UNPRUNED, images=n)
    for n in frames:
        size = {"frames": n, "image_size": (392, 392)}
        held = export(prepared(work, "qwen"), work / "film", backend, dtype, **size)
        yield f"{n} frames", held.select(PLAN), held.select(UNPRUNED)


def measure(prompt: str, pruned: RunSpec, unpruned: RunSpec, backend: str, args: argparse.Namespace) -> Measured:
    """Prints what FLOPs promise, then measures."""
    manifest, costs = pruned.manifest, pruned.budget
    cost = sum(c.flops for c in stage_costs(manifest.decoder, pruned.plan, costs, manifest.dtype))
    ranking = sum(n or 0 for n in scoring_flops(manifest.decoder, pruned.plan, costs)) / cost
    promise = ceiling(pruned)
    print(
        f"{prompt}, {backend} {manifest.dtype}: image tokens {list(costs.visual)}; FLOPs allow {promise:.2f}x", end=""
    )
    print(f", ranking adds {ranking:.2%} of the pruned prefill's", flush=True)
    systems = [System(name, "bundle", run, Path(), backend) for name, run in ((PRUNED, pruned), (UNPRUNED, unpruned))]
    fast, slow = benchmark(
        systems, iterations=args.iterations, warm_up=args.warm_up, threads=args.threads, phases=("prefill",)
    )
    found = Measured(
        prompt, pruned.budget.images, backend, manifest.dtype, costs.visual, promise, ranking,
        (caches(pruned, backend), caches(unpruned, backend)), fast.median("prefill"), slow.median("prefill"),
        ratios(fast, slow, "prefill"),
    )  # fmt: skip
    median, low, high = found.over
    kept, whole = (n / 2**20 for n in found.caches)
    print(f"  {found.pruned * 1e3:.0f} ms pruned, {found.unpruned * 1e3:.0f} unpruned: {median:.2f}x", end="")
    print(f" ({low:.2f} to {high:.2f}), {found.share:.0%} of that; caches {whole:.0f} -> {kept:.0f} MiB", flush=True)
    return found


def verdicts(found: Sequence[Measured]) -> Iterator[str]:
    """Lines that say of each number of many pictures whether the better backend met the bars."""
    for images in sorted({m.images for m in found if m.images >= MANY}):
        best = max((m for m in found if m.images == images), key=lambda m: m.share)
        met = best.over[0] >= LEAST and best.share >= SHARE
        bars = f"the bars are {LEAST}x and {SHARE:.0%} of {best.promise:.2f}x"
        told = f"{best.prompt}, {best.backend}: {best.over[0]:.2f}x, {best.share:.0%}"
        yield f"{'met    ' if met else 'NOT MET'}  {told}; {bars}"


def table(found: Sequence[Measured]) -> str:
    """GitHub's Markdown."""
    head = ("prompt", "backend", "image tokens", "pruned", "unpruned", "speed-up", "of the promise", "KV caches")
    lines = [f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    for m in found:
        median, low, high = m.over
        kept, whole = (n / 2**20 for n in m.caches)
        cells = (
            m.prompt, f"{m.backend} {m.dtype}", " → ".join(map(str, m.tokens)), f"{m.pruned * 1e3:.0f} ms",
            f"{m.unpruned * 1e3:.0f} ms", f"{median:.2f}x ({low:.2f} to {high:.2f})",
            f"{m.share:.0%} of {m.promise:.2f}x", f"{whole:.0f} → {kept:.0f} MiB",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    cpu, features = cpu_and_features(Path("/proc/cpuinfo"))
    # With AVX-512's bf16 alone OpenVINO multiplies at half the speed of its own fp32 (docs/log.md).
    fast: Dtype = "bf16" if "amx_bf16" in features.split(", ") else "fp32"
    dtypes: dict[str, Dtype] = {"onnxruntime": "fp32", "openvino": fast}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="*", default=IMAGES)
    parser.add_argument("--frames", type=int, nargs="*", default=FRAMES)
    parser.add_argument("--backend", choices=tuple(dtypes), action="append", help="repeatable (default: both)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help=f"of OpenVINO (default: {fast}, as this CPU has it)")
    parser.add_argument("--iterations", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the models here for the next run")
    args = parser.parse_args()
    dtypes["openvino"] = args.dtype or fast
    backends = [(name, dtypes[name]) for name in args.backend or dtypes]
    print(f"{cpu}, {args.threads} threads; {features}")
    found, seen = list[Measured](), list[AtOnce]()
    with work_folder(args.work) as work:
        for backend, dtype in backends:
            for prompt, *runs in bundles(work, backend, dtype, tuple(args.images), tuple(args.frames)):
                found.append(measure(prompt, *runs, backend, args))
        if several := [n for n in args.images if n > 1]:
            seen = at_once(
                prepared(work, "llava"), work / "vision", backends, several,
                rounds=args.iterations, threads=args.threads,
            )  # fmt: skip
    print("\n".join([table(found), *(one.told() for one in seen), *verdicts(found)]))
    rows = {"prompts": [asdict(m) for m in found], "vision": [asdict(one) for one in seen]}
    print(json.dumps({"cpu": cpu, "features": features, "threads": args.threads} | rows))


if __name__ == "__main__":
    main()
