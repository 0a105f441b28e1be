"""An export, phase by phase: resolve, plan, vision, stages, compile, finalise."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as with_fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnx_ir as ir
from msgspec.structs import replace

from himap_export.engines.backends import READ_GRAPHS, build_all, load_backend
from himap_export.engines.bundle import Bundle, digests
from himap_export.engines.layout import ImageTokens
from himap_export.engines.manifest import (
    FILE_NAME,
    EngineRecord,
    FileRecord,
    GraphRecord,
    Manifest,
    ModelRecord,
    Quantization,
    Variant,
    finalised,
    manifest_json,
    read_manifest,
)
from himap_export.engines.prompt import TOKENIZER
from himap_export.engines.questions import Example
from himap_export.engines.weight_file import StoredTensor, check_finite, read_header
from himap_export.exporter.bind import WeightNames, bind, fitting
from himap_export.exporter.checkpoint import Checkpoint, open_checkpoint
from himap_export.exporter.planning import Planned
from himap_export.exporter.processor import ProcessorData, read_processor
from himap_export.exporter.quantize.calibration import Source, read_questions
from himap_export.exporter.quantize.ready_linear import ReadyLinear
from himap_export.exporter.quantize.scaling import Calibrated, calibrate, write_folded
from himap_export.exporter.quantize.taking import take_over, taken_lines, write_multiplied
from himap_export.exporter.quantize.weights import Linear, write_quantised
from himap_export.exporter.store import store_weights, write_weights
from himap_export.exporter.target import settle_target, work_folder
from himap_export.graphs.build import StageGraph
from himap_export.graphs.errors import HimapError
from himap_export.graphs.ports import WeightRef
from himap_export.graphs.quantization import linear_shapes
from himap_export.graphs.stages import StagedModel

_TOOLS = ("himap-export", "numpy", "onnx", "onnx-ir", "onnxscript", "torch", "transformers", "tokenizers", "pillow")
Progress = Callable[[str], None]


@dataclass
class Export:
    """One export under way in the folder `work`; each phase adds what the next ones need."""

    planned: Planned
    checkpoint: Checkpoint
    processor: ProcessorData
    names: WeightNames
    ready: Mapping[str, ReadyLinear]
    work: Path
    command: tuple[str, ...]
    questions: tuple[Example, ...] = ()
    graphs: dict[str, StageGraph] = field(default_factory=dict)
    variants: list[Variant] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    records: dict[str, GraphRecord] = field(default_factory=dict)
    engines: dict[str, dict[str, EngineRecord]] = field(default_factory=dict)
    hashes: dict[str, FileRecord] = field(default_factory=dict)
    calibrated: Calibrated | None = None
    quantization: Quantization | None = None

    def vision(self) -> str:
        """Builds a vision graph for each image spec."""
        from himap_export.exporter.vision import vision_graph  # torch: seconds to import

        p = self.planned
        for image, spec in p.images.items():
            name = self._vision_name(image)
            self.graphs[name] = vision_graph(
                name, p.model.family, spec, hidden=p.decoder.hidden, dtype=p.dtype, names=self.names
            )
        return ", ".join(f"{spec.tokens} image tokens of {name}" for name, spec in p.images.items())

    def _vision_name(self, image: str) -> str:
        return "vision" if len(self.planned.images) == 1 else f"vision-{image}"

    def stages(self) -> str:
        """Builds every variant's language graphs, those that are equal once."""
        p, known = self.planned, dict[bytes, str]()
        for v in p.variants:
            played = {"vision": self._vision_name(v.image)}
            model = StagedModel(spec=p.decoder, plan=v.plan, budget=v.budget, dtype=p.dtype, names=self.names)
            for graph in model.graphs():
                content = ir.to_proto(graph.model).SerializeToString(deterministic=True)
                own = graph.name if len(p.variants) == 1 else f"{graph.name}-{p.variant_name(v)}"
                name = known.setdefault(content, own)
                self.graphs.setdefault(name, graph)
                played[graph.name] = name
            variant = Variant(plan_name=v.plan_name, plan=v.plan, budget=v.budget, image=v.image, graphs=played)
            self.variants.append(variant)
        totals = ", ".join(str(list(v.budget.total)) for v in p.variants)
        return f"{len(self.graphs)} graphs, S = {totals}"

    def weights(self) -> str:
        """Puts the weights where the graphs' form wants them, and writes the ONNX files that point there."""
        p = self.planned
        for name, graph in self.graphs.items():
            onnx.checker.check_model(ir.to_proto(graph.model), full_check=True)
            self.records[name] = GraphRecord(f"{name}.onnx", *graph.ports, graph.weights)
        if p.weight_form == "absent":
            for name, graph in self.graphs.items():
                self._write(name, graph.model)
            return "none: engines take them as inputs"
        if p.weights_of is not None:
            return self._take_over(p.weights_of)
        wanted = {n: s for graph in self.graphs.values() for n, s in graph.weights.items() if not s.constant}
        ready, tensors = {linear.name for linear in self.ready.values()}, self.checkpoint.tensors
        used = {n: fitting(tensors, n, spec.shape, spec.rows) for n, spec in wanted.items() if n not in ready}
        check_finite([*used.values(), *(linear.stored for linear in self._linears() if isinstance(linear, Linear))])
        # Beside what is built: a temporary folder may lie in memory, and a 7B's weights do not.
        with TemporaryDirectory(dir=self.work) as name:
            scratch = Path(name)
            if self.questions:
                used |= self._calibrate(scratch / "folded")
            if p.weight_form == "shared":
                return self._share(used, self._linears())
            used |= self._multiply(scratch / "multiplied")
            return self._embed(used | self._quantise(self._linears(), scratch / "parts"))

    def _take_over(self, bundle: Bundle) -> str:
        """Stores what another bundle of the same model holds, quantised weights as they are there."""
        held, self.quantization = bundle.weights(), bundle.manifest.quantization
        if self.planned.weight_form == "shared":
            return self._share(held, [])
        return self._embed(held)

    def _calibrate(self, file: Path) -> dict[str, StoredTensor]:
        """Finds how weights are scaled before they are rounded; writes those that are not rounded, scaled, into `file`,
        and returns them."""
        source = Source(self.planned, self.checkpoint.tensors, self.names, self.processor)
        self.calibrated = calibrate(source, self.questions)
        return write_folded(source, self.calibrated.folding, file)

    def _linears(self) -> Sequence[Linear | ReadyLinear]:
        """Returns the weights that are stored quantised."""
        if self.ready:
            return [linear for linear in self.ready.values() if linear.form is not None]
        shapes, found = linear_shapes(self.planned.decoder), list[Linear]()
        for role, form in self.planned.forms.items():
            ref = self.names(role)
            stored = fitting(self.checkpoint.tensors, ref.name, shapes[role], ref.rows)
            linear = Linear(ref.name, stored, form)
            if self.calibrated:
                factors, largest = self.calibrated.folding.factors(role), self.calibrated.largest[role]
                linear = with_fields(linear, factors=factors, largest=largest)
            found.append(linear)
        return found

    def _multiply(self, file: Path) -> dict[str, StoredTensor]:
        """Writes the quantised weights that have no form into `file`, multiplied out; returns them there."""
        linears = [linear for linear in self.ready.values() if linear.form is None]
        if not linears:
            return {}
        write_multiplied(linears, file, self.planned.dtype, self.planned.asked.allow_overflow)
        return read_header(file)

    def _quantise(self, linears: Sequence[Linear | ReadyLinear], file: Path) -> dict[str, StoredTensor]:
        """Quantises weights into `file`, if there are any, and returns their parts there."""
        if not linears:
            return {}
        taken = self.planned.model.quantised
        method = f"taken over from {taken.method}" if taken is not None else "round to nearest"
        method = f"{self.calibrated.method}, then {method}" if self.calibrated else method
        self.quantization = Quantization(method, write_quantised(linears, file, self.planned.dtype))
        return read_header(file)

    def _share(self, used: Mapping[str, StoredTensor], linears: Sequence[Linear | ReadyLinear]) -> str:
        """Stores one copy for all graphs; beside quantised weights only those tensors of a file that are read."""
        p, folder = self.planned, self.work / "weights"
        if linears or self.ready:
            folder.mkdir()
            over = p.asked.allow_overflow
            write_weights([*used.values()], folder / "plain.safetensors", p.dtype, allow_overflow=over)
            self._multiply(folder / "multiplied.safetensors")
            self._quantise(linears, folder / "quantised.safetensors")
            self.files = sorted(file.name for file in folder.iterdir())
        else:
            self.files = store_weights(
                used.values(), folder, p.dtype, p.asked.hard_link, allow_overflow=p.asked.allow_overflow
            )
        stored = {name: t for file in self.files for name, t in read_header(folder / file).items()}
        for name, graph in self.graphs.items():
            self._write(name, bind(graph, stored, _location))
        sources = (linear.stored for linear in linears if isinstance(linear, Linear))
        read = sum(t.nbytes for t in (*used.values(), *sources)) + sum(t.nbytes for t in self.ready.values())
        written = sum(t.nbytes for t in stored.values())
        became = f", {written / 1e6:.1f} MB written" if linears or self.ready else ""
        return f"{read / 1e6:.1f} MB read{became}, shared by {len(self.graphs)} graphs"

    def _embed(self, used: Mapping[str, StoredTensor]) -> str:
        """Stores for each graph a file of its own."""
        folder = self.work / "weights"
        folder.mkdir()
        for name, graph in self.graphs.items():
            file = folder / f"{name}.safetensors"
            write_weights(
                [used[w] for w in graph.weights], file, self.planned.dtype,
                allow_overflow=self.planned.asked.allow_overflow,
                constant={w for w, spec in graph.weights.items() if spec.constant},
            )  # fmt: skip
            self._write(name, bind(graph, read_header(file), _location))
        self.files = [f"{name}.safetensors" for name in self.graphs]
        return f"{sum((folder / file).stat().st_size for file in self.files) / 1e6:.1f} MB, each graph its own"

    def _write(self, name: str, model: ir.Model) -> None:
        ir.save(model, self.work / f"{name}.onnx")

    def compile(self) -> str:
        """Builds each graph on each backend; embedded weights one at a time, deleting what is compiled in."""
        p = self.planned
        bundle = Bundle(self.work, self.manifest())
        self.engines = {backend: {} for backend in p.asked.backends}
        for graphs in [[g] for g in self.records] if p.weight_form == "embedded" else [list(self.records)]:
            for backend in p.asked.backends:
                self.engines[backend] |= build_all(backend, bundle, graphs, p.asked.gather)
            if p.weight_form == "embedded" and not READ_GRAPHS & set(p.asked.backends):
                self._drop_graph(graphs[0])
        if p.weight_form == "embedded" and not self.files:
            (self.work / "weights").rmdir()
        seconds = {name: sum(e.seconds for e in built.values()) for name, built in self.engines.items()}
        return ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items())

    def _drop_graph(self, name: str) -> None:
        """Its engines hold it whole, weights and all."""
        (self.work / f"{name}.onnx").unlink()
        (self.work / "weights" / f"{name}.safetensors").unlink()
        self.files.remove(f"{name}.safetensors")
        self.records[name] = replace(self.records[name], file="")

    def finalise(self) -> str:
        """Writes the processor's files, hashes everything, and writes the manifest last."""
        for name, content in self.processor.files.items():
            (self.work / name).write_bytes(content)
        self.hashes = digests(self.work)
        (self.work / FILE_NAME).write_bytes(manifest_json(finalised(self.manifest())))
        read_manifest(self.work)  # what cannot be read back was never exported
        return f"{len(self.hashes)} files, {sum(f.bytes for f in self.hashes.values()) / 1e6:.1f} MB"

    def manifest(self) -> Manifest:
        p, processor = self.planned, self.processor
        return Manifest(
            model=_model_record(p, self.checkpoint),
            decoder=p.decoder,
            variants=tuple(self.variants),
            dtype=p.dtype,
            graphs=self.records,
            engines=self.engines,
            weight_form=p.weight_form,
            weights=tuple(f"weights/{file}" for file in self.files),
            quantization=self.quantization,
            images=processor.images,
            prompt=processor.prompt,
            tokenizer=TOKENIZER if TOKENIZER in processor.files else None,
            toolchain=_toolchain(p.asked.backends),
            command=self.command,
            files=self.hashes,
        )


def write_bundle(
    planned: Planned, out: Path, *, command: tuple[str, ...], overwrite: bool, progress: Progress
) -> Bundle:
    """Writes the bundle of `planned` to `out`, and `command` into it as what made it; returns the bundle, opened.

    HimapError if there is something else at `out`, a backend is missing, or a weight is not usable; on any failure
    `out` is as it was.
    """
    out = settle_target(out, overwrite)
    for name in planned.asked.backends:
        load_backend(name).check(planned.dtype, planned.asked.gather)
    checkpoint = _checkpoint(planned)
    family = planned.model.family
    plain = WeightNames(checkpoint.names, family)
    ready = dict[str, ReadyLinear]()
    if planned.weights_of is None:
        ready = take_over(checkpoint.ready, plain, planned.decoder, planned.asked.backends)
    for line in taken_lines(ready.values(), planned.dtype):
        progress(f"{planned.model.name}: {line}")
    forms = {role: linear.form for role, linear in ready.items() if linear.form is not None}
    names = WeightNames(checkpoint.names, family, forms or planned.forms)
    _check_weights(planned, checkpoint, names)
    processor = read_processor(planned.model.folder, family, planned.images)
    questions = read_questions(planned.asked.calibrate) if planned.asked.calibrate else ()
    with work_folder(out, overwrite) as work:
        state = Export(
            planned=planned, checkpoint=checkpoint, processor=processor, names=names, ready=ready, work=work,
            command=command, questions=questions,
        )  # fmt: skip
        for phase in (state.vision, state.stages, state.weights, state.compile, state.finalise):
            start = time.perf_counter()
            result = phase()
            progress(f"{phase.__name__:8} {time.perf_counter() - start:6.1f} s   {result}")
    return Bundle.open(out, verify=False)


def _checkpoint(p: Planned) -> Checkpoint:
    """Returns the opened checkpoint; for an alias without a folder, what the registry knows of it."""
    if p.model.folder is None:
        return Checkpoint({}, {}, frozenset())
    return open_checkpoint(p.model.folder, p.weight_form != "absent", p.model.tower, p.model.quantised)


def _check_weights(p: Planned, checkpoint: Checkpoint, names: WeightNames) -> None:
    """Checks before anything is built that the checkpoint is the model's: decode reads every weight of the decoder."""
    if p.weight_form == "absent":
        return
    v, missing = p.variants[0], list[HimapError]()
    decode = StagedModel(spec=p.decoder, plan=v.plan, budget=v.budget, dtype=p.dtype, names=WeightRef).decode()
    for role, spec in decode.weights.items():
        try:
            ref = names(role)
        except HimapError as problem:
            missing.append(problem)
        else:
            if (ref.rows.tensor if ref.rows else ref.name) not in checkpoint.ready:
                # Says more about a wrong model than a layer that it has not.
                fitting(checkpoint.tensors, ref.name, spec.shape, ref.rows)
    if missing:
        raise missing[0]


def _location(stored: StoredTensor) -> str:
    return f"weights/{stored.file.name}"


def _model_record(p: Planned, checkpoint: Checkpoint) -> ModelRecord:
    """Returns token ids as transformers' `generate` takes them: generation_config.json's first, then config.json's."""
    config, rules = p.model.family.fields, p.model.family.prompt()
    told = (checkpoint.generation, config.get("text_config", {}), config)
    eos = next((c["eos_token_id"] for c in told if c.get("eos_token_id") is not None), list(rules.eos))
    pad = next((c["pad_token_id"] for c in told if c.get("pad_token_id") is not None), rules.pad)
    eos_tokens = tuple(dict.fromkeys((*(eos if isinstance(eos, list) else (eos,)), *rules.stop)))
    return ModelRecord(
        name=p.model.name,
        source=p.model.source,
        architecture=p.model.family.architecture,
        image=ImageTokens(rules.image_token, rules.between, rules.film_token),
        eos_tokens=eos_tokens,
        pad_token=eos_tokens[0] if pad is None else pad,
    )


def _toolchain(backends: tuple[str, ...]) -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for tool in _TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    for backend in backends:
        found |= load_backend(backend).version()
    return found
