"""The manifest: what a bundle holds, as frozen data and as JSON. A folder without one is not a bundle."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from himap_export.engines.layout import Grid, ImageTokens
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.plan import Cut, PruningPlan, TokenBudget
from himap_export.graphs.spec import DecoderSpec, Dtype

SCHEMA = 4
FILE_NAME = "manifest.json"
WeightForm = Literal["shared", "embedded", "absent"]


@dataclass(frozen=True)
class TensorSpec:
    """A static tensor at a graph's door: `dtype` is fp16, bf16, fp32 or int64."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GraphRecord:
    """One graph: its tensors in and out, and the checkpoint's weights it reads, by name.

    `file` is its ONNX file, empty where only engines with their weights inside are left of it.
    """

    file: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    weights: Mapping[str, TensorSpec]


@dataclass(frozen=True)
class PictureRecord:
    """What a vision graph sees: `tiles` pictures of `size` (height, width) a prompt, made as `preprocessing` says.

    `grid`: rows and columns of the tokens of one tile.
    """

    size: tuple[int, int]
    tiles: int
    grid: Grid
    preprocessing: Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """One plan at one text budget for one of the bundle's pictures. `graphs` names the graph that plays each stage;
    variants share those that agree."""

    plan_name: str
    plan: PruningPlan
    budget: TokenBudget
    picture: str
    graphs: Mapping[str, str]


@dataclass(frozen=True)
class EngineRecord:
    """What a backend made of one graph. `gather` says in which form it holds the top-k gather: ops, plugin or none.

    Where a compiler tells, equal ones counted: `layers` of the network it read ("64x KV_CACHE_UPDATE") and `kernels`
    that became of them ("32x _gemm_mha_v2 (Attention)").
    """

    file: str
    seconds: float
    gather: str = "none"
    layers: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelRecord:
    """Where the model came from and the token ids its prompts need; `image`: what stands for image tokens."""

    name: str
    source: str
    architecture: str
    image: ImageTokens
    eos_tokens: tuple[int, ...]
    pad_token: int


@dataclass(frozen=True)
class FileRecord:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Everything about a bundle but its tensors; paths are relative to its folder.

    `weight_form`: "shared", the files in `weights` are read by all engines; "embedded", each engine holds its own;
    "absent", the bundle was made without them and `himap-run --weights` brings them.
    """

    model: ModelRecord
    decoder: DecoderSpec
    variants: tuple[Variant, ...]
    dtype: Dtype
    graphs: Mapping[str, GraphRecord]
    engines: Mapping[str, Mapping[str, EngineRecord]]
    weight_form: WeightForm
    weights: tuple[str, ...]
    pictures: Mapping[str, PictureRecord]
    prompt: Mapping[str, Any] | None
    tokenizer: str | None
    toolchain: Mapping[str, str]
    command: tuple[str, ...]
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote; KeyError, TypeError or ValueError if it is anything else."""
        d = json.loads(text)
        d["model"]["image"] = ImageTokens(**_tuples(d["model"]["image"]))
        d["model"] = ModelRecord(**_tuples(d["model"]))
        d["decoder"] = DecoderSpec(**_tuples(d["decoder"]))
        d["pictures"] = {name: PictureRecord(**_tuples(p)) for name, p in d["pictures"].items()}
        d["variants"] = tuple(_variant(v) for v in d["variants"])
        d["graphs"] = {name: _graph(g) for name, g in d["graphs"].items()}
        d["engines"] = {
            backend: {name: EngineRecord(**_tuples(e)) for name, e in engines.items()}
            for backend, engines in d["engines"].items()
        }
        d["files"] = {name: FileRecord(**f) for name, f in d["files"].items()}
        return cls(**{**d, "weights": tuple(d["weights"]), "command": tuple(d["command"])})


def _tuples(d: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in d.items()}


def _variant(d: dict[str, Any]) -> Variant:
    plan = PruningPlan(tuple(Cut(**cut) for cut in d["plan"]["cuts"]))
    return Variant(d["plan_name"], plan, TokenBudget(**_tuples(d["budget"])), d["picture"], d["graphs"])


def _graph(d: dict[str, Any]) -> GraphRecord:
    inputs, outputs, weights = (
        {name: TensorSpec(t["dtype"], tuple(t["shape"])) for name, t in d[side].items()}
        for side in ("inputs", "outputs", "weights")
    )
    return GraphRecord(d["file"], inputs, outputs, weights)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the bundle in `folder`; HimapError if there is none, or it is of another schema, or damaged."""
    path = folder / FILE_NAME
    try:
        text = path.read_text()
        schema = json.loads(text)["schema"]
        if schema == SCHEMA:
            return Manifest.from_json(text)
    except (FileNotFoundError, NotADirectoryError):
        hint = f"a bundle is the folder himap-export wrote, with its {FILE_NAME}"
        raise HimapError(f"{folder} is not a bundle", hint=hint, code=Exit.USAGE) from None
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise HimapError(
            f"{path} is damaged", f"{type(problem).__name__} {problem}", "export the bundle again"
        ) from None
    if isinstance(schema, int) and schema > SCHEMA:
        raise HimapError(
            f"{folder} is a bundle of schema {schema}, this version reads {SCHEMA}", hint="update himap-export"
        )
    raise HimapError(f"{folder} is a bundle of schema {schema}, this version reads {SCHEMA}", hint="export it again")
