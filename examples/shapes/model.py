"""The untrained `shapes`: a LLaVA of 12 decoder layers over 576 image tokens, its tokenizer and its processor."""

import math

import torch
from draw import PATCH, SIDE, corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PATCHES = SIDE // PATCH  # a side
IMAGE_TOKEN = 3
PREAMBLE = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
SYSTEMS = ("", "", "", "Answer with one word. ", "You see a drawing. ", PREAMBLE)
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% else %} ASSISTANT: {{ message['content'][0]['text'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over the questions: it can encode any text, and knows these words whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*corpus(), *(["USER: ", " ASSISTANT:", *SYSTEMS] * 50)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left",
    )  # fmt: skip


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def make_model(words: int) -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=words, hidden_size=128, intermediate_size=384, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH, projection_dim=128,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=PATCHES**2,
        vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.embeddings.position_embedding.weight.data[1:] = grid_positions(vision.hidden_size)
    return model


def grid_positions(width: int) -> torch.Tensor:
    """[patches,width] sines and cosines of each patch's row and column, half of the width each, to begin from: what
    stands beside a patch is hardly learnt from random ones."""
    frequency = math.pi / PATCHES * torch.arange(1, width // 4 + 1) / 2
    angle = torch.arange(PATCHES)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], 1) / 2
    return torch.cat([waves.repeat_interleave(PATCHES, 0), waves.repeat(PATCHES, 1)], 1)
