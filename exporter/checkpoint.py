"""A Hugging Face checkpoint folder: its configuration, and where each tensor lies. Nothing in it is executed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from himap_export.engines.weight_file import StoredTensor, read_header
from himap_export.graphs.errors import Exit, HimapError

# Reads no code from the pickles: weights_only. Writes shards and their index beside them.
CONVERT = (
    "python -c 'import sys, glob, torch, huggingface_hub as h; f = sys.argv[1]; "
    'h.save_torch_state_dict({k: v for p in glob.glob(f + "/pytorch_model*.bin") '
    "for k, v in torch.load(p, weights_only=True, mmap=True).items()}, f)'"
)
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = ("pytorch_model*.bin*", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """`config` as in config.json; `tensors` by name, none of them read. Empty of what the folder does not hold.

    `names`: all tensors' names, which an index tells even where its shards are absent.
    """

    folder: Path
    config: dict[str, Any]
    generation: dict[str, Any]
    tensors: dict[str, StoredTensor]
    names: frozenset[str]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(sorted({t.file for t in self.tensors.values()}))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder; HimapError (usage) if there is none."""
    if not (folder / "config.json").is_file():
        hint = "MODEL is an alias, a Hugging Face id, or a checkpoint folder in Hugging Face format"
        raise HimapError(f"{folder} holds no config.json", hint=hint, code=Exit.USAGE)
    return _read_json(folder / "config.json")


def open_checkpoint(folder: Path, weights: bool = True, tower: Path | None = None) -> Checkpoint:
    """The checkpoint in `folder`, single or sharded safetensors, every header checked against its file's length; with
    the tensors of a `tower` that lies in another folder, if it has any.

    HimapError (missing) if it holds none; without `weights` it need not.
    """
    config = read_config(folder)
    generation_file = folder / "generation_config.json"
    generation = _read_json(generation_file) if generation_file.is_file() else {}
    tensors: dict[str, StoredTensor] = {}
    for file in _shards(folder) if weights or any(folder.glob("*.safetensors")) else ():
        tensors |= read_header(file)
    names = set(tensors or (_weight_map(folder) if (folder / _INDEX).is_file() else ()))
    inside = any(".vision_tower." in name for name in names)
    if tower is not None and not inside and (weights or any(tower.glob("*.safetensors"))):
        for file in _shards(tower):
            tensors = read_header(file) | tensors
        names |= set(tensors)
    return Checkpoint(folder, config, generation, tensors, frozenset(names))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as problem:
        raise HimapError(f"{path} is not JSON", str(problem), "fetch the checkpoint again", Exit.USAGE) from None
    if not isinstance(data, dict):
        raise HimapError(f"{path} holds no JSON object", hint="fetch the checkpoint again", code=Exit.USAGE)
    return data


def _shards(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        names = sorted(set(_weight_map(folder).values()))
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise HimapError(f"{folder} lacks {name}", f"{_INDEX} lists it", "fetch the shard", Exit.MISSING)
        return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if any(True for pattern in _PICKLES for _ in folder.glob(pattern)):
        hint = f"pickles run code and are never loaded; convert them: {CONVERT} {folder}"
        raise HimapError(f"{folder} holds only pickled weights", "expected safetensors", hint, Exit.MISSING)
    raise HimapError(f"{folder} holds no weights", f"expected {_SINGLE} or {_INDEX}", "fetch them", Exit.MISSING)


def _weight_map(folder: Path) -> dict[str, str]:
    entries = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(entries, dict) or not entries or not all(isinstance(name, str) for name in entries.values()):
        raise HimapError(f"{folder / _INDEX} has no weight_map", hint="fetch the checkpoint again")
    return entries
