"""An export, phase by phase: resolve, plan, vision, stages, compile, seal."""

import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx
import onnx_ir as ir

from himap_export.engines.backends import load_backend
from himap_export.engines.bundle import Bundle, digests
from himap_export.engines.image import clip_preprocessing
from himap_export.engines.manifest import (
    FILE_NAME,
    EngineRecord,
    GraphRecord,
    Manifest,
    ModelRecord,
    TensorSpec,
)
from himap_export.engines.weight_file import StoredTensor, read_header
from himap_export.exporter import llava
from himap_export.exporter.bind import WeightNames, bind
from himap_export.exporter.checkpoint import Checkpoint, open_checkpoint
from himap_export.exporter.planning import Planned
from himap_export.exporter.processor import TOKENIZER, ProcessorData, read_processor
from himap_export.exporter.store import store_weights
from himap_export.exporter.target import check_target, work_folder
from himap_export.graphs.build import IR_DTYPE, StageGraph
from himap_export.graphs.stages import StagedModel

_TOOLS = ("himap-export", "numpy", "onnx", "onnx-ir", "onnxscript", "torch", "transformers", "tokenizers", "pillow")
_DTYPE = {code: name for name, code in IR_DTYPE.items()} | {ir.DataType.INT64: "int64"}
Progress = Callable[[str], None]


@dataclass
class Export:
    """One export under way in the folder `work`; each phase adds what the next ones need."""

    planned: Planned
    checkpoint: Checkpoint
    processor: ProcessorData
    names: WeightNames
    work: Path
    command: tuple[str, ...]
    graphs: list[StageGraph] = field(default_factory=list)
    stored: dict[str, StoredTensor] = field(default_factory=dict)
    records: dict[str, GraphRecord] = field(default_factory=dict)
    engines: dict[str, dict[str, EngineRecord]] = field(default_factory=dict)

    def vision(self) -> str:
        from himap_export.exporter.vision import vision_graph  # torch: seconds to import

        p = self.planned
        self.graphs.append(vision_graph(p.model.config, p.decoder, p.budget, p.dtype))
        return f"{p.vision.tokens} image tokens"

    def stages(self) -> str:
        """Builds the four language graphs, stores the weights that all five read, and writes the ONNX files."""
        p = self.planned
        self.graphs += StagedModel(p.decoder, p.plan, p.budget, p.dtype, self.names).graphs()
        names = {"vision": self.names}  # the other graphs already call weights what the checkpoint calls them
        used = dict.fromkeys(names.get(g.name, str)(weight) for g in self.graphs for weight in g.weights)
        files = store_weights([self.checkpoint.tensors[name] for name in used], self.work / "weights", p.dtype)
        for file in files:
            self.stored |= read_header(self.work / "weights" / file)
        for graph in self.graphs:
            self._write(graph)
        return f"S = {list(p.budget.total)}, {sum(self.stored[n].nbytes for n in used) / 1e6:.1f} MB of weights"

    def _write(self, graph: StageGraph) -> None:
        inputs = [v for v in graph.model.graph.inputs if v.name not in graph.weights]
        rename = self.names if graph.name == "vision" else str
        model, weights = bind(graph, self.stored, lambda t: f"weights/{t.file.name}", rename)
        path = self.work / f"{graph.name}.onnx"
        ir.save(model, path)
        onnx.checker.check_model(path, full_check=True)
        self.records[graph.name] = GraphRecord(path.name, _specs(inputs), _specs(model.graph.outputs), weights)

    def compile(self) -> str:
        bundle = Bundle(self.work, self.manifest())
        for name in self.planned.backends:
            backend = load_backend(name)
            self.engines[name] = {graph: backend.build(bundle, graph) for graph in self.records}
        seconds = {name: sum(e.seconds for e in built.values()) for name, built in self.engines.items()}
        return ", ".join(f"{name} {s:.1f} s" for name, s in seconds.items())

    def seal(self) -> str:
        """Writes the processor's files, hashes everything, and writes the manifest last."""
        for name, content in self.processor.files.items():
            (self.work / name).write_bytes(content)
        manifest = replace(self.manifest(), files=digests(self.work))
        (self.work / FILE_NAME).write_text(manifest.to_json())
        return f"{len(manifest.files)} files, {sum(f.bytes for f in manifest.files.values()) / 1e6:.1f} MB"

    def manifest(self) -> Manifest:
        p, processor = self.planned, self.processor
        return Manifest(
            model=_model_record(p, self.checkpoint),
            decoder=p.decoder,
            plan=p.plan,
            budget=p.budget,
            dtype=p.dtype,
            graphs=self.records,
            engines=self.engines,
            weights=tuple(sorted({f"weights/{t.file.name}" for t in self.stored.values()})),
            image=processor.image.to_json(),
            prompt=processor.prompt.to_json() if processor.prompt else None,
            tokenizer=TOKENIZER if processor.prompt else None,
            toolchain=_toolchain(p.backends),
            command=self.command,
        )


def export(planned: Planned, out: Path, command: tuple[str, ...], overwrite: bool, progress: Progress) -> Manifest:
    """Writes the bundle of `planned` to `out` and returns its manifest; on any failure `out` is as it was."""
    check_target(out, overwrite)
    for name in planned.backends:
        load_backend(name).check(planned.dtype)
    assert planned.model.folder is not None
    checkpoint = open_checkpoint(planned.model.folder)
    names = WeightNames(checkpoint.tensors, llava.tensor_candidates, llava.tied(checkpoint.config))
    record = _model_record(planned, checkpoint)
    image = clip_preprocessing(planned.vision.image_size)
    processor = read_processor(checkpoint.folder, planned.vision.tokens, record.image_token, image)
    with work_folder(out) as work:
        state = Export(planned, checkpoint, processor, names, work, command)
        for phase in (state.vision, state.stages, state.compile, state.seal):
            start = time.perf_counter()
            result = phase()
            progress(f"{phase.__name__:8} {time.perf_counter() - start:6.1f} s   {result}")
        return state.manifest()


def _specs(values: Iterable[ir.Value]) -> dict[str, TensorSpec]:
    specs = {}
    for v in values:
        assert v.name is not None and v.dtype is not None and v.shape is not None
        specs[v.name] = TensorSpec(_DTYPE[v.dtype], tuple(int(n) for n in v.shape.numpy()))
    return specs


def _model_record(p: Planned, checkpoint: Checkpoint) -> ModelRecord:
    """Token ids as transformers' `generate` takes them: generation_config.json first, then config.json."""
    config, text = checkpoint.config, checkpoint.config.get("text_config", {})
    defaults = {"eos_token_id": 2, "pad_token_id": None}  # LlamaConfig's
    found = {}
    for key, default in defaults.items():
        found[key] = next((c[key] for c in (checkpoint.generation, text, config) if c.get(key) is not None), default)
    eos = found["eos_token_id"]
    eos_tokens = tuple(eos) if isinstance(eos, list) else (eos,)
    pad = eos_tokens[0] if found["pad_token_id"] is None else found["pad_token_id"]
    image_token = config.get("image_token_index", config.get("image_token_id", 32000))
    return ModelRecord(p.model.name, p.model.source, llava.ARCHITECTURE, image_token, eos_tokens, pad)


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
