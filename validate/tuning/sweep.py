"""Every plan's answer to an example, in one walk down a tree: what plans agree on is computed once.

The unpruned pass gives the state at every first cut; each of those runs on from there and gives the state at every
second one; and so on to the end. One prefill a plan: the first generated token is the answer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from himap_export.engines.arrays import Inputs
from himap_export.engines.isolation import MEMORY, pooled
from himap_export.engines.questions import Example
from himap_export.graphs.spec import Dtype
from himap_export.validate.accuracy.prompter import prompter_of_checkpoint
from himap_export.validate.accuracy.systems import request_seed
from himap_export.validate.checkpoint import load_reference
from himap_export.validate.reference.criteria import Cuts, State
from himap_export.validate.reference.reference import Reference
from himap_export.validate.registration import require_references

Plans = Mapping[str, Cuts]
Draw = tuple[str, int]  # a plan's name, and the repetition of what is random in it
SweptExample = tuple[Example, Mapping[Draw, int], int]  # an example, the first token by draw, and the right one


def first_tokens(reference: Reference, inputs: Inputs, plans: Plans, seeds: Sequence[int] = (0,)) -> dict[Draw, int]:
    """Returns the first token of every plan, by its name and the place of one of `seeds`, by which random cuts draw."""
    state = reference.start(inputs.input_ids[0], inputs.pixel_values)
    drawn = (_walk(reference, state, plans, seed=seed) for seed in seeds)
    return {(name, n): token for n, tokens in enumerate(drawn) for name, token in tokens.items()}


def _walk(reference: Reference, state: State, plans: Plans, depth: int = 0, *, seed: int) -> dict[str, int]:
    """The first token of `plans` that agree in their first `depth` cuts, behind which `state` is: on to every next cut,
    and from each to the end."""
    found = dict[str, int]()
    further = {name: cuts for name, cuts in plans.items() if len(cuts) > depth}
    for layer in sorted({cuts[depth].layer for cuts in further.values()}):
        state = reference.advance(state, layer, attention=True)
        for cut in dict.fromkeys(cuts[depth] for cuts in further.values() if cuts[depth].layer == layer):
            kept, _ = reference.cut(state, cut, seed)
            alike = {name: cuts for name, cuts in further.items() if cuts[depth] == cut}
            found |= _walk(reference, kept, alike, depth + 1, seed=seed)
    if ended := plans.keys() - further.keys():
        token = int(reference.logits(reference.advance(state, reference.layers)).argmax())
        found |= dict.fromkeys(ended, token)
    return found


@dataclass(frozen=True)
class Job:
    """What a worker needs: the checkpoint, how to compute, and the plans, each as often as there are `seeds`."""

    checkpoint: Path
    dtype: Dtype
    threads: int
    plans: Plans
    seeds: tuple[int, ...]


def sweep(job: Job, examples: Sequence[tuple[int, Example]], workers: int) -> Iterator[SweptExample]:
    """Returns what `workers` processes find for numbered examples, in the order in which they are done.

    A HimapError of theirs is raised here, and one is if a process dies. Whoever stops early does not wait for them.
    """
    return pooled("sweeping plans", workers, examples, _answering, job, hint=f"{MEMORY} try `workers` 1")


def _answering(job: Job) -> Callable[[tuple[int, Example]], SweptExample]:
    require_references("the sweep", (cut.criterion for cuts in job.plans.values() for cut in cuts))
    prompter = prompter_of_checkpoint(job.checkpoint)
    reference = load_reference(job.checkpoint, job.dtype, job.threads, image=prompter.processor.spec)

    def answer(task: tuple[int, Example]) -> SweptExample:
        number, example = task
        seeds = [request_seed(seed, number) for seed in job.seeds]
        tokens = first_tokens(reference, prompter.arrays(example), job.plans, seeds)
        return example, tokens, prompter.label(example)

    return answer
