"""Trains the shipped model `shapes`: a small LLaVA that answers questions about drawn scenes.

First the vision tower and projector learn what each patch shows and what stands beside it, from dense labels; then all
is trained on the answers. Both begin on parts of scenes, 8 x 8 and 16 x 16 patches at their place in the whole, so that
patches look and are numbered as in the 24 x 24 of the end, which is slow to train. All questions about an image share
its tokens: they stand behind it in one row, each blind to the others.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from draw import (
    BESIDE,
    CELL,
    COLORS,
    KINDS,
    LETTERS,
    PATCH,
    TYPES,
    Question,
    Scene,
    draw,
    held_out,
    patch_labels,
    questions,
    sample_scene,
)
from forward import Forward
from model import PATCHES, SYSTEMS, make_model, make_processor, make_tokenizer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

# How often a type is asked, against the others. To look for a kind is soon learnt; to look for a colour among several
# things, only when that is asked often.
EVEN = dict.fromkeys(TYPES, 1.0) | {"letter": 3.0, "relation": 3.0, "color": 2.0, "shape": 2.0, "count": 1.5}
HARD = {"color": 0.3, "count": 0.5, "where": 0.6, "exists": 2.0, "relation": 4.0, "shape": 5.0, "letter": 6.0}
HARDER = HARD | {"where": 0.4, "exists": 1.0, "relation": 8.0, "shape": 10.0, "letter": 4.0}
HARDEST = dict.fromkeys(TYPES, 1.0) | {"relation": 6.0}  # all others are known by then


@dataclass(frozen=True)
class Phase:
    """`steps` of `batch` scenes of cells x cells cells, `asked` questions each; none: dense labels alone."""

    cells: int
    steps: int
    batch: int
    part: int  # of a batch goes through at once: what it leaves for the way back stays in the caches
    asked: int
    rate: float  # of learning, at the start
    last: float  # and at the end
    weights: Mapping[str, float] = field(default_factory=dict)  # of the types asked


PHASES = (
    Phase(cells=2, steps=4000, batch=64, part=32, asked=0, rate=2e-3, last=1e-3),
    Phase(cells=4, steps=700, batch=32, part=16, asked=0, rate=1e-3, last=1e-3),
    Phase(cells=6, steps=200, batch=16, part=8, asked=0, rate=1e-3, last=1e-3),
    Phase(cells=2, steps=1600, batch=32, part=16, asked=10, rate=1.5e-3, last=1.2e-3, weights=EVEN),
    Phase(cells=2, steps=1500, batch=32, part=16, asked=10, rate=1.5e-3, last=1e-3, weights=HARD),
    Phase(cells=2, steps=1200, batch=32, part=16, asked=10, rate=1.2e-3, last=8e-4, weights=HARDER),
    Phase(cells=4, steps=600, batch=24, part=6, asked=14, rate=8e-4, last=6e-4, weights=HARDER),
    Phase(cells=6, steps=700, batch=16, part=4, asked=16, rate=6e-4, last=0.0, weights=HARDEST),
)
POOL = {2: 40_000, 4: 12_000, 6: 8_000}  # scenes drawn ahead for a phase, by cells


@dataclass(frozen=True)
class Sample:
    """A scene, its pixels [3,H,W] uint8 and its patch labels [7,patches]."""

    scene: Scene
    pixels: np.ndarray
    labels: np.ndarray


def _sample(cells: int, seed: str) -> Sample:
    scene = sample_scene(random.Random(seed), cells)
    return Sample(scene, np.asarray(draw(scene)).transpose(2, 0, 1).copy(), patch_labels(scene))


class Trainer:
    """The model, its optimiser and how far it has come: phase and step."""

    def __init__(self, seed: int, state: Path, compiled: bool, rank: int = 0, ranks: int = 1) -> None:
        torch.manual_seed(seed)
        self.seed, self.state, self.rank, self.ranks = seed, state, rank, ranks
        self.tokenizer = make_tokenizer()
        self.processor = make_processor(self.tokenizer)
        self.model = make_model(len(self.tokenizer))
        image = self.processor.image_processor
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (image.image_mean, image.image_std))
        classes = (len(KINDS) + 1, len(COLORS) + 1, len(LETTERS) + 1, *(len(KINDS) + 1 for _ in BESIDE))
        hidden = self.model.config.text_config.hidden_size
        self.heads = torch.nn.ModuleList(torch.nn.Linear(hidden, n) for n in classes)
        self.modules = torch.nn.ModuleDict({"model": self.model, "heads": self.heads})
        self.optimiser = torch.optim.AdamW(self.modules.parameters(), betas=(0.9, 0.98), weight_decay=0.05, fused=True)
        self.phase = self.step = 0
        self.ids: dict[str, list[int]] = {}
        self.forward = Forward.of(self.model, compiled)

    def run(self, minutes: float) -> bool:
        """Trains for at most so long, and tells whether that was to the end."""
        end = time.monotonic() + minutes * 60
        while self.phase < len(PHASES):
            phase = PHASES[self.phase]
            pool = self._pool() if self.step < phase.steps else []
            recent, begin = Counter[str](), time.monotonic()
            while self.step < phase.steps:
                self._train(pool, recent)
                if self.step % 100 == 0:
                    self._tell(recent, time.monotonic() - begin)
                    begin = time.monotonic()
                if self.step % 200 == 0 or self.step == phase.steps:
                    late = self._agreed(time.monotonic() > end)
                    self.save_state()
                    if late:
                        return False
            self.phase, self.step = self.phase + 1, 0
        return True

    def _pool(self) -> list[Sample]:
        """This rank's scenes of the present phase of the training stream."""
        cells = PHASES[self.phase].cells
        seeds = (f"train {self.seed} {self.phase} {self.rank} {i}" for i in range(POOL[cells] // self.ranks))
        return [_sample(cells, seed) for seed in seeds]

    def _agreed(self, late: bool) -> bool:
        """What rank 0 says."""
        said = torch.tensor(float(late))
        torch.distributed.broadcast(said, 0)
        return bool(said)

    def _train(self, pool: list[Sample], recent: Counter[str]) -> None:
        """One step of AdamW, its draws seeded by where it stands, so that a resumed run draws the same."""
        phase, rng = PHASES[self.phase], random.Random(f"{self.seed} {self.phase} {self.step} {self.rank}")
        done = self.step / phase.steps
        rate = phase.last + (phase.rate - phase.last) * (1 + math.cos(math.pi * done)) / 2
        for group in self.optimiser.param_groups:
            group["lr"] = rate * min(1, (self.step + 1) / 100)
        samples = rng.sample(pool, phase.batch // self.ranks)
        self.optimiser.zero_grad()
        for start in range(0, len(samples), phase.part):
            part = samples[start : start + phase.part]
            share = len(part) / len(samples)
            with torch.autocast("cpu", torch.bfloat16):
                loss = (
                    self._answer_loss(part, rng, recent)
                    if phase.asked
                    else self._patch_loss(self._features(part), part)
                )
            (loss * share).backward()  # type: ignore[no-untyped-call]
            recent["loss"] += loss.item() * share
        self._average()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimiser.step()
        self.step, recent["steps"] = self.step + 1, recent["steps"] + 1

    def _average(self) -> None:
        """The ranks' gradients, in one exchange."""
        own = [p.grad for p in self.modules.parameters() if p.grad is not None]
        whole = torch.cat([g.flatten() for g in own])
        torch.distributed.all_reduce(whole)
        for gradient, mean in zip(own, (whole / self.ranks).split([g.numel() for g in own]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _tell(self, recent: Counter[str], seconds: float) -> None:
        if self.rank:
            return
        phase = PHASES[self.phase]
        tokens, speed = (phase.cells * CELL // PATCH) ** 2, recent["steps"] * phase.batch / seconds
        right = "  ".join(f"{t} {recent[t] / recent[f'{t} asked']:.0%}" for t in TYPES if recent[f"{t} asked"])
        what, loss = "answers" if phase.asked else "dense", recent["loss"] / recent["steps"]
        right = right or " ".join(f"{loss:.2f}" for loss in self.dense.tolist())
        log(
            f"{what} {tokens} tokens, step {self.step} of {phase.steps}, {speed:.0f} images/s  loss {loss:.4f}  {right}"
        )
        recent.clear()

    def _features(self, samples: list[Sample]) -> Tensor:
        """[B,P,D]"""
        pixels = (torch.from_numpy(np.stack([s.pixels for s in samples])).float() / 255 - self.mean) / self.std
        return self.forward.features(pixels, _places(samples))

    def _patch_loss(self, features: Tensor, samples: list[Sample]) -> Tensor:
        """Cross entropy of the patch labels: of the items' patches, and of all others as much, that they are none."""
        labels = torch.from_numpy(np.stack([s.labels for s in samples])).transpose(0, 1).flatten(1)
        item, features = labels[0] > 0, features.flatten(0, 1)
        losses = [functional.cross_entropy(head(features[item]), labels[i][item]) for i, head in enumerate(self.heads)]
        losses += [functional.cross_entropy(self.heads[0](features[~item]), labels[0][~item])]
        self.dense = torch.stack(losses).detach()
        return torch.stack(losses).sum()

    def _answer_loss(self, samples: list[Sample], rng: random.Random, recent: Counter[str]) -> Tensor:
        """Cross entropy of the answers' words and of the end behind them, all questions of an image in one row."""
        system = self._encode(f"{rng.choice(SYSTEMS)}USER: ", bos=True)
        asked = [self._questions(s.scene, rng) for s in samples]
        texts = [
            [(self._encode(f"{q.text} ASSISTANT:"), [*self._encode(f" {q.answer}"), 2]) for q in row] for row in asked
        ]
        rows = _stacked([[i for q, a in row for i in q + a] for row in texts], 0)
        wanted = _stacked([[i for q, a in row for i in [-100] * (len(q) - 1) + a + [-100]] for row in texts], -100)
        owner = _stacked([[n for n, (q, a) in enumerate(row) for _ in q + a] for row in texts], -1)
        features, answers = self._features(samples), wanted != -100
        prompt, at, first = self._prompt(features, samples, system)
        hidden = self.forward.texts(prompt, at, texts=rows, owner=owner, first=first)
        logits = self.model.lm_head(hidden[answers])
        self._count(asked, owner, answers, logits.argmax(-1) != wanted[answers], recent)
        loss = functional.cross_entropy(logits, wanted[answers])
        return loss * 2 + 0.1 * self._patch_loss(features, samples)

    def _prompt(self, features: Tensor, samples: list[Sample], system: list[int]) -> tuple[Tensor, Tensor, int]:
        """The embedded prompt [B,P,D] up to its questions, its positions [B,P], and the position behind it; the patches
        of a part of a scene stand where they do in the whole."""
        behind, batch, image = self._encode("\n"), len(samples), len(system) + PATCHES**2
        embed = self.model.model.language_model.embed_tokens
        before, after = (embed(torch.tensor(ids)).expand(batch, -1, -1) for ids in (system, behind))
        ends = (torch.arange(n, n + len(ids)).expand(batch, -1) for n, ids in ((0, system), (image, behind)))
        at = torch.cat([next(ends), len(system) + _places(samples), next(ends)], 1)
        return torch.cat([before, features, after], 1), at, image + len(behind)

    def _count(
        self, asked: list[list[Question]], owner: Tensor, at: Tensor, wrong: Tensor, recent: Counter[str]
    ) -> None:
        """Adds to `recent` how many answers were asked for and right, by type: those with no `wrong` token."""
        width = PHASES[self.phase].asked
        index = torch.arange(len(asked))[:, None] * width + owner
        mistakes = torch.zeros(len(asked) * width).index_add(0, index[at], wrong.float())
        for question, count in zip((q for row in asked for q in row), mistakes.tolist(), strict=True):
            recent[question.type] += not count
            recent[f"{question.type} asked"] += 1

    def _questions(self, scene: Scene, rng: random.Random) -> list[Question]:
        """As many as the phase asks, drawn by the weight of their type without putting any back."""
        asked, weights = PHASES[self.phase].asked, PHASES[self.phase].weights
        found = sorted(questions(scene, rng), key=lambda q: rng.random() ** (1 / weights[q.type]), reverse=True)
        return (found * asked)[:asked]

    def _encode(self, text: str, bos: bool = False) -> list[int]:
        if text not in self.ids:
            self.ids[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [1] * bos + self.ids[text]

    def save_state(self) -> None:
        """Writes weights, the optimiser's moments and the place in the schedule; whole or not at all."""
        if self.rank:
            return
        self.state.mkdir(parents=True, exist_ok=True)
        tensors = dict(self.modules.state_dict())
        names = {parameter: name for name, parameter in self.modules.named_parameters()}
        for parameter, moments in self.optimiser.state.items():
            tensors |= {f"{key} of {names[parameter]}": value for key, value in moments.items()}
        new = self.state / "new.safetensors"
        save_file(tensors, new, {"place": json.dumps([self.phase, self.step])})
        new.replace(self.state / "state.safetensors")

    def load_state(self) -> None:
        """Goes on from what `save_state` wrote, if there is any."""
        file = self.state / "state.safetensors"
        if not file.exists():
            return
        with safe_open(file, "pt") as found:
            self.phase, self.step = json.loads(found.metadata()["place"])
            tensors = {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118
        self.modules.load_state_dict({name: t for name, t in tensors.items() if " of " not in name})
        for name, parameter in self.modules.named_parameters():
            moments = {
                key: tensors[f"{key} of {name}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key} of {name}" in tensors
            }
            if moments:
                self.optimiser.state[parameter] = moments

    def save(self, out: Path) -> None:
        """Writes the model in bf16, as Hugging Face does, and its processor."""
        self.model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
        self.model.to(torch.bfloat16).save_pretrained(out)
        self.processor.save_pretrained(out)


def _places(samples: list[Sample]) -> Tensor:
    """[B,P] int64: the numbers that the patches of parts of scenes have in the whole."""
    side, cell = samples[0].scene.cells * CELL // PATCH, CELL // PATCH
    within = torch.arange(side)[:, None] * PATCHES + torch.arange(side)
    corners = torch.tensor([(r * PATCHES + c) * cell for r, c in (s.scene.corner for s in samples)])
    return corners[:, None] + within.flatten()


def _stacked(rows: list[list[int]], fill: int) -> Tensor:
    """[B,N], `fill` behind the shorter."""
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


@torch.inference_mode()
def evaluate(folder: Path, count: int, seed: int) -> dict[str, float]:
    """Share of right answers by type and in all: the saved model, its own processor, greedy `generate`."""
    processor = LlavaProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    right, asked, batch = Counter[str](), Counter[str](), list[tuple[Image.Image, str, str, str]]()
    for n, item in enumerate(held_out(count, seed), 1):
        batch.append(item)
        if len(batch) == 32 or n == count:
            prompts = [f"USER: <image>\n{question} ASSISTANT:" for _, question, _, _ in batch]
            inputs = processor(images=[i[0] for i in batch], text=prompts, padding=True, return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            said = processor.batch_decode(tokens, skip_special_tokens=True)
            for words, (_, _, answer, kind) in zip(said, batch, strict=True):
                asked[kind] += 1
                right[kind] += words.strip() == answer
            batch.clear()
    return {kind: right[kind] / asked[kind] for kind in asked} | {"all": right.total() / asked.total()}


def log(line: str) -> None:
    print(line, flush=True)


def work(rank: int, args: argparse.Namespace, meeting: str) -> None:
    """One of the processes: each has a core, which is faster than two threads that wait for each other."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.processes)
    trainer, begin = Trainer(args.seed, args.state, args.compile, rank, args.processes), time.monotonic()
    trainer.load_state()
    if rank == 0:
        size, words = sum(p.numel() for p in trainer.model.parameters()), len(trainer.tokenizer)
        log(f"train.py --seed {args.seed}  torch {torch.__version__}, {size / 1e6:.2f} M parameters, {words} words")
        log(f"from phase {trainer.phase}, step {trainer.step}")
    ended = trainer.run(args.minutes)
    if rank == 0:
        log(f"{'ended' if ended else 'stopped'} after {(time.monotonic() - begin) / 60:.0f} minutes")
        trainer.save(args.out)
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=180, help="at most, in this run (default: 180)")
    parser.add_argument("--state", type=Path, default=Path("build/shapes"), help="what a stopped run goes on from")
    parser.add_argument("--processes", type=int, default=2, help="cores to use (default: 2)")
    parser.add_argument("--compile", action="store_true", help="the layers; needs a C++ compiler")
    parser.add_argument("--questions", type=int, default=3500, help="held-out questions (default: 3500)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (args, f"{folder}/meeting"), args.processes)  # type: ignore[no-untyped-call]
    accuracy = evaluate(args.out, args.questions, seed=1)
    log(f"held out, {args.questions} questions: " + "  ".join(f"{k} {v:.1%}" for k, v in accuracy.items()))
    sys.exit(accuracy["all"] < 0.9)


if __name__ == "__main__":
    main()
