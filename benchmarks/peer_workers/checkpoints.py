"""Writes the random decoder as the checkpoints that peers take: python checkpoints.py MODEL OUT.

MODEL is the LLaVA of `prefill.py`. OUT/llava is it with a tokenizer and a processor; OUT/llama its decoder alone;
OUT/qwen2_vl a random Qwen2-VL whose decoder has the same sizes: the architecture that OpenVINO GenAI prunes.
"""

import os
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
IMAGE = "<image>"
BYTES_ONLY = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tokenizer_of(vocab: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of `vocab` entries in which a byte is a token; the last one is the image's."""
    words = {token: n for n, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    words |= {f"filler{n}": n for n in range(len(words), vocab - 1)} | {IMAGE: vocab - 1}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL, IMAGE])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=BYTES_ONLY
    )


def write_llava(model: Path, out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    out.mkdir(parents=True)
    for file in model.iterdir():
        os.link(file, out / file.name)
    vision = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    LlavaProcessor(
        vision, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token=IMAGE, chat_template=BYTES_ONLY,
    ).save_pretrained(out)  # fmt: skip


def write_llama(model: Path, out: Path, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Writes the decoder alone and returns its config."""
    whole = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    alone = LlamaForCausalLM(whole.config.text_config)
    alone.model, alone.lm_head = whole.model.language_model, whole.lm_head
    alone.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return whole.config.text_config


def write_qwen2_vl(sizes: LlamaConfig, out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    named = {f"{n.strip('<|>')}_token_id": SPECIAL.index(n) for n in SPECIAL[4:]}
    names = {"image_token_id": named["image_pad_token_id"], "video_token_id": named["video_pad_token_id"]}
    text = {
        name: getattr(sizes, name)
        for name in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "vocab_size", "max_position_embeddings",
        )
    }  # fmt: skip
    axes = sizes.head_dim // 8  # of the frequencies, for time, row and column
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [axes, axes * 3 // 2, axes * 3 // 2]}}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "rope_theta": 10000.0, "tie_word_embeddings": False}
    tower = {"depth": 4, "embed_dim": 256, "num_heads": 4, "hidden_size": sizes.hidden_size, "mlp_ratio": 4}
    config = Qwen2VLConfig(
        **text, text_config=text, vision_config=tower, **names, vision_start_token_id=named["vision_start_token_id"],
        vision_end_token_id=named["vision_end_token_id"],
    )  # fmt: skip
    Qwen2VLForConditionalGeneration(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    Qwen2VLImageProcessor().save_pretrained(out)


def main() -> None:
    model, out = map(Path, sys.argv[1:])
    tokenizer = tokenizer_of(32000)
    write_llava(model, out / "llava", tokenizer)
    sizes = write_llama(model, out / "llama", tokenizer)
    write_qwen2_vl(sizes, out / "qwen2_vl", tokenizer)


if __name__ == "__main__":
    main()
