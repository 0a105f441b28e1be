"""A Triton model repository for a bundle: NAME-stream, NAME-batch and a README.md, whole or not at all."""

import json
import os
import re
import shlex
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template

from himap_export.engines.backends import ANYWAY, Opening
from himap_export.engines.bundle import Bundle
from himap_export.engines.command import held_signals
from himap_export.engines.files import check_outside, folder_beside, has_long_name
from himap_export.graphs.errors import Exit, HimapError
from himap_export.serve import MODEL_NAME
from himap_export.serve.service import Settings

MODEL = 'from himap_export.serve.triton.{} import TritonPythonModel\n\n__all__ = ["TritonPythonModel"]\n'
DELAY_US = 2000  # for which the batching model's first request waits for others


def write_repository(
    bundle: Bundle,
    folder: Path,
    *,
    name: str,
    plans: tuple[str, ...] = (),
    backend: str | None = None,
    opening: Opening = ANYWAY,
    settings: Settings | None = None,
    verify: bool = True,
) -> None:
    """Writes a model repository into `folder`, new or empty, whose models answer as a service with these settings.

    It names the bundle's folder, and holds no copy of it. With `verify` the models compare the bundle's content with
    its manifest when they open it. HimapError (usage) for a folder that holds something, a `name` that Triton
    cannot take, a plan that the bundle does not hold, or one that does not take a single picture.
    """
    if not re.fullmatch(MODEL_NAME, name):
        details = f"{name[:80]!r} is not up to 100 letters, digits, dots, dashes and underscores"
        raise HimapError("the models of Triton cannot have this name", details, "give a `model_name`", Exit.USAGE)
    target, settings = _settled(folder), settings or Settings()
    chosen = [bundle.plan_name(plan) for plan in plans]
    for plan in chosen or {v.plan_name for v in bundle.manifest.variants}:
        bundle.variants(plan, 1, film=False)  # config.pbtxt has one IMAGE, whatever the bundle
    said = {
        "bundle": os.path.realpath(bundle.folder),
        "weights": [os.path.realpath(folder) for folder in bundle.weight_folders],
        "name": name,
        "plans": chosen,
        "backend": backend,
        "device": opening.device,
        "threads": opening.threads,
        "max_batch": settings.max_batch,
        "max_queue": settings.max_queue,
        "prefills": settings.prefills,
        "verify": verify,
    }
    content = _models(bundle, name, settings, _parameters(said))
    content["README.md"] = _filled(
        "README.md", name=name, bundle=str(said["bundle"]), mounts=_mounts(target, bundle),
        rows=str(_rows(bundle, settings)), new=str(min(v.budget.new for v in bundle.manifest.variants)),
        plans=", ".join(chosen or dict.fromkeys(v.plan_name for v in bundle.manifest.variants)),
    )  # fmt: skip
    with folder_beside(target, ".himap-partial-") as folder:
        (work := folder / "models").mkdir()
        for path, text in content.items():
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            (work / path).write_text(text, encoding="utf-8")
        with held_signals():
            work.rename(target)  # onto nothing, or onto an empty folder


def _models(bundle: Bundle, name: str, settings: Settings, parameters: str) -> dict[str, str]:
    """Returns the files of both models, by path."""
    waiting = f"default_queue_policy {{ max_queue_size: {settings.max_queue} }}"
    stream = _filled(
        "config.pbtxt", parameters=parameters, ragged="",
        purpose="Answers stream; one instance answers as many questions at a time as the bundle has slots.",
        batching="max_batch_size: 0\nmodel_transaction_policy { decoupled: true }",
    )  # fmt: skip
    batch = _filled(
        "config.pbtxt", parameters=parameters, ragged=" allow_ragged_batch: true",
        purpose="Whole answers, for clients that do not stream; Triton gathers what is answered together.",
        batching=f"max_batch_size: {_rows(bundle, settings)}\n"
        f"dynamic_batching {{ max_queue_delay_microseconds: {DELAY_US} {waiting} }}",
    )  # fmt: skip
    return {
        f"{name}-stream/config.pbtxt": stream,
        f"{name}-stream/1/model.py": MODEL.format("streaming"),
        f"{name}-batch/config.pbtxt": batch,
        f"{name}-batch/1/model.py": MODEL.format("batching"),
    }


def _rows(bundle: Bundle, settings: Settings) -> int:
    """How many requests may be one batch: all get a slot at once."""
    slots = (max(1, v.budget.slots) for v in bundle.manifest.variants)
    return max(1, min(settings.max_queue, settings.max_batch or settings.max_queue, *slots))


def _mounts(target: Path, bundle: Bundle) -> str:
    """Returns docker's options by which a container sees all that the models open, the bundle where it is here."""
    inside = [f"{place}:{place}:ro" for place in map(os.path.realpath, (bundle.folder, *bundle.weight_folders))]
    return " ".join(f"-v {shlex.quote(mount)}" for mount in (f"{target}:/models:ro", *inside))


def _filled(template: str, **values: str) -> str:
    text = (files(__package__) / "templates" / template).read_text(encoding="utf-8")
    return Template(text).substitute(values)


def _parameters(said: Mapping[str, object]) -> str:
    """Returns what config.pbtxt says of the parameters, each as JSON in protobuf's text format; what is None or empty
    is not said."""
    lines = []
    for key, value in said.items():
        if value is None or value == []:
            continue
        text = json.dumps(value).replace("\\", "\\\\").replace('"', '\\"')  # JSON's own escapes are ASCII
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: "{text}" }} }}')
    return "\n".join(lines)


def _settled(folder: Path) -> Path:
    """Returns the absolute path of a repository that may be written; HimapError (usage) if something is there."""
    check_outside(folder)
    try:
        target = Path(os.path.realpath(folder.parent)) / folder.name
        if folder.name in ("", "..") or has_long_name(target, next(p for p in target.parents if p.exists())):
            kind = "it does not end in a name that a folder can have"
        elif not os.path.lexists(target):
            kind = ""
        elif target.is_symlink() or not target.is_dir():
            kind = "it is there and is no folder"
        elif target == Path.cwd() or os.path.ismount(target):
            kind = "it is the folder you are in, or a mount point"
        else:
            kind = "it is not empty" if any(target.iterdir()) else ""
    except (OSError, ValueError) as problem:
        kind = getattr(problem, "strerror", None) or str(problem)
    if kind:
        hint = "name a new folder; what is there is left alone"
        raise HimapError(f"{str(folder)[:300]} cannot become a model repository", kind, hint, Exit.USAGE)
    return target
