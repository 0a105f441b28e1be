"""How long prefill takes: the plans as engines of one bundle, taking turns, beside the unpruned model."""

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from himap_export.engines.backends import Opening
from himap_export.engines.pipeline import Pipeline
from himap_export.graphs.plan import PruningPlan, TokenBudget
from himap_export.graphs.spec import Dtype
from himap_export.validate.contenders import UNPRUNED
from himap_export.validate.questions import drawn_inputs
from himap_export.validate.twin import export_twin

BACKEND, WARM_UP = "onnxruntime", 2


@dataclass(frozen=True)
class Timed:
    """Prefill's seconds, and its share of the unpruned model's in the same round: median, lowest, highest."""

    seconds: float
    share: tuple[float, float, float]


def measure(
    checkpoint: Path, plans: Mapping[str, PruningPlan], image_tokens: int, text: int, dtype: Dtype, threads: int,
    rounds: int,
) -> dict[str, Timed]:  # fmt: skip
    """By name; the unpruned model is one of them. Every slot of the text budget is filled."""
    everyone = {**plans, UNPRUNED: PruningPlan()}
    kept = {name: (plan, plan.kept(image_tokens)) for name, plan in everyone.items()}
    with tempfile.TemporaryDirectory(prefix="himap-tune-") as folder:
        bundle = export_twin(
            checkpoint, TokenBudget((image_tokens,), text, 1), dtype, BACKEND, kept, Path(folder) / "b"
        )
        pipelines: dict[str, Pipeline] = {}
        for name in everyone:
            engines = next(iter(pipelines.values())).engines if pipelines else None
            pipelines[name] = Pipeline(bundle.at(name), BACKEND, Opening(threads), engines)
            inputs = drawn_inputs(pipelines[name].bundle, 1, 0, fill=True)
            pipelines[name].prefill(inputs.input_ids, inputs.pixel_values, inputs.attention_mask)
        taken = [{name: _prefill(p) for name, p in pipelines.items()} for _ in range(WARM_UP + rounds)][WARM_UP:]
    found = {}
    for name in everyone:
        shares = [turn[name] / turn[UNPRUNED] for turn in taken]
        seconds = statistics.median(turn[name] for turn in taken)
        found[name] = Timed(seconds, (statistics.median(shares), min(shares), max(shares)))
    return found


def _prefill(pipeline: Pipeline) -> float:
    start = time.perf_counter()
    for stage in pipeline.stages:
        pipeline.run(stage)
    pipeline.read("logits")
    return time.perf_counter() - start
