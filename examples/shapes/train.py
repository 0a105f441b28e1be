"""Trains the shipped model `shapes`: a small LLaVA that answers questions about drawn scenes.

Two phases. First the vision tower and projector learn what each patch shows, from dense labels: minutes of that replace
hours of guessing from answers alone. Then everything is trained on the answers. All questions about an image share its
tokens: they stand behind it in one row, each blind to the others.
"""

import argparse
import random
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from draw import (
    ANSWERS,
    COLORS,
    LETTERS,
    SHAPES,
    Question,
    Scene,
    corpus,
    draw,
    held_out,
    patch_labels,
    questions,
    sample_scene,
)
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PIXELS, PATCH, ASKED = 112, 14, 6  # image side, patch side, questions per image and step
PATCHES = PIXELS // PATCH
PREAMBLE = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)
WEIGHTS = {
    "color": 1,
    "count": 1,
    "exists": 2,
    "shape": 3,
    "letter": 4,
    "relation": 4,
}  # hard ones are asked more often
SYSTEMS = ("", "", "", "Answer with one word. ", "You see a drawing. ", PREAMBLE)
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% else %} ASSISTANT: {{ message['content'][0]['text'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Sample:
    """An image as the model's pixels [3,112,112] uint8, its scene, and its patch labels [3,64]."""

    pixels: np.ndarray
    labels: np.ndarray
    scene: Scene


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over the questions: it can encode any text, and knows these words whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*corpus(), *(["USER: ", " ASSISTANT:", *SYSTEMS] * 50)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"}, padding_side="left",
    )  # fmt: skip


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}
    )
    return LlavaProcessor(
        image_processor, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=10, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4, image_size=PIXELS,
        patch_size=PATCH, projection_dim=128,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, image_seq_length=PATCHES * PATCHES,
        vision_feature_layer=-2, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def _sample(seed: str) -> Sample:
    scene = sample_scene(random.Random(seed))
    small = draw(scene).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
    return Sample(np.asarray(small).transpose(2, 0, 1).copy(), patch_labels(scene, PATCHES), scene)


def make_pool(size: int, seed: int) -> list[Sample]:
    """Scenes of the training stream, drawn ahead and resized as the processor does it."""
    with ProcessPoolExecutor(2) as workers:
        return list(workers.map(_sample, (f"train {seed} {i}" for i in range(size)), chunksize=256))


class Trainer:
    """The model, its data and its optimiser; `minutes` of training in all."""

    def __init__(self, seed: int, minutes: float, pool: int, resume: Path | None = None) -> None:
        torch.manual_seed(seed)
        self.rng, self.seconds = random.Random(seed), minutes * 60
        self.tokenizer = make_tokenizer()
        self.processor = make_processor(self.tokenizer)
        self.model = LlavaForConditionalGeneration.from_pretrained(resume) if resume else make_model(self.tokenizer)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self._image.image_mean, self._image.image_std))
        self.normalise = lambda pixels: (pixels.float() / 255 - mean) / std
        kinds = (len(SHAPES) + 2, len(COLORS) + 1, len(LETTERS) + 1)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(self.model.config.text_config.hidden_size, n) for n in kinds)
        self.pool = make_pool(pool, seed)
        self.ids: dict[str, list[int]] = {}
        for answer in ANSWERS:
            assert len(self._encode(f" {answer}")) == 1, f"{answer} is more than one token"

    @property
    def _image(self) -> CLIPImageProcessorPil:
        return self.processor.image_processor

    def run(self, seconds: float, batch: int, rate: float, dense: bool) -> None:
        """One phase: AdamW, a short warm-up, then a cosine over the time that is left."""
        parts = (self.model.model.vision_tower, self.model.model.multi_modal_projector, self.heads)
        modules = parts if dense else (self.model, self.heads)
        parameters = [p for m in modules for p in m.parameters()]
        optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
        start, step, recent = time.monotonic(), 0, Counter[str]()
        while (done := (time.monotonic() - start) / seconds) < 1:
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * done))
            with torch.autocast("cpu", torch.bfloat16):
                loss = self._dense_loss(batch) if dense else self._answer_loss(batch, recent)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            step, recent["loss"], recent["steps"] = step + 1, recent["loss"] + loss.item(), recent["steps"] + 1
            if step % 100 == 0:
                right = f"  answers {recent['right'] / recent['asked']:.1%}" if recent["asked"] else ""
                log(
                    f"{'dense' if dense else 'answers'} step {step} {done:4.0%} "
                    f"loss {recent['loss'] / recent['steps']:.4f}{right}"
                )
                recent.clear()

    def _features(self, samples: list[Sample]) -> torch.Tensor:
        """[B,64,D]"""
        pixels = self.normalise(torch.from_numpy(np.stack([s.pixels for s in samples])))
        features = self.model.get_image_features(pixels).pooler_output
        return torch.stack(list(features))

    def _patch_loss(self, features: torch.Tensor, samples: list[Sample]) -> torch.Tensor:
        labels = torch.from_numpy(np.stack([s.labels for s in samples]))
        losses = [
            functional.cross_entropy(head(features).flatten(0, 1), labels[:, i].flatten())
            for i, head in enumerate(self.heads)
        ]
        return torch.stack(losses).sum()

    def _dense_loss(self, batch: int) -> torch.Tensor:
        samples = self.rng.choices(self.pool, k=batch)
        return self._patch_loss(self._features(samples), samples)

    def _answer_loss(self, batch: int, recent: Counter[str]) -> torch.Tensor:
        """Cross entropy of the answers' words and of the end behind them, all questions of an image in one row."""
        samples = self.rng.choices(self.pool, k=batch)
        prefix = self._encode(f"{self.rng.choice(SYSTEMS)}USER: ", bos=True) + [3] * PATCHES**2 + self._encode("\n")
        asked = [self._questions(s.scene) for s in samples]
        texts = [
            [self._encode(f"{q.text} ASSISTANT:") + self._encode(f" {q.answer}") + [2] for q in row] for row in asked
        ]
        width = max(len(t) for row in texts for t in row)
        rows = torch.tensor([prefix + [i for t in row for i in t + [0] * (width - len(t))] for row in texts])
        features = self._features(samples)
        embeds = self.model.get_input_embeddings()(rows)
        embeds = embeds.masked_scatter((rows == 3)[..., None], features.to(embeds.dtype))
        mask, positions = _blind(len(prefix), width, ASKED)
        out = self.model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask.expand(batch, 1, -1, -1), position_ids=positions, use_cache=False
        )
        at = torch.tensor([[len(prefix) + n * width + len(t) - 3 for n, t in enumerate(row)] for row in texts])
        at = torch.stack([at, at + 1], -1).flatten(1)  # the word is said where the prompt ends, the end after it
        picked = out.last_hidden_state.gather(1, at[..., None].expand(-1, -1, embeds.shape[-1]))
        logits, wanted = self.model.lm_head(picked), rows.gather(1, at + 1)
        recent["right"] += int((logits.argmax(-1) == wanted)[:, ::2].sum())
        recent["asked"] += batch * ASKED
        return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()) * 2 + 0.1 * self._patch_loss(
            features, samples
        )

    def _questions(self, scene: Scene) -> list[Question]:
        """ASKED of them, drawn by the weight of their type without putting any back."""
        found = sorted(
            questions(scene, self.rng), key=lambda q: self.rng.random() ** (1 / WEIGHTS[q.type]), reverse=True
        )
        return (found * ASKED)[:ASKED]

    def _encode(self, text: str, bos: bool = False) -> list[int]:
        if text not in self.ids:
            self.ids[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [1] * bos + self.ids[text]

    def save(self, out: Path) -> None:
        self.model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
        self.model.save_pretrained(out)
        self.processor.save_pretrained(out)


def _blind(prefix: int, width: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Additive mask [1,1,N,N] and positions [1,N] of `count` texts behind one prefix, each blind to the others."""
    owner = torch.cat([torch.zeros(prefix), torch.arange(1, count + 1).repeat_interleave(width)])
    position = torch.cat([torch.arange(prefix), prefix + torch.arange(width).repeat(count)])
    index = torch.arange(len(owner))
    seen = (index[None] <= index[:, None]) & ((owner[None] == 0) | (owner[None] == owner[:, None]))
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None], position[None]


@torch.inference_mode()
def evaluate(folder: Path, count: int, seed: int) -> dict[str, float]:
    """Share of right answers by type and in all: the saved model, its own processor, greedy `generate`."""
    processor = LlavaProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    right, asked, batch = Counter[str](), Counter[str](), list[tuple[Image.Image, str, str, str]]()
    for n, item in enumerate(held_out(count, seed), 1):
        batch.append(item)
        if len(batch) == 64 or n == count:
            prompts = [f"USER: <image>\n{question} ASSISTANT:" for _, question, _, _ in batch]
            inputs = processor(images=[i[0] for i in batch], text=prompts, padding=True, return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            for said, (_, _, answer, kind) in zip(
                processor.batch_decode(tokens, skip_special_tokens=True), batch, strict=True
            ):
                asked[kind] += 1
                right[kind] += said.strip() == answer
            batch.clear()
    return {kind: right[kind] / asked[kind] for kind in asked} | {"all": right.total() / asked.total()}


def log(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="of training, all phases (default: 60)")
    parser.add_argument("--pool", type=int, default=40_000, help="scenes drawn ahead (default: 40000)")
    parser.add_argument("--questions", type=int, default=3000, help="held-out questions (default: 3000)")
    parser.add_argument("--resume", type=Path, help="go on from this checkpoint, answers only")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    begin = time.monotonic()
    resumed = " --resume" if args.resume else ""
    log(
        f"train.py --seed {args.seed} --minutes {args.minutes:g} --pool {args.pool}{resumed}  torch {torch.__version__}"
    )
    torch.set_num_threads(2)
    trainer = Trainer(args.seed, args.minutes, args.pool, args.resume)
    size = sum(p.numel() for p in trainer.model.parameters())
    log(
        f"{size / 1e6:.2f} M parameters, {len(trainer.tokenizer)} words, pool drawn in {time.monotonic() - begin:.0f} s"
    )
    if args.resume is None:
        trainer.run(trainer.seconds * 0.12, 64, 2e-3, dense=True)
    trainer.run(trainer.seconds * (1 if args.resume else 0.88), 32, 1.2e-3, dense=False)
    trainer.save(args.out)
    accuracy = evaluate(args.out, args.questions, seed=1)
    log(f"held out, {args.questions} questions: " + "  ".join(f"{k} {v:.1%}" for k, v in accuracy.items()))
    log(f"wall time {(time.monotonic() - begin) / 60:.0f} minutes")
    sys.exit(accuracy["all"] < 0.9)


if __name__ == "__main__":
    main()
