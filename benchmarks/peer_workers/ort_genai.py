"""onnxruntime-genai on what its model builder made of the decoder, in the builder's precision."""

import json

import numpy as np
import onnxruntime_genai as og
from serving import Phases, Task, clock, serve


def opened(task: Task) -> Phases:
    config = og.Config(str(task.folder))
    threads = {"intra_op_num_threads": task.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
    model = og.Model(config)
    prompt = np.random.default_rng(0).integers(3, 30000, (1, task.prompt)).astype(np.int32)

    def begun() -> tuple[og.Generator, float]:
        """Returns a generator behind the prompt, and the seconds that the prompt took."""
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=task.prompt + task.steps + 2, min_length=task.prompt + task.steps + 2)
        generator = og.Generator(model, parameters)
        return generator, clock(lambda: generator.append_tokens(prompt))

    def decode() -> float:
        generator, _ = begun()
        generator.generate_next_token()  # only chooses from the prompt's logits
        return clock(lambda: [generator.generate_next_token() for _ in range(task.steps)]) / task.steps

    return {"prefill": lambda: begun()[1], "decode": decode}


if __name__ == "__main__":
    serve(opened)
