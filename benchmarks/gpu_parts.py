"""What `gpu.py` measures, each part in a process of its own; all but the kernel also run on a CPU, as tests do it."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from himap_export.engines.backends import Opening
from himap_export.engines.bundle import Bundle, RunSpec
from himap_export.engines.pipeline import Pipeline
from himap_export.graphs.flops import stage_costs
from himap_export.graphs.plan import PruningPlan

if TYPE_CHECKING:
    import torch

Times = dict[str, float]  # seconds by what was done; medians
DECODE_STEPS = 32
# In one bundle, over one copy of the weights. Those with one cut only tell what the other cut's scores cost.
PLANS = {"pruned": (0.5, 0.75), "unpruned": (0.0, 0.0), "first only": (0.5, 0.0), "second only": (0.0, 0.75)}


def plan_file(file: Path, plan: PruningPlan) -> Path:
    """The four plans as `himap-export --plan` reads them, cut where HiMAP's `plan` cuts."""
    first, second = plan.cuts
    tables = (
        f"[{name.replace(' ', '-')}]\nk1 = {first.layer}\nk2 = {second.layer}\nr1 = {r1}\nr2 = {r2}\n"
        for name, (r1, r2) in PLANS.items()
    )
    file.write_text("\n".join(tables))
    return file


@dataclass(frozen=True)
class Machine:
    """fp16 matrix FLOP/s and copied bytes/s (read and written) that PyTorch reaches on the device."""

    name: str
    flops: float
    bandwidth: float


def clock(work: Callable[[], object], wait: Callable[[], object], iterations: int, warm_up: int = 3) -> float:
    """Median seconds of `work` until `wait` says it is done."""
    seconds = []
    for n in range(warm_up + iterations):
        wait()
        start = time.perf_counter()
        work()
        wait()
        if n >= warm_up:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def waiter(device: str) -> Callable[[], object]:
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


def machine(device: str, size: int = 8192) -> Machine:
    import torch

    a, b = (torch.randn(size, size, device=device, dtype=_dtype(device)) for _ in range(2))
    wait = waiter(device)
    multiply = clock(lambda: a @ b, wait, 10)
    source = torch.empty(size * size * 8, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = clock(lambda: target.copy_(source), wait, 10)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return Machine(name, 2 * size**3 / multiply, 2 * source.nbytes / copy)


def kernel(shape: tuple[int, int, int, int], iterations: int) -> Times:
    """The Triton kernel against PyTorch on a GPU, [B,S,D] fp16 keeping K: equal bit for bit, or RuntimeError."""
    import torch

    from himap_export.engines.plugin.kernel import top_k_gather
    from himap_export.engines.plugin.ptx import GatherShape, tiling

    batch, tokens, keep, hidden = shape
    random = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(batch, tokens, hidden, device="cuda", dtype=torch.float16, generator=random)
    score = torch.rand(batch, tokens, device="cuda", generator=random).mul(64).floor()  # with ties
    position = torch.arange(tokens, device="cuda").repeat(batch, 1)
    kind = torch.randint(0, 4, (batch, tokens), device="cuda", generator=random)
    y = torch.empty(batch, keep, hidden, device="cuda", dtype=x.dtype)
    kept, kinds = (torch.empty(batch, keep, device="cuda", dtype=torch.int64) for _ in range(2))
    plan = tiling(GatherShape(batch, tokens, keep, hidden, "fp16"))

    def ours() -> None:
        top_k_gather[plan.grid](
            x, score, position, kind, y, kept, kinds, **plan.constants, num_warps=plan.warps, enable_fp_fusion=False
        )

    def torchs() -> tuple[object, ...]:
        index = score.sort(dim=1, descending=True, stable=True).indices[:, :keep].sort(dim=1).values
        return x.gather(1, index[:, :, None].expand(-1, -1, hidden)), position.gather(1, index), kind.gather(1, index)

    ours()
    for mine, his in zip((y, kept, kinds), torchs(), strict=True):
        if not torch.equal(mine, his):
            raise RuntimeError(f"the kernel's result differs from PyTorch's at {shape}")
    wait = waiter("cuda")
    return {"kernel": clock(ours, wait, iterations), "PyTorch": clock(torchs, wait, iterations)}


def torch_times(checkpoint: Path, bundle: Path, device: str, iterations: int) -> dict[str, Times]:
    """PyTorch SDPA unpruned, and HiMAP as its authors run it: eager, a prompt at a time, no cache kept for decoding."""
    run = Bundle.open(bundle, verify=False).select()
    return {
        "PyTorch SDPA": _sdpa(checkpoint, run, device, iterations),
        "PyTorch HiMAP, eager": _eager(checkpoint, run, device, iterations),
    }


def _sdpa(checkpoint: Path, run: RunSpec, device: str, iterations: int) -> Times:
    import torch

    from himap_export.validate.parity.prompts import drawn_inputs
    from himap_export.validate.reference.reference import Reference

    inputs, wait = drawn_inputs(run, run.budget.batch, 0, fill=True), waiter(device)
    arrays = (inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
    model = Reference(checkpoint, _dtype(device), "sdpa", device)
    with torch.inference_mode():
        prompts = model.embed(*arrays)
        logits, cache = model.forward(prompts)
        tokens, at = logits.argmax(-1), iter(range(prompts.hidden.shape[1], 1 << 30))
        found = {
            "vision": clock(lambda: model.image_features(inputs.pixel_values), wait, iterations),
            "prefill": clock(lambda: model.forward(prompts), wait, iterations),
            "first token": clock(lambda: model.forward(model.embed(*arrays)), wait, iterations),
            "decode": clock(lambda: model.step(tokens, next(at), cache), wait, DECODE_STEPS),
        }
    peak = {"peak bytes": float(torch.cuda.max_memory_allocated())} if device == "cuda" else {}
    return found | peak


def _eager(checkpoint: Path, run: RunSpec, device: str, iterations: int) -> Times:
    from himap_export.validate.parity.prompts import drawn_inputs
    from himap_export.validate.parity.runs import reference_cuts
    from himap_export.validate.reference.reference import Reference

    inputs, cuts = (
        drawn_inputs(run, run.budget.batch, 0, fill=True),
        reference_cuts(run.plan, run.budget.visual),
    )
    model = Reference(checkpoint, _dtype(device), "eager", device)

    def first_token() -> object:
        return model.prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask, cuts=cuts)

    return {"first token": clock(first_token, waiter(device), max(3, iterations // 3))}


def _dtype(device: str) -> "torch.dtype":
    import torch

    return torch.float16 if device == "cuda" else torch.float32


def bundle_times(folder: Path, backend: str, device: str, iterations: int) -> dict[str, Times]:
    """All plans of a bundle over one copy of the weights, taking turns; reading a small tensor waits for the device."""
    bundle = Bundle.open(folder, verify=False)
    names = list(dict.fromkeys(v.plan_name for v in bundle.manifest.variants))
    opening = Opening(device=device if backend == "onnxruntime" else None)
    pipelines: dict[str, Pipeline] = {}
    for name in names:
        pipelines[name] = Pipeline(bundle.select(name), backend, opening, next(iter(pipelines.values()), None))
    found: dict[str, Times] = {name: {} for name in names}
    for phase in ("vision", *pipelines[names[0]].stages, "prefill", "first token", "decode"):
        rounds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(3):  # turns, each of a third of the iterations
            for name, pipeline in pipelines.items():
                rounds[name].append(_timed(pipeline, phase, max(1, iterations // 3)))
        for name in names:
            found[name][phase] = statistics.median(rounds[name])
    used = getattr(next(iter(pipelines.values())).engines, "memory_bytes", None)
    if used is not None:
        found[names[0]]["bytes for all plans"] = float(used())
    return found


def _timed(pipeline: Pipeline, phase: str, iterations: int) -> float:
    from himap_export.validate.parity.prompts import drawn_inputs

    run = pipeline.spec
    inputs = drawn_inputs(run, run.budget.batch, 0, fill=True)
    arrays = (inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
    prefilled, layout = pipeline.prefill(*arrays)

    def wait() -> object:
        return pipeline.read("token_type")

    if phase == "first token":
        return clock(lambda: [pipeline.features.forget(), pipeline.prefill(*arrays)], wait, iterations)
    if phase == "vision":
        pictures = range(run.budget.batch * run.budget.images)
        return clock(lambda: [pipeline.run(phase) for _ in pictures], wait, iterations)
    if phase == "prefill":
        return clock(lambda: [pipeline.run(stage) for stage in pipeline.stages], wait, iterations)
    if phase == "decode":
        tokens, steps = prefilled.logits.argmax(axis=1), min(DECODE_STEPS, run.budget.new)
        tokens = np.resize(tokens, len(layout.lengths))
        return clock(lambda: [pipeline.step(tokens, layout.lengths + i) for i in range(steps)], wait, 1) / steps
    return clock(lambda: pipeline.run(phase), wait, iterations)


def parity(folder: Path, checkpoint: Path, backend: str, device: str) -> dict[str, object]:
    """himap-validate's comparison, PyTorch on the same device."""
    import torch

    from himap_export.validate.parity.compare import compare
    from himap_export.validate.parity.limits import ParityOptions
    from himap_export.validate.parity.prompts import drawn_inputs
    from himap_export.validate.parity.results import gates_json
    from himap_export.validate.reference.reference import Reference

    run = Bundle.open(folder, verify=False).select()
    pipeline = Pipeline(run, backend, Opening(device=device if backend == "onnxruntime" else None))
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    found = compare(
        pipeline,
        lambda dtype: Reference(checkpoint, kinds[dtype], device=device),
        drawn_inputs(run, 1, 0),
        ParityOptions(8, outputs=False),
    )
    return {"passed": found.passed, "gates": gates_json(found)}


def roofline(run: RunSpec, found: Machine) -> Times:
    """The least seconds by arithmetic: prefill of each stage by FLOPs, a decode step by the weights it reads."""
    decoder, plan, budget = run.manifest.decoder, run.plan, run.budget
    costs = stage_costs(decoder, plan, budget, run.manifest.dtype)
    times = {cost.name: cost.flops / found.flops for cost in costs}
    width = 4 if run.manifest.dtype == "fp32" else 2
    weights = sum(int(np.prod(s.shape)) * width for s in run.graph("decode").weights.values())
    cache = sum(cost.kv_bytes for cost in costs)
    # A copy reads and writes; a decode step only reads.
    return times | {"prefill": sum(times.values()), "decode": (weights + cache) / found.bandwidth}
