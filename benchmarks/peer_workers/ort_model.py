"""Runs onnxruntime-genai's model builder, with its own arguments.

It imports classes that are newer than the transformers with which optimum-intel exports Qwen2-VL, for models that are
not ours.
"""

import runpy

import transformers

for newer in ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"):
    if not hasattr(transformers, newer):
        setattr(transformers, newer, None)

if __name__ == "__main__":
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")
