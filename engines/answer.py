"""Answering: a question or arrays through the pipeline, the text streamed, the clock read where users feel it."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tokenizers import Tokenizer

from himap_export.engines.arrays import Inputs
from himap_export.engines.bundle import Bundle
from himap_export.engines.image import ImagePreprocessing, load_image, nearest_size, preprocess
from himap_export.engines.pipeline import Pipeline
from himap_export.engines.prompt import TOKENIZER, Detokenizer, PromptFormat, encode, load_tokenizer
from himap_export.engines.sampling import Sampling
from himap_export.graphs.errors import Exit, HimapError


@dataclass(frozen=True)
class Question:
    """One image and one prompt, as arrays; `detokenizer` turns the answer back into text."""

    image: Image.Image
    prompt: str
    preprocessing: ImagePreprocessing
    arrays: Inputs
    detokenizer: Detokenizer


@dataclass(frozen=True)
class Answer:
    """`outputs`: image_features, logits, tokens and by cut kept_k1, .. over all prompts. Seconds: `first` until the
    first token of the first batch (vision and prefill), `decoding` for all `steps` after it."""

    text: str
    outputs: dict[str, npt.NDArray[Any]]
    first: float
    decoding: float
    steps: int


def load_processor(bundle: Bundle, weights: Sequence[Path]) -> tuple[Tokenizer, PromptFormat]:
    """The bundle's tokenizer, which may lie in one of the `weights` folders, and its prompts' format.

    HimapError (usage) if there is none.
    """
    manifest = bundle.manifest
    files = [bundle.path(manifest.tokenizer)] if manifest.tokenizer else [folder / TOKENIZER for folder in weights]
    file = next((file for file in files if file.is_file()), None)
    if manifest.prompt is None or file is None:
        hint = "its checkpoint had none: use --load-inputs"
        if manifest.prompt is not None:
            hint = (
                f"it was exported without a checkpoint: put {TOKENIZER} into the --weights folder, or use --load-inputs"
            )
        raise HimapError(f"{bundle.folder} holds no tokenizer", hint=hint, code=Exit.USAGE)
    return load_tokenizer(file), manifest.prompt


def load_question(
    bundle: Bundle, image_file: Path, prompt: str, weights: Sequence[Path] = (), size: tuple[int, int] | None = None
) -> Question:
    """The question, its image made `size` (height, width) or, if None, the bundle's size nearest to the image's shape.

    HimapError if the bundle and the `weights` folder have no tokenizer, or the image cannot be read.
    """
    image = load_image(image_file)
    images = bundle.manifest.images
    size = size or nearest_size((image.height, image.width), [spec.size for spec in images.values()])
    spec = images[bundle.image_name(size)]
    tokenizer, form = load_processor(bundle, weights)
    ids = encode(tokenizer, form, prompt, spec.tokens)
    arrays = Inputs(ids[None], preprocess(image, spec.preprocessing))
    return Question(image, prompt, spec.preprocessing, arrays, Detokenizer(tokenizer))


def run_arrays(
    pipeline: Pipeline,
    arrays: Inputs,
    new_tokens: int,
    sampling: Sampling,
    question: Question | None,
    stream: IO[str] | None,
) -> Answer:
    """All prompts, B at a time; shorter answers are filled with the padding token.

    Prompt n draws its random cuts, if the plan has any, by the sampling's seed + n, and its tokens by seed and n:
    what it is answered does not depend on the batch it stands in. HimapError if logits are not finite.
    """
    batch, pad = pipeline.spec.budget.batch, pipeline.manifest.model.pad_token
    numbers = range(len(arrays.input_ids))
    found: dict[str, list[npt.NDArray[Any]]] = {}
    text, first, decoding, steps = "", 0.0, 0.0, 0
    for n, a in enumerate(arrays.batches(batch)):
        start = time.perf_counter()
        requests = numbers[n * batch : (n + 1) * batch]
        seeds = sampling.seed + np.array(requests, np.int64)
        prefilled, layout = pipeline.prefill(a.input_ids, a.pixel_values, a.attention_mask, seeds)
        answer: list[npt.NDArray[np.int64]] = []
        for token in pipeline.generate(prefilled, layout, new_tokens, sampling, requests):
            if not answer:
                first, start = first or time.perf_counter() - start, time.perf_counter()
            answer.append(token)
            if question is not None and token[0] not in pipeline.manifest.model.eos_tokens:
                piece = question.detokenizer.push(int(token[0]))
                piece = piece if text else piece.lstrip()  # the space that tokenizers put before a word
                text += piece
                if stream is not None:
                    print(piece, end="", file=stream, flush=True)
        decoding, steps = decoding + time.perf_counter() - start, steps + len(answer) - 1
        features = pipeline.read("image_features")[: len(a.input_ids)]
        arrays_of: dict[str, npt.NDArray[Any]] = {"image_features": features, **prefilled.kept}
        arrays_of["logits"] = prefilled.logits
        for name, values in (arrays_of | {"tokens": np.stack(answer, axis=1)}).items():
            found.setdefault(name, []).append(values)
    if question is not None:
        rest = question.detokenizer.finish()
        text += rest
        if stream is not None:
            print(rest, file=stream)
    width = max(t.shape[1] for t in found["tokens"])
    found["tokens"] = [np.pad(t, ((0, 0), (0, width - t.shape[1])), constant_values=pad) for t in found["tokens"]]
    return Answer(text, {k: np.concatenate(v) for k, v in found.items()}, first, decoding, steps)


def show(answer: Answer, pipeline: Pipeline, opened: float, as_json: bool) -> None:
    """What the answer cost: to standard output as JSON, else as one line."""
    rate, run = answer.steps / answer.decoding if answer.steps else 0.0, pipeline.spec
    if as_json:
        facts = {
            "text": answer.text,
            "tokens": answer.outputs["tokens"].tolist(),
            "device": pipeline.engines.device,
            "open_s": round(opened, 3),
            "first_token_s": round(answer.first, 4),
            "tokens_per_s": round(rate, 1),
            "image_tokens": list(run.budget.visual),
            "plan": run.plan_name,
            "text_budget": run.budget.text,
        }
        print(json.dumps(facts))
        return
    speed = f"{rate:.0f} tokens/s" if answer.steps else "one token"
    tokens = " -> ".join(map(str, run.budget.visual))
    spoken = [f"first token {answer.first * 1e3:.0f} ms", speed, f"image tokens {tokens}"]
    if len(run.manifest.variants) > 1:
        spoken.append(f"plan {run.plan_name}, text budget {run.budget.text}")
    print(f"[{', '.join(spoken)}, {pipeline.backend} on {pipeline.engines.device}]")
