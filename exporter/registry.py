"""From the name of a model to its family, its configuration and its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from himap_export.exporter.aliases import ALIASES
from himap_export.exporter.checkpoint import read_config
from himap_export.exporter.families import internvl, llava, llava_original, qwen2_5_vl, qwen3_vl, qwen_vl
from himap_export.exporter.family import Family
from himap_export.graphs.errors import Exit, HimapError

_ROWS = (llava.FAMILY, llava_original.FAMILY, qwen_vl.FAMILY, qwen2_5_vl.FAMILY, qwen3_vl.FAMILY, internvl.FAMILY)
FAMILIES = {family.architecture: family for family in _ROWS}
# What an export reads of a repository on the hub: never code, never pickles.
_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.tiktoken", "tokenizer.model")


@dataclass(frozen=True)
class Model:
    """A model as named by the user: its family, its configuration, and its folder once the weights are there.

    `tower`: the folder of another checkpoint that holds its vision tower, if there is one; its config.json stands in
    `config` as "vision_config".
    """

    name: str
    source: str
    family: Family
    config: dict[str, Any]
    folder: Path | None
    tower: Path | None = None


def resolve(name: str, revision: str | None = None, weights: bool = True, checkpoint: Path | None = None) -> Model:
    """Alias, local folder or Hugging Face id to a model; without `weights` an alias needs no network.

    `checkpoint`: the folder that holds an alias's weights; what the alias says of its sizes then is what they must be.
    HimapError: usage for what is no model or of an unsupported architecture, missing for what cannot be fetched.
    """
    alias = ALIASES.get(name)
    source = str(checkpoint) if checkpoint else alias.source if alias else name
    if checkpoint and not alias:
        hint = "a folder is a model by itself: leave --checkpoint out"
        raise HimapError(f"{name} is no alias", f"aliases: {', '.join(ALIASES)}", hint, Exit.USAGE)
    if Path(source).is_dir():
        own = read_config(Path(source))
        return _model(name, source, own | alias.config if alias else own, Path(source), weights)
    if checkpoint:
        raise HimapError(f"{checkpoint} is no folder", "--checkpoint holds the weights of an alias", code=Exit.USAGE)
    if alias and not weights:
        return Model(name, source, _family(name, alias.config), alias.config, None)
    if alias is None and (source.count("/") != 1 or source.startswith((".", "/"))):
        known = f"aliases: {', '.join(ALIASES)}; or a Hugging Face id, or a folder"
        raise HimapError(f"unknown model {name}", known, code=Exit.USAGE)
    folder = _download(source, revision, weights)
    own = read_config(folder)
    if alias and "mm_vision_tower" in alias.config:  # releases name a folder on their authors' machines
        own["mm_vision_tower"] = alias.config["mm_vision_tower"]
    return _model(name, source, own, folder, weights)


def _model(name: str, source: str, config: dict[str, Any], folder: Path, weights: bool) -> Model:
    family = _family(name, config)
    named = family.tower(config)
    if named is None:
        return Model(name, source, family, config, folder)
    tower = next((p for p in (folder / named, Path(named)) if p.is_dir()), None)
    if tower is None and (named.count("/") != 1 or named.startswith((".", "/"))):
        details, hint = f"config.json names {named}", f"put the tower's checkpoint into {folder / named}"
        raise HimapError(f"{name}: the vision tower's folder is not there", details, hint, Exit.MISSING)
    tower = tower or _download(named, None, weights)
    return Model(name, source, family, {"vision_config": read_config(tower), **config}, folder, tower)


def _family(name: str, config: dict[str, Any]) -> Family:
    found = (config.get("architectures") or ["(none named)"])[0]
    if found not in FAMILIES:
        supported = f"supported: {', '.join(FAMILIES)}"
        raise HimapError(f"{name}: unsupported architecture {found}", supported, code=Exit.USAGE)
    return FAMILIES[found]


def _download(source: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [p for p in _PATTERNS if weights or not p.endswith("safetensors")]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as problem:  # the hub's client raises its own, its transport's and the OS's errors
        details = (str(problem).splitlines() or [type(problem).__name__])[0]
        hint = "check the id and the network, or give a local checkpoint folder"
        raise HimapError(f"cannot fetch {source} from the Hugging Face hub", details, hint, Exit.MISSING) from None
