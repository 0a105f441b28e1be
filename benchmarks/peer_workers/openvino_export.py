"""optimum-intel's export in OpenVINO: its decoder, of dynamic shapes and stateful, on embeddings of the prompt."""

import numpy as np
import openvino as ov
from serving import Phases, Task, clock, serve

# Over weights in int4 it is OpenVINO's own choice.
PRECISIONS = {"fp32": {"INFERENCE_PRECISION_HINT": "f32"}, "bf16": {"INFERENCE_PRECISION_HINT": "bf16"}, "int4": {}}


def opened(task: Task) -> Phases:
    core = ov.Core()
    settings = {
        **PRECISIONS[task.precision],
        "INFERENCE_NUM_THREADS": task.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "CACHE_DIR": str(task.folder / f"cache-{task.precision}"),
    }
    compiled = core.compile_model(task.folder / "openvino_language_model.xml", "CPU", settings)
    request, hidden = compiled.create_infer_request(), compiled.input("inputs_embeds").partial_shape[2].get_length()
    prompt = np.random.default_rng(0).standard_normal((1, task.prompt, hidden), dtype=np.float32) * 0.02

    def infer(embeddings: np.ndarray, before: int) -> None:
        tokens = embeddings.shape[1]
        request.infer(
            {
                "inputs_embeds": embeddings,
                "attention_mask": np.ones((1, before + tokens), np.int64),
                "position_ids": np.arange(before, before + tokens, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            },
            share_inputs=True,
            share_outputs=True,
        )

    def prefill() -> float:
        request.reset_state()
        return clock(lambda: infer(prompt, 0))

    def decode() -> float:
        prefill()
        return clock(lambda: [infer(prompt[:, :1], task.prompt + n) for n in range(task.steps)]) / task.steps

    return {"prefill": prefill, "decode": decode}


if __name__ == "__main__":
    serve(opened)
