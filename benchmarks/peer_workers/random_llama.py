"""Writes a LLaMA of random 4-bit weights: python random_llama.py CONFIG {awq,q4_0} OUT. Times do not depend on values.

CONFIG is a config.json whose `text_config` has the sizes. `awq`: the folder of a checkpoint that onnxruntime-genai's
model builder takes; `q4_0`: a GGUF file, its head in Q6_K as llama.cpp's quantiser leaves it. One layer of it is in
memory at a time.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from checkpoints import tokenizer_of
from gguf import GGMLQuantizationType, GGUFWriter
from gguf_file import LAYER, NAMES, describe
from safetensors.numpy import save_file
from transformers import LlamaConfig

GROUP = 128  # inputs that share a scale in AWQ
BLOCKS = {GGMLQuantizationType.Q4_0: (32, 18), GGMLQuantizationType.Q6_K: (256, 210)}  # numbers, bytes
RANDOM = np.random.default_rng(0)
STEP = np.float16(2e-3)


def linears(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Returns a layer's weights, [out,in]."""
    d, m, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    square = {f"self_attn.{name}_proj": (d, d) for name in "qo"} | {f"self_attn.{name}_proj": (kv, d) for name in "kv"}
    return square | {"mlp.gate_proj": (m, d), "mlp.up_proj": (m, d), "mlp.down_proj": (d, m)}


def integers(*shape: int) -> np.ndarray:
    return np.frombuffer(RANDOM.bytes(4 * math.prod(shape)), np.int32).reshape(shape)


def write_awq(config: LlamaConfig, out: Path) -> None:
    out.mkdir(parents=True)
    d, norm = config.hidden_size, np.ones(config.hidden_size, np.float16)
    for n in range(config.num_hidden_layers):
        layer = {f"{name}.weight": norm for name in ("input_layernorm", "post_attention_layernorm")}
        for name, (rows, columns) in linears(config).items():
            layer[f"{name}.qweight"] = integers(columns, rows // 8)
            layer[f"{name}.qzeros"] = integers(columns // GROUP, rows // 8)
            layer[f"{name}.scales"] = np.full((columns // GROUP, rows), STEP)
        save_file({f"model.layers.{n}.{name}": values for name, values in layer.items()}, out / f"{n:03}.safetensors")
    ends = {"model.norm.weight": norm}
    for name in ("model.embed_tokens", "lm_head"):
        ends[f"{name}.weight"] = (RANDOM.standard_normal((config.vocab_size, d), np.float32) * 0.02).astype(np.float16)
    save_file(ends, out / "ends.safetensors")
    tokenizer_of(config.vocab_size).save_pretrained(out)
    quantized = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    told = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": quantized}
    (out / "config.json").write_text(json.dumps(told))


def gguf_tensors(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType]]:
    """Yields names, shapes and types in the order in which they are written."""
    four, six, plain = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q6_K, GGMLQuantizationType.F32
    d = config.hidden_size
    for name, kind in (("model.embed_tokens", four), ("lm_head", six)):
        yield NAMES[name], (config.vocab_size, d), kind
    yield NAMES["model.norm"], (d,), plain
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm": (d,), "post_attention_layernorm": (d,), **linears(config)}
    for n in range(config.num_hidden_layers):
        yield from ((f"blk.{n}.{LAYER[name]}", s, four if len(s) == 2 else plain) for name, s in shapes.items())


def blocks(shape: tuple[int, ...], kind: GGMLQuantizationType) -> np.ndarray:
    """Returns random bytes in the layout of `kind`, the step of each block STEP; ones for a vector."""
    if kind not in BLOCKS:
        return np.ones(shape, np.float32)
    numbers, size = BLOCKS[kind]
    found = np.frombuffer(RANDOM.bytes(math.prod(shape) // numbers * size), np.uint8).reshape(-1, size).copy()
    at = 0 if kind == GGMLQuantizationType.Q4_0 else size - 2
    found[:, at : at + 2] = np.frombuffer(STEP.tobytes(), np.uint8)
    return found.reshape(shape[0], -1)


def write_gguf(config: LlamaConfig, file: Path) -> None:
    writer = GGUFWriter(file, "llama")
    describe(writer, config)
    for name, shape, kind in gguf_tensors(config):
        numbers, size = BLOCKS.get(kind, (1, 4))
        stored = (*shape[:-1], shape[-1] // numbers * size) if kind in BLOCKS else shape
        dtype = np.dtype(np.uint8 if kind in BLOCKS else np.float32)
        writer.add_tensor_info(f"{name}.weight", stored, dtype, math.prod(stored) * dtype.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, kind in gguf_tensors(config):
        writer.write_tensor_data(blocks(shape, kind))
    writer.close()


def main() -> None:
    config, kind, out = sys.argv[1:]
    sizes = LlamaConfig(**json.loads(Path(config).read_text())["text_config"])
    {"awq": write_awq, "q4_0": write_gguf}[kind](sizes, Path(out))


if __name__ == "__main__":
    main()
