"""Prefill: prompts in, vision and the stages run, logits and the kept positions out.

Every tensor of every graph is static, so all are allocated once, when a variant is opened, and bound by their places
(`graphs/ports.py`): what one stage writes the next one reads in place.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.arrays import memory_bytes
from himap_export.engines.backends import ANYWAY, Engines, Opening, Tensor, open_backend
from himap_export.engines.bundle import RunSpec
from himap_export.engines.layout import Integers, PromptLayout, lay_out
from himap_export.engines.weight_file import NUMPY
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import Place, Port, Role
from himap_export.graphs.spec import PADDING, SEEDS

Tensors = dict[Place, Tensor]
Seen = Mapping[Place, npt.NDArray[Any]]  # what vision writes: features, [B,V,D] each
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

    `engines` of another one over the same bundle share its one copy of the weights; tensors are each one's own.
    """

    def __init__(self, spec: RunSpec, backend: str, opening: Opening = ANYWAY, engines: Engines | None = None) -> None:
        self.spec, self.manifest, self.backend = spec, spec.manifest, backend
        if backend not in self.manifest.engines:
            held = ", ".join(self.manifest.engines)
            raise HimapError(f"{spec.bundle.folder} holds no {backend} engines", f"it holds {held}", code=Exit.MISSING)
        self.engines: Engines = engines or open_backend(backend, spec.bundle, opening)
        self.tensors: Tensors = {}
        self.stages = spec.plan.stages
        self._rope_shift = np.zeros(spec.budget.batch, np.int64)  # of the prompts that were loaded last
        self._run: dict[str, Callable[[], None]] = {}

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
    ) -> PromptLayout:
        """Checks up to B prompts [b,S] with pixels [b*tiles,3,H,W] and writes them where the stages read them.

        Instead of pixels, what a pipeline over the same tower has `seen` in them. `seeds` [b], 0 if not given, are what
        random cuts draw by, modulo SEEDS; other plans read none.
        """
        m, budget, samples = self.manifest, self.spec.budget, len(input_ids)
        grid = self.spec.image.grid if m.decoder.rope_axes else None
        layout = lay_out(
            input_ids, attention_mask, image=m.model.image, vocab=m.decoder.vocab, budget=budget, grid=grid
        )
        if isinstance(pixel_values, Mapping):
            for place, features in pixel_values.items():
                self.tensors[place].write(features)
        else:
            self._write_pixels(pixel_values, samples)
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

    def _write_pixels(self, pixel_values: npt.NDArray[Any], samples: int) -> None:
        tiles, port = self.spec.image.tiles, self.tensors[Place("pixel_values")].spec
        if pixel_values.shape != (wanted := (tiles * samples, *port.shape[1:])):
            each = "one image" if tiles == 1 else f"{tiles} tiles"
            expected = f"expected {list(wanted)}, {each} per prompt"
            raise HimapError(f"pixel_values are {list(pixel_values.shape)}", expected, code=Exit.USAGE)
        most = FP16_MAX if port.dtype == "fp16" else FP32_MAX
        if not np.abs(pixel_values).max() <= most:  # false for NaN, too
            details = f"expected numbers up to {most:g}, the largest is {np.abs(pixel_values).max():g}"
            raise HimapError("pixel_values are out of range", details, code=Exit.USAGE)
        missing = self.spec.budget.batch - samples
        _write(self.tensors, {"pixel_values": np.concatenate([pixel_values, *[pixel_values[-tiles:]] * missing])})

    def _feed(self, tokens: Integers, positions: Integers, shift: Integers, tensors: Tensors) -> None:
        """Writes what decode reads: a token [B] for each row, at its original position [B]."""
        turned = np.repeat((positions + shift)[:, None, None], 3, axis=2)
        _write(tensors, {
            "next_id": tokens[:, None], "next_position": positions[:, None], "next_rope_position": turned,
        })  # fmt: skip

    def seen(self) -> Seen:
        """Returns what vision made of the pixels that were loaded last: a pipeline over the same tower can take it."""
        return {port.place: self.tensors[port.place].read() for port in self.spec.graph("vision").outputs.values()}

    def prefilled(self, samples: int) -> Prefilled:
        """Returns what the tensors now hold, of the first `samples` prompts."""
        kept = {f"kept_{name}": self.kept(cut)[:samples] for cut, name in enumerate(self.stages[1:], 1)}
        return Prefilled(self.read("logits")[:samples], kept)

    def kept(self, cut: int) -> Integers:
        """Returns original positions [B,S_i] that cut 1, 2, .. kept, -1 for padding."""
        return np.where(self.read("kept_types", cut=cut) == PADDING, -1, self.read("kept_positions", cut=cut))
