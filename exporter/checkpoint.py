"""A Hugging Face checkpoint folder: its configuration, and where each tensor lies. Nothing in it is executed."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec

from himap_export.engines.checkpoint_files import stored_tensors, tensor_names
from himap_export.engines.documents import Id, read_json
from himap_export.engines.weight_file import StoredTensor
from himap_export.exporter.quantize.declared import Declared
from himap_export.exporter.quantize.ready import ready_linears
from himap_export.exporter.quantize.ready_linear import ReadyLinear
from himap_export.graphs.errors import Exit, HimapError


class Generation(msgspec.Struct, frozen=True):
    """What generation_config.json says of the ids at which an answer ends, and of the one that fills up a batch."""

    eos_token_id: Id | Annotated[list[Id], msgspec.Meta(min_length=1, max_length=1000)] | None = None
    pad_token_id: Id | None = None


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` by name, none of them read, and empty if they were not asked for.

    `generation`: the fields of `Generation`. `names`: all tensors' names, which an index tells even where its shards
    are absent. `ready`: the linear layers of a checkpoint that comes quantised, by their weights' names, which are
    among the `names`.
    """

    generation: dict[str, Any]
    tensors: dict[str, StoredTensor]
    names: frozenset[str]
    ready: dict[str, ReadyLinear] = field(default_factory=dict)


def read_config(folder: Path) -> dict[str, Any]:
    """Returns config.json of a checkpoint folder; HimapError (usage) if there is none."""
    if not os.path.lexists(folder / "config.json"):
        hint = "MODEL is an alias, a Hugging Face id, or a checkpoint folder in Hugging Face format"
        raise HimapError(f"{folder} holds no config.json", hint=hint, code=Exit.USAGE)
    return read_json(folder / "config.json", dict[str, Any], "configuration")


def open_checkpoint(
    folder: Path, weights: bool = True, tower: Path | None = None, quantised: Declared | None = None
) -> Checkpoint:
    """Returns the checkpoint in `folder`, single or sharded safetensors, with the tensors of a `tower` that lies in
    another folder; checks every header against its file's length, and quantised layers against what it says of them.

    HimapError (missing) if the folder holds no tensors, or as `ready_linears`; without `weights` none are looked for.
    """
    generation = Generation()
    if os.path.lexists(folder / "generation_config.json"):
        generation = read_json(folder / "generation_config.json", Generation, "configuration")
    own = tensor_names(folder)
    folders = [folder] if tower is None or any(".vision_tower." in name for name in own) else [folder, tower]
    tensors = stored_tensors(folders) if weights else {}
    ready = ready_linears(quantised, tensors)
    names = own.union(*map(tensor_names, folders[1:]), ready)
    return Checkpoint(msgspec.to_builtins(generation), tensors, names, ready)
