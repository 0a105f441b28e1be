"""The checkpoint that a quantised bundle must compute like: its source, with the weights that the bundle made of it.

Tight parity needs a reference over the very numbers that the engines hold: what rounding did to the weights is no
mistake of the engines. Values are read from the bundle's files and restated here in NumPy; nothing is shared with what
rounded and packed them. As stored, of a linear layer's weight NAME [out,in]:

    NAME.int8   I8   [in,out]     NAME.scale  [out], or [in/B,out]: one for B inputs of an output
    NAME.int4   U8   [in,out/2]   two's complement, an even column in a byte's low four bits; NAME.scale as above

The value is q * scale, in fp32, which is exact for scales in fp16 and bf16. Weights in fp8 and nvfp4 are only ever
inside engines.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from himap_export.engines.bundle import Bundle
from himap_export.engines.checkpoint_files import INDEX, stored_tensors
from himap_export.engines.scratch import scratch_folder
from himap_export.engines.weight_file import StoredTensor, find_tensors
from himap_export.exporter.checkpoint import read_config
from himap_export.exporter.quantize.declared import PLACES, declared
from himap_export.graphs.errors import Exit, HimapError
from himap_export.graphs.ports import WeightSpec
from himap_export.validate.checkpoint import Source

Files = Mapping[str, Path]  # where each tensor lies, by name
HEAD = "lm_head.weight"
_NUMBERS = ("int8", "int4")  # what holds a weight's numbers; the rest are its scales


@dataclass(frozen=True)
class Piece:
    """What a bundle holds as `name`, of the rows `start` to `stop` of a checkpoint's tensor, of all if None; by its
    `suffixes` the parts of a quantised weight, none: as it is."""

    name: str
    start: int | None = None
    stop: int | None = None
    suffixes: tuple[str, ...] = ()


@contextmanager
def judge_of(bundle: Bundle, source: Source) -> Iterator[Source]:
    """Yields the checkpoint whose model the bundle must equal: `source`; if one of both is quantised, another in its
    layout, with the weights that the bundle computes with, which lasts as long as the context. HimapError as
    `write_dequantised`."""
    if bundle.manifest.quantization is None and has_original(source):
        yield source
        return
    with scratch_folder("dequantised") as folder:
        write_dequantised(bundle, source.folder, folder)
        yield replace(source, folder=folder)


def has_original(source: Source) -> bool:
    """Tells whether a checkpoint holds its weights unrounded: nobody published it quantised."""
    return declared(read_config(source.folder), "config.json") is None


def check_held(bundle: Bundle, source: Source) -> None:
    """Raises HimapError (usage) if `judge_of` must read the bundle's weights, and they lie inside its engines only."""
    m = bundle.manifest
    if (m.quantization or not has_original(source)) and m.weight_form == "embedded" and not m.weights:
        hint = "in int8 and int4, export it for onnxruntime or openvino, too: then they lie beside the engines"
        raise HimapError(f"{bundle.folder} holds its weights inside its engines", hint=hint, code=Exit.USAGE)


def dequantised(parts: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """Returns a weight [out,in] of its `parts` by suffix, int8, uint8 or floats, in the shapes above."""
    kind = next(suffix for suffix in _NUMBERS if suffix in parts)
    q, scale = parts[kind], parts["scale"].astype(np.float32)
    if kind == "int4":
        codes = np.empty((len(q), 2 * q.shape[1]), np.uint8)
        codes[:, 0::2], codes[:, 1::2] = q % 16, q // 16
        q = codes.astype(np.float32) - 16 * (codes > 7)
    if scale.ndim == 2:
        scale = scale.repeat(len(q) // len(scale), axis=0)
    return np.ascontiguousarray((q.astype(np.float32) * scale).T)


def write_dequantised(bundle: Bundle, folder: Path, out: Path) -> None:
    """Writes into the folder `out` what the checkpoint in `folder` holds, one tensor in memory at a time: those of the
    decoder as the bundle has them, quantised ones in fp32, all others as they are, and links to everything else.

    HimapError (failure) if the disk has no room for it.
    """
    held = {name: t.file for name, t in bundle.tensors.items()}
    stored = stored_tensors([folder])
    source = {name: t.file for name, t in stored.items()}
    pieces = _pieces(bundle)
    names = [
        *(name for name in source if name in pieces or not _is_packed(name, pieces)),
        *(name for name in pieces if name not in source),
    ]
    _check_room(bundle, [stored[name] for name in names if name not in pieces], out)
    index = {name: f"{n:05}.safetensors" for n, name in enumerate(names)}
    for name, file in index.items():
        own = pieces.get(name, [])
        if name in source:
            tensor = reduce(partial(_replaced, held=held), own, read_tensor(source, name))
        else:
            tensor = torch.cat([_value(piece, held) for piece in sorted(own, key=lambda piece: piece.start or 0)])
        save_file({name: tensor.contiguous()}, out / file, {"format": "pt"})
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = _plain(read_config(folder))
    if HEAD in pieces and HEAD not in source:
        for part in (config, config.get("text_config", {})):
            part["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config))
    for entry in folder.iterdir():
        if entry.suffix != ".safetensors" and entry.name not in (INDEX, "config.json"):
            (out / entry.name).symlink_to(entry.resolve())


def _pieces(bundle: Bundle) -> dict[str, list[Piece]]:
    """Returns what the bundle holds of each of the checkpoint's decoder tensors. A quantised head that is tied to the
    embedding is a tensor of its own."""
    wanted = _of_decoder(bundle)
    pieces = dict[str, list[Piece]]()
    for name, spec in wanted.items():
        if not spec.constant:
            rows = spec.rows
            whole = Piece(name) if rows is None else Piece(name, rows.start, rows.stop)
            pieces.setdefault(name if rows is None else rows.tensor, []).append(whole)
    parts = dict[str, list[str]]()
    for part in (name for name, spec in wanted.items() if spec.constant):
        name, _, suffix = part.rpartition(".")
        parts.setdefault(name, []).append(suffix)
    for name, suffixes in parts.items():
        fused = re.fullmatch(r"(.+)\[(\d+):(\d+)\]", name)
        start, stop = (int(fused[2]), int(fused[3])) if fused else (None, None)
        tensor = fused[1] if fused else HEAD if name in pieces else name
        pieces.setdefault(tensor, []).append(Piece(name, start, stop, tuple(suffixes)))
    return pieces


def _of_decoder(bundle: Bundle) -> Mapping[str, WeightSpec]:
    """Returns the decoder's weights, all of which decode reads, parts of quantised ones each by its own name."""
    return bundle.manifest.graphs[bundle.select().graph_name("decode")].weights


def _is_packed(name: str, pieces: Mapping[str, list[Piece]]) -> bool:
    """Tells whether a checkpoint's tensor is a part of one that it holds quantised: NAME.qweight where the bundle has
    NAME.weight."""
    layer, _, kind = name.rpartition(".")
    return kind != "bias" and f"{layer}.weight" in pieces


def _replaced(tensor: Tensor, piece: Piece, held: Files) -> Tensor:
    """Returns the checkpoint's `tensor` with what the bundle holds in its place: a plain one only if that is another
    than the checkpoint's, rounded to its type."""
    own, value = slice(piece.start, piece.stop), _value(piece, held)
    if not piece.suffixes and torch.equal(tensor[own].to(value.dtype), value):
        return tensor
    if piece.start is None:
        return value
    tensor = tensor.float()
    tensor[own] = value
    return tensor


def _value(piece: Piece, held: Files) -> Tensor:
    """Returns the numbers of a piece, in fp32 if they are quantised."""
    if not piece.suffixes:
        return read_tensor(held, piece.name, slice(piece.start, piece.stop))
    parts = {suffix: read_tensor(held, f"{piece.name}.{suffix}") for suffix in piece.suffixes}
    # NumPy knows no 8-bit floats and no bf16.
    arrays = {suffix: (t.float() if t.is_floating_point() else t).numpy() for suffix, t in parts.items()}
    return torch.from_numpy(dequantised(arrays))


def read_tensor(files: Files, name: str, rows: slice = slice(None)) -> Tensor:
    """Returns the tensor `name`; of one that is not there by its own name, `rows` of the one that it is a part of."""
    found = name if name in files else name.rpartition("[")[0]
    with safe_open(files[found], "pt") as file:
        tensor: Tensor = file.get_tensor(found)
    return tensor if name in files else tensor[rows]


def _check_room(bundle: Bundle, kept: Iterable[StoredTensor], out: Path) -> None:
    """Raises HimapError unless the disk has room for tensors `kept`, and for the bundle's, quantised ones in fp32."""
    wanted = _of_decoder(bundle)
    needed = sum(4 * prod(spec.shape) for spec in wanted.values() if spec.dtype in _NUMBERS)
    needed += sum(t.nbytes for t in find_tensors(bundle.tensors, wanted).values() if not wanted[t.name].constant)
    needed += sum(t.nbytes for t in kept)
    if needed > (free := shutil.disk_usage(out).free):
        details = f"it takes up to {needed / 1e9:.1f} GB in {out.parent}, which has {free / 1e9:.1f} GB"
        raise HimapError(f"no room for the dequantised weights of {bundle.folder}", details, "set TMPDIR")


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a config.json says but for how its checkpoint is quantised."""
    found = {key: value for key, value in config.items() if key not in PLACES}
    return {key: _plain(value) if isinstance(value, dict) else value for key, value in found.items()}
