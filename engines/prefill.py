"""Prefill: prompts in, vision and the stages run, logits and the kept positions out.

Vision looks at one picture at a time, whatever the batch: what it makes of each is copied to where the stages read the
features of all.

Every tensor of every graph is static, so all are allocated once, when a variant is opened, and bound by their places
(`graphs/ports.py`): what one stage writes the next one reads in place.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.arrays import memory_bytes
from himap_export.engines.backends import ANYWAY, Engines, Opening, Tensor, open_backend
from himap_export.engines.bundle import RunSpec
from himap_export.engines.layout import Integers, PromptLayout, how_many, lay_out
from himap_export.engines.vision import FeatureCache, Features, Vision
from himap_export.engines.weight_file import NUMPY
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import Place, Port, Role, seen_as
from himap_export.graphs.spec import PADDING, SEEDS

Tensors = dict[Place, Tensor]
Seen = Mapping[Place, npt.NDArray[Any]]  # what the stages read of pictures: features, [B,V0,D] each
FP16_MAX, FP32_MAX = float(np.finfo(np.float16).max), float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Prefilled:
    """What prefill leaves: `logits` [b,W] fp32 at the last prompt token, and by cut (`kept_k1`, ..) the original
    positions it kept, [b,S1], [b,S2], .., -1 for padding."""

    logits: npt.NDArray[np.float32]
    kept: Mapping[str, Integers]


def check_memory(device: str, graphs: Iterable[tuple[RunSpec, str]]) -> None:
    """Refuses the tensors of what plays these stages of variants, all allocated at once, if they are more than the
    memory of a CPU: a machine that swaps is as good as dead."""
    if device != "cpu":
        return
    ports = {(id(spec), p.place, p.shape): p for spec, stage in graphs for p in _ports(spec, stage).values()}
    needed = sum(prod(port.shape) * np.dtype(NUMPY[port.dtype]).itemsize for port in ports.values())
    if needed > memory_bytes():
        details = f"{needed / 1e9:.0f} GB for caches and states, this machine has {memory_bytes() / 1e9:.0f}"
        raise HimapError("the bundle is too large for this machine", details, "export smaller budgets or fewer slots")


def _ports(spec: RunSpec, stage: str) -> Mapping[str, Port]:
    record = spec.graph(stage)
    return {**record.inputs, **record.outputs}


def _write(tensors: Tensors, values: Mapping[Role, npt.NDArray[Any]]) -> None:
    """Writes those of `values` that a graph of this variant reads."""
    for role, array in values.items():
        if Place(role) in tensors:
            tensors[Place(role)].write(array)


class Prefill:
    """What prefills up to B prompts at a time with a variant of a bundle, opened on a backend.

    `beside` another one over the same bundle it shares its engines, their one copy of the weights and the features of
    pictures that either has seen; tensors are each one's own.
    """

    vision: Vision

    def __init__(self, spec: RunSpec, backend: str, opening: Opening = ANYWAY, beside: "Prefill | None" = None) -> None:
        self.spec, self.manifest, self.backend = spec, spec.manifest, backend
        if backend not in self.manifest.engines:
            held = ", ".join(self.manifest.engines)
            raise HimapError(f"{spec.bundle.folder} holds no {backend} engines", f"it holds {held}", code=Exit.MISSING)
        self.engines: Engines = beside.engines if beside else open_backend(backend, spec.bundle, opening)
        self.features: FeatureCache = beside.features if beside else FeatureCache()
        self.tensors: Tensors = {}
        self.stages = spec.plan.stages
        self._rope_shift = np.zeros(spec.budget.batch, np.int64)  # of the prompts that were loaded last
        self._run: dict[str, Callable[[], None]] = {}
        self._slices: dict[tuple[Place, int], Tensor] = {}

    def _open_vision(self) -> Vision:
        """Binds the vision graph to this variant's tensors."""
        run = self._run["vision"] = self.engines.chain([self._bind("vision", self.tensors)])
        return Vision(
            self.spec.graph_name("vision"), self.spec.graph("vision").ports, self.tensors, run=run,
            engines=self.engines, cache=self.features,
        )  # fmt: skip

    def _bind(self, stage: str, tensors: Tensors) -> Callable[[], None]:
        """Returns what runs the graph of a stage over `tensors`; those that are not there yet are allocated."""
        ports = _ports(self.spec, stage)
        for port in ports.values():
            if port.place not in tensors:
                tensors[port.place] = self.engines.tensor(port)
        bound = {name: tensors[port.place] for name, port in ports.items()}
        return self.engines.bind(self.spec.graph_name(stage), bound)

    def chained(self, *graphs: str) -> Callable[[], None]:
        """Returns what runs `graphs` one after the other, on a GPU by one launch."""
        return self.engines.chain([self._run[name] for name in graphs])

    def run(self, stage: str) -> None:
        """Runs the graph of a stage on whatever its tensors now hold."""
        self._run[stage]()

    def read(self, role: Role, layer: int | None = None, cut: int | None = None) -> npt.NDArray[Any]:
        """Returns a copy of a tensor; bf16 as fp32."""
        return self.tensors[Place(role, layer, cut)].read()

    def load(
        self,
        input_ids: Integers,
        pixel_values: npt.NDArray[Any] | Seen,
        attention_mask: Integers | None = None,
        seeds: Integers | None = None,
        seconds: Sequence[float] = (),
    ) -> PromptLayout:
        """Checks up to B prompts [b,S] with the pixels [n*tiles,3,H,W] of all their pictures, looks at these, and
        writes what the stages read.

        Instead of pixels, what a pipeline over the same tower has `seen` in them. `seeds` [b], 0 if not given, are what
        random cuts draw by, modulo SEEDS; other plans read none. `seconds` [b] between two steps of a film.
        """
        m, budget, samples, film = self.manifest, self.spec.budget, len(input_ids), self.spec.image.film
        rate = film.rope_per_second if film else 0.0
        steps = [rate * each for each in seconds or (1.0,) * samples] if rate else []
        layout = lay_out(
            input_ids, attention_mask, image=m.model.image, vocab=m.decoder.vocab, budget=budget,
            grid=self.spec.image.grid if m.decoder.rope_axes else None, steps=steps,
        )  # fmt: skip
        if isinstance(pixel_values, Mapping):
            for place, features in pixel_values.items():
                self.tensors[place].write(features)
        else:
            self._look(pixel_values, layout.images[:samples])
        given = np.zeros(samples, np.int64) if seeds is None else seeds
        _write(self.tensors, {
            "input_ids": layout.input_ids,
            "position_ids": layout.position_ids,
            "token_type": layout.token_type,
            "rope_position_ids": layout.rope_position_ids,
            "seed": np.concatenate([given, *[given[-1:]] * (budget.batch - samples)])[:, None] % SEEDS,
        })  # fmt: skip
        self._rope_shift = layout.rope_shift
        return layout

    def _look(self, pixel_values: npt.NDArray[Any], images: Integers) -> None:
        """Looks at the pictures of prompts, of which each holds as many as `images` [b] says; of prompts that are
        missing in the batch at the last one's."""
        tiles, *view = self.vision.pixels_shape
        port = self.tensors[Place("pixel_values")].spec
        if pixel_values.shape != (wanted := (tiles * int(images.sum()), *view)):
            expected = f"expected {list(wanted)}, of {how_many(images.sum())}"
            expected += f" in {tiles} tiles each" if tiles > 1 else ""
            raise HimapError(f"pixel_values are {list(pixel_values.shape)}", expected, code=Exit.USAGE)
        most = FP16_MAX if port.dtype == "fp16" else FP32_MAX
        if not np.abs(pixel_values).max() <= most:  # false for NaN, too
            details = f"expected numbers up to {most:g}, the largest is {np.abs(pixel_values).max():g}"
            raise HimapError("pixel_values are out of range", details, code=Exit.USAGE)
        pictures = pixel_values.reshape(-1, tiles, *view)
        ends = np.cumsum(images)
        for row in range(self.spec.budget.batch):
            source = min(row, len(images) - 1)
            for n in range(images[source]):
                seen = self.vision.look(pictures[ends[source] - images[source] + n])
                self._show(seen, row * self.spec.budget.images + n)

    def _show(self, seen: Features, index: int) -> None:
        """Copies the features of a picture to where the stages read those of picture `index`, counted through all
        prompts."""
        for place, tensor in seen.items():
            key = seen_as(place), index
            if key not in self._slices:
                self._slices[key] = self.tensors[key[0]].row(index, self.spec.budget.images)
            self._slices[key].take(tensor)

    def _feed(self, tokens: Integers, positions: Integers, shift: Integers, tensors: Tensors) -> None:
        """Writes what decode reads: a token [B] for each row, at its original position [B]."""
        turned = np.repeat((positions + shift)[:, None, None], 3, axis=2)
        _write(tensors, {
            "next_id": tokens[:, None], "next_position": positions[:, None], "next_rope_position": turned,
        })  # fmt: skip

    def seen(self) -> Seen:
        """Returns what vision made of the pixels that were loaded last: a pipeline over the same tower can take it."""
        places = [seen_as(port.place) for port in self.spec.graph("vision").outputs.values()]
        return {place: self.tensors[place].read() for place in places}

    def prefilled(self, samples: int) -> Prefilled:
        """Returns what the tensors now hold, of the first `samples` prompts."""
        kept = {f"kept_{name}": self.kept(cut)[:samples] for cut, name in enumerate(self.stages[1:], 1)}
        return Prefilled(self.read("logits")[:samples], kept)

    def kept(self, cut: int) -> Integers:
        """Returns original positions [B,S_i] that cut 1, 2, .. kept, -1 for padding."""
        return np.where(self.read("kept_types", cut=cut) == PADDING, -1, self.read("kept_positions", cut=cut))
