"""The random LLaVA of `prefill.py` as a model that can be asked over HTTP, its bundles, and the requests that are sent.

The tokenizer has a word for each token, so that a question has exactly as many tokens as it has words. The end of
sequence is an id that the head does not have: every answer is as long as it was asked to be.
"""

import base64
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prefill import TEXT, write_model

BEFORE, AFTER = 35, 135  # text tokens before the image and behind it
WORDS, IMAGE, NEVER = 31999, 31999, 32000  # the image's token follows the words; no logit has the last id
SIDE = 336
PRUNED, UNPRUNED = "himap", "none"
PLANS = """
[himap]
policy = "himap"
k1 = 2
k2 = 8
r1 = 0.5
r2 = 0.75

[none]
policy = "none"
"""


def write_checkpoint(folder: Path, **tower: int) -> None:
    """Writes the model, its tokenizer, its chat template and its image processor; `tower` as `write_model`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

    write_model(folder, **tower)
    vocabulary = {f"w{n}": n for n in range(WORDS)} | {"<image>": IMAGE}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<image>"])
    system = " ".join(f"w{n}" for n in range(1, BEFORE + 1))
    text = "{% for part in messages[0]['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    chat = f"{system} <image> {text}{{% endfor %}}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": NEVER, "pad_token_id": 0}))


def export_bundle(model: Path, out: Path, **options: Any) -> None:
    """Exports the pruned plan and the one without cuts into one bundle; `options` as himap_export.export's."""
    import himap_export as hx

    plans = out.with_name(f"{out.name}.toml")
    plans.write_text(PLANS)
    budgets = {"text_budget": TEXT, "max_new_tokens": 64}
    hx.export(model, out=out, overwrite=True, plan=plans, **(budgets | options))


@dataclass(frozen=True)
class Bundles:
    """Folders: the bundle whose decode has `slots` rows, and the one that answers as many prompts together."""

    slots: Path
    static: Path

    @classmethod
    def made(cls, work: Path, backend: str, dtype: str, slots: int) -> "Bundles":
        """Makes the checkpoint, once, and both bundles, always, so that they are today's graphs."""
        model = work / "model-served"
        if not (model / "generation_config.json").exists():
            write_checkpoint(model)
        export = partial(export_bundle, model, backend=backend, dtype=dtype)
        found = cls(work / "slots", work / "static")
        export(found.slots, slots=slots)
        export(found.static, batch=slots)
        return found


def pictures(count: int) -> list[str]:
    """Returns PNGs of a few coloured boxes as data URIs, some kB each."""
    from PIL import Image, ImageDraw

    found = []
    for n in range(count):
        draw, image = random.Random(n), Image.new("RGB", (SIDE, SIDE), "white")
        pen = ImageDraw.Draw(image)
        for _ in range(12):
            left, top = draw.randrange(SIDE), draw.randrange(SIDE)
            color = tuple(draw.randrange(256) for _ in range(3))
            pen.rectangle((left, top, left + 80, top + 80), color)
        held = io.BytesIO()
        image.save(held, "png")
        found.append(f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}")
    return found


def question(number: int, words: int = AFTER) -> str:
    """Returns so many `words`, drawn by `number`."""
    return " ".join(f"w{n}" for n in random.Random(number).choices(range(1, WORDS), k=words))


def bodies(model: str, tokens: int, images: Sequence[str], count: int = 32) -> list[bytes]:
    """Returns requests for streamed answers of exactly `tokens` tokens, with usage and the server's own times."""
    found = []
    for n in range(count):
        parts = [
            {"type": "image_url", "image_url": {"url": images[n % len(images)]}},
            {"type": "text", "text": question(n)},
        ]
        document = {
            "model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": tokens, "stream": True,
            "stream_options": {"include_usage": True}, "himap": {"return_timing": True},
        }  # fmt: skip
        found.append(json.dumps(document).encode())
    return found
