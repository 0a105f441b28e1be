"""OpenVINO GenAI's VLMPipeline over optimum-intel's export: its own clocks, less what it says the image took.

Its prefix cache, which would answer the second prefill from the first, is off. `pruned` is CDPruner's `pruning_ratio`,
which prunes Qwen's models only; LLaVA's are run unpruned without a word: `opened` refuses that.
"""

import json
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from serving import Phases, Task, serve

# Over weights in int4 it is OpenVINO's own choice.
PRECISIONS = {"fp32": {"INFERENCE_PRECISION_HINT": "f32"}, "bf16": {"INFERENCE_PRECISION_HINT": "bf16"}, "int4": {}}
# Of the image that makes 576 tokens, and how many tokens its frame takes: LLaVA a line break, Qwen its start and end.
IMAGES = {"llava": (336, 1), "qwen2_vl": (672, 2)}


def opened(task: Task) -> Phases:
    family = json.loads((task.folder / "config.json").read_text())["model_type"]
    if task.pruned and family == "llava":
        raise ValueError("VLMPipeline does not prune LLaVA")
    settings = {
        **PRECISIONS[task.precision],
        "INFERENCE_NUM_THREADS": task.threads,
        "CACHE_DIR": str(task.folder / f"cache-{task.precision}"),
    }
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens = False, 4096
    pipeline = genai.VLMPipeline(task.folder, "CPU", scheduler_config=scheduler, **settings)
    side, frame = IMAGES[family]
    pixels = np.random.default_rng(0).integers(0, 255, (1, side, side, 3), dtype=np.uint8)
    image, text = ov.Tensor(pixels), "a" * (task.prompt - 576 - frame)

    def generated(tokens: int, removed: int) -> Any:
        asked = genai.GenerationConfig()
        asked.max_new_tokens, asked.ignore_eos, asked.apply_chat_template = tokens, True, False
        asked.pruning_ratio = removed
        metrics = pipeline.generate(text, images=[image], generation_config=asked).perf_metrics
        found = metrics.get_num_input_tokens()
        if not removed and found != task.prompt:
            raise ValueError(f"the prompt is {found} tokens, not {task.prompt}")
        return metrics

    def prefill() -> float:
        metrics = generated(2, task.pruned)
        # Pruned, the image's time includes the pruner's, which is part of a pruned prefill: it is taken without it.
        image = generated(2, 0) if task.pruned else metrics
        return (metrics.get_ttft().mean - image.get_prepare_embeddings_duration().mean) / 1e3

    return {"prefill": prefill, "decode": lambda: generated(task.steps + 1, task.pruned).get_tpot().mean / 1e3}


if __name__ == "__main__":
    serve(opened)
