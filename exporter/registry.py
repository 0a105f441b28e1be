"""From the name of a model to its family, its configuration and its folder."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from himap_export.engines.documents import typed
from himap_export.exporter.aliases import ALIASES
from himap_export.exporter.checkpoint import read_config
from himap_export.exporter.config import Head
from himap_export.exporter.families.internvl import InternVl
from himap_export.exporter.families.llava import Llava
from himap_export.exporter.families.llava_next import LlavaNext
from himap_export.exporter.families.llava_onevision import LlavaOnevision
from himap_export.exporter.families.llava_original import LlavaOriginal
from himap_export.exporter.families.qwen2_5_vl import Qwen25Vl
from himap_export.exporter.families.qwen3_vl import Qwen3Vl
from himap_export.exporter.families.qwen_vl import QwenVl
from himap_export.exporter.families.smolvlm import SmolVlm
from himap_export.exporter.family import Config, Family
from himap_export.exporter.quantize.declared import Declared, declared
from himap_export.graphs.errors import Exit, HimapError, suggestion

AnyFamily = type[Family[Any]]
_FAMILIES: dict[str, AnyFamily] = {}
_HUB_ID: Final = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
# What an export reads of a repository on the hub: never code, never pickles.
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.tiktoken", "tokenizer.model")


@dataclass(frozen=True)
class Model:
    """A model as named by the user: its family over its configuration, and its folder once the weights are there.

    `tower`: the folder of another checkpoint that holds its vision tower, if there is one; the family knows its
    config.json. `quantised`: what a checkpoint that comes quantised says of it.
    """

    name: str
    source: str
    family: Family[Any]
    folder: Path | None
    tower: Path | None = None
    quantised: Declared | None = None


def register_family(family: AnyFamily) -> AnyFamily:
    """Makes `family` the one that checkpoints of its architecture are exported by; returns it, to serve as a decorator.

    HimapError (usage) if another family has that architecture.
    """
    if _FAMILIES.setdefault(family.architecture, family) is not family:
        details = "one architecture has one family"
        raise HimapError(f"{family.architecture} is registered already", details, code=Exit.USAGE)
    return family


for _family in (Llava, LlavaOriginal, LlavaNext, LlavaOnevision, QwenVl, Qwen25Vl, Qwen3Vl, InternVl, SmolVlm):
    register_family(_family)


def find_family(config: Config, where: str) -> AnyFamily:
    """Returns the family of config.json's first architecture; HimapError (usage) if there is none."""
    found = (typed(config, Head, f"{where}: config.json").architectures or ["(none named)"])[0]
    if found not in _FAMILIES:
        supported = f"supported: {', '.join(_FAMILIES)}"
        raise HimapError(f"{where}: unsupported architecture {found[:80]}", supported, code=Exit.USAGE)
    return _FAMILIES[found]


def resolve(
    name: str,
    revision: str | None = None,
    weights: bool = True,
    checkpoint: Path | None = None,
    vision_tower: Path | None = None,
) -> Model:
    """Finds the model of an alias, a local folder or a Hugging Face id; without `weights` an alias needs no network.

    `checkpoint`: the folder that holds an alias's weights; what the alias says of its sizes then is what they must be.
    `vision_tower`: the folder of the vision tower, for a release that has it apart and names it elsewhere. HimapError:
    usage for what is no model, of an unsupported architecture or unusable, missing for what cannot be fetched.
    """
    alias = ALIASES.get(name)
    source = str(checkpoint) if checkpoint else alias.source if alias else name
    if checkpoint and not alias:
        hint = "a folder is a model by itself: leave `checkpoint` out"
        raise HimapError(f"{name[:80]} is no alias", f"aliases: {', '.join(ALIASES)}", hint, Exit.USAGE)
    config = alias.config if alias else {}
    if _is_folder(Path(source)):
        folder = Path(source)
    elif checkpoint:
        raise HimapError(f"{checkpoint} is no folder", "`checkpoint` holds the weights of an alias", code=Exit.USAGE)
    elif alias and not weights:
        return Model(name, source, find_family(config, name).parse(config, name), None)
    elif alias is None and not _HUB_ID.fullmatch(source):
        known = f"aliases: {', '.join(ALIASES)}; or a Hugging Face id, or a folder{suggestion(source, ALIASES)}"
        raise HimapError(f"unknown model {name[:80]}", known, code=Exit.USAGE)
    else:
        folder = _download(source, revision, weights)
        # Releases name a folder on their authors' machines.
        config = {key: value for key, value in config.items() if key == "mm_vision_tower"}
    config = read_config(folder) | config
    where = f"{name[:200]}: config.json"
    family = find_family(config, name[:200]).parse(config, where)
    model = Model(name, source, family, folder, quantised=declared(config, where))
    return _with_tower(model, folder, vision_tower, weights)


def _with_tower(model: Model, folder: Path, given: Path | None, weights: bool) -> Model:
    """Returns `model` with the vision tower that its configuration names, if that has a checkpoint of its own."""
    named = model.family.tower()
    if named is None:
        if given is not None:
            raise HimapError(f"{model.name} has its vision tower", hint="leave `vision_tower` out", code=Exit.USAGE)
        return model
    tower = given or _inside(folder, named)
    if tower is None and _HUB_ID.fullmatch(named):
        tower = _download(named, None, weights)
    if tower is None or not _is_folder(tower):
        details = f"config.json names {named[:200]}, no Hugging Face id, and no folder in {folder}"
        details = details if tower is None else f"{tower} is no folder"
        hint = "give the folder of the tower's checkpoint with `vision_tower` DIR"
        raise HimapError(f"{model.name}: the vision tower's folder is not there", details, hint, Exit.MISSING)
    family = model.family.with_tower(read_config(tower), f"{tower}: config.json")
    return replace(model, family=family, tower=tower)


def _inside(folder: Path, named: str) -> Path | None:
    """Returns the folder that a checkpoint names, if it is one inside the checkpoint's own, wherever links lead."""
    try:
        home, found = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / named))
    except ValueError:  # a null byte
        return None
    inside = found != home and found.is_relative_to(home) and _is_folder(found)
    return folder / found.relative_to(home) if inside else None


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _download(source: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [p for p in _PATTERNS if weights or not p.endswith("safetensors")]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as problem:  # the hub's client raises its own, its transport's and the OS's errors
        details = (str(problem).splitlines() or [type(problem).__name__])[0]
        hint = "check the id and the network, or give a local checkpoint folder"
        raise HimapError(f"cannot fetch {source} from the Hugging Face hub", details, hint, Exit.MISSING) from None
