"""What himap-export reads of checkpoints that come quantised: what config.json says of them, and a layer's tensors."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import json_faults
from fuzz.checkpoint_doors import EXPORT, header_faults, joined, split
from fuzz.contract import Arguments, Case, Door, Room

WEIGHTS, CONFIG, SAID = "model.safetensors", "config.json", "quantization_config"
LAYER = "model.layers.1.mlp.down_proj"

HARMLESS = {
    f"{SAID}.checkpoint_format = null": "it is the first format then",
    f"{SAID}.checkpoint_format deleted": "it is the first format then",
    f"{SAID}.config_groups.group_0.input_activations = object": "activations stay as they are, and it says so",
}


def doors(originals: Mapping[str, Path]) -> list[Door]:
    """Two doors for each checkpoint whose name begins with "quantised"."""
    names = [name for name in originals if name.startswith("quantised ")]
    return [door for name in names for door in (_config(name, originals[name]), _tensors(name, originals[name]))]


def _shown(export: Any) -> None:
    """Ends an export before its first phase and tells what its weights are."""
    for role, linear in export.ready.items():
        read = zlib.crc32(b"".join(np.ascontiguousarray(piece).data for piece in linear.multiplied()))
        print(role, linear.form, linear.why, linear.values().sum(dtype=int) if linear.form else "", read)
    raise SystemExit(0)


def _case(name: str, fault: str, file: str, content: bytes, why: str = "") -> Case:
    def prepare(room: Room) -> Arguments:
        model = room.copy(name)
        room.write(model / file, content)
        return (
            model,
            "--k1",
            1,
            "--k2",
            3,
            "--text-budget",
            24,
            "--backend",
            "onnxruntime",
            "--out",
            room.folder / "out",
        )

    return Case(f"{name} {file}", fault, "himap-export", prepare, why, same=True, patches={f"{EXPORT}.vision": _shown})


def _config(name: str, folder: Path) -> Door:
    text = (folder / CONFIG).read_bytes()

    def bad() -> Sequence[Case]:
        faults = (fault for fault in json_faults.faults(text) if fault.place.startswith(SAID))
        return [_case(name, fault.name, CONFIG, fault.spoil(text), HARMLESS.get(fault.name, "")) for fault in faults]

    return Door(f"{name} {CONFIG}", _case(name, "good", CONFIG, text), bad)


def _tensors(name: str, folder: Path) -> Door:
    raw = (folder / WEIGHTS).read_bytes()

    def bad() -> Sequence[Case]:
        header, data = split(raw)
        found = []
        for tensor in sorted(tensor for tensor in header if LAYER in tensor):
            found += [(f"{tensor}: {what}", content) for what, content in header_faults(header, data, tensor)]
            for word in (b"\0", b"\xff", b"\x7f"):
                begin, end = header[tensor]["data_offsets"]
                spoiled = data[:begin] + word * (end - begin) + data[end:]
                found.append((f"{tensor}: all {word!r}", joined(json.dumps(header).encode(), spoiled)))
        return [_case(name, what, WEIGHTS, content, _other(what)) for what, content in found]

    return Door(f"{name} {WEIGHTS}", _case(name, "good", WEIGHTS, raw), bad)


def _other(fault: str) -> str:
    """Why an export may go on with other weights than the good checkpoint's."""
    return "other numbers of the right kind" if ": all " in fault else ""
