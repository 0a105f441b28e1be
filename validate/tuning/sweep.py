"""Every plan's answer to an example, in one walk down a tree: what plans agree on is computed once.

The unpruned pass gives the state at every K1; each (K1, R1) runs on from there and gives the state at every K2; each
(K2, R2) runs on to the end. One prefill a plan: the first generated token is the answer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from himap_export.engines.arrays import Inputs
from himap_export.engines.isolation import MEMORY, pooled
from himap_export.engines.questions import Example
from himap_export.graphs.spec import Dtype
from himap_export.validate.accuracy.prompter import prompter_of_checkpoint
from himap_export.validate.accuracy.systems import UNPRUNED, request_seed
from himap_export.validate.checkpoint import load_reference
from himap_export.validate.reference.criteria import ReferenceCut, State
from himap_export.validate.reference.reference import Reference
from himap_export.validate.tuning.grid import Candidate

SweptExample = tuple[Example, Mapping[str, int], int]  # an example, the first token by plan, and the right one
CRITERIA = {"himap": ("instruction", "image"), "random": ("random", "random")}


def first_tokens(
    reference: Reference, inputs: Inputs, candidates: Sequence[Candidate], policy: str = "himap", seed: int = 0
) -> dict[str, int]:
    """Returns the first token of the unpruned model ("none") and of every plan, by name; `candidates` sorted as `grid`
    does."""
    found, first = {}, CRITERIA[policy][0]
    state = reference.start(inputs.input_ids[0], inputs.pixel_values)
    at: dict[int, State] = {}
    for k1 in sorted({c.k1 for c in candidates}):
        state = at[k1] = reference.advance(state, k1, attention=True)
    found[UNPRUNED] = _last(reference, state)
    for (k1, r1), group in groupby(candidates, key=lambda c: (c.k1, c.r1)):
        kept, _ = reference.cut(at[k1], ReferenceCut(k1, first, r1), seed)
        found |= _second(reference, kept, candidates=list(group), criterion=CRITERIA[policy][1], seed=seed)
    return found


def _second(
    reference: Reference, state: State, candidates: Iterable[Candidate], criterion: str, seed: int
) -> dict[str, int]:
    """From behind the first cut: on to every K2, and from each to the end."""
    found = {}
    for k2, group in groupby(candidates, key=lambda c: c.k2):
        state = reference.advance(state, k2, attention=True)
        for candidate in group:
            kept, _ = reference.cut(state, ReferenceCut(k2, criterion, candidate.r2), seed)
            found[candidate.name] = _last(reference, kept)
    return found


def _last(reference: Reference, state: State) -> int:
    return int(reference.logits(reference.advance(state, reference.layers)).argmax())


@dataclass(frozen=True)
class Job:
    """What a worker needs: the checkpoint, how to compute, and the plans."""

    checkpoint: Path
    dtype: Dtype
    threads: int
    candidates: tuple[Candidate, ...]
    policy: str
    seed: int


def sweep(job: Job, examples: Sequence[tuple[int, Example]], workers: int) -> Iterator[SweptExample]:
    """Returns what `workers` processes find for numbered examples, in the order in which they are done.

    A HimapError of theirs is raised here, and one is if a process dies. Whoever stops early does not wait for them.
    """
    return pooled("sweeping plans", workers, examples, _answering, job, hint=f"{MEMORY} try `workers` 1")


def _answering(job: Job) -> Callable[[tuple[int, Example]], SweptExample]:
    reference = load_reference(job.checkpoint, job.dtype, job.threads)
    prompter = prompter_of_checkpoint(job.checkpoint)

    def answer(task: tuple[int, Example]) -> SweptExample:
        number, example = task
        inputs, seed = prompter.arrays(example), request_seed(job.seed, number)
        tokens = first_tokens(reference, inputs, candidates=job.candidates, policy=job.policy, seed=seed)
        return example, tokens, prompter.label(example)

    return answer
