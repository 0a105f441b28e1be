"""What it costs to number anew who stays (GAP, arXiv 2506.21873): a control that no engine of ours can run.

Who is kept keeps its position in every graph that this project makes. Here the PyTorch reference, which those graphs
are compared with, answers the same questions twice, once like that and once with positions that count from 0 again
behind each cut, and the same image tokens kept for the same reasons.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from dataset import write
from tables import KINDS, table
from torch import Tensor
from transformers import DynamicCache

from himap_export.engines.processor import Processor
from himap_export.engines.questions import Example, read_dataset
from himap_export.exporter.aliases import ALIASES
from himap_export.validate.accuracy.choices import is_right
from himap_export.validate.accuracy.evaluate import percent, points
from himap_export.validate.accuracy.prompter import prompter_of_checkpoint
from himap_export.validate.accuracy.statistics import accuracy_interval, paired_difference
from himap_export.validate.reference.criteria import Cuts, ReferenceCut, State, reference_himap
from himap_export.validate.reference.reference import Reference

FOLDER = Path(ALIASES["shapes"].source)
SEED, QUESTIONS, TOKENS = 11, 700, 2  # of an answer, two tokens are enough to judge it
PLANS: dict[str, Cuts] = {
    "himap": reference_himap(2, 5, 0.5, 0.75),
    "uniform": (ReferenceCut(2, "uniform", 0.5), ReferenceCut(5, "uniform", 0.75)),
    "dart": (ReferenceCut(1, "dart", 0.5), ReferenceCut(3, "dart", 0.75)),
}
NUMBERED = ("original", "renumbered")


class Renumbered(Reference):
    """The reference, but that the tokens alive behind a cut count from 0 again."""

    def rope_positions(self, state: State) -> Tensor:
        return torch.arange(len(state.alive))

    @torch.no_grad()
    def step(self, tokens: Tensor, position: int, cache: DynamicCache, shift: int = 0) -> Tensor:
        """Logits [B,W] of one decode step: in each layer the token follows those that the layer saw."""
        hidden = self.decoder.embed_tokens(tokens[:, None])
        for layer in range(self.layers):
            hidden, _ = self.run(range(layer, layer + 1), hidden, torch.tensor([cache.get_seq_length(layer)]), cache)
        return self._logits(hidden)


def ask(examples: Sequence[Example]) -> dict[str, list[bool]]:
    """Whether each answer is right, by plan and numbering."""
    torch.set_num_threads(1)
    prompter = prompter_of_checkpoint(FOLDER)
    references: dict[str, Reference] = {
        "original": Reference(FOLDER, attn_implementation="sdpa"),
        "renumbered": Renumbered(FOLDER, attn_implementation="sdpa"),
    }
    found: dict[str, list[bool]] = {f"{plan} {numbered}": [] for plan in PLANS for numbered in NUMBERED}
    for example in examples:
        inputs, processor = prompter.arrays(example), prompter.processor
        for plan, cuts in PLANS.items():
            for numbered, reference in references.items():
                said = answer(reference, processor, inputs.input_ids, inputs.pixel_values, cuts)
                found[f"{plan} {numbered}"].append(is_right(example, said))
    return found


def answer(reference: Reference, processor: Processor, ids: np.ndarray, pixels: np.ndarray, cuts: Cuts) -> str:
    tokens, _ = reference.answer(reference.prefill(ids, pixels, cuts=cuts), TOKENS)
    return processor.text(tokens[0].tolist(), reference.stop_tokens)


def control(out: Path, docs: Path | None) -> None:
    """Asks on two cores, and writes positions.md."""
    examples = read_dataset(write(out / "positions", QUESTIONS, SEED)).examples
    kinds = np.array([e.type for e in examples])
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        halves = list(pool.map(ask, (examples[: QUESTIONS // 2], examples[QUESTIONS // 2 :])))
    right = {name: np.array([*halves[0][name], *halves[1][name]]) for name in halves[0]}
    lines = [f"# Who stays keeps its position, or is numbered anew, on {QUESTIONS} questions", ""]
    lines += ["Right answers of the PyTorch reference in percent, and what renumbering changes, in points.", ""]
    head = ("questions", *(f"{p} {n}" for p in PLANS for n in (*NUMBERED, "difference")))
    rows = list[tuple[str, ...]]()
    for kind in KINDS:
        here, cells = (kinds == kind) | (kind == "all"), list[str]()
        for plan in PLANS:
            own = [right[f"{plan} {numbered}"][here] for numbered in NUMBERED]
            cells += [*(percent(accuracy_interval(r)) for r in own), points(paired_difference(own[1], own[0]))]
        rows.append((kind, *cells))
    lines += table(head, rows)
    print("\n".join(lines))
    if docs is not None:
        docs.mkdir(parents=True, exist_ok=True)
        (docs / "positions.md").write_text("\n".join([*lines, ""]))
