"""What himap-run reads: manifests, arrays and pictures that lie."""

import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from fuzz import json_faults
from fuzz.contract import Arguments, Case, Door, Room
from fuzz.json_faults import Fault
from PIL import Image

RUN = ("--max-new-tokens", "2", "--threads", "1", "--json")
MANIFEST = "manifest.json"
Originals = Mapping[str, Path]


def doors(originals: Originals) -> list[Door]:
    """Manifests as they are and given a new digest by the attacker, arrays, pictures."""
    return [
        _manifests("manifest", originals, lambda text: text, lambda fault: ""),
        _manifests("manifest with a new digest", originals, with_new_digest, _of_an_own_bundle),
        _arrays(originals),
        _pictures(originals),
    ]


def answered(text: str) -> str:
    """What an answer says, without its times."""
    return json.dumps({key: value for key, value in json.loads(text).items() if not key.endswith("_s")})


# --- manifests ---


def with_new_digest(text: bytes) -> bytes:
    """The manifest with a digest that fits, as an attacker would write it; as it is, if it is no manifest."""
    from himap_export.engines.manifest import Manifest, finalised, manifest_json
    from himap_export.graphs.errors import HimapError

    try:
        return manifest_json(finalised(msgspec.json.decode(text, type=Manifest)))
    except (msgspec.MsgspecError, RecursionError, ValueError, HimapError):
        return text


# Whoever gives a manifest a new digest made a bundle of their own. What is harmless in it, and why.
OWN = (
    (r"toolchain\..*|command.*|model\.(name|source|architecture)", ".*", "words about the bundle's making"),
    (r"engines\..*\.(seconds|gather|layers|kernels).*", ".*", "a report, not an instruction"),
    (r"model\.(eos_tokens|pad_token).*", "0|deleted|list|null", "which tokens end an answer is the bundle's to say"),
    (r"images\.[^.]+\.preprocessing\..*", ".*", "what the model sees is the bundle's to say, within bounds"),
    (r"prompt.*|tokenizer", ".*", "a bundle may go without"),
    (r"variants\[\d\]\.plan_name", "word|climbing|absolute", "a name"),
    (r"decoder\..*", ".*", "what the graphs were made from; the graphs say what is computed"),
)


def _of_an_own_bundle(fault: Fault) -> str:
    if fault.value in ("NaN", "inf", "twice", "unknown key", "half", "deep"):
        return ""
    return next((why for place, value, why in OWN if _fits(fault, place, value)), "")


def _fits(fault: Fault, place: str, value: str) -> bool:
    return re.fullmatch(place, fault.place) is not None and re.fullmatch(value, fault.value) is not None


def _manifests(
    name: str, originals: Originals, finalise: Callable[[bytes], bytes], harmless: Callable[[Fault], str]
) -> Door:
    text = (originals["bundle"] / MANIFEST).read_bytes()

    def case(fault: Fault | None) -> Case:
        def prepare(room: Room) -> Arguments:
            bundle = room.copy("bundle")
            if fault is not None:
                room.write(bundle / MANIFEST, finalise(fault.spoil(text)))
            return (bundle, "--load-inputs", room.copy("in.npz"), *RUN)

        # Sealed again, a change that the answer does not show is one of the reports. Unsealed, none is allowed but to
        # leave out what has the default's value: the manifest is the same then, and so is its digest.
        same = fault is None or harmless is _of_an_own_bundle or fault.value == "deleted"
        why = harmless(fault) if fault else ""
        return Case(name, fault.name if fault else "good", "himap-run", prepare, why, same, result=answered)

    return Door(name, case(None), lambda: [case(fault) for fault in json_faults.faults(text, most_alike=1)])


# --- arrays ---


def _npz(arrays: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _array_faults(good: Mapping[str, Any]) -> Iterator[tuple[str, bytes | Mapping[str, Any]]]:
    """By name: the whole file, or the arrays that change (None: it is missing)."""
    for name in good:
        yield from _array_kinds(name, good[name])
    ids, pixels = good["input_ids"], good["pixel_values"]
    for value in (np.nan, np.inf, -np.inf):
        yield (
            f"a pixel is {value}",
            {"pixel_values": _with(pixels, value)},
        )
    for value in (-1, 2**31, 2**63 - 1, -(2**63)):
        yield f"a token is {value}", {"input_ids": np.where(np.arange(ids.shape[1]) == 1, value, ids)}
    for value in (2, -1, 2**40):
        yield f"a mask of {value}", {"attention_mask": np.full_like(ids, value)}
    yield "a mask of nothing", {"attention_mask": np.zeros_like(ids)}
    yield "a mask with holes", {"attention_mask": (np.arange(ids.shape[1]) % 3 > 0).astype(np.int64)[None]}
    yield "10000 prompts, one image", {"input_ids": np.repeat(ids, 10_000, 0)}
    yield "a prompt of a million tokens", {"input_ids": np.resize(ids, (1, 10**6)), "attention_mask": None}
    yield "a grid", {"image_grid_thw": np.array([[1, 4, 4]])}
    yield (
        "patches of a grid of 2**40",
        {"pixel_values": np.ones((4, 6), np.float32), "image_grid_thw": np.array([[1, 2**40, 2]])},
    )
    yield (
        "patches of a grid of nan",
        {"pixel_values": np.ones((4, 6), np.float32), "image_grid_thw": np.array([[np.nan] * 3])},
    )
    yield "patches of a flat grid", {"pixel_values": np.ones((4, 6), np.float32), "image_grid_thw": np.array(3)}
    yield "patches of no width", {"pixel_values": np.ones((0, 0), np.float32), "image_grid_thw": np.zeros((0, 3), int)}
    yield from _file_faults(_npz(good), good)


def _with(array: Any, value: float) -> Any:
    """The array with `value` at its start."""
    changed = array.copy()
    changed.flat[0] = value
    return changed


def _array_kinds(name: str, array: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield f"{name} is missing", {name: None}
    yield f"{name} of objects", {name: array.astype(object)}
    for kind in ("complex64", "U8", "S3", "bool", "uint64", "float16", "float64", "int8", "M8[s]", ">i8", ">f4"):
        with np.errstate(all="ignore"):
            try:
                yield f"{name} of {kind}", {name: array.astype(kind)}
            except (TypeError, ValueError):
                continue
    for what, shape in (("flat", -1), ("deeper", (1, *array.shape)), ("a number", ())):
        yield f"{name} is {what}", {name: np.resize(array, shape) if shape != -1 else array.ravel()}
    yield f"{name} is empty", {name: array[:0]}
    yield f"{name} has no width", {name: array[..., :0]}
    yield f"{name} of fields", {name: np.zeros(array.shape, [("a", "i4"), ("b", "f4")])}


def _npy(header: str, data: bytes = b"\0" * 64, version: bytes = b"\x01\x00") -> bytes:
    padded = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(padded)) + padded + data


def _zip(members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _file_faults(whole: bytes, good: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    members = {f"{name}.npy": _member(array) for name, array in good.items()}
    for length in (0, 1, 4, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        yield f"cut at {length}", whole[:length]
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        yield f"flipped at {place}", whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]
    yield "a .npy", _member(good["input_ids"])
    yield "a pickle", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93."
    yield "text", b"input_ids = 3"
    zeros = b"\0" * 400_000_000
    yield "a bomb that nobody reads", _zip(members | {"bomb.npy": _npy(_head("|u1", len(zeros)), zeros)}, 8)
    yield "a bomb of ids", _zip(members | {"input_ids.npy": _npy(_head("<i8", "1, 50000000"), zeros)}, 8)
    for shape in ("10**12", "1000000000000", "-1", "1, -5", "True", "1.5", "(((", "1" * 5000):
        yield f"ids of the shape {shape[:20]}", _zip(members | {"input_ids.npy": _npy(_head("<i8", shape))})
    for kind in ("|O", "<i9", "nonsense", "<f4,<f4", "|V100000000"):
        yield f"ids of the kind {kind}", _zip(members | {"input_ids.npy": _npy(_head(kind, 1))})
    yield "deep header", _zip(members | {"input_ids.npy": _npy("(" * 9000 + ")" * 9000)})
    yield "another version", _zip(members | {"input_ids.npy": _npy(_head("<i8", 1), version=b"\x09\x00")})
    yield "a member that is no array", _zip(members | {"input_ids.npy": b"words"})
    yield "names that climb", _zip({f"../{name}": content for name, content in members.items()})
    lied = bytearray(_zip(members))
    at = lied.rindex(b"PK\x01\x02")
    lied[at + 20 : at + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
    yield "sizes that lie", bytes(lied)
    hidden = bytearray(_zip(members))
    for mark, flag in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        hidden[hidden.index(mark) + flag] |= 1
    yield "encrypted", bytes(hidden)
    yield "lzma", _zip(members, zipfile.ZIP_LZMA)


def _head(kind: str, shape: object) -> str:
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': ({shape},), }}"


def _member(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# Other spellings of the same arrays, or what the prompt may leave open.
_SAME = re.compile(
    r"(input_ids|attention_mask) of (>i8|int8|int16|bool|uint64)|pixel_values of (float16|float64|>f4|>f8)"
    r"|attention_mask is missing|lzma|sizes that lie|a mask of -?\d+|flipped at \d+|names .*"
    r"|a bomb that nobody reads|a grid"
)


def _arrays(originals: Originals) -> Door:
    with np.load(originals["in.npz"]) as stored:
        good = dict(stored)

    def case(name: str, content: bytes | Mapping[str, Any]) -> Case:
        def prepare(room: Room) -> Arguments:
            bundle, file = room.copy("bundle"), room.folder / "bad.npz"
            changed = content
            if not isinstance(changed, bytes):
                changed = _npz({k: v for k, v in (good | dict(changed)).items() if v is not None})
            file.write_bytes(changed)
            return (bundle, "--load-inputs", file, *RUN)

        why = "half precision is a spelling of its own" if name == "pixel_values of float16" else ""
        same = name == "good" or _SAME.fullmatch(name) is not None
        return Case("arrays", name, "himap-run", prepare, why, same, result=answered)

    return Door("arrays", case("good", {}), lambda: [case(*fault) for fault in _array_faults(good)])


# --- pictures ---


def _png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def _saved(mode: str, kind: str, size: tuple[int, int] = (40, 30), **more: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 0).save(file, kind, **more)
    return file.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n(made) (w) file closefile\nshowpage\n"


def _picture_faults(whole: bytes) -> Iterator[tuple[str, str, bytes]]:
    """Name, file name, content."""
    for length in (0, 1, 8, 20, 60, len(whole) // 2, len(whole) - 20, len(whole) - 1):
        yield f"cut at {length}", "a.png", whole[:length]
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        yield f"flipped at {place}", "a.png", whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]
    for width, height in ((50_000, 50_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1), (0, 10), (13_000, 13_000)):
        yield f"a bomb of {width} x {height}", "a.png", _png(width, height)
    yield "a strip of 1 x 100000", "a.png", _png(1, 100_000, b"\0\1\2\3" * 100_000)
    yield "a strip of 100000 x 1", "a.png", _png(100_000, 1, b"\0" + b"\1\2\3" * 100_000)
    yield "a strip of 1 x 10", "a.png", _png(1, 10, b"\0\1\2\3" * 10)
    yield "another suffix", "a.jpg", whole
    yield "no suffix", "a", whole
    yield "postscript", "a.eps", EPS
    yield "postscript as PNG", "a.png", EPS
    yield "text", "a.png", b"not a picture"
    yield "svg", "a.svg", b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"
    for mode in ("1", "L", "P", "LA", "RGBA", "I;16"):
        yield f"mode {mode}", "a.png", _saved(mode, "PNG")
    for kind, mode in (("JPEG", "CMYK"), ("TIFF", "F"), ("GIF", "P"), ("BMP", "RGB"), ("WEBP", "RGB"), ("ICO", "RGBA")):
        yield f"{kind} {mode}", f"a.{kind.lower()}", _saved(mode, kind)
    frames = [Image.new("P", (8, 8), n) for n in range(50)]
    yield "animated", "a.gif", _saved("P", "GIF", (8, 8), save_all=True, append_images=frames)


_DECODES = re.compile(
    r"mode .*|[A-Z]+ [A-Z]+|animated|another suffix|no suffix|a strip of 1 x 10|flipped at \d+|cut at \d+"
)


def _pictures(originals: Originals) -> Door:
    whole = originals["image.png"].read_bytes()

    def case(name: str, file_name: str, content: bytes) -> Case:
        def prepare(room: Room) -> Arguments:
            bundle = room.copy("bundle")
            file = room.write(room.folder / file_name, content)
            return (bundle, "--image", file, "--prompt", "what?", *RUN)

        why = "it decodes to a picture" if _DECODES.fullmatch(name) else ""
        return Case("picture", name, "himap-run", prepare, why, result=answered)

    return Door("picture", case("good", "a.png", whole), lambda: [case(*fault) for fault in _picture_faults(whole)])
