"""What callers use of the exporter: `plan`, which needs no weights, and `export`, which writes a bundle."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from himap_export.engines.backends import Gather
from himap_export.engines.bundle import Bundle
from himap_export.engines.choice import slow_dtype
from himap_export.exporter.planning import Planned, Request, plan_export
from himap_export.exporter.registry import resolve
from himap_export.exporter.target import settle_target
from himap_export.graphs.errors import HimapWarning
from himap_export.graphs.plan import PruningPlan, Quota
from himap_export.graphs.ports import Kind
from himap_export.graphs.spec import Dtype

Progress = Callable[[str], None]


class ExportOptions(TypedDict, total=False):
    """What may be asked of a plan and of an export; where one value is wanted, several go into one bundle.

    The plan: `task` (the authors': qa, the default, or caption), changed by `k1`, `k2` (layers of the cuts), `r1`, `r2`
    (fractions of the image tokens that leave) or `keep` (tokens that stay at a single cut); `policy`, a name of
    POLICIES; or `plan`: a task, a TOML file, a PruningPlan or plans by name. Budgets: `text_budget` (192) tokens that
    are not the image's, `max_new_tokens` (128), `batch` (1), `slots`, prompts that a service answers at a time (0),
    `align`: keep more, up to a multiple of so many tokens a stage. Images: how many `images` a prompt holds (1), or
    that it holds a film of so many `frames`; `quota`: whether a cut ranks all of them together ("prompt") or keeps as
    many of each ("per-image"); `image_size` (height, width) and `tiles`, for models that have a choice. Engines:
    `backend` (the best that is installed and runs here), `dtype` (the checkpoint's own, where the backend computes it),
    `gather`, the top-k gather's form. Weights: `weight_form` shared (the default), embedded, or absent: the bundle then
    holds engines only; `hard_link` instead of copies; `allow_overflow` of a smaller dtype. Quantised weights:
    `quantize` int8, int4, fp8, nvfp4 or int8-dynamic, in blocks of `block` inputs; `keep_dtype`, patterns of layers
    that stay; `quantize_head`; `calibrate`, questions by whose activations weights are scaled (AWQ). The model:
    `revision` of a Hugging Face id, `checkpoint` with an alias's weights, `vision_tower`, where a checkpoint names one
    outside its folder.
    """

    task: str
    plan: str | Path | PruningPlan | Mapping[str, PruningPlan] | Sequence[str | Path]
    policy: str | Sequence[str]
    k1: int | None
    k2: int | None
    r1: float | None
    r2: float | None
    keep: int | None
    text_budget: int | Sequence[int]
    max_new_tokens: int
    batch: int
    slots: int
    align: int | None
    image_size: tuple[int, int] | Sequence[tuple[int, int]]
    tiles: int | None
    images: int | Sequence[int]
    frames: int | None
    quota: Quota | None
    backend: str | Sequence[str]
    dtype: Dtype | None
    gather: Gather
    weight_form: Literal["shared", "embedded", "absent"] | None
    hard_link: bool
    allow_overflow: bool
    revision: str | None
    checkpoint: Path | str | None
    vision_tower: Path | str | None
    quantize: Kind | None
    block: int | None
    keep_dtype: str | Sequence[str]
    quantize_head: bool
    calibrate: Path | str | None


PLURAL = {
    "policy": "policies", "plan": "plans", "image_size": "image_sizes", "text_budget": "text_budgets",
    "images": "images", "backend": "backends", "keep_dtype": "keep_dtype",
}  # fmt: skip
SOURCE = ("revision", "checkpoint", "vision_tower")  # of the model


def plan(model: str | Path, *, weights: bool = False, **options: Unpack[ExportOptions]) -> Planned:
    """Returns what an export would build: stages, budgets, FLOPs. `model` is an alias, a Hugging Face id or a folder;
    `weights`: whether they are fetched. A HimapWarning tells of a dtype that is slow on the backend.

    HimapError: usage for what is no model, or a plan that it cannot follow; missing for what cannot be fetched.
    """
    found = resolve(
        str(model), options.get("revision"), weights=weights, checkpoint=_path(options.get("checkpoint")),
        vision_tower=_path(options.get("vision_tower")),
    )  # fmt: skip
    asked: dict[str, Any] = {}
    for name, value in options.items():
        if name == "calibrate":
            asked[name] = _path(options.get("calibrate"))
        elif name not in SOURCE:
            asked[PLURAL.get(name, name)] = _several(name, value) if name in PLURAL else value
    planned = plan_export(found, Request(**asked))
    if slow := slow_dtype(planned.asked.backends, planned.dtype):
        warnings.warn(HimapWarning(slow), stacklevel=2)
    return planned


def export(
    model: str | Path,
    *,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress = lambda line: None,
    **options: Unpack[ExportOptions],
) -> Bundle:
    """Writes a bundle of `model` to the folder `out` and returns it, opened; `progress` hears of each phase.

    HimapError as `plan`, or if there is something else at `out`, a backend is missing, or a weight is not usable; then
    `out` is as it was.
    """
    from himap_export.exporter.export import write_bundle  # onnx: none of it is needed for a plan

    settle_target(Path(out), overwrite)  # before anything is fetched
    planned = plan(model, weights=options.get("weight_form") != "absent", **options)
    told = ("himap_export.export", str(model), *(f"{name}={value!r}" for name, value in options.items()))
    return write_bundle(planned, Path(out), command=told, overwrite=overwrite, progress=progress)


def _several(name: str, value: Any) -> tuple[Any, ...]:
    """Returns what was asked of one, or of several, as several, each once."""
    one = isinstance(value, str | Path | int | PruningPlan | Mapping)
    one = one or (name == "image_size" and len(value) == 2 and isinstance(value[0], int))
    values = [value] if one else list(value)
    return tuple(v for n, v in enumerate(values) if v not in values[:n])


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given)
