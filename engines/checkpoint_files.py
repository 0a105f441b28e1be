"""Which files of a checkpoint's folder are its weights: one rule, for an export and for `himap-run --weights`.

The index says in which file each tensor lies; without one all lie in model.safetensors. Nothing else that the folder
holds is read. Of several folders, the first that holds a tensor gives it.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from himap_export.engines.documents import read_json
from himap_export.engines.weight_file import StoredTensor, read_header
from himap_export.graphs.errors import Exit, HimapError

# Looked for by lexists: what goes by one of these names and is no plain file is refused when read, not passed over.
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = ("pytorch_model*.bin*", "*.pt", "*.pth", "*.ckpt")
# Reads no code from the pickles: weights_only. Writes shards and their index beside them.
CONVERT = (
    "python -c 'import sys, glob, torch, huggingface_hub as h; f = sys.argv[1]; "
    'h.save_torch_state_dict({k: v for p in glob.glob(f + "/pytorch_model*.bin") '
    "for k, v in torch.load(p, weights_only=True, mmap=True).items()}, f)'"
)


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, Annotated[str, msgspec.Meta(min_length=1, max_length=255)]] = {}


def stored_tensors(folders: Iterable[Path], code: Exit = Exit.MISSING) -> dict[str, StoredTensor]:
    """Returns every tensor of the checkpoint in `folders` by name, headers checked, no tensor read.

    HimapError: `code` if a folder holds no weights or lacks a shard, failure if a file is damaged or is not what the
    index says.
    """
    found: dict[str, StoredTensor] = {}
    for folder in folders:
        for file, listed in weight_files(folder, code).items():
            held = read_header(file)
            for name in held if listed is None else listed:
                if name not in held:
                    details, hint = f"{INDEX} says that it holds {name[:100]}", "fetch the checkpoint again"
                    raise HimapError(f"{file} is not the index's", details, hint)
                found.setdefault(name, held[name])
    return found


def tensor_names(folder: Path) -> frozenset[str]:
    """Returns the tensors' names in `folder`, as far as it tells: an index does even where its shards are absent."""
    if os.path.lexists(folder / INDEX):
        return frozenset(_weight_map(folder))
    return frozenset(read_header(folder / SINGLE) if os.path.lexists(folder / SINGLE) else ())


def weight_files(folder: Path, code: Exit) -> Mapping[Path, list[str] | None]:
    """Returns each file of the weights in `folder`, with the names of those of its tensors that count; None: all.

    HimapError (`code`) if it holds none or lacks one."""
    if os.path.lexists(folder / INDEX):
        shards: dict[str, list[str]] = {}
        for name, shard in _weight_map(folder).items():
            shards.setdefault(shard, []).append(name)
        for shard in sorted(shards):
            if not _is_plain(shard) or not os.path.lexists(folder / shard):
                raise HimapError(f"{folder} lacks {shard}", f"{INDEX} lists it", "fetch the shard", code)
        return {folder / shard: shards[shard] for shard in sorted(shards)}
    if os.path.lexists(folder / SINGLE):
        return {folder / SINGLE: None}
    if any(True for pattern in _PICKLES for _ in folder.glob(pattern)):
        hint = f"pickles run code and are never loaded; convert them: {CONVERT} {folder}"
        raise HimapError(f"{folder} holds only pickled weights", "expected safetensors", hint, code)
    raise HimapError(f"{folder} holds no weights", f"expected {SINGLE} or {INDEX}", "fetch them", code)


def _weight_map(folder: Path) -> Mapping[str, str]:
    entries = read_json(folder / INDEX, _Index, "index", code=Exit.FAILURE).weight_map
    if not entries:
        raise HimapError(f"{folder / INDEX} has no weight_map", hint="fetch the checkpoint again")
    return entries


def _is_plain(shard: str) -> bool:
    """Tells whether it names a file in the index's own folder."""
    return shard.isprintable() and "/" not in shard and shard not in (".", "..")
