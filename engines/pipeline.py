"""The chain: vision, the stages of prefill, then decode over KV caches that stay where they are.

Every tensor of every graph is static, so all are allocated once, when a bundle is opened, and bound by their places
(`graphs/ports.py`): what one stage writes the next one reads in place, and prefill's caches are decode's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from himap_export.engines.arrays import memory_bytes
from himap_export.engines.backends import ANYWAY, Engines, Opening, Tensor, open_backend
from himap_export.engines.bundle import RunSpec
from himap_export.engines.layout import Integers, PromptLayout, lay_out
from himap_export.engines.sampling import Sampler, Sampling
from himap_export.engines.weight_file import NUMPY
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import Place, Port, Role
from himap_export.graphs.spec import PADDING, SEEDS

Seen = Mapping[Place, npt.NDArray[Any]]  # what vision writes: features, [B,V,D] each
FP16_MAX, FP32_MAX = float(np.finfo(np.float16).max), float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Prefilled:
    """What prefill leaves: `logits` [b,W] fp32 at the last prompt token, and by cut (`kept_k1`, ..) the original
    positions it kept, [b,S1], [b,S2], .., -1 for padding."""

    logits: npt.NDArray[np.float32]
    kept: Mapping[str, Integers]


class Pipeline:
    """A variant of a bundle, opened on a backend, for batches of up to B prompts at a time.

    `engines` of another pipeline over the same bundle share its one copy of the weights; tensors are each one's own.
    """

    def __init__(self, spec: RunSpec, backend: str, opening: Opening = ANYWAY, engines: Engines | None = None) -> None:
        self.spec, self.manifest, self.backend = spec, spec.manifest, backend
        if backend not in self.manifest.engines:
            held = ", ".join(self.manifest.engines)
            raise HimapError(f"{spec.bundle.folder} holds no {backend} engines", f"it holds {held}", code=Exit.MISSING)
        self.engines: Engines = engines or open_backend(backend, spec.bundle, opening)
        self.tensors: dict[Place, Tensor] = {}
        self.stages = spec.plan.stages
        self._check_memory()
        self._rope_shift = np.zeros(spec.budget.batch, np.int64)  # of the prompts that were loaded last
        self._run = {name: self._bind(name) for name in ("vision", *self.stages, "decode")}
        self._prefill, self._decode = self.chained("vision", *self.stages), self.chained("decode")

    def _check_memory(self) -> None:
        """Refuses tensors, all allocated at once, that are more than memory: a machine that swaps is as good as
        dead."""
        if self.engines.device != "cpu":
            return
        ports = {port.place: port for stage in self.spec.variant.graphs for port in self._ports(stage).values()}
        needed = sum(prod(port.shape) * np.dtype(NUMPY[port.dtype]).itemsize for port in ports.values())
        if needed > memory_bytes():
            details = f"{needed / 1e9:.0f} GB for its caches and states, this machine has {memory_bytes() / 1e9:.0f}"
            summary = f"{self.spec.bundle.folder} is too large for this machine"
            raise HimapError(summary, details, "export smaller budgets")

    def _ports(self, stage: str) -> Mapping[str, Port]:
        record = self.spec.graph(stage)
        return {**record.inputs, **record.outputs}

    def _bind(self, stage: str) -> Callable[[], None]:
        ports = self._ports(stage)
        for port in ports.values():
            if port.place not in self.tensors:
                self.tensors[port.place] = self.engines.tensor(port)
        bound = {name: self.tensors[port.place] for name, port in ports.items()}
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

    def _write(self, values: Mapping[Role, npt.NDArray[Any]]) -> None:
        """Writes those of `values` that a graph of this variant reads."""
        for role, array in values.items():
            if Place(role) in self.tensors:
                self.tensors[Place(role)].write(array)

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
        self._write({
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
        self._write({"pixel_values": np.concatenate([pixel_values, *[pixel_values[-tiles:]] * missing])})

    def prefill(
        self,
        input_ids: Integers,
        pixel_values: npt.NDArray[Any] | Seen,
        attention_mask: Integers | None = None,
        seeds: Integers | None = None,
    ) -> tuple[Prefilled, PromptLayout]:
        """Loads prompts, as `load`, then runs vision, unless it is known what it makes of the pixels, and all stages of
        prefill."""
        layout = self.load(input_ids, pixel_values, attention_mask, seeds)
        (self._behind_vision if isinstance(pixel_values, Mapping) else self._prefill)()
        return self.prefilled(len(input_ids)), layout

    @cached_property
    def _behind_vision(self) -> Callable[[], None]:
        return self.chained(*self.stages)

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

    def step(self, tokens: Integers, positions: Integers) -> npt.NDArray[np.float32]:
        """Appends one token [B] per sample at its original position [B]; returns logits [B,W]."""
        self.feed(tokens, positions)
        self._decode()
        return self.read("logits")

    def feed(self, tokens: Integers, positions: Integers) -> None:
        """Writes what decode reads."""
        turned = np.repeat((positions + self._rope_shift)[:, None, None], 3, axis=2)
        self._write({
            "next_id": tokens[:, None], "next_position": positions[:, None], "next_rope_position": turned,
        })  # fmt: skip

    def generate(
        self,
        prefilled: Prefilled,
        layout: PromptLayout,
        new_tokens: int,
        sampling: Sampling | None = None,
        requests: Sequence[int] | None = None,
    ) -> Iterator[Integers]:
        """Yields tokens [b], one array per step, until every sample has ended; an ended one goes on with padding.

        `requests` [b], 0, 1, .. if not given, are the samples' numbers: by theirs and the seed they draw. HimapError if
        logits are not finite.
        """
        limit = self.spec.budget.new
        if not 1 <= new_tokens <= limit:
            hint = f"1 to {limit}, or export with `max_new_tokens` {new_tokens}"
            summary = f"`max_new_tokens` {new_tokens} is outside the bundle's budget"
            raise HimapError(summary, hint=hint, code=Exit.USAGE)
        samples, batch, model = len(prefilled.logits), len(layout.lengths), self.manifest.model
        sampler = Sampler(sampling or Sampling(), range(samples) if requests is None else requests)
        ended, logits = np.zeros(samples, bool), prefilled.logits
        for step in range(new_tokens):
            tokens = np.where(ended, model.pad_token, sampler(np.where(ended[:, None], 0, logits)))
            yield tokens
            ended |= np.isin(tokens, model.eos_tokens)
            if ended.all() or step == new_tokens - 1:
                return
            logits = self.step(np.resize(tokens, batch), layout.lengths + step)[:samples]
