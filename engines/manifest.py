"""The manifest: what a bundle holds, as frozen data and as JSON. A folder without one is not a bundle.

It holds a digest of its own canonical form, and every file of the bundle is listed with its sha256: who knows
the digest knows every byte. docs/bundle.md says what a schema's number promises.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from himap_export.engines.documents import MEGABYTE, Id, parse_json, read_file, typed
from himap_export.engines.film import Film
from himap_export.engines.image import ImagePreprocessing
from himap_export.engines.layout import Grid, ImageTokens
from himap_export.engines.prompt import Expansion, PromptFormat
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import PruningPlan, TokenBudget, Tokens
from himap_export.graphs.ports import (
    ElementType,
    GraphPorts,
    Kind,
    LinearForm,
    Port,
    Size,
    WeightSpec,
    chain_problems,
    graph_problems,
    slots_problems,
    vision_problems,
)
from himap_export.graphs.spec import DecoderSpec, Dtype

SCHEMA = 8
FILE_NAME = "manifest.json"
WeightForm = Literal["shared", "embedded", "absent"]
_NUMBERS: Mapping[Kind, ElementType] = {
    "int8": "int8", "int8-dynamic": "int8", "int4": "int4", "fp8": "fp8", "nvfp4": "fp4",
}  # fmt: skip
MOST = 64 * MEGABYTE  # a hundred variants of the largest model take 20

Name = Annotated[str, Meta(min_length=1, max_length=500)]
Text = Annotated[str, Meta(max_length=100_000)]


class GraphRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """One graph: its ports and the checkpoint's weights it reads, by their names in the ONNX file.

    `file` is its ONNX file, empty where only engines with their weights inside are left of it.
    """

    file: str
    inputs: Mapping[Name, Port]
    outputs: Mapping[Name, Port]
    weights: Mapping[Name, WeightSpec]

    @property
    def ports(self) -> GraphPorts:
        return GraphPorts(self.inputs, self.outputs)


class ImageSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """What a vision graph sees of one picture, or of a `film`: `tiles` of it, made as `preprocessing` says.

    `size` (height, width): of pictures or frames that are seen as they are. `tokens`: V, of all tiles; `grid`: rows and
    columns of those that are drawn, of one tile or step, each row with `newline` tokens behind it that stand for no
    place. `expansion`: what the picture becomes in a prompt. `several`: it is for prompts of several pictures only.
    """

    size: tuple[Size, Size]
    tiles: Annotated[int, Meta(ge=1, le=10_000)]
    tokens: Tokens
    grid: Grid
    preprocessing: ImagePreprocessing
    expansion: Expansion
    newline: Annotated[int, Meta(ge=0, le=1)] = 0
    film: Film | None = None
    several: bool = False

    @property
    def view(self) -> tuple[int, int]:
        """(height, width) of what the tower sees at once: of one tile or frame."""
        return self.preprocessing.output_size


class Variant(Struct, frozen=True, forbid_unknown_fields=True):
    """One plan at one text budget for one of the bundle's image specs. `graphs` names the graph that plays each stage;
    variants share those that agree."""

    plan_name: Name
    plan: PruningPlan
    budget: TokenBudget
    image: Name
    graphs: Mapping[Name, Name]


class EngineRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """What a backend made of one graph. `gather` says in which form it holds the top-k gather: ops, plugin or none;
    `weights`, which file of weights is the backend's own, if one is.

    Where a compiler tells, equal ones counted: `layers` of the network it read ("64x KV_CACHE_UPDATE") and `kernels`
    that became of them ("32x _gemm_mha_v2 (Attention)"). `targets`: the compute capabilities it was built for, 89 for
    8.9; none: for the machine at hand.
    """

    file: Name
    seconds: Annotated[float, Meta(ge=0)]
    gather: Literal["ops", "plugin", "none"] = "none"
    layers: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    weights: Name | None = None
    targets: tuple[int, ...] = ()


class ModelRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the model came from and the token ids its prompts need; `image`: what stands for image tokens."""

    name: Text
    source: Text
    architecture: Text
    image: ImageTokens
    eos_tokens: Annotated[tuple[Id, ...], Meta(min_length=1, max_length=1000)]
    pad_token: Id


class FileRecord(Struct, frozen=True, forbid_unknown_fields=True):
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    bytes: Size


class QuantisedWeight(LinearForm, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How one weight is quantised, and the `error` of it: root mean square, relative to the weight's."""

    error: Annotated[float, Meta(ge=0, le=1e6)]

    @property
    def numbers(self) -> ElementType:
        """The type of its numbers, whose name in graphs ends in it."""
        return _NUMBERS[self.kind]


class Quantization(Struct, frozen=True, forbid_unknown_fields=True):
    """The weights that are quantised, by name, and the `method` that did it: "round to nearest"."""

    method: Text
    weights: Annotated[Mapping[Name, QuantisedWeight], Meta(min_length=1)]


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything about a bundle but its tensors; paths are relative to its folder, `files` lists them all.

    `weight_form`: "shared", the files in `weights` are read by all engines; "embedded", each engine holds its own;
    "absent", the bundle was made without them and `himap-run --weights` brings them. `digest`: see `finalised`.
    """

    schema: Literal[8] = 8
    model: ModelRecord
    decoder: DecoderSpec
    variants: Annotated[tuple[Variant, ...], Meta(min_length=1, max_length=1000)]
    dtype: Dtype
    graphs: Mapping[Name, GraphRecord]
    engines: Mapping[Name, Mapping[Name, EngineRecord]]
    weight_form: WeightForm
    weights: tuple[Name, ...]
    quantization: Quantization | None = None
    images: Mapping[Name, ImageSpec]
    prompt: PromptFormat | None
    tokenizer: Name | None
    toolchain: Mapping[Name, Text]
    command: tuple[Text, ...]
    files: Mapping[Name, FileRecord] = {}  # msgspec copies it
    digest: str = ""

    def wanted(self) -> dict[str, WeightSpec]:
        """Returns every weight that a graph reads, by name."""
        return {name: spec for graph in self.graphs.values() for name, spec in graph.weights.items()}

    def quantised(self) -> Mapping[str, QuantisedWeight]:
        """Returns the weights that are quantised, by name; none in a bundle of floats."""
        return self.quantization.weights if self.quantization else {}

    def decode_graphs(self) -> frozenset[str]:
        """Returns the graphs that play decode, over slots too."""
        return frozenset(v.graphs[stage] for v in self.variants for stage in ("decode", "slots") if stage in v.graphs)

    def paths(self) -> Iterator[str]:
        """Yields every file that opening the bundle may read."""
        yield from (graph.file for graph in self.graphs.values() if graph.file)
        engines = [engine for engines in self.engines.values() for engine in engines.values()]
        yield from (engine.file for engine in engines)
        yield from {engine.weights for engine in engines if engine.weights is not None}
        yield from self.weights
        if self.tokenizer is not None:
            yield self.tokenizer


def finalised(manifest: Manifest) -> Manifest:
    """Returns the manifest with its `digest`: the sha256, in hex, of its canonical form, which is its JSON without the
    digest, without white space, keys of every object in order, UTF-8."""
    return msgspec.structs.replace(manifest, digest=_digest(manifest))


def _digest(manifest: Manifest) -> str:
    bare = msgspec.structs.replace(manifest, digest="")
    return hashlib.sha256(msgspec.json.encode(bare, order="deterministic")).hexdigest()


def manifest_json(manifest: Manifest) -> bytes:
    """Returns the file's content."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """Returns the manifest of the bundle in `folder`, its digest and all references inside it checked.

    HimapError: usage if there is none, failure if it is damaged, not what its digest says, or of another schema.
    """
    path = folder / FILE_NAME
    if not os.path.lexists(path):
        hint = f"a bundle is the folder himap-export wrote, with its {FILE_NAME}"
        raise HimapError(f"{folder} is not a bundle", hint=hint, code=Exit.USAGE)
    try:
        data = parse_json(read_file(path, "manifest", MOST, Exit.FAILURE), str(path), Exit.FAILURE)
        schema = data.get("schema") if isinstance(data, dict) else None
        if type(schema) is not int:  # a bool is one by inheritance
            raise HimapError(f"{path} names no schema", "it is no bundle's")
        manifest = typed(data, Manifest, str(path), Exit.FAILURE) if schema == SCHEMA else None
    except HimapError as problem:
        details = ": ".join(part for part in (problem.summary, problem.details) if part)
        raise HimapError(f"{path} is damaged", details, "copy or export the bundle again") from None
    if manifest is None:
        hint = "update himap-export" if schema > SCHEMA else "export it again"
        raise HimapError(f"{folder} is a bundle of schema {schema}, this version reads {SCHEMA}", hint=hint)
    if manifest.digest != _digest(manifest):
        what = f"its digest is {manifest.digest[:12] or 'missing'}, its content has {_digest(manifest)[:12]}"
        raise HimapError(f"{path} has changed since export", what, "copy or export the bundle again")
    if wrong := next(_problems(manifest), ""):
        raise HimapError(f"{path} is damaged", wrong, "export the bundle again")
    return manifest


def is_plain(name: str) -> bool:
    """Tells whether `name` can be a file inside a bundle's folder and nowhere else, written in one way only."""
    parts = name.split("/")
    return all(part not in ("", ".", "..") and part.isprintable() and "\\" not in part for part in parts)


def _problems(m: Manifest) -> Iterator[str]:
    """Yields what a manifest says that cannot be so: paths that lead out, references to what it does not hold."""
    yield from (f"the path {name!r} leads out of the bundle" for name in (*m.paths(), *m.files) if not is_plain(name))
    yield from (f"{name} is not listed among its files" for name in m.paths() if name not in m.files)
    yield from (f"{FILE_NAME} lists itself" for name in m.files if name == FILE_NAME)
    for name, graph in m.graphs.items():
        yield from (f"graph {name}: {problem}" for problem in graph_problems(graph.ports))
        yield from (f"the weight {w} is of int64" for w, spec in graph.weights.items() if spec.dtype == "int64")
    yield from _quantised_problems(m)
    for v in m.variants:
        yield from _variant_problems(m, v)
    for backend, engines in m.engines.items():
        if set(engines) != set(m.graphs):
            yield f"the {backend} engines are not those of its graphs"
    yield from (f"{name} has no graph" for name in m.images if all(v.image != name for v in m.variants))
    kinds = {(v.image, v.budget.images) for v in m.variants}
    held = [sorted((v.plan_name, v.budget.text) for v in m.variants if (v.image, v.budget.images) == k) for k in kinds]
    if any(plans != held[0] for plans in held):
        yield "its images have different plans"


def _quantised_problems(m: Manifest) -> Iterator[str]:
    wanted = m.wanted()
    for name, weight in m.quantised().items():
        spec = wanted.get(f"{name}.{weight.numbers}")
        if spec is None or not spec.constant or spec.dtype != weight.numbers:
            yield f"no graph reads {name} in {weight.kind}"
        elif len(spec.shape) != 2 or not all(spec.shape) or (weight.block and spec.shape[0] % weight.block):
            yield f"{name} is {list(spec.shape)}, quantised in blocks of {weight.block}"


def _variant_problems(m: Manifest, v: Variant) -> Iterator[str]:
    what = f"plan {v.plan_name} at text budget {v.budget.text}"
    stages = ("vision", *v.plan.stages, "decode", *(["slots"] if v.budget.slots else []))
    if set(v.graphs) != set(stages) or not set(v.graphs.values()) <= set(m.graphs):
        yield f"{what} does not name a graph for each of {', '.join(stages)}"
    else:
        ports = {stage: m.graphs[v.graphs[stage]].ports for stage in stages}
        slots = [slots_problems(ports["decode"], ports.pop("slots"), v.budget.slots)] if v.budget.slots else []
        vision, *others = ports.values()
        seen = vision_problems(vision, others, v.budget.images)
        problems = chain(chain_problems([vision, *others], len(v.plan.cuts)), seen, *slots)
        yield from (f"{what}: {problem}" for problem in problems)
    if (image := m.images.get(v.image)) is None:
        yield f"{what} is for images {v.image}, which are not there"
    elif v.budget.visual[0] != image.tokens * v.budget.images or image.tokens < 1:
        yield f"{what} has {v.budget.visual[0]} image tokens, not those of its images"
    elif problem := _image_problem(image):
        yield f"{what} is for images {v.image}, {problem}"
    if v.plan.quota == "per-image" and any(kept % v.budget.images for kept in v.budget.visual):
        yield f"{what} keeps {list(v.budget.visual)} image tokens, not as many of each of {v.budget.images} images"
    if len(v.budget.visual) != len(v.plan.stages) or list(v.budget.visual) != sorted(v.budget.visual, reverse=True):
        yield f"{what} keeps {list(v.budget.visual)} image tokens"
    if any(cut.layer >= m.decoder.layers for cut in v.plan.cuts):
        yield f"{what} cuts behind the decoder's last layer"


def _image_problem(image: ImageSpec) -> str:
    """Returns what an image spec says that cannot be so; "" for nothing."""
    rows, columns = image.grid
    steps = image.film.steps if image.film else 1
    if min(rows, columns) < 1 or steps * rows * (columns + image.newline) > image.tokens:
        return f"whose grid {rows} x {columns} has more than its {image.tokens} tokens"
    if image.expansion.tokens != image.tokens:
        return f"which become {image.expansion.tokens} tokens in a prompt, not {image.tokens}"
    if image.film and (image.tiles != image.film.frames or image.film.frames % steps):
        return f"of {image.film.frames} frames in {image.tiles} tiles and {steps} steps"
    return ""


def is_bundle(folder: Path) -> bool:
    """Tells whether the manifest in `folder` is one that himap-export wrote, of this or an older schema; damaged or
    not, a web app's is none."""
    return _own_files(folder) is not None


def foreign_files(folder: Path) -> list[str]:
    """Returns what lies in a bundle's folder and is not the bundle's, links and devices too: paths relative to it."""
    own = _own_files(folder) or frozenset()
    return sorted(name for name in entries(folder) if name != FILE_NAME and name not in own)


def _own_files(folder: Path) -> frozenset[str] | None:
    """Returns the files that a manifest of ours lists, whatever its schema; None if it is not ours."""
    if not os.path.lexists(folder / FILE_NAME):
        return None
    try:
        data = parse_json(read_file(folder / FILE_NAME, "manifest", MOST), "manifest")
        found = typed(data, _Outline, "manifest")
    except HimapError:
        return None
    return frozenset(found.files)


class _Outline(Struct, frozen=True):
    """What every schema of ours has had."""

    schema: Annotated[int, Meta(ge=1, le=SCHEMA)]
    model: Mapping[str, Any]
    decoder: Mapping[str, Any]
    graphs: Mapping[str, Any]
    engines: Mapping[str, Any]
    toolchain: Mapping[str, str]
    command: tuple[str, ...]
    files: Mapping[str, FileRecord]


def entries(folder: Path) -> Iterator[str]:
    """Yields every entry under `folder` that is not a folder, by its path in it; links are not followed."""
    for home, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(home) / name).is_symlink()]
        for name in (*files, *links):
            yield (Path(home) / name).relative_to(folder).as_posix()
