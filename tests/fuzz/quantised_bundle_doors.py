"""What himap-run reads of quantised bundles: what the manifest says of such weights, and the files that hold them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fuzz import json_faults
from fuzz.bundle_doors import MANIFEST, RUN, answered, with_new_digest
from fuzz.checkpoint_doors import header_faults, joined, split
from fuzz.contract import Arguments, Case, Door, Room

BUNDLE = "bundle of int4"
FILES = {"onnxruntime": "weights/quantised.safetensors", "openvino": "openvino.safetensors"}
LAYER = "layers.0.mlp.down_proj.weight"


def doors(originals: Mapping[str, Path]) -> list[Door]:
    """Two doors for each backend that reads such weights from files."""
    folder = originals[BUNDLE]
    return [door for backend in FILES for door in (_manifest(backend, folder), _tensors(backend, folder))]


def _case(backend: str, file: str, fault: str, content: bytes, why: str = "") -> Case:
    def prepare(room: Room) -> Arguments:
        bundle = room.copy(BUNDLE)
        room.write(bundle / file, content)
        return (bundle, "--backend", backend, "--no-verify", "--load-inputs", room.copy("in.npz"), *RUN)

    return Case(f"{BUNDLE} {backend} {file}", fault, "himap-run", prepare, why, same=True, result=answered)


def _manifest(backend: str, folder: Path) -> Door:
    """Given a new digest by the attacker."""
    text = (folder / MANIFEST).read_bytes()

    def bad() -> Sequence[Case]:
        found = [fault for fault in json_faults.faults(text, most_alike=1) if _of_weights(fault.place)]
        return [_case(backend, MANIFEST, fault.name, with_new_digest(fault.spoil(text))) for fault in found]

    return Door(f"{BUNDLE} {backend} {MANIFEST}", _case(backend, MANIFEST, "good", text), bad)


def _of_weights(place: str) -> bool:
    inside = any(f".{suffix}" in place for suffix in ("int4", "scale")) and place.startswith("graphs.")
    return inside or place.startswith("quantization") or (place.startswith("engines.openvino") and "weights" in place)


def _tensors(backend: str, folder: Path) -> Door:
    file = FILES[backend]
    raw = (folder / file).read_bytes()

    def bad() -> Sequence[Case]:
        header, data = split(raw)
        names = sorted(name for name in header if LAYER in name)
        found = [(f"{name}: {what}", content) for name in names for what, content in _faults(header, data, name)]
        return [_case(backend, file, what, content) for what, content in found]

    return Door(f"{BUNDLE} {backend} {file}", _case(backend, file, "good", raw), bad)


def _faults(header: dict[str, Any], data: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    yield from header_faults(header, data, name)
    first, (begin, end) = header[name]["shape"][0], header[name]["data_offsets"]
    wide = (end - begin) // first
    for kind, size in (("I8", 1), ("U8", 1), ("F16", 2), ("BF16", 2), ("F32", 4), ("F64", 8)):
        if kind != header[name]["dtype"] and wide % size == 0:
            spoiled = header | {name: {**header[name], "dtype": kind, "shape": [first, wide // size]}}
            yield f"the same bytes as {kind}", joined(json.dumps(spoiled).encode(), data)
