"""What a decoder's linear layers read when it answers questions, layer by layer.

Calibration runs the model in fp32, unpruned, on some prompts: the hidden states of all of them pass through one layer
before the next one is read. So one layer is in memory, whatever the model. The layers are the graphs of an export that
cuts before each of them and removes nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tqdm import tqdm

from himap_export.engines.image import load_image
from himap_export.engines.layout import ImageTokens, Integers, PromptLayout, lay_out, text_tokens
from himap_export.engines.processor import Processor
from himap_export.engines.prompt import TOKENIZER
from himap_export.engines.questions import Example, located, prompt_of, read_dataset
from himap_export.engines.scratch import scratch_folder
from himap_export.engines.weight_file import StoredTensor, as_numbers, map_tensors
from himap_export.exporter.bind import WeightNames, fitting
from himap_export.exporter.planning import Planned
from himap_export.exporter.processor import ProcessorData
from himap_export.exporter.quantize.awq import HEAD, Activations, Floats, Group, layer_groups
from himap_export.exporter.quantize.streamed import StreamedGraph
from himap_export.graphs.build import StageGraph
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import Cut, PruningPlan, TokenBudget
from himap_export.graphs.ports import Port, Role, WeightRef
from himap_export.graphs.spec import IMAGE, DecoderSpec
from himap_export.graphs.stages import StagedModel

LEAST, MOST = 8, 32  # prompts: fewer say little of a channel, more change little
_TOKENS = 256  # whose inputs are kept, of all prompts together


@dataclass(frozen=True)
class Source:
    """The model that is calibrated, as an export knows it: its weights lie in `tensors`, by `names`."""

    planned: Planned
    tensors: Mapping[str, StoredTensor]
    names: WeightNames
    processor: ProcessorData

    def stored(self, role: str, shape: tuple[int, ...]) -> StoredTensor:
        """Returns where the decoder's weight `role` lies. HimapError as `fitting`."""
        ref = self.names(role)
        return fitting(self.tensors, ref.name, shape, ref.rows)

    def read(self, role: str, shape: tuple[int, ...], rows: Integers | None = None) -> Floats:
        """Returns the weight, or some of its rows, as fp32. HimapError as `fitting`."""
        stored = self.stored(role, shape)
        mapped = map_tensors([stored])[stored.name]
        return as_numbers(mapped if rows is None else mapped[rows], stored.dtype).astype(np.float32)


def read_questions(file: Path) -> tuple[Example, ...]:
    """Returns up to MOST questions of a data set, from all over it. HimapError (usage) as `read_dataset`, or for fewer
    than LEAST."""
    found = read_dataset(file).examples
    if len(found) < LEAST:
        details = f"it holds {len(found)} question{'s' * (len(found) > 1)}, expected at least {LEAST}"
        raise HimapError(f"{file} is too small to calibrate with", details, code=Exit.USAGE)
    count = min(MOST, len(found))
    return tuple(found[n * len(found) // count] for n in range(count))


def activations(source: Source, questions: Sequence[Example], head: bool) -> Iterator[tuple[Group, Activations]]:
    """Yields what each group of linear layers reads of the prompts' real tokens, layer by layer; the head's last.

    HimapError: usage for a checkpoint without a tokenizer, a question that is no prompt, a weight that does not fit;
    missing without onnxruntime; failure for activations that are not finite.
    """
    spec = source.planned.decoder
    with scratch_folder("calibration") as folder:
        prompts, budget = _embedded(source, questions, folder)
        for layer in tqdm(range(spec.layers), desc="calibration", leave=False, disable=None, delay=0.5):
            yield from _layer(source, layer, prompts, budget).items()
        if head:
            tally, weight = _Tally(), source.read("norm.weight", (spec.hidden,))
            for prompt in prompts:
                tally.add(_normalised(prompt.load("hidden")[0], weight, spec.norm_eps), prompt)
            yield HEAD, tally.activations(HEAD)


def layer_graph(spec: DecoderSpec, layer: int, budget: TokenBudget) -> StageGraph:
    """Returns the graph of one decoder layer over all tokens of a prompt, fp32; its weights go by their roles."""
    cuts = tuple(Cut(n, "uniform", remove=0.0) for n in range(spec.layers))
    stages = TokenBudget(budget.visual * (spec.layers + 1), budget.text, budget.new)
    return StagedModel(spec, PruningPlan(cuts), stages, dtype="fp32", names=WeightRef).stage(layer + 1)


class _Prompt:
    """A prompt on its way through the layers: `length` real tokens, then padding; `sampled` are some of the real ones.
    What is large lies in files that begin with `place`."""

    def __init__(self, layout: PromptLayout, sampled: Integers, place: Path) -> None:
        self.length, self.sampled, self._place = int(layout.lengths[0]), sampled, place
        self._small: dict[Role, npt.NDArray[Any]] = {
            "position_ids": layout.position_ids, "kept_positions": layout.position_ids,
            "token_type": layout.token_type, "kept_types": layout.token_type,
            "rope_position_ids": layout.rope_position_ids,
        }  # fmt: skip

    def save(self, name: str, values: npt.NDArray[Any]) -> None:
        np.save(f"{self._place}.{name}.npy", values)

    def load(self, name: str) -> Floats:
        found: Floats = np.load(f"{self._place}.{name}.npy")
        return found

    def feeds(self, inputs: Mapping[str, Port]) -> dict[str, npt.NDArray[Any]]:
        """Returns what a layer reads, by the names of its `inputs`; its caches are not among it."""
        large = {name: port.role for name, port in inputs.items() if port.role in ("hidden", "deepstack")}
        found = {name: self._small[port.role] for name, port in inputs.items() if port.role in self._small}
        return found | {name: self.load("hidden" if role == "hidden" else name) for name, role in large.items()}


class _Tally:
    """Adds up what one group reads."""

    def __init__(self) -> None:
        self._sum: npt.NDArray[np.float64] | float = 0.0
        self._largest: Floats | float = 0.0
        self._tokens, self._rows = 0, list[Floats]()

    def add(self, x: Floats, prompt: _Prompt) -> None:
        """Counts x [S,in] of one prompt, without its padding."""
        size = np.abs(x[: prompt.length])
        self._sum = self._sum + size.sum(axis=0, dtype=np.float64)
        self._largest = np.maximum(self._largest, size.max(axis=0))
        self._tokens += prompt.length
        self._rows.append(x[prompt.sampled])

    def activations(self, group: Group) -> Activations:
        """Returns what `group` reads. HimapError if some of that is not finite."""
        mean = np.asarray(self._sum / self._tokens, np.float32)
        if not np.isfinite(self._largest).all():
            count = np.count_nonzero(~np.isfinite(self._largest))
            details = f"{count} of {mean.size} channels overflow in fp32 where {group.readers[0]} reads them"
            raise HimapError(f"cannot calibrate: the output of {group.maker} is not finite", details)
        return Activations(mean, np.asarray(self._largest), np.concatenate(self._rows))


def _normalised(x: Floats, weight: Floats, eps: float) -> Floats:
    """Returns x [S,D] normalised by its RMS: what the head reads."""
    rms: Floats = np.sqrt(np.square(x).mean(axis=1, keepdims=True) + np.float32(eps))
    return x / rms * weight


def _embedded(source: Source, questions: Sequence[Example], folder: Path) -> tuple[list[_Prompt], TokenBudget]:
    """Returns the prompts as they enter the first layer, and what they are padded to; saves their hidden states
    [1,S,D]."""
    spec, v, rules = source.planned.decoder, source.planned.variants[0], source.planned.model.family.prompt()
    image, ids = ImageTokens(rules.image_token, rules.between), _seen(source, questions, folder)
    longest = max(text_tokens(each, None, image) for each in ids)
    most = max(v.budget.text for v in source.planned.variants)
    budget = TokenBudget((v.vision.tokens,), text=min(longest, most), new=1)
    grid = v.vision.grid if spec.rope_axes else None
    each, random, prompts = -(-_TOKENS // len(ids)), np.random.default_rng(0), list[_Prompt]()
    for n, (example, given) in enumerate(zip(questions, ids, strict=True)):
        with located(example):
            layout = lay_out(given, None, image=image, vocab=spec.vocab, budget=budget, grid=grid)
        sampled = np.sort(random.permutation(int(layout.lengths[0]))[:each])
        prompt = _Prompt(layout, sampled, folder / str(n))
        hidden = source.read("embed_tokens.weight", (spec.vocab, spec.hidden), layout.input_ids[0])
        hidden[layout.token_type[0] == IMAGE] = prompt.load("image_features")[0]
        prompt.save("hidden", hidden[None])
        prompts.append(prompt)
    return prompts, budget


def _seen(source: Source, questions: Sequence[Example], folder: Path) -> list[Integers]:
    """Returns the questions' ids [1,S]; saves what the vision graph makes of their images."""
    from himap_export.exporter.vision import vision_graph  # torch: seconds to import

    planned, processor = source.planned, _processor(source)
    graph = vision_graph(
        "vision", planned.model.family, planned.variants[0].vision, hidden=planned.decoder.hidden,
        dtype="fp32", names=source.names,
    )  # fmt: skip
    stored = {name: fitting(source.tensors, name, w.shape, w.rows) for name, w in graph.weights.items()}
    run, ids = StreamedGraph(graph, stored, list(graph.model.graph.outputs)), list[Integers]()
    for n, example in enumerate(questions):
        with located(example):
            inputs = processor.inputs([load_image(example.image)], prompt_of(example))
        for name, features in run({"pixel_values": inputs.pixel_values}).items():
            np.save(folder / f"{n}.{name}.npy", features)
        ids.append(inputs.input_ids)
    return ids


def _processor(source: Source) -> Processor:
    """Returns the processor for images of the first variant. HimapError (usage) without a tokenizer."""
    found, v = source.processor, source.planned.variants[0]
    if found.prompt is None or TOKENIZER not in found.files:
        name = source.planned.model.name
        raise HimapError(f"{name} holds no tokenizer", "calibration asks questions", code=Exit.USAGE)
    if v.vision.film is not None or v.vision.several:
        details = "calibration asks about one image each"
        raise HimapError("`calibrate` needs a bundle for questions about one image", details, code=Exit.USAGE)
    return Processor(Tokenizer.from_buffer(found.files[TOKENIZER]), found.prompt, found.images[v.image])


def _layer(source: Source, layer: int, prompts: Sequence[_Prompt], budget: TokenBudget) -> dict[Group, Activations]:
    """Takes all prompts through a layer; returns what its groups read."""
    graph = layer_graph(source.planned.decoder, layer, budget)
    stored = {role: source.stored(role, weight.shape) for role, weight in graph.weights.items()}
    gemms = [node.inputs for node in graph.model.graph if node.op_type == "Gemm"]
    inputs = {weight.name: x for x, weight, *_ in gemms if x is not None and weight is not None}
    read = {group: inputs[f"{group.readers[0]}.weight"] for group in layer_groups(layer)}
    after = next(name for name, port in graph.ports.outputs.items() if port.role in ("hidden", "last_hidden"))
    hidden = next(value for value in graph.model.graph.outputs if value.name == after)
    run, tallies = StreamedGraph(graph, stored, [hidden, *read.values()]), {group: _Tally() for group in read}
    for prompt in prompts:
        found = run(prompt.feeds(graph.ports.inputs))
        for group, value in read.items():
            tallies[group].add(found[str(value.name)], prompt)
        prompt.save("hidden", found[after])
    return {group: tally.activations(group) for group, tally in tallies.items()}
