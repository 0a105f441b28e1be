"""Writes a LLaMA checkpoint as GGUF: python gguf_file.py CHECKPOINT {F32,BF16} FILE. No tokenizer: none is timed."""

import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.numpy import load_file
from transformers import AutoConfig, PretrainedConfig

LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def main() -> None:
    checkpoint, kind, file = Path(sys.argv[1]), GGMLQuantizationType[sys.argv[2]], Path(sys.argv[3])
    config = AutoConfig.from_pretrained(checkpoint)
    writer = GGUFWriter(file, "llama")
    describe(writer, config)
    weights = {
        name.removesuffix(".weight"): values for name, values in load_file(checkpoint / "model.safetensors").items()
    }
    names = NAMES | {
        f"model.layers.{n}.{theirs}": f"blk.{n}.{its}"
        for n in range(config.num_hidden_layers)
        for theirs, its in LAYER.items()
    }
    for name, its in names.items():
        values = weights[name]
        if its.endswith(("attn_q", "attn_k")):
            values = interleaved(
                values, config.num_attention_heads if its.endswith("q") else config.num_key_value_heads
            )
        stored = kind if values.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(f"{its}.weight", quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Returns `weight` [out,in] with each head's rows in the order of llama.cpp's rotation: pairs lie side by side."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


if __name__ == "__main__":
    main()
